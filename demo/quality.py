# SPDX-License-Identifier: Apache-2.0
"""Measures what automatic recipes gain over the fixed ones on a tiny Flux, through a real ComfyUI server.

    nox -s quality             everything, on a fresh machine
    python demo/quality.py     the same where the requirements are installed

Records an importance matrix with the node "GGUF Imatrix Collector" on prompts and seeds of its own, lets tools/tune.py
choose types for the real file size of each fixed recipe, makes the files with tools/convert.py and draws other prompts
with other seeds. The reference is the BF16 safetensors file in ComfyUI's own loader. Table, pictures and a report go to
quality-output/.
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
from types import ModuleType

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import _pack  # noqa: F401
from gguf_kit.demo import host, metrics, sheet, tiny_flux
from gguf_kit.demo.run import aligned_table, make_server, write_pictures
from gguf_kit.demo.server import ComfyServer, ServerError, WorkflowError
from gguf_kit.demo.workflow import (
    Loader,
    Result,
    build_collecting_workflow,
    build_workflow,
    gguf_loader,
    run_workflow,
    safetensors_loader,
)
from gguf_kit.errors import GGUFError
from gguf_kit.quantize.imatrix import Imatrix, read_imatrix
from gguf_kit.tools import convert, report, tune
from gguf_kit.tools.report_pictures import ssim

OUTPUT = host.PACK / "quality-output"
TYPES = ("Q2_K", "Q3_K_S", "Q4_K_S")
REFERENCE = "safetensors"
POLICIES = ("kept", "free")
SEEDS_PER_PROMPT = 4
CALIBRATION_RUNS = 16
CALIBRATION_BATCH = 2
FIRST_CALIBRATION_SEED = 10_000
RECORDED_ROWS = 256
SENSITIVITY_CALLS = tiny_flux.STEPS
PREFIX = "imatrix/tiny-flux"
TITLES = {"fixed": "fixed recipe", "imatrix": "with importance", "kept": "automatic", "free": "automatic, all layers"}
HEADINGS = ("size of", "recipe", "file bytes", "latent error", "against fixed", "median", "PSNR dB", "SSIM")
METHOD = (
    "Tiny Flux (9.07 M weights) through a ComfyUI {comfyui} server, torch {torch}, float32 on one CPU thread: euler,\n"
    "simple, 8 steps, cfg 1.0, eight prompts with four seeds each. Importance matrix and gains come from\n"
    "{calibration}: other prompts, other seeds. Latent error: relative L2 error of the final\n"
    "latents against the BF16 safetensors, over all 32 together, in model space; median: of the 32 pictures, each\n"
    "for itself. 'with importance' is the fixed recipe weighed by the importance matrix. 'automatic' keeps in 16 bit\n"
    "what the fixed recipe keeps so; 'automatic, all layers' chooses for those layers too."
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        type: name of the file's recipe: a fixed one, or that of a recipe file.
        size_of: fixed recipe whose file size was the limit.
        recipe: key of TITLES.
        mb, bpw: megabytes and bits per weight of all tensors.
        file_bytes: real size.
        latent_error: relative L2 error over all latents.
        against_fixed: latent_error by that of the fixed recipe, less 1.
        median_error: of the single pictures.
        psnr_db, ssim: of the decoded pictures.
    """

    type: str
    size_of: str
    recipe: str
    mb: float
    bpw: float
    file_bytes: int
    latent_error: float
    against_fixed: float
    median_error: float
    psnr_db: float
    ssim: float

    def cells(self) -> tuple[str, ...]:
        """The values as the table shows them, in the order of HEADINGS."""
        change = "" if self.recipe == "fixed" else f"{100 * self.against_fixed:+.0f} %"
        errors = f"{self.latent_error:.4f}", change, f"{self.median_error:.4f}"
        return (
            self.size_of,
            TITLES[self.recipe],
            f"{self.file_bytes:,}",
            *errors,
            f"{self.psnr_db:.1f}",
            f"{self.ssim:.3f}",
        )


def test_jobs() -> list[tuple[str, int]]:
    """(prompt, seed) of the pictures that are judged."""
    return [(prompt, seed + k) for prompt, seed in tiny_flux.SEEDS.items() for k in range(SEEDS_PER_PROMPT)]


