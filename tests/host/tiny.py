# SPDX-License-Identifier: Apache-2.0
"""The tiny Flux in a host: as GGUF through the pack, and its weights dequantized beforehand through the host alone."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import gguf
import numpy as np
import torch
from comfy.weight_adapter import LoRAAdapter
from gguf_kit.loader import load_diffusion_model
from gguf_kit.models.values import QuantizedBytes
from gguf_kit.ops import OpsOptions
from gguf_kit.service import load_model

TYPES = ("Q8_0", "Q4_K_S", "Q2_K")
CPU = torch.device("cpu")


def float_weights(path):
    """The file's weights as float32 tensors."""
    state, _ = load_diffusion_model(path)
    return {k: v.dequantize() if isinstance(v, QuantizedBytes) else v.float() for k, v in state.items()}


def quantized_model(path, **options):
    """Patcher of the pack, loaded through the service that the node uses."""
    return load_model(str(path), OpsOptions(**options))


def float_model(path):
    """Patcher of the host over the dequantized weights, in float32, which need no gradients as those of the pack.

    torch puts other kernels to some products of weights that need gradients, and with some CPUs they round differently.
    """
    patcher = comfy.sd.load_diffusion_model_state_dict(float_weights(path), model_options={"dtype": torch.float32})
    patcher.model.requires_grad_(False)
    return patcher


def copy_file(source, path, keep=lambda name: True, extra=None, tag="flux", prefix=""):
    """A copy of a GGUF file: tensors left out, others added or put in place of its own, with another tag and prefix.

    Arrays added are float32, matrices whose rows allow it become Q8_0.
    """
    extra = extra or {}
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, tag or "none")
    if not tag:
        writer.kv_data[0].pop("general.architecture")
    for tensor in reader.tensors:
        if keep(tensor.name) and tensor.name not in extra:
            writer.add_tensor(prefix + tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in extra.items():
        quantize = values.ndim == 2 and values.shape[1] % 32 == 0
        qtype = gguf.GGMLQuantizationType.Q8_0 if quantize else gguf.GGMLQuantizationType.F32
        writer.add_tensor(prefix + name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def inputs(batch=2, seed=0):
    """Latent, time step, context and vector for apply_model: 64 picture tokens and 2 text tokens each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 16, 16, 16, generator=generator)
    t = torch.linspace(0.9, 0.1, batch)
    return x, t, torch.randn(batch, 2, 64, generator=generator), torch.randn(batch, 64, generator=generator)


def run(patcher, batch=2, load=True, **conditions):
    """One apply_model, the patcher loaded as the host would do it (load=False: as it is)."""
    if load:
        comfy.model_management.load_models_gpu([patcher])
    x, t, context, y = inputs(batch)
    return patcher.model.apply_model(x, t, c_crossattn=context, y=y, **conditions)


def relative(a, b):
    """Relative L2 difference of a to b."""
    return (torch.linalg.vector_norm((a - b).float()) / torch.linalg.vector_norm(b.float())).item()


def block_key(name):
    return f"diffusion_model.{name}.weight"


# A fused qkv, a projection, both MLP layers, a fused single block, and a layer that is not quantized (BF16).
LORA_SHAPES = {
    block_key("double_blocks.0.img_attn.qkv"): (768, 256),
    block_key("double_blocks.1.txt_attn.proj"): (256, 256),
    block_key("double_blocks.1.img_mlp.0"): (1024, 256),
    block_key("double_blocks.1.img_mlp.2"): (256, 1024),
    block_key("single_blocks.2.linear1"): (1792, 256),
    block_key("img_in"): (256, 64),
}


def factors(shape, seed, rank=4, scale=0.05):
    """Up (out, rank) and down (rank, in) of a LoRA large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    return up * scale, down * scale


def lora(seed=1, rank=4, alpha=2.0, dora=False):
    """Patches of a plain LoRA (or DoRA) for LORA_SHAPES."""
    patches = {}
    for i, (key, shape) in enumerate(LORA_SHAPES.items()):
        up, down = factors(shape, seed * 100 + i, rank)
        dora_scale = torch.rand(1, shape[1], generator=torch.Generator().manual_seed(i)) + 0.5 if dora else None
        patches[key] = LoRAAdapter(set(), (up, down, alpha, None, dora_scale, None))
    return patches


def split_lora(seed=7):
    """Patches on the q, k and v rows of a fused weight, and on some of its columns, as other trainers make them."""
    qkv, proj = block_key("double_blocks.0.img_attn.qkv"), block_key("single_blocks.1.linear2")
    patches = {}
    for i in range(3):
        patches[(qkv, (0, 256 * i, 256))] = LoRAAdapter(set(), (*factors((256, 256), seed + i), 4.0, None, None, None))
    patches[(proj, (1, 256, 512))] = LoRAAdapter(set(), (*factors((256, 512), seed + 3), 4.0, None, None, None))
    return patches


def with_patches(patcher, *patch_sets, strength=0.8, strength_model=1.0):
    """A clone with these patches, as the host's LoRA node makes it."""
    clone = patcher.clone()
    for patches in patch_sets:
        added = clone.add_patches(patches, strength, strength_model)
        assert len(added) == len(patches)
    return clone
