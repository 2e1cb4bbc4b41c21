# SPDX-License-Identifier: Apache-2.0
"""Generates pictures with a tiny Flux in each quantized type through a real ComfyUI server, and measures them.

    nox -s demo            everything, on a fresh machine
    python demo/run.py     the same where the requirements are installed

Converts the BF16 safetensors model in tests/data with tools/convert.py to every type, starts ComfyUI with this pack in
it, and submits one workflow per file and prompt over its API: "Unet Loader (GGUF)" and otherwise ComfyUI's own nodes.
The reference is the safetensors file through ComfyUI's own loader. Pictures, a contact sheet and the table go to
demo-output/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import _pack  # noqa: F401
from gguf_kit.demo import host, metrics, sheet, tiny_flux
from gguf_kit.demo.server import ComfyServer, ServerError, WorkflowError
from gguf_kit.demo.workflow import (
    Loader,
    Result,
    build_workflow,
    gguf_loader,
    run_workflow,
    safetensors_loader,
    seconds_per_step,
)
from gguf_kit.quantize.recipes import RECIPES
from gguf_kit.tools import convert

OUTPUT = host.PACK / "demo-output"
TYPES = ("BF16", *(name for name, recipe in RECIPES.items() if not recipe.needs_imatrix))
REFERENCE = "safetensors"
HEADINGS = ("type", "MB", "bits/weight", "latent rel. error", "PSNR dB", "s/step")
METHOD = (
    "Tiny Flux (9.07 M weights) through a ComfyUI {comfyui} server, torch {torch}, float32 on one CPU thread: euler,\n"
    "simple, 8 steps, cfg 1.0, eight prompts. Errors are over all eight together, against the BF16 safetensors in\n"
    "ComfyUI's own loader; the latent error is relative, in model space. MB and bits/weight count all tensors of the\n"
    "file. s/step: the server's execution times of two runs with a loaded model that differ only in their number of\n"
    "steps, subtracted and divided by that difference; median of three."
)


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        type: name of the file's type, or REFERENCE.
        mb, bpw: megabytes and bits per weight of all tensors.
        latent_error, psnr_db: against the reference, psnr_db None for equal pictures.
        seconds_per_step: median sampling time.
    """

    type: str
    mb: float
    bpw: float
    latent_error: float
    psnr_db: float | None
    seconds_per_step: float

    def cells(self) -> tuple[str, ...]:
        """The values as the table shows them, in the order of HEADINGS."""
        psnr = "inf" if self.psnr_db is None else f"{self.psnr_db:.1f}"
        numbers = f"{self.mb:.2f}", f"{self.bpw:.2f}", f"{self.latent_error:.4f}", psnr, f"{self.seconds_per_step:.3f}"
        return (self.type, *numbers)


