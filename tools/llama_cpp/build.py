# SPDX-License-Identifier: Apache-2.0
"""Builds ggml's quantizer, and llama.cpp's program around it, from a pinned and patched llama.cpp.

    python tools/llama_cpp/build.py                              the library that convert.py uses; it builds it itself
    python tools/llama_cpp/build.py --target llama-quantize      the patched program
    python tools/llama_cpp/build.py --cross x86_64-windows-gnu   whether the library links for another system

The last line printed is the path of what was built. Builds are kept in $GGUF_KIT_CACHE, else in gguf-kit in the
system's cache folder, and are used only after they gave the stored bytes for every type (golden.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _pack  # noqa: F401
from gguf_kit.errors import GGUFError
from gguf_kit.quantize import ggml
from gguf_kit.quantize.ggml import BuildError
from gguf_kit.tools.llama_cpp import compilers, golden, source
from gguf_kit.tools.llama_cpp.compilers import Compiler
from gguf_kit.tools.llama_cpp.source import PINNED, Log

Progress = Callable[[Iterable[Path], int], Iterable[Path]]

# The slowest first, so that the last one to end is a short one.
GGML_SOURCES = (
    "ggml/src/ggml-quants.c ggml/src/ggml-backend-meta.cpp ggml/src/gguf.cpp ggml/src/ggml.c ggml/src/ggml-backend.cpp "
    "ggml/src/ggml-opt.cpp ggml/src/ggml-alloc.c ggml/src/ggml.cpp ggml/src/ggml-threading.cpp"
).split()
# What llama-quantize runs. These files also name functions of the rest of llama.cpp that quantizing never calls;
# the linker drops those callers (SECTION_FLAGS, GC_FLAGS), so 16 files are compiled instead of 300.
PROGRAM_SOURCES = (
    "ggml/src/ggml-backend-reg.cpp ggml/src/ggml-backend-dl.cpp src/llama.cpp src/llama-arch.cpp src/llama-hparams.cpp "
    "src/llama-impl.cpp src/llama-mmap.cpp src/llama-model-loader.cpp src/llama-quant.cpp common/common.cpp "
    "common/imatrix-loader.cpp common/json.cpp common/log.cpp common/build-info.cpp tools/quantize/quantize.cpp "
    "tools/quantize/main.cpp"
).split()
INCLUDES = (
    "ggml/include ggml/src include src common vendor vendor/nlohmann vendor/sheredom tools/quantize generated".split()
)
# GGML_SHARED and GGML_BUILD export ggml's functions from a Windows library.
DEFINES = (
    "-DNDEBUG",
    "-DGGML_SHARED",
    "-DGGML_BUILD",
    "-D_XOPEN_SOURCE=600",
    "-D_GNU_SOURCE",
    "-D_FILE_OFFSET_BITS=64",
)
SYSTEM_DEFINES = {"darwin": ("-D_DARWIN_C_SOURCE",), "win32": ("-D_CRT_SECURE_NO_WARNINGS", "-D_WIN32_WINNT=0x0A00")}
# All arithmetic is in ggml; a higher level triples the time of these files.
PROGRAM_FLAGS = ("-O1", "-ffp-contract=off")
SECTION_FLAGS = ("-ffunction-sections", "-fdata-sections")
GC_FLAGS = {"darwin": ("-Wl,-dead_strip",)}
# Their search tables take seconds each, so two processes share the check.
SLOW_TYPES = ("IQ1_S", "IQ1_M")


def build_ggml(log: Log, kind: str = "auto", given: Path | None = None, progress: Progress | None = None) -> Path:
    """The ggml library of this version, built unless an accepted one is in the cache.

    Args:
        log: is told, in one line each, what takes time.
        kind: compiler, one of compilers.KINDS.
        given: archive or folder of llama.cpp, None for the pinned one.
        progress: wraps the files being compiled, as tqdm.
    Raises:
        BuildError: no source, no compiler, a failed compilation, or a library that computes other bytes.
    """
    wanted = ggml.library_path()
    if wanted.is_file():
        return wanted
    started = time.monotonic()
    compiler = compilers.find_compiler(kind, log)
    with _workshop() as folder:
        log(f"Building ggml of llama.cpp {PINNED.llama_cpp} with {compiler.kind}, once: a minute or two")
        root = _prepare(given, folder, log)
        library = _link_library(compiler, root, folder / "result" / wanted.name, progress)
        _check_library(library)
        _keep(library.parent, wanted.parent)
    log(f"Built ggml in {time.monotonic() - started:.0f} s")
    return wanted


def build_llama_quantize(
    log: Log, kind: str = "auto", given: Path | None = None, progress: Progress | None = None
) -> Path:
    """The patched llama-quantize, built unless one of this version is in the cache. Arguments as in build_ggml.

    Raises:
        BuildError: as in build_ggml, or the program does not run.
    """
    name = "llama-quantize.exe" if sys.platform == "win32" else "llama-quantize"
    wanted = ggml.cache_folder() / f"llama-quantize-{ggml.build_key()}" / name
    if wanted.is_file():
        return wanted
    started = time.monotonic()
    compiler = compilers.find_compiler(kind, log)
    with _workshop() as folder:
        log(f"Building llama-quantize of llama.cpp {PINNED.llama_cpp} with {compiler.kind}, once: a minute or two")
        root = _prepare(given, folder, log)
        objects = _compile(compiler, root, GGML_SOURCES, (*PINNED.flags, *SECTION_FLAGS), progress)
        objects += _compile(compiler, root, PROGRAM_SOURCES, (*PROGRAM_FLAGS, *SECTION_FLAGS), progress)
        program = folder / "result" / name
        program.parent.mkdir()
        gc_flags = GC_FLAGS.get(compiler.system, ("-Wl,--gc-sections",))
        command = [*compiler.cxx, *gc_flags, *map(str, objects), "-o", str(program), *_libraries(compiler)]
        compilers.run(command, compiler.environment)
        _check_program(program, folder)
        _keep(program.parent, wanted.parent)
    log(f"Built llama-quantize in {time.monotonic() - started:.0f} s")
    return wanted


def cross_build(log: Log, target: str, given: Path | None = None, progress: Progress | None = None) -> Path:
    """The ggml library for another system, by zig; it cannot be run here, so it is not accepted for use anywhere.

    Args:
        target: as zig spells it: x86_64-windows-gnu, aarch64-macos, ...
    Raises:
        BuildError: it does not compile or link.
    """
    compiler = compilers.find_compiler("zig", log, target)
    wanted = ggml.cache_folder() / f"unchecked-{target}-{ggml.build_key()}"
    with _workshop() as folder:
        root = _prepare(given, folder, log)
        name = ggml.LIBRARY_NAMES.get(compiler.system, "libggml-base.so")
        library = _link_library(compiler, root, folder / "result" / name, progress)
        _keep(library.parent, wanted)
    return wanted / name


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """A folder in the cache, so that what is made in it can be renamed into place; removed at the end.

    Raises:
        BuildError: the cache folder cannot be made or written.
    """
    cache = ggml.cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=cache, prefix="building-", ignore_cleanup_errors=True)
    except OSError as error:
        hint = "Set GGUF_KIT_CACHE to a folder that can be written."
        raise BuildError(f"cannot be written: {error.strerror}", path=cache, hint=hint) from error
    with folder as name:
        yield Path(name)


def _keep(result: Path, wanted: Path) -> None:
    """Give a finished folder its final name; another process that was faster made the same."""
    try:
        result.rename(wanted)
    except OSError as error:
        if not wanted.is_dir():
            raise BuildError(f"cannot be written: {error.strerror}", path=wanted) from error


def _compile(
    compiler: Compiler, root: Path, sources: Sequence[str], flags: Sequence[str], progress: Progress | None
) -> list[Path]:
    """Compile files side by side.

    Returns:
        Their objects, in the same order.
    """
    (root / "objects").mkdir(exist_ok=True)
    options = [*flags, "-fPIC", "-w", *DEFINES, *SYSTEM_DEFINES.get(compiler.system, ())]
    options += [f"-I{include}" for include in INCLUDES]

    def compile_one(name: str) -> Path:
        target = f"objects/{Path(name).name}.o"
        command = [*compiler.c, "-std=c11"] if name.endswith(".c") else [*compiler.cxx, "-std=c++17"]
        compilers.run([*command, *options, "-c", name, "-o", target], compiler.environment, root)
        return root / target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            done = pool.map(compile_one, sources)
            return list(progress(done, len(sources)) if progress else done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _prepare(given: Path | None, folder: Path, log: Log) -> Path:
    """Patched sources with the files that llama.cpp's own build generates."""
    root = source.prepare_source(given, folder / "llama.cpp", log)
    _write_generated(root)
    return root


