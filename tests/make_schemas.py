# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/recipes/NAME.schema: which type each recipe gives the tensors of a model.

    python tests/make_schemas.py [NAME ...]

The source is a stored key list (tests/data/models), all of its weights BF16. `[kept]` has what is the same in every
recipe, vectors left out, which are all F32. Then `[RECIPE] base type`, and a line `type: names` for what gets another
one. `{0..2,5}` in a name stands for numbers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import model_keys
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = model_keys.FOLDER.parent / "recipes"
NUMBER = re.compile(r"\d+")

# Schema -> the stored model that it is made for.
MODELS = {
    "flux": "flux-dev",
    "flux2": "flux2-klein-4b",
    "chroma": "chroma",
    "sd1": "sd1",
    "sdxl": "sdxl",
    "sd3": "sd35-medium",
    "aura": "aura",
    "hidream": "hidream",
    "cosmos": "cosmos-predict2-2b",
    "ltxv": "ltx23",
    "hyvid": "hyvid",
    "wan": "wan21-i2v",
    "lumina2": "lumina2",
    "z_image": "zimage",
    "qwen_image": "qwen-image",
    "krea2": "krea2",
    "omnigen2": "omnigen2",
    "kandinsky5": "kandinsky5",
    "ideogram4": "ideogram4",
    "boogu": "boogu",
    "mochi": "mochi",
    "hydit": "hunyuan-dit",
    "ernie_image": "ernie-image",
    "lens": "lens",
    "mage_flow": "mage-flow",
    "joyimage": "joyimage",
    "minimax_h3": "minimax-h3",
    "pixeldit": "pixeldit",
    "seedvr2": "seedvr2-3b",
    "hidream_o1": "hidream-o1",
    "ace": "ace-step",
    "cogvideox": "cogvideox-5b",
    "cascade": "cascade-c",
    "pixart": "pixart-sigma",
    "pid": "pid",
    "svd": "svd",
    "ace15": "ace-step15",
    "stable_audio": "stable-audio",
    "minimax_music3": "minimax-music3",
    "hunyuan3d": "hunyuan3d21",
    "triposplat": "triposplat",
    "generic": "other-depth-anything3",
    "t5": "te-t5xxl",
    "umt5": "te-umt5xxl",
    "clip_text": "te-clip-l",
    "qwen2vl": "te-qwen25-7b",
    "qwen3": "te-qwen3-4b",
    "llama": "te-llama3-8b",
    "mistral3": "te-mistral3-24b",
    "gemma2": "te-gemma2-2b",
    "gemma3": "te-gemma3-12b",
}


def make_schema(name: str) -> str:
    """The text of a schema, from what the quantizer plans now."""
    from gguf_kit.quantize.containers import StoredTensor
    from gguf_kit.quantize.plan import Choices, make_plan
    from gguf_kit.quantize.recipes import RECIPES
    from gguf_kit.quantize.sources import Source

    keys = model_keys.read_keys(MODELS[name])
    dtypes = {key: torch.int8 if key.endswith("_model") else torch.bfloat16 for key in keys}  # tokenizers
    stored = {key: StoredTensor(dtypes[key], shape, torch.Tensor) for key, shape in keys.items()}
    source = Source(Path(name), "key list", stored, {}, ())
    plans = {recipe: make_plan(source, Choices(recipe, has_imatrix=True)) for recipe in RECIPES}
    types = {recipe: {t.name: t.qtype.name for t in plan.tensors if len(t.shape) > 1} for recipe, plan in plans.items()}
    first = next(iter(types.values()))
    kept = {key: qtype for key, qtype in first.items() if all(of[key] == qtype for of in types.values())}
    arch = next(iter(plans.values())).arch
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        f"# {MODELS[name]}.keys as {arch.title}, general.architecture {arch.tag}",
        "[kept]",
        *_lines(kept),
    ]
    for recipe, plan in plans.items():
        base = RECIPES[recipe].base.name
        lines.append(f"[{recipe}] {base}, {plan.data_bytes / 1e9:.3f} GB")
        lines += _lines({key: qtype for key, qtype in types[recipe].items() if key not in kept and qtype != base})
    return "\n".join(lines) + "\n"


def _lines(types: dict[str, str]) -> list[str]:
    names = {qtype: [key for key in types if types[key] == qtype] for qtype in sorted(set(types.values()))}
    return [f"{qtype}: {name}" for qtype, keys in names.items() for name in fold_names(keys)]


def fold_names(names: Iterable[str]) -> list[str]:
    """Names with sets of numbers that stand for exactly these names, in the order of their first appearance."""
    numbers: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        numbers.setdefault(NUMBER.sub("#", name), []).append(tuple(map(int, NUMBER.findall(name))))
    return [_fill(pattern, sets) for pattern, tuples in numbers.items() for sets in _products(tuples)]


def _products(tuples: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Sets of numbers for each place whose products make up the tuples."""
    if not tuples[0]:
        return [()]
    behind: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in tuples:
        behind.setdefault(first, []).append(tuple(rest))
    merged: dict[tuple[tuple[tuple[int, ...], ...], ...], list[int]] = {}
    for first, rests in behind.items():
        merged.setdefault(tuple(_products(rests)), []).append(first)
    return [(tuple(sorted(firsts)), *rest) for products, firsts in merged.items() for rest in products]


def _fill(pattern: str, sets: Sequence[tuple[int, ...]]) -> str:
    labels = iter(sets)
    return re.sub("#", lambda _: _label(next(labels)), pattern)


def _label(numbers: Sequence[int]) -> str:
    """One number as it is, several as {0..2,5}."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    label = ",".join("..".join(map(str, run)) for run in runs)
    return label if len(numbers) == 1 else f"{{{label}}}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: write some schemas, or all of them."""
    sys.path.insert(0, str(ROOT / "tools"))
    import _pack  # noqa: F401

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(MODELS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in parser.parse_args(argv).names or MODELS:
        (FOLDER / f"{name}.schema").write_text(make_schema(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
