# SPDX-License-Identifier: Apache-2.0
"""Make a safetensors file of a GGUF file: dequantize every weight, round it once, write.

    python tools/to_safetensors.py --src flux1-dev-Q8_0.gguf                    writes flux1-dev-Q8_0-BF16.safetensors
    python tools/to_safetensors.py --src flux1-dev-Q8_0.gguf --dtype F32        exactly what the file holds
    python tools/to_safetensors.py --src gemma-3-12b-it-Q4_0.gguf --dst models/text_encoders

Tensors keep their names and get the shapes that they had before they were made to fit GGUF. Text encoders in
llama.cpp's names get the names, the order of rows and the tokenizer that ComfyUI expects, and the vision part that lies
beside them. A split file is joined: pass its first part. What quantization lost does not come back.
Exit codes: 0 done, 2 the request or its input cannot be used; one line on stderr says why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _pack  # noqa: F401
from gguf_kit.gguf_file import GGUFFile
from gguf_kit.loader import AUTO, NONE, load_text_encoder
from gguf_kit.models import archs, repairs, text_encoders
from gguf_kit.models.split_files import open_gguf
from gguf_kit.models.values import StateDict
from gguf_kit.quantize.to_safetensors import FLOAT_TYPES, make_layout, write_safetensors
from gguf_kit.quantize.writer import file_exists
from gguf_kit.tools._command import check_destination, run_command, tell_leftovers
from gguf_kit.tools._output import write_out

PROG = "to_safetensors"
SUFFIX = ".safetensors"


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--src", type=Path, required=True, metavar="FILE", help="the GGUF file, the first part of a split one")
    add("--dst", type=Path, metavar="FILE|DIR", help="the file to write (NAME-TYPE.safetensors beside the source)")
    add("--dtype", choices=tuple(FLOAT_TYPES), default="BF16", help="type of all floats in the file (BF16)")
    add(
        "--vision",
        default=AUTO,
        metavar="FILE",
        help=f"vision part (mmproj) of a text encoder; {AUTO}: the one beside it that fits; {NONE}: text only ({AUTO})",
    )
    add("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def read_state(path: Path, vision: str) -> tuple[StateDict, dict[str, str]]:
    """The tensors under the names that they are to have, and the strings that the file carries along."""
    file = open_gguf(path)
    if text_encoders.detect(file.tensors, text_encoders.tags_of(file)) is None:
        return repairs.read_values(file, find_tensors(file)), file.carried_metadata()
    state, info = load_text_encoder(path, vision)
    return state, dict(info.metadata)


def find_tensors(file: GGUFFile) -> repairs.Keys:
    """All tensors of a file under their whole names; those of a diffusion model in the shapes that it has them in."""
    names = repairs.whole_names(file)
    shapes = {name: file.logical_shape(stored) for name, stored in names.items()}
    inside = archs.strip_prefix(names)
    restored = repairs.restore_shapes({key: shapes[name] for key, name in inside.items()})
    if archs.detect(restored) is not None:
        shapes |= {name: restored[key] for key, name in inside.items()}
    return repairs.Keys(names, shapes)


def destination(args: argparse.Namespace) -> Path:
    """The file to write: --dst, or the source's name with the type, beside it or in the folder --dst."""
    name = f"{args.src.stem}-{args.dtype}{SUFFIX}"
    dst: Path = args.dst or args.src.absolute().parent
    return dst / name if dst.is_dir() else dst


def run(args: argparse.Namespace) -> int:
    """Write the file as the options say."""
    path = destination(args)
    check_destination(path, args.src, *([] if args.vision in (AUTO, NONE) else [Path(args.vision)]))
    if path.exists() and not args.overwrite:
        raise file_exists(path)
    state, metadata = read_state(args.src, args.vision)
    tell_leftovers(PROG, path)
    dtype = FLOAT_TYPES[args.dtype]
    layout = make_layout(state, dtype, metadata)
    started = time.monotonic()
    with tqdm(total=layout.data_bytes, unit="B", unit_scale=True, desc=args.dtype, disable=None, smoothing=0.1) as bar:
        progress = bar_updater(bar)
        write_safetensors(state, path, dtype=dtype, metadata=metadata, overwrite=args.overwrite, progress=progress)
    seconds = time.monotonic() - started
    write_out(f"{path}: {len(state)} tensors, {layout.n_bytes / 1e6:.2f} MB, made in {seconds:.0f} s\n")
    return 0


def bar_updater(bar: tqdm) -> Callable[[str, int], None]:
    """A progress function that shows the tensor at work."""

    def update(key: str, n_bytes: int) -> None:
        bar.set_postfix_str(key[-40:], refresh=False)
        bar.update(n_bytes)

    return update


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done, 2 with one line on stderr when the request or its input cannot be used."""
    args = make_parser().parse_args(argv)
    return run_command(PROG, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
