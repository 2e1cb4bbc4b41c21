# SPDX-License-Identifier: Apache-2.0
"""Save GGUF: what is saved is the patched float model within the type's own error, wherever it is loaded."""

import gc
import os
import re
import weakref
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import gguf
import numpy as np
import pytest
import tiny
import torch
from comfy_execution.utils import CurrentNodeContext
from gguf import GGMLQuantizationType as QType
from gguf_kit import nodes_save, saver
from gguf_kit.dequant import PLAIN_DTYPES
from gguf_kit.errors import GGUFError
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.host.lora import patch_weight
from gguf_kit.quantize import convert as convert_module
from gguf_kit.quantize.plan import Choices, make_plan
from gguf_kit.quantize.sources import Source
from gguf_kit.quantize.writer import NO_ROOM_HINT
from make_files import quantize_with_ggml


@pytest.fixture
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def save(patcher, type_name="Q8_0"):
    """The file that the node writes."""
    before = set(tiny_files())
    assert nodes_save.SaveGGUF().save(patcher, "diffusion_models/test", type_name) == {}
    (path,) = set(tiny_files()) - before
    return path


def tiny_files():
    folder = os.path.join(folder_paths.get_output_directory(), "diffusion_models")
    return [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []


def patched_floats(path, *patch_sets, strength=0.8):
    """The file's weights in float32 with patches added by the host: what a loss-free file would hold."""
    weights = tiny.float_weights(path)
    for patches in patch_sets:
        for target, adapter in patches.items():
            key, offset = target if isinstance(target, tuple) else (target, None)
            name = key.removeprefix("diffusion_model.")
            todo = [(strength, adapter, 1.0, offset, None)]
            weights[name] = patch_weight(weights[name].clone(), todo, key, weights[name])
    return weights


def check_error(path, expected):
    """Every quantized tensor of a Q8_0 file has the very bytes that ggml makes of the expected floats.

    So it is off by no more than half a step of its block.
    """
    found = tiny.float_weights(path)
    assert set(found) == set(expected)
    qtypes = {name: info.qtype for name, info in GGUFFile(path).tensors.items()}
    n_quantized = 0
    for name, exact in expected.items():
        if qtypes.get(name) is QType.Q8_0:
            n_quantized += 1
            step = exact.reshape(-1, 32).abs().amax(dim=1, keepdim=True) / 127
            error = (found[name] - exact).reshape(-1, 32).abs()
            # Half a step, and the scale's rounding to float16 127 times: by 2**-11 of it, or 2**-25 where it is tiny.
            assert torch.all(error <= step * (0.5 + 127 * 2**-11) + 127 * 2**-25), name
            reference = quantize_with_ggml(exact.numpy(), QType.Q8_0)
            assert np.array_equal(GGUFFile(path).data(name).numpy(), reference.reshape(-1)), name
        else:  # rounded once to the type that it is kept in
            kept = exact.to(PLAIN_DTYPES[qtypes[name]]) if name in qtypes else exact
            assert torch.equal(found[name], kept.to(torch.float32)), name
    assert n_quantized > 20


def test_a_patched_model_saved_as_q8_0_has_the_error_of_q8_0(tiny_flux, output, inference_mode):
    source = tiny_flux("Q4_K_S")
    patcher = tiny.with_patches(tiny.quantized_model(source), tiny.lora(), tiny.split_lora())
    path = save(patcher)
    assert os.path.basename(path) == "test-Q8_0_00001_.gguf"
    expected = patched_floats(source, tiny.lora(), tiny.split_lora())
    check_error(path, expected)
    # And what the loaded file computes is off by no more than gguf-py's Q8_0 of the patched float model.
    dense = comfy.sd.load_diffusion_model_state_dict(dict(expected), {"dtype": torch.float32})
    exact = tiny.run(dense)
    by_gguf = comfy.sd.load_diffusion_model_state_dict(q8_0(path, expected), {"dtype": torch.float32})
    loaded = tiny.quantized_model(path)
    assert tiny.relative(tiny.run(loaded), exact) <= tiny.relative(tiny.run(by_gguf), exact) * 1.05
    assert tiny.relative(tiny.run(patcher), exact) < 1e-5


def q8_0(path, weights):
    """Weights through gguf-py's Q8_0 where a file has that type."""
    result = {}
    tensors = GGUFFile(path).tensors
    for name, exact in weights.items():
        values = exact.numpy()
        if name in tensors and tensors[name].qtype is QType.Q8_0:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, QType.Q8_0), QType.Q8_0)
        elif name in tensors:
            values = exact.to(PLAIN_DTYPES[tensors[name].qtype]).float().numpy()
        result[name] = torch.from_numpy(np.array(values))
    return result