def _write_generated(root: Path) -> None:
    """The files that llama.cpp's own build writes: names of versions. Nothing of the machine gets in."""
    folder = root / "generated"
    folder.mkdir()
    for prefix, version in (("GGML", PINNED.ggml), ("LLAMA", PINNED.llama_cpp)):
        text = f'#define {prefix}_VERSION "{version}"\n#define {prefix}_COMMIT "{PINNED.llama_cpp}"\n'
        (folder / f"{prefix.lower()}-version.h").write_text(text, encoding="ascii")
    template = root / "common" / "build-info.cpp.in"
    text = template.read_text(encoding="utf-8").replace("@LLAMA_BUILD_NUMBER@", PINNED.llama_cpp.removeprefix("b"))
    text = text.replace("@LLAMA_BUILD_COMMIT@", "patched").replace("@BUILD_COMPILER@", "build.py")
    template.with_suffix("").write_text(text.replace("@BUILD_TARGET@", "GGUF Kit"), encoding="utf-8")


def _libraries(compiler: Compiler) -> list[str]:
    """Libraries of the system. gcc's runtime is linked in on Windows, where nothing else would find it."""
    if compiler.system == "win32":
        return [] if compiler.kind == "zig" else ["-static"]
    return ["-lpthread", "-lm"] + (["-ldl"] if compiler.system == "linux" else [])


