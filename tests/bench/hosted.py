# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI in this process, Flux-shaped files for it, and models of the pack and of the host over them.

Importing this module imports measure.py, which makes the pack importable as `gguf_kit`. The host is the one of
COMFYUI_PATH, else the one that the demo fetches.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _paths  # noqa: F401
import measure
import torch
import weights
from gguf import GGMLQuantizationType as QType
from gguf import GGUFWriter
from gguf_kit import layouts

from demo.host import get_host

ROOT = measure.ROOT
HIDDEN, MLP, TEXT, HEAD = 3072, 12288, 4096, 128
DOUBLE = {
    **{f"{s}_attn.qkv": (3 * HIDDEN, HIDDEN) for s in ("img", "txt")},
    **{f"{s}_attn.proj": (HIDDEN, HIDDEN) for s in ("img", "txt")},
    **{f"{s}_mlp.0": (MLP, HIDDEN) for s in ("img", "txt")},
    **{f"{s}_mlp.2": (HIDDEN, MLP) for s in ("img", "txt")},
    **{f"{s}_mod.lin": (6 * HIDDEN, HIDDEN) for s in ("img", "txt")},
}
SINGLE = {
    "linear1": (3 * HIDDEN + MLP, HIDDEN),
    "linear2": (HIDDEN, HIDDEN + MLP),
    "modulation.lin": (3 * HIDDEN, HIDDEN),
}
OUTER = {
    "img_in": (HIDDEN, 64),
    "txt_in": (HIDDEN, TEXT),
    "time_in.in_layer": (HIDDEN, 256),
    "time_in.out_layer": (HIDDEN, HIDDEN),
    "vector_in.in_layer": (HIDDEN, 768),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    "final_layer.linear": (64, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}
GUIDANCE = {"guidance_in.in_layer": (HIDDEN, 256), "guidance_in.out_layer": (HIDDEN, HIDDEN)}
# Flux.1-dev has 19 double and 38 single blocks: 780 tensors.
N_DOUBLE, N_SINGLE = 19, 38


def flux_shapes(n_double: int, n_single: int | None = None, guidance: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Flux.1 schnell (dev: with guidance) of so many blocks, twice as many single ones."""
    layers = OUTER | (GUIDANCE if guidance else {})
    norms: dict[str, tuple[int, ...]] = {}
    for i in range(n_double):
        layers |= {f"double_blocks.{i}.{name}": shape for name, shape in DOUBLE.items()}
        for s in ("img", "txt"):
            norms |= {f"double_blocks.{i}.{s}_attn.norm.{n}_norm.scale": (HEAD,) for n in ("query", "key")}
    for i in range(2 * n_double if n_single is None else n_single):
        layers |= {f"single_blocks.{i}.{name}": shape for name, shape in SINGLE.items()}
        norms |= {f"single_blocks.{i}.norm.{n}_norm.scale": (HEAD,) for n in ("query", "key")}
    matrices = {f"{name}.weight": shape for name, shape in layers.items()}
    return matrices | {f"{name}.bias": shape[:1] for name, shape in layers.items()} | norms


def qtype_of(name: str, shape: tuple[int, ...], qtype: QType) -> QType:
    """What a tensor of such a file is stored as: matrices of blocks in the type, other matrices BF16, vectors F32."""
    if len(shape) == 1:
        return QType.F32
    return qtype if "_blocks." in name else QType.BF16


def n_blocks_for(gigabytes: float, qtype: QType) -> int:
    """Double blocks of a file of about this size."""
    sizes = (sum(layouts.n_bytes(qtype, shape) for shape in part.values()) for part in (DOUBLE, SINGLE))
    double, single = sizes
    return max(1, round(gigabytes * 1e9 / (double + 2 * single)))


def write_model(path: Path, qtype: QType, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A GGUF file of random weights of ordinary size; norms are 1, biases 0."""
    writer = GGUFWriter(path, "flux")
    for i, (name, shape) in enumerate(shapes.items()):
        used = qtype_of(name, shape, qtype)
        if len(shape) == 1:
            data = torch.full(shape, float(name.endswith("scale"))).numpy()
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, weights.make_bytes(used, shape, seed=i).numpy(), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sparse_model(path: Path, qtype: QType, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The same file with holes for data, which read as zeros, on file systems that have holes; returns its bytes."""
    writer = GGUFWriter(path, "flux")
    end = 0
    for name, shape in shapes.items():
        used = qtype_of(name, shape, qtype)
        n_bytes = layouts.n_bytes(used, shape)
        writer.add_tensor_info(name, shape, torch.zeros(1).numpy().dtype, n_bytes, raw_dtype=used)
        end = end + n_bytes + -n_bytes % writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.stat().st_size
    size = header + -header % writer.data_alignment + end
    with open(path, "r+b") as file:
        file.truncate(size)
    return size


# -- the host --


def boot_host(device: str = "cpu") -> None:
    """Import a real ComfyUI, and what its own loaders need. 0.3.75 learns to count the heads of a small Flux."""
    sys.path.insert(0, str(get_host()))
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    import comfy.model_detection
    import comfy.sd
    import comfyui_version  # noqa: F401

    import nodes  # noqa: F401

    detect = comfy.model_detection.detect_unet_config

    def detect_with_heads(*positional: Any, **named: Any) -> Any:
        config = detect(*positional, **named)
        if config and config.get("image_model") == "flux":
            config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
        return config

    comfy.model_detection.detect_unet_config = detect_with_heads


def import_pack() -> Any:
    """Import the pack as ComfyUI does, a package named by its path; returns its module of nodes."""
    spec = importlib.util.spec_from_file_location(str(ROOT), ROOT / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT}: no package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(ROOT)] = module
    spec.loader.exec_module(module)
    return sys.modules[f"{ROOT}.nodes"]


def quantized_model(path: Path, dtype: torch.dtype) -> Any:
    """The pack's patcher of a GGUF file, computing in a dtype."""
    from gguf_kit.ops import OpsOptions
    from gguf_kit.service import load_model

    patcher = load_model(str(path), OpsOptions())
    patcher.set_model_compute_dtype(dtype)
    return patcher


def dense_model(path: Path, dtype: torch.dtype) -> Any:
    """The host's own patcher over the same weights, dequantized beforehand and rounded to the dtype."""
    import comfy.sd
    from gguf_kit.loader import load_diffusion_model
    from gguf_kit.models.values import QuantizedBytes

    state, _ = load_diffusion_model(str(path))
    dense = {k: v.dequantize(dtype) if isinstance(v, QuantizedBytes) else v.to(dtype) for k, v in state.items()}
    patcher = comfy.sd.load_diffusion_model_state_dict(dense, model_options={"dtype": dtype})
    patcher.set_model_compute_dtype(dtype)
    return patcher


def load_all(*patchers: Any) -> None:
    """Put models where they compute, all of them."""
    import comfy.model_management

    comfy.model_management.load_models_gpu(list(patchers), force_full_load=True)


# Sides of the latent whose patches of 2x2 are the picture's tokens, and tokens of text.
LATENTS = {64: (16, 16, 2), 512: (32, 32, 256), 4096: (120, 128, 256), 4608: (128, 128, 512)}


def make_inputs(tokens: int, device: torch.device, text_width: int = TEXT, vector: int = 768) -> dict[str, Any]:
    """Arguments of apply_model for one picture with so many tokens (a key of LATENTS), text included."""
    height, width, n_text = LATENTS[tokens]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "x": randn(1, 16, height, width),
        "t": torch.tensor([0.5], device=device),
        "c_crossattn": randn(1, n_text, text_width),
        "y": randn(1, vector),
    }


def step(patcher: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """One forward of a loaded model, as a sampler calls it."""
    with torch.inference_mode():
        result: torch.Tensor = patcher.model.apply_model(**inputs)
    return result