@pytest.mark.parametrize("state", ["never loaded", "loaded", "partly loaded", "another clone is loaded"])
def test_what_is_saved_does_not_hang_on_what_is_loaded(tiny_flux, output, state):
    source = tiny_flux("Q4_K_S")
    plain = tiny.quantized_model(source)
    patcher = tiny.with_patches(plain, tiny.lora())
    if state != "never loaded":
        tiny.run(tiny.with_patches(plain, tiny.lora(seed=5)) if state == "another clone is loaded" else patcher)
    if state == "partly loaded":
        patcher.partially_unload(tiny.CPU, patcher.model_size() * 0.5)
    check_error(save(patcher), patched_floats(source, tiny.lora()))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_of_the_host_is_saved_too(tiny_flux, output, loaded):
    """From safetensors: the host patches its weights in place, and keeps what they were."""
    source = tiny_flux("BF16")
    patcher = tiny.with_patches(tiny.float_model(source), tiny.lora())
    if loaded:
        tiny.run(patcher)
    check_error(save(patcher), patched_floats(source, tiny.lora()))


def test_a_merge_of_two_models_is_saved(tiny_flux, output):
    """What ModelMergeSimple makes: patches that hold another model's weights."""
    first, second = tiny.quantized_model(tiny_flux("Q4_K_S")), tiny.quantized_model(tiny_flux("Q8_0"))
    merged = first.clone()
    for key, patch in second.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 0.25, 0.75)
    one, two = tiny.float_weights(tiny_flux("Q4_K_S")), tiny.float_weights(tiny_flux("Q8_0"))
    expected = {name: 0.75 * value + 0.25 * two[name] for name, value in one.items()}
    found = tiny.float_weights(save(merged, "F32"))
    for name, value in expected.items():
        assert tiny.relative(found[name], value) < 1e-6, name


def test_what_a_type_keeps_has_the_precision_of_the_source_after_a_merge_too(tiny_flux, output):
    """F32 alone holds the sums themselves; else they are rounded once, to the type that they would have unpatched."""
    first, second = tiny_flux("Q4_K_S"), tiny.quantized_model(tiny_flux("Q8_0"))
    merged = tiny.with_patches(tiny.quantized_model(first), tiny.lora())
    for key, patch in second.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 0.5, 0.5)
    plain = {name: qtype for name, (qtype, _) in data_bytes(save(tiny.quantized_model(first), "Q8_0")).items()}
    path = save(merged, "Q8_0")
    assert {name: qtype for name, (qtype, _) in data_bytes(path).items()} == plain
    exact, rounded = tiny.float_weights(save(merged, "F32")), tiny.float_weights(path)
    kept = [name for name, qtype in plain.items() if qtype is QType.BF16]
    assert "img_in.weight" in kept
    assert all(torch.equal(rounded[name], exact[name].bfloat16().float()) for name in kept)
    assert not all(torch.equal(rounded[name], exact[name]) for name in kept)


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/elsewhere/x", "../../x"])
def test_a_name_outside_the_output_folder_is_refused_in_one_sentence(output, prefix):
    with pytest.raises(GGUFError, match="leads out of ComfyUI's output folder") as caught:
        nodes_save.output_path(prefix, "Q8_0")
    assert "\n" not in str(caught.value)
    assert str(output) not in str(caught.value)
    assert nodes_save.output_path("a/../b/x", "Q8_0").parent.resolve() == (output / "b").resolve()