def _link_library(compiler: Compiler, root: Path, library: Path, progress: Progress | None) -> Path:
    """Compile and link ggml-base."""
    return _link_shared(compiler, _compile(compiler, root, GGML_SOURCES, PINNED.flags, progress), library)


def _link_shared(compiler: Compiler, objects: Sequence[Path], library: Path) -> Path:
    library.parent.mkdir(exist_ok=True)
    command = [*compiler.cxx, "-shared", *map(str, objects), "-o", str(library), *_libraries(compiler)]
    compilers.run(command, compiler.environment)
    return library


def _check_library(library: Path) -> None:
    """Let a library encode the golden inputs, in processes of their own: a broken one may end its process.

    Raises:
        BuildError: it computes other bytes than those stored.
    """
    names = sorted(qtype.name for qtype in ggml.ENCODABLE)
    groups = [SLOW_TYPES, [name for name in names if name not in SLOW_TYPES]]
    check = [sys.executable, str(Path(golden.__file__).resolve()), str(library), "--types"]
    with ThreadPoolExecutor(len(groups)) as pool:
        list(pool.map(lambda group: compilers.run([*check, *group], golden.ENVIRONMENT), groups))


def _check_program(program: Path, folder: Path) -> None:
    """Let llama-quantize encode the golden inputs, in a folder to work in.

    Raises:
        BuildError: it does not run, or writes other bytes than those stored.
    """
    for importance in (None, golden.golden_importance()):
        command = golden.write_program_test(folder, program, importance)
        compilers.run(command, golden.ENVIRONMENT, folder)
        wrong = golden.wrong_in_file(folder, importance)
        if wrong:
            raise BuildError(f"it wrote other bytes than stored: {', '.join(wrong)}", path=program)


def _progress_bar(done: Iterable[Path], total: int) -> Iterable[Path]:
    bar: Iterable[Path] = tqdm(done, total=total, unit="file", desc="compiling", leave=False)
    return bar


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 0 with the path on stdout, 2 with one message on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", choices=("ggml", "llama-quantize"), default="ggml")
    add("--source", type=Path, metavar="DIR|ARCHIVE", help=f"{PINNED.archive}, or a folder with this llama.cpp")
    add(
        "--compiler", choices=compilers.KINDS, default="auto", help="default: $CC, cc, gcc or clang; else zig from PyPI"
    )
    add("--cross", metavar="TRIPLE", help="build the library for another system with zig, without checking its bytes")
    add("--fetch", action="store_true", help="only download the source, so that later builds need no network")
    args = parser.parse_args(argv)
    try:
        if args.fetch:
            path = source.fetch_archive(_say)
        elif args.cross:
            path = cross_build(_say, args.cross, args.source, _progress_bar)
        else:
            build = build_ggml if args.target == "ggml" else build_llama_quantize
            path = build(_say, args.compiler, args.source, _progress_bar)
    except GGUFError as error:
        _say(str(error))
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
