# SPDX-License-Identifier: Apache-2.0
"""Make a GGUF file of a diffusion model or text encoder: read any source, choose a type per tensor, quantize, write.

    python tools/convert.py --src flux1-dev.safetensors --type Q4_K_S
    python tools/convert.py --src flux1-dev.safetensors                     its own precision, in GGUF
    python tools/convert.py --src folder-of-shards --type Q5_K_M --dry-run  what would be written, and how large
    python tools/convert.py --src model.ckpt --type Q4_K_M --tensor-type 'to_v=Q6_K' --tensor-type '^proj_out=F16'
    python tools/convert.py --src t5xxl_fp16.safetensors --type Q8_0        a text encoder, for CLIPLoader (GGUF)

Sources: .safetensors (one file, shards with an index, a diffusers folder), .ckpt .pt .pth .bin, whole checkpoints (the
diffusion model is taken out), text encoders under the names that ComfyUI or their makers give them, fp8 plain and
scaled, and GGUF in 16 or 32 bit. Tensors are read one after another.
Exit codes: 0 done, 2 the request or its input cannot be used; one line on stderr says why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _pack  # noqa: F401
from gguf_kit.dequant import PLAIN_DTYPES
from gguf_kit.errors import GGUFError, name_list
from gguf_kit.models import archs
from gguf_kit.quantize import ggml
from gguf_kit.quantize.convert import Conversion, check_importance, convert, tensors_without_importance
from gguf_kit.quantize.encode import ENGINES, Engine, GgmlEngine, TorchEngine, useful_threads
from gguf_kit.quantize.imatrix import read_imatrix
from gguf_kit.quantize.plan import Choices, Plan, PlannedTensor, make_plan
from gguf_kit.quantize.recipe_files import parse_qtype, read_recipe_file, recipe_text
from gguf_kit.quantize.recipes import PLAIN_TYPES, TYPE_NAMES
from gguf_kit.quantize.sources import Source, open_source
from gguf_kit.quantize.writer import file_exists, file_size, merged_metadata
from gguf_kit.tools._command import check_destination, run_command, say, tell_leftovers
from gguf_kit.tools._output import write_out
from gguf_kit.tools.llama_cpp import build

ARCH_NAMES = tuple(dict.fromkeys(arch.name for arch in (*archs.ARCHS, *archs.ENCODERS, archs.GENERIC)))
PRECISION_ENDINGS = tuple(f"-{name}" for name in PLAIN_TYPES)


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options of convert.py and quantize.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--src", type=Path, required=True, metavar="FILE|DIR", help="the model to convert")
    add("--dst", type=Path, metavar="FILE|DIR", help="the file to write (NAME-TYPE.gguf beside the source)")
    add("--type", default="", metavar="TYPE", help=f"{', '.join(TYPE_NAMES)} (the source's own precision)")
    add("--imatrix", type=Path, metavar="FILE", help="importance matrix in one of llama.cpp's formats")
    add(
        "--arch",
        default="",
        metavar="NAME",
        help=f"do not detect it: {', '.join(ARCH_NAMES)}",
    )
    add(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=QTYPE",
        help="type of the tensors whose name the pattern is found in; may be repeated, the first that fits wins",
    )
    add("--recipe", type=Path, metavar="FILE", help="type of each tensor, one NAME=QTYPE per line, as exported")
    add("--export-recipe", type=Path, metavar="FILE", help="write the types that were chosen, one NAME=QTYPE per line")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    add("--threads", type=int, default=default_threads(), metavar="N", help="processors to use (all there are)")
    add("--engine", choices=ENGINES, default="auto", help="ggml: C code, built on first use; torch: slower, anywhere")
    add(
        "--device",
        default="",
        metavar="DEVICE",
        help="where the torch engine computes: cpu, cuda (cuda if there is one)",
    )
    add("--dry-run", action="store_true", help="show the plan, read and write no tensor data")
    add("--json", action="store_true", help="print the plan (--dry-run) or the result as JSON")
    return parser


def default_threads() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_choices(args: argparse.Namespace) -> Choices:
    """What the command line asks for."""
    if args.threads < 1:
        raise GGUFError(f"--threads {args.threads} is less than 1", hint="Leave it out to use all processors.")
    type_name = args.type.upper()
    if type_name and type_name not in TYPE_NAMES:
        raise GGUFError(f"--type '{args.type}' is not known", hint=f"Types: {', '.join(TYPE_NAMES)}.")
    overrides = []
    for text in args.tensor_type:
        pattern, separator, qtype_name = text.rpartition("=")
        if not separator or not pattern:
            raise GGUFError(f"--tensor-type '{text}' is not of the form REGEX=QTYPE", hint="Example: 'attn_v=Q6_K'.")
        try:
            overrides.append((re.compile(pattern), parse_qtype(qtype_name)))
        except re.error as error:
            raise GGUFError(f"--tensor-type '{text}': {error}", hint="Correct the pattern.") from error
    exact = read_recipe_file(args.recipe) if args.recipe else {}
    return Choices(type_name, args.arch, tuple(overrides), exact, has_imatrix=args.imatrix is not None)


def model_name(src: Path) -> str:
    """Name of the model: that of its file or folder, without the precision that a first step put behind it."""
    stem = src.name if src.is_dir() else src.stem
    if src.suffix != ".gguf":
        return stem
    return next((stem.removesuffix(end) for end in PRECISION_ENDINGS if stem.endswith(end)), stem)


def destination(args: argparse.Namespace, plan: Plan) -> Path:
    """Where the file goes: --dst, a folder's NAME-TYPE.gguf, or the same beside the source."""
    label = args.recipe.stem if args.recipe and not args.type else plan.label
    src = args.src.absolute()  # a link gives its own name, not that of what it leads to
    name = f"{model_name(src)}-{label}.gguf"
    if args.dst is None:
        path = src.parent / name
    else:
        path = args.dst / name if args.dst.is_dir() else args.dst
    path = Path(os.path.realpath(path))
    check_destination(path, src)
    if not path.parent.is_dir():
        raise GGUFError(f"there is no folder {path.parent}", path=path, hint="Make it first, or name another.")
    return path