def calibration_jobs(n_runs: int) -> list[tuple[str, int]]:
    """(prompt, seed) of samplings that are learned from: prompts and seeds that test_jobs() does not have."""
    others = [name for name in tiny_flux.prompt_names() if name not in tiny_flux.SEEDS]
    return [(others[i * len(others) // n_runs], FIRST_CALIBRATION_SEED + i) for i in range(n_runs)]


def recorded_imatrix(work: Path, output: Path, n_runs: int) -> Path:
    """The importance matrix of the reference model, recorded by the node.

    Args:
        work: for what the server writes.
        output: for the file.
        n_runs: samplings.
    """
    options = {
        "filename_prefix": PREFIX,
        "mode": "add to the file",
        "record_rows": RECORDED_ROWS,
        "sensitivity_calls": SENSITIVITY_CALLS,
    }
    loader = safetensors_loader(tiny_flux.MODEL.name)
    with make_server(work / "calibrate", [], output / "server.log") as server:
        for prompt, seed in tqdm(calibration_jobs(n_runs), desc="calibrate", unit="run", disable=None):
            server.submit(build_collecting_workflow(loader, prompt, seed, CALIBRATION_BATCH, options))
        path = output / "tiny-flux.imatrix.gguf"
        shutil.copyfile(server.base / "output" / f"{PREFIX}.imatrix.gguf", path)
    return path


@dataclass(frozen=True)
class Made:
    """A file to be judged.

    Attributes:
        name: of its recipe, as Row.type.
        size_of, recipe: as in Row.
        path: the file.
    """

    name: str
    size_of: str
    recipe: str
    path: Path


def make_files(folder: Path, types: Sequence[str], imatrix: Path) -> list[Made]:
    """For each type the fixed recipe, the same weighed by importance, and automatic ones of the fixed one's size."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for type_name in types:
        fixed = folder / f"tiny-flux-{type_name}.gguf"
        run_tool(convert, fixed, "--type", type_name)
        files.append(Made(type_name, type_name, "fixed", fixed))
        weighed = folder / f"tiny-flux-{type_name}-imatrix.gguf"
        run_tool(convert, weighed, "--type", type_name, "--imatrix", str(imatrix))
        files.append(Made(f"{type_name}-imatrix", type_name, "imatrix", weighed))
        for policy in POLICIES:
            recipe = folder / f"auto-{type_name}-{policy}.txt"
            goal = "--max-size", str(fixed.stat().st_size), "--keep-policy", policy
            run_tool(tune, recipe, "--imatrix", str(imatrix), *goal, *tuning_options(folder))
            path = folder / f"tiny-flux-{recipe.stem}.gguf"
            run_tool(convert, path, "--imatrix", str(imatrix), "--recipe", str(recipe))
            files.append(Made(recipe.stem, type_name, policy, path))
    return files


def tuning_options(folder: Path) -> tuple[str, ...]:
    """How costs are measured, and where they are kept."""
    return "--cache", str(folder / "tiny-flux.costs.jsonl"), "--sample-rows", "0"


def run_tool(tool: ModuleType, path: Path, *options: str) -> None:
    """Run a command line of tools/ that makes a file of the tiny Flux."""
    if tool.main(["--src", str(tiny_flux.MODEL), "--dst", str(path), "--overwrite", *options]):
        raise ServerError(f"{Path(str(tool.__file__)).name} could not make {path.name}")


def learned_from(imatrix: Imatrix) -> str:
    """How many pictures an importance matrix was recorded from, in words."""
    return f"{imatrix.chunk_count * CALIBRATION_BATCH} other pictures"


def draw(server: ComfyServer, loader: Loader, progress: tqdm) -> list[Result]:
    """One result for each of test_jobs()."""
    found = []
    for prompt, seed in test_jobs():
        found.append(run_workflow(server, build_workflow(loader, prompt, seed)))
        progress.update()
    return found


def judge(made: Made, found: list[Result], wanted: list[Result], fixed: float) -> Row:
    """The table's line for one file; fixed: latent error of the fixed recipe, 0 for that itself."""
    error = metrics.latent_error(np.concatenate([r.latent for r in found]), np.concatenate([r.latent for r in wanted]))
    singles = [metrics.latent_error(a.latent, b.latent) for a, b in zip(found, wanted, strict=True)]
    pictures, references = np.stack([r.picture for r in found]), np.stack([r.picture for r in wanted])
    size = metrics.file_size(made.path)
    return Row(
        type=made.name,
        size_of=made.size_of,
        recipe=made.recipe,
        mb=size.n_bytes / 1e6,
        bpw=size.bpw,
        file_bytes=made.path.stat().st_size,
        latent_error=error,
        against_fixed=error / fixed - 1 if fixed else 0.0,
        median_error=float(np.median(singles)),
        psnr_db=metrics.psnr(pictures, references),
        ssim=float(np.mean([ssim(a, b) for a, b in zip(pictures, references, strict=True)])),
    )


def measure(server: ComfyServer, files: Sequence[Made]) -> tuple[list[Row], dict[str, list[Result]]]:
    """Draw with the reference and each file: the rows of the table, and Row.type -> results."""
    rows: list[Row] = []
    with tqdm(total=(1 + len(files)) * len(test_jobs()), desc="draw", unit="picture", disable=None) as progress:
        results = {REFERENCE: draw(server, safetensors_loader(tiny_flux.MODEL.name), progress)}
        for made in files:
            results[made.name] = draw(server, gguf_loader(made.path.name), progress)
            fixed = next((row.latent_error for row in rows if row.size_of == made.size_of), 0.0)
            rows.append(judge(made, results[made.name], results[REFERENCE], fixed))
    return rows, results


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table that is aligned in a terminal too."""
    return aligned_table([HEADINGS, *(row.cells() for row in rows)])


def label(row: Row) -> str:
    """What stands beside a file's pictures."""
    title = TITLES[row.recipe].replace(", ", ",\n")
    return f"size of {row.size_of}\n{title}\nerror {row.latent_error:.4f}"


def write_sheet(path: Path, rows: Sequence[Row], results: dict[str, list[Result]]) -> None:
    """The contact sheet: the first picture of each prompt, a line for each file."""
    labels = {row.type: label(row) for row in rows}
    lines = [
        (labels.get(name, "BF16\nsafetensors"), [result.png for result in found[::SEEDS_PER_PROMPT]])
        for name, found in results.items()
    ]
    sheet.write_contact_sheet(path, list(tiny_flux.SEEDS), lines)


def write_results(output: Path, rows: Sequence[Row], results: dict[str, list[Result]], versions: dict[str, str]) -> str:
    """Write pictures, contact sheet, quality.md and results.json; returns the table."""
    shutil.rmtree(output / "pictures", ignore_errors=True)
    names = [f"{prompt.replace(' ', '-')}-{seed}" for prompt, seed in test_jobs()]
    write_pictures(output / "pictures", results, names)
    write_sheet(output / "contact_sheet.png", rows, results)
    method, table = METHOD.format(**versions), markdown_table(rows)
    text = f"# Automatic recipes against fixed ones\n\n{method}\n\n{table}\n\n![contact sheet](contact_sheet.png)\n"
    (output / "quality.md").write_text(text, encoding="utf-8")
    found = {**versions, "method": method, "rows": [asdict(row) for row in rows]}
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return table


def write_report(output: Path, files: Sequence[Made], imatrix: Path) -> None:
    """Write report/report.html, by tools/report.py."""
    recipes = [made.path.parent / f"{made.name}.txt" for made in files if made.recipe in POLICIES]
    options = [option for recipe in recipes for option in ("--recipe", str(recipe))]
    shown = "--pictures", str(output / "pictures"), "--reference", REFERENCE, "--results", str(output / "results.json")
    arguments = ["--src", str(tiny_flux.MODEL), "--imatrix", str(imatrix), "--out", str(output / "report")]
    if report.main([*arguments, "--overwrite", *options, *shown, *tuning_options(output / "models")]):
        raise ServerError("tools/report.py could not make the report")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--types", nargs="+", choices=TYPES, default=TYPES, metavar="TYPE", help=", ".join(TYPES))
    add("--out", type=Path, default=OUTPUT, help="folder for the results (quality-output)")
    add("--imatrix", type=Path, metavar="FILE", help="take this importance matrix, record none")
    add("--runs", type=int, default=CALIBRATION_RUNS, metavar="N", help=f"samplings to learn from ({CALIBRATION_RUNS})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 when everything was measured, 2 when something stopped it, which is said on stderr."""
    args = make_parser().parse_args(argv)
    output = args.out.resolve()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="gguf-kit-quality-") as work:
            imatrix = args.imatrix or recorded_imatrix(Path(work), output, args.runs)
            files = make_files(output / "models", args.types, imatrix)
            models = [made.path for made in files]
            with make_server(Path(work) / "draw", models, output / "server.log") as server:
                rows, results = measure(server, files)
                system = server.system_stats()["system"]
        versions = {"comfyui": system["comfyui_version"], "torch": system["pytorch_version"]}
        versions["calibration"] = learned_from(read_imatrix(imatrix, with_rows=False))
        table = write_results(output, rows, results, versions)
        write_report(output, files, imatrix)
    except (host.HostError, ServerError, WorkflowError, GGUFError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    print(f"\n{table}\n")
    for name in ("quality.md", "results.json", "contact_sheet.png", "report/report.html", "pictures", "models"):
        print(output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