@pytest.mark.parametrize("type_name", ["F32", "Q4_K_S"])
def test_other_types(tiny_flux, output, type_name):
    source = tiny_flux("Q2_K")
    path = save(tiny.quantized_model(source), type_name)
    expected, found = tiny.float_weights(source), tiny.float_weights(path)
    limit = {"F32": 0.0, "Q4_K_S": 0.12}[type_name]
    for name, exact in expected.items():
        assert tiny.relative(found[name], exact) <= max(limit, 0.0), name
    assert tiny.run(tiny.quantized_model(path)).isfinite().all()


def data_bytes(path):
    """Name -> type and bytes of every tensor."""
    file = GGUFFile(path)
    return {name: (info.qtype, bytes(file.data(name).numpy())) for name, info in file.tensors.items()}


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K_S", "Q2_K"])
def test_a_file_saved_again_at_its_own_type_has_the_same_bytes(tiny_flux, output, type_name, monkeypatch):
    """Nothing is decoded for that, and no encoder is asked."""
    source = tiny_flux(type_name)
    monkeypatch.setattr(saver, "GgmlEngine", None)
    monkeypatch.setattr(saver.TorchEngine, "encode", None)
    monkeypatch.setattr(saver, "dequantize_weight", None)
    patcher = tiny.quantized_model(source)
    assert data_bytes(save(patcher, type_name)) == data_bytes(source)
    tiny.run(patcher)
    monkeypatch.setattr(convert_module, "CHUNK_WEIGHTS", 2**12)
    monkeypatch.setattr(convert_module, "MIN_CHUNK_WEIGHTS", 2**12)
    assert data_bytes(save(patcher, type_name)) == data_bytes(source)


def test_with_a_lora_only_the_patched_tensors_change(tiny_flux, output):
    source = tiny_flux("Q4_K_S")
    before = data_bytes(source)
    after = data_bytes(save(tiny.with_patches(tiny.quantized_model(source), tiny.lora()), "Q4_K_S"))
    changed = {f"diffusion_model.{name}" for name in before if before[name] != after[name]}
    assert changed == set(tiny.LORA_SHAPES)


def test_what_a_type_keeps_keeps_the_type_that_it_has(tiny_flux, output, tmp_path):
    """Other programs quantize the embedders too; 16 bits would not hold them better, only larger."""
    values = np.random.default_rng(0).standard_normal((256, 64), dtype=np.float32)
    source = tiny.copy_file(tiny_flux("Q4_K_S"), tmp_path / "m.gguf", extra={"img_in.weight": values})
    found = data_bytes(save(tiny.quantized_model(source), "Q4_K_S"))
    assert found == data_bytes(source)
    assert found["img_in.weight"][0] is QType.Q8_0


def test_a_damaged_scale_is_not_passed_on(tiny_flux, output, tmp_path):
    source = tmp_path / "m.gguf"
    data = bytearray(tiny_flux("Q8_0").read_bytes())
    info = GGUFFile(tiny_flux("Q8_0")).tensors["double_blocks.0.img_mlp.0.weight"]
    data[info.offset : info.offset + 2] = np.float16(np.inf).tobytes()
    source.write_bytes(data)
    with pytest.raises(GGUFError, match=r"'double_blocks\.0\.img_mlp\.0\.weight' has scales that are NaN or infinite"):
        save(tiny.quantized_model(source), "Q8_0")
    assert not tiny_files()


RECIPE = """# mine
double_blocks.0.img_mlp.0.weight=Q6_K
img_in.weight=q8_0

txt_in.weight=F32
"""