def choose_engine(args: argparse.Namespace, plan: Plan) -> Engine:
    """The engine of --engine; auto takes ggml, building it on first use, and torch where it cannot be had."""
    if args.device and args.engine == "ggml":
        raise GGUFError("--device is for the torch engine", hint="Leave out --engine ggml.")
    if args.engine == "torch" or args.device:
        return TorchEngine(choose_device(args.device))
    if all(t.qtype in PLAIN_DTYPES for t in plan.tensors):
        return TorchEngine()
    try:
        return GgmlEngine(ggml.find_library() or build.build_ggml(lambda line: say(f"{args.prog}: {line}")))
    except ggml.BuildError as error:
        if args.engine == "ggml":
            raise
        say(f"{args.prog}: {error} Going on with the torch engine, which is slower.")
        return TorchEngine(choose_device(args.device))


def choose_device(name: str) -> torch.device:
    """Where the torch engine computes: --device, which must work, else a CUDA device if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise GGUFError(f"--device {name} cannot be used: {reason}", hint="Leave out --device.") from error


def run(args: argparse.Namespace) -> int:
    """Convert as the options say."""
    choices = read_choices(args)
    source = open_source(args.src)
    imatrix = read_imatrix(args.imatrix) if args.imatrix else None
    plan = make_plan(source, choices)
    path = destination(args, plan)
    conversion = Conversion(source, plan, model_name(args.src.absolute()), imatrix)
    check_importance(conversion)
    for line in notes(source, conversion):
        say(f"{args.prog}: {line}")
    if args.export_recipe:
        write_text(args.export_recipe, recipe_text(plan), args.overwrite)
    n_bytes = file_size(plan, conversion.header)
    if args.dry_run:
        write_out((json.dumps(plan.as_json(n_bytes), indent=1) if args.json else describe(plan, path, n_bytes)) + "\n")
        return 0
    started = time.monotonic()
    engine = write_file(args, conversion, path)
    seconds = time.monotonic() - started
    result = {"path": str(path), "engine": engine.name, "seconds": seconds} | plan.as_json(n_bytes)
    made = f"{path}: {size_line(plan, n_bytes)}, made in {seconds:.0f} s by {engine.name}"
    write_out((json.dumps(result) if args.json else made) + "\n")
    return 0


def write_file(args: argparse.Namespace, conversion: Conversion, path: Path) -> Engine:
    """Write the file with a progress bar; the engine that did it."""
    plan = conversion.plan
    if path.exists() and not args.overwrite:  # before an engine is built
        raise file_exists(path)
    tell_leftovers(args.prog, path)
    engine = choose_engine(args, plan)
    torch.set_num_threads(1)  # the threads are ours
    with tqdm(total=plan.data_bytes, unit="B", unit_scale=True, desc=plan.label, disable=None, smoothing=0.1) as bar:
        progress = bar_updater(bar)
        n_threads = useful_threads(engine, args.threads)
        convert(conversion, path, engine, n_threads=n_threads, overwrite=args.overwrite, progress=progress)
    return engine


def bar_updater(bar: tqdm) -> Callable[[PlannedTensor, int], None]:
    """A progress function that shows the tensor at work and its type."""

    def update(tensor: PlannedTensor, n_bytes: int) -> None:
        bar.set_postfix_str(f"{tensor.qtype.name} {tensor.name[-40:]}", refresh=False)
        bar.update(n_bytes)

    return update


def notes(source: Source, conversion: Conversion) -> list[str]:
    """Everything that the user should know before it starts."""
    found = [*source.notes, *conversion.plan.warnings, *merged_metadata(source.metadata)[1]]
    without = tensors_without_importance(conversion)
    if without:
        found.append(f"{len(without)} quantized tensors are not in the importance matrix: {name_list(without)}")
    return found


def write_text(path: Path, text: str, overwrite: bool) -> None:
    """Write a small file, never over an existing one unasked."""
    try:
        with open(path, "w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise file_exists(path) from None
    except OSError as error:
        raise GGUFError(f"cannot be written: {error.strerror}", path=path, hint="Check the folder.") from error


def size_line(plan: Plan, n_bytes: int) -> str:
    """Architecture, size and precision in a few words."""
    size = f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2f} MB"
    return f"{plan.arch.title}, {len(plan.tensors)} tensors, {size}, {plan.bpw:.2f} bits per weight"


def describe(plan: Plan, path: Path, n_bytes: int) -> str:
    """The plan as a table: for each role and type the tensors, weights and bytes."""
    tensors: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for t in plan.tensors:
        key = t.category.value, t.qtype.name
        tensors[key] += 1
        weights[key] += prod(t.shape)
        sizes[key] += t.n_bytes
    lines = [f"{path.name}: {size_line(plan, n_bytes)}", f"{'role':<12} {'type':<8} tensors   M weights         MB"]
    for key, size in sizes.most_common():
        lines.append(f"{key[0]:<12} {key[1]:<8} {tensors[key]:>7} {weights[key] / 1e6:>11.2f} {size / 1e6:>10.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, *, prog: str = "convert", description: str = __doc__ or "") -> int:
    """Command line: 0 done, 2 with one line on stderr when the request or its input cannot be used."""
    args = make_parser(description).parse_args(argv)
    args.prog = prog
    return run_command(prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
