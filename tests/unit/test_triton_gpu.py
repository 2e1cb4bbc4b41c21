# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels without a GPU: their source, their numbers in the interpreter, and the code they compile to."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf_kit.kernels import triton_gpu
from gguf_kit.kernels.triton_source import Index, book_bytes, write_kernel
from gguf_kit.layouts import LAYOUTS, Code, Field, Layout, Plane
from quant_data import BLOCK_QTYPES, dequantize_with

TESTS = Path(__file__).resolve().parents[1]
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# torch brings Triton on Linux, where a missing one is a failure; elsewhere it is the user's choice.
needs_triton = pytest.mark.skipif(
    sys.platform != "linux" and bool(triton_gpu._import_failure()), reason="Triton is not installed here"
)


@needs_triton
def test_kernels_are_exact_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--confcutdir=.", "-q", "-p", "no:cacheprovider", "interpreted_kernels.py"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1", "GGUF_KIT_BACKEND": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 6 * len(BLOCK_QTYPES)
    assert "skipped" not in run.stdout


def test_a_cpu_has_no_triton_unless_it_is_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_gpu.unavailable(LAYOUTS[QType.Q4_K], torch.device("cpu")) == "Triton does not run on cpu"
    monkeypatch.setattr(triton_gpu, "_import_failure", lambda: "")
    for name in ("cuda:0", "cuda:1", "xpu:0"):
        assert triton_gpu.unavailable(LAYOUTS[QType.Q4_K], torch.device(name)) == ""


@pytest.mark.parametrize("error", [ImportError("no DLL"), OSError("no libcuda"), AttributeError("no 'language'")])
def test_a_triton_that_cannot_be_imported_is_a_reason_and_no_crash(error, monkeypatch):
    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "triton":
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    triton_gpu._import_failure.cache_clear()
    try:
        reason = triton_gpu.unavailable(LAYOUTS[QType.Q4_K], torch.device("cuda", 0))
        assert reason.startswith("Triton ")
        assert str(error) in reason
        assert triton_gpu.failures() == ()
    finally:
        triton_gpu._import_failure.cache_clear()


def test_importing_the_front_door_imports_no_triton():
    code = "import sys, _pack, gguf_kit.dequant; sys.exit('triton.language' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent / "tools").returncode == 0