def test_a_recipe_comes_before_the_type(tiny_flux, output):
    patcher = tiny.quantized_model(tiny_flux("Q8_0"))
    plain = {name: qtype for name, (qtype, _) in data_bytes(save(patcher, "Q4_K_S")).items()}
    before = set(tiny_files())
    nodes_save.SaveGGUF().save(patcher, "diffusion_models/other", "Q4_K_S", recipe=RECIPE)
    (path,) = set(tiny_files()) - before
    found = {name: qtype for name, (qtype, _) in data_bytes(path).items()}
    wanted = {
        "double_blocks.0.img_mlp.0.weight": QType.Q6_K,
        "img_in.weight": QType.Q8_0,
        "txt_in.weight": QType.F32,
    }
    assert found == plain | wanted
    assert plain != found


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("a=Q4_K\nnonsense", "line 2 of the recipe is not of the form name=TYPE: 'nonsense'. Correct that line."),
        ("a=Q4_K\na=Q8_0", "line 2 of the recipe names a tensor twice"),
        ("img_in.weight=Q9", "line 1 of the recipe: 'Q9' is no type of tensors"),
        ("blk.0.attn_q.weight=Q8_0", "the model has none of the 1 names in the recipe: blk.0.attn_q.weight. Take the"),
        ("img_in.weight=Q4_K", "tensor 'img_in.weight' has rows of 64 weights, no multiple of 256 and cannot be Q4_K"),
        ("img_in.weight=IQ2_XS", "tensor 'img_in.weight' has rows of 64 weights"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(tiny_flux, output, recipe, sentence):
    with pytest.raises(GGUFError, match=re.escape(sentence)) as caught:
        nodes_save.SaveGGUF().save(tiny.quantized_model(tiny_flux("Q2_K")), "diffusion_models/m", "Q8_0", recipe=recipe)
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)
    assert not tiny_files()


def test_two_saves_get_two_names_and_nothing_is_kept_in_memory(tiny_flux, output):
    patcher = tiny.with_patches(tiny.quantized_model(tiny_flux("Q2_K")), tiny.lora())
    names = [os.path.basename(save(patcher)) for _ in range(2)]
    assert names == ["test-Q8_0_00001_.gguf", "test-Q8_0_00002_.gguf"]
    held = weakref.ref(patcher.model)
    del patcher
    gc.collect()
    assert held() is None


def test_saving_changes_nothing_in_the_model(tiny_flux, output):
    patcher = tiny.with_patches(tiny.quantized_model(tiny_flux("Q4_K_S")), tiny.lora(), tiny.split_lora())
    result = tiny.run(patcher)
    parameters = {name: id(parameter) for name, parameter in patcher.model.named_parameters()}
    n_patches = {key: len(patches) for key, patches in patcher.patches.items()}
    save(patcher)
    assert {name: id(parameter) for name, parameter in patcher.model.named_parameters()} == parameters
    assert {key: len(patches) for key, patches in patcher.patches.items()} == n_patches
    assert torch.equal(tiny.run(patcher, load=False), result)


def test_a_failure_on_the_way_leaves_no_file(tiny_flux, output, monkeypatch):
    patcher, calls = tiny.with_patches(tiny.quantized_model(tiny_flux("Q2_K")), tiny.lora()), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("the adapter does not fit")
        return patch_weight(*args)

    monkeypatch.setattr(saver, "patch_weight", fail)
    with pytest.raises(RuntimeError, match="does not fit"):
        save(patcher)
    assert not tiny_files()


def test_without_room_on_the_device_patches_are_added_on_the_cpu(tiny_flux, output, monkeypatch):
    source, refused = tiny_flux("Q4_K_S"), set()

    def patch(weight, patches, key, original):
        if key not in refused:
            refused.add(key)
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return patch_weight(weight, patches, key, original)

    monkeypatch.setattr(saver, "patch_weight", patch)
    patcher = tiny.with_patches(tiny.quantized_model(source), tiny.lora())
    patcher.load_device = torch.device("cpu", 0)  # plays the GPU
    check_error(save(patcher), patched_floats(source, tiny.lora()))
    assert refused == set(tiny.LORA_SHAPES)


def test_what_the_file_carries_is_carried_along(tiny_flux, output, tmp_path):
    source = gguf_with_config(tiny_flux("Q2_K"), tmp_path / "config.gguf")
    assert GGUFFile(save(tiny.quantized_model(source), "Q8_0")).carried_metadata() == {"config": "{}"}