def make_models(folder: Path, types: Sequence[str]) -> dict[str, Path]:
    """GGUF files of the tiny Flux, always made anew by the converter: type -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"tiny-flux-{name}.gguf" for name in types}
    for name, path in paths.items():
        options = ["--src", str(tiny_flux.MODEL), "--dst", str(path), "--type", name, "--overwrite"]
        if convert.main(options):
            raise ServerError(f"tools/convert.py could not make {path.name}")
    return paths


def make_server(work: Path, models: Sequence[Path], log: Path) -> ComfyServer:
    """A server, not yet started, with the pack, the test nodes and the models in it."""
    folders = {
        "diffusion_models": [tiny_flux.MODEL, *models],
        "vae_approx": tiny_flux.VAE_FILES,
        "tiny_flux": tiny_flux.PROMPT_FILES,
    }
    base = host.make_base(work, {"gguf-kit": host.PACK, "tiny-flux-nodes": host.TEST_NODES}, folders)
    return ComfyServer(host.get_host(), base, log)


def sample(server: ComfyServer, loader: Loader, progress: tqdm) -> list[Result]:
    """One result for each prompt of tiny_flux.SEEDS."""
    results = []
    for prompt, seed in tiny_flux.SEEDS.items():
        results.append(run_workflow(server, build_workflow(loader, prompt, seed)))
        progress.update()
    return results


def measure(server: ComfyServer, models: dict[str, Path]) -> tuple[list[Row], dict[str, list[Result]]]:
    """Sample and time the reference and each model: the rows of the table, and type -> results."""
    loaders = {REFERENCE: safetensors_loader(tiny_flux.MODEL.name)}
    loaders |= {name: gguf_loader(path.name) for name, path in models.items()}
    results, rows = {}, []
    with tqdm(total=len(loaders) * len(tiny_flux.SEEDS), desc="sample", unit="picture", disable=None) as progress:
        for name, loader in loaders.items():
            results[name] = sample(server, loader, progress)
            seconds = seconds_per_step(server, loader)
            size = metrics.file_size(models.get(name, tiny_flux.MODEL))
            rows.append(compare(name, size, results[name], results[REFERENCE], seconds))
    return rows, results


def compare(name: str, size: metrics.FileSize, found: list[Result], wanted: list[Result], seconds: float) -> Row:
    """The table's line for one type."""
    error = metrics.latent_error(np.concatenate([r.latent for r in found]), np.concatenate([r.latent for r in wanted]))
    psnr = metrics.psnr(np.stack([r.picture for r in found]), np.stack([r.picture for r in wanted]))
    psnr_db = psnr if np.isfinite(psnr) else None
    return Row(name, size.n_bytes / 1e6, size.bpw, error, psnr_db, seconds)


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    return aligned_table([HEADINGS, *(row.cells() for row in rows)])


def aligned_table(lines: Sequence[Sequence[str]]) -> str:
    """Headings and rows as a Markdown table that is aligned in a terminal too."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def write_pictures(folder: Path, results: dict[str, list[Result]], names: Sequence[str]) -> None:
    """Write every picture as folder/TYPE/NAME.png."""
    for type_name, found in results.items():
        (folder / type_name).mkdir(parents=True, exist_ok=True)
        for name, result in zip(names, found, strict=True):
            (folder / type_name / f"{name}.png").write_bytes(result.png)


def write_report(output: Path, rows: Sequence[Row], results: dict[str, list[Result]], versions: dict[str, str]) -> str:
    """Write pictures, contact sheet, results.md and results.json; returns the table."""
    shutil.rmtree(output / "pictures", ignore_errors=True)
    write_pictures(output / "pictures", results, [prompt.replace(" ", "-") for prompt in tiny_flux.SEEDS])
    labels = {row.type: f"{row.type}\n{row.bpw:.2f} bits/weight\nerror {row.latent_error:.4f}" for row in rows}
    pictures = [(labels[name], [result.png for result in found]) for name, found in results.items()]
    sheet.write_contact_sheet(output / "contact_sheet.png", list(tiny_flux.SEEDS), pictures)
    table, method = markdown_table(rows), METHOD.format(**versions)
    text = f"# Results of the demo\n\n{method}\n\n{table}\n\n![contact sheet](contact_sheet.png)\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    report = {**versions, "method": method, "rows": [asdict(row) for row in rows]}
    (output / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 when all pictures were made, 2 when something stopped it, which is said on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, metavar="TYPE", help=", ".join(TYPES))
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder for the results (demo-output)")
    args = parser.parse_args(argv)
    output = args.out.resolve()
    output.mkdir(parents=True, exist_ok=True)
    try:
        models = make_models(output / "models", args.types)
        with tempfile.TemporaryDirectory(prefix="gguf-kit-demo-") as work:
            with make_server(Path(work), list(models.values()), output / "server.log") as server:
                rows, results = measure(server, models)
                system = server.system_stats()["system"]
        versions = {"comfyui": system["comfyui_version"], "torch": system["pytorch_version"]}
        table = write_report(output, rows, results, versions)
    except (host.HostError, ServerError, WorkflowError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print(f"\n{table}\n")
    for name in ("results.md", "results.json", "contact_sheet.png", "pictures", "models", "server.log"):
        print(output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