@pytest.mark.parametrize("start", [0, 1, 4, 12, 160])
@pytest.mark.parametrize("factor", [1, 4, 8])
def test_indices_are_what_they_say(start, factor):
    n = 64
    first = Index("x", n).times(factor).plus(start)
    for index, function in (
        (first, lambda x: x),
        (first.over(8), lambda x: x // 8),
        (first.modulo(8).times(3), lambda x: x % 8 * 3),
        (first.over(5), lambda x: x // 5),
        (first.modulo(5).plus(2), lambda x: x % 5 + 2),
        (first.over(4).modulo(8).add(first.over(64).times(8)), lambda x: x // 4 % 8 + x // 64 * 8),
        (first.modulo(32).over(4), lambda x: x % 32 // 4),
        (first.clamp(16, 20), lambda x: min(max(x - 16, 0), 20)),
    ):
        tl = type("tl", (), {"minimum": min, "maximum": max})
        values = [eval(index.text, {"x": x, "tl": tl}) for x in range(n)]
        assert values == [function(x * factor + start) for x in range(n)]
        assert max(values) < index.end
        assert not any(value % (index.step or 1 << 30) for value in values)


def made_up(**changes):
    """A row that no format has: Q4_0's fields with other codes."""
    return Layout(QType.Q4_0, "", (Field("d", "f16"), Field("qs", "u8", 16)), **changes)


@pytest.mark.parametrize(
    ("quants", "reason"),
    [
        (Plane("qs", 4, (0, 4)), "runs of 1 words of qs are too short"),
        (Plane("qs", 4, (0, 4), run=2), "runs of 2 words of qs are too short"),
        (Plane("qs", 4, (0, 4, 8, 12), run=4, word="u16"), "digits of qs do not fit the bytes they lie in"),
        (Plane("qs", 2, (0, 1, 2, 3, 4, 5, 6, 7), base=3, stop=4), "runs of 1 words of qs are too short"),
    ],
    ids=["short runs", "runs of two", "wide words", "ternary digits side by side"],
)
def test_a_row_that_the_generator_does_not_know_is_refused(quants, reason):
    with pytest.raises(ValueError, match=f"Q4_0: {reason}"):
        write_kernel(made_up(quants=Code(((quants,),))), 2, 16)


def test_uneven_shifts_are_refused():
    layout = made_up(quants=LAYOUTS[QType.Q4_0].quants, scales=Code(((Plane("qs", 1, (0, 3, 4, 7), stop=1),),)))
    with pytest.raises(ValueError, match="are not evenly spaced"):
        write_kernel(layout, 2, 16)


# As Q5_1, with its fields in an order that puts the quants at a multiple of 2 only.
SHIFTED = Layout(
    QType.Q5_1,
    "",
    (Field("d", "f16"), Field("qs", "u8", 16), Field("m", "f16"), Field("qh", "u8", 4)),
    quants=LAYOUTS[QType.Q5_1].quants,
    m="m",
)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize(
    "layout", [*(LAYOUTS[qtype] for qtype in BLOCK_QTYPES), SHIFTED], ids=lambda row: row.qtype.name
)
def test_words_are_read_where_they_are_aligned_and_within_the_block(layout, itemsize, alignment):
    """A GPU stops at a word that is not; the interpreter does not mind."""
    kernel = write_kernel(layout, itemsize, alignment)
    wide = re.findall(r"tl\.load\(\(block \+ (.+)\)\.to\(tl\.pointer_type\(tl\.uint(\d+)\)\)\)", kernel.source)
    narrow = re.findall(r"tl\.load\(block \+ (.+)\)\.to\(", kernel.source)
    assert len(wide) + len(narrow) == kernel.source.count("block + ")
    tl = type("tl", (), {"minimum": min, "maximum": max})
    for text, bits in [*wide, *((text, "8") for text in narrow)]:
        n_bytes = int(bits) // 8
        for unit in range(layout.block_size // kernel.n_unit):
            offset = eval(text, {"unit": unit, "tl": tl})
            assert 0 <= offset <= layout.type_size - n_bytes
            assert alignment % n_bytes == offset % n_bytes == layout.type_size % n_bytes == 0


def compile_kernel(qtype, dtype, alignment=16, arch=90):
    """Compile for an NVIDIA GPU that need not be there; returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, function = triton_gpu._compiled(LAYOUTS[qtype], dtype.itemsize, alignment)
    words = {0: "*fp32", 4: "*i32", 8: "*i64"}
    books = {book.name: words[book_bytes(book, kernel.n_unit)] for book in kernel.books}
    signature = {"data": "*u8", "out": POINTERS[dtype], "n_units": "i32", **books}
    aligned = [i for i, name in enumerate(signature) if signature[name][0] == "*" and (name != "data" or alignment > 1)]
    source = ASTSource(
        function,
        {**signature, "UNITS": "constexpr"},
        {"UNITS": triton_gpu.UNITS},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": triton_gpu.UNITS // 32, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.fixture
def compiler_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@needs_triton
@pytest.mark.usefixtures("compiler_cache")
@pytest.mark.parametrize(
    ("qtype", "dtype", "n_loads"),
    [
        (QType.Q8_0, torch.bfloat16, 5),  # d, and 8 bytes two at a time
        (QType.Q4_K, torch.bfloat16, 6),  # d, dmin, 3 of the scales, 8 bytes at once
        (QType.Q6_K, torch.float16, 10),
        (QType.IQ2_XS, torch.bfloat16, 5),
        (QType.Q4_K, torch.float32, 6),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_compiled_code_reads_wide_words_and_stores_once(qtype, dtype, n_loads):
    compiled = compile_kernel(qtype, dtype)
    ptx = compiled.asm["ptx"]
    assert len(re.findall(r"\bld\.global", ptx)) == n_loads
    assert re.findall(r"\bst\.global\S*", ptx) == ["st.global.v4.b32"]
    assert not re.search(r"\.(shared|local)\b.*\[|fma\.|\.ftz", ptx)  # registers only; every product is rounded
    assert re.search(r"get_program_id x.*\n.*arith\.extsi .*: i32 to i64", compiled.asm["ttir"])


@needs_triton
@pytest.mark.usefixtures("compiler_cache")
def test_data_at_any_address_is_read_byte_by_byte():
    ptx = compile_kernel(QType.Q4_K, torch.bfloat16, alignment=1).asm["ptx"]
    assert set(re.findall(r"ld\.global\.(?:\S*\.)?(\w+)", ptx)) == {"b8"}


class Driver:
    """An H100 that Triton compiles for and that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compile_only(compiler_cache, monkeypatch):
    """Launches go through Triton's own code up to the driver; the kernels that they compiled are listed."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = []
    run = JITFunction.run

    def warm_up(self, *args, **kwargs):
        compiled.append(run(self, *args, **{**kwargs, "warmup": True}))

    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(torch.cpu, "current_device", lambda: None)  # the index of torch.device("cpu")
    monkeypatch.setattr(triton_gpu, "_functions", {})
    monkeypatch.setattr(driver, "_active", Driver())
    return compiled


@needs_triton
def test_a_launch_compiles_what_was_asked_for(compile_only):
    layout = LAYOUTS[QType.IQ4_NL]
    for n_blocks in (1, 3, 64):  # 4, 12 and 256 units
        dequantize_with(triton_gpu, torch.zeros(n_blocks, layout.type_size, dtype=torch.uint8), layout, torch.bfloat16)
    assert len({kernel.hash for kernel in compile_only}) == 1  # one for all sizes
    [kernel] = {kernel.hash: kernel for kernel in compile_only}.values()
    assert kernel.metadata.num_warps == 8
    assert not kernel.metadata.enable_fp_fusion
    assert "st.global.v4.b32" in kernel.asm["ptx"]


@needs_triton
@pytest.mark.parametrize(("shift", "widths"), [(0, {"b8", "b16", "b64"}), (1, {"b8"}), (8, {"b8"})])
def test_where_the_data_lies_decides_how_it_is_read(shift, widths, compile_only):
    buffer = torch.zeros(1024, dtype=torch.uint8)
    start = -buffer.data_ptr() % 16 + shift
    dequantize_with(triton_gpu, buffer[start : start + 144].view(1, 144), LAYOUTS[QType.Q4_K], torch.bfloat16)
    [kernel] = compile_only
    assert set(re.findall(r"ld\.global\.(?:\S*\.)?(\w+)", kernel.asm["ptx"])) == widths