def gguf_with_config(source, path):
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "flux")
    writer.add_string("config", "{}")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_progress_is_shown_and_a_cancelled_prompt_leaves_nothing(tiny_flux, output, monkeypatch):
    patcher, seen = tiny.quantized_model(tiny_flux("Q2_K")), []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    with CurrentNodeContext("a prompt", "7"):
        save(patcher)
    assert seen[-1][0] == seen[-1][1] > 0

    comfy.model_management.interrupt_current_processing()
    with CurrentNodeContext("a prompt", "7"), pytest.raises(comfy.model_management.InterruptProcessingException):
        nodes_save.SaveGGUF().save(patcher, "diffusion_models/other", "Q8_0")
    assert [os.path.basename(name) for name in tiny_files()] == ["test-Q8_0_00001_.gguf"]


class FakeEngine:
    """Stands for an engine; says what it was made with."""

    qtypes = frozenset({QType.Q8_0})

    def __init__(self, of="cpu"):
        self.of, self.device = of, torch.device(of if isinstance(of, torch.device) else "cpu")


@pytest.mark.parametrize(
    ("device", "library", "chosen"),
    [
        ("cuda", "lib", torch.device("cuda")),
        ("cuda", None, torch.device("cuda")),
        ("xpu", "lib", torch.device("xpu")),
        ("mps", "lib", "lib"),
        ("mps", None, "cpu"),
        ("cpu", "lib", "lib"),
        ("cpu", None, "cpu"),
    ],
)
def test_a_gpu_encodes_then_ggml_then_torch(tiny_flux, monkeypatch, device, library, chosen):
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device(device))
    monkeypatch.setattr(saver.ggml, "find_library", lambda: library)
    monkeypatch.setattr(saver, "TorchEngine", FakeEngine)
    monkeypatch.setattr(saver, "GgmlEngine", FakeEngine)
    source = Source(Path("m"), "MODEL", saver.patched_tensors(tiny.quantized_model(tiny_flux("Q2_K"))), {}, ())
    engine, n_threads = saver.choose_engine(source, make_plan(source, Choices("Q8_0")))
    assert engine.of == chosen
    n_processors, on_gpu = os.cpu_count() or 1, isinstance(chosen, torch.device)
    assert n_threads == (n_processors if chosen == "lib" else min(2, n_processors) if on_gpu else 1)
    # Floats need none of them.
    assert saver.choose_engine(source, make_plan(source, Choices("F16")))[0].of == "cpu"


def test_ggml_is_used_when_it_was_built_and_nothing_is_built(tiny_flux, output, monkeypatch):
    monkeypatch.setattr(saver.ggml, "find_library", lambda: None)
    patcher = tiny.quantized_model(tiny_flux("Q2_K"))
    assert os.path.getsize(save(patcher)) > 0
    monkeypatch.setattr(saver.TorchEngine, "qtypes", frozenset())
    with pytest.raises(GGUFError, match=r"Q8_0 needs ggml's encoder for Q8_0, which is not built yet\. Build it"):
        save(patcher)


def test_messages_for_the_command_line_say_what_to_do_in_a_node(tiny_flux, output, monkeypatch):
    def full(*_, **__):
        raise GGUFError("the disk is full", path="m.gguf", hint=NO_ROOM_HINT)

    monkeypatch.setattr(saver, "convert", full)
    with pytest.raises(GGUFError, match=r"^m\.gguf: the disk is full\. Free some space, or start ComfyUI with"):
        save(tiny.quantized_model(tiny_flux("Q2_K")))


def test_the_node_offers_what_needs_no_importance_matrix():
    inputs = nodes_save.SaveGGUF.INPUT_TYPES()["required"]
    assert {"F16", "BF16", "Q8_0", "Q4_K_S", "Q2_K"} <= set(inputs["type"][0])
    assert inputs["filename_prefix"][1]["default"] == "diffusion_models/ComfyUI"
    assert all(not saver.RECIPES[name].needs_imatrix for name in inputs["type"][0] if name in saver.RECIPES)
