# SPDX-License-Identifier: Apache-2.0
"""A MODEL that records an importance matrix while it samples, and the file that all its samplings add up in.

What is listened to and measured is in host/collector.py and its neighbours, the file's format in quantize/imatrix.py.
A sampling that fails or is cancelled adds nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from .errors import GGUFError, name_list, plain_text
from .host.collect_calls import CallRecorder
from .host.collect_gains import Modules, make_meter, measure_gains
from .host.collector import InputListener, LayerInputs, linear_layers
from .quantize.imatrix import Entry, Imatrix, read_imatrix
from .quantize.imatrix_merge import merge
from .quantize.imatrix_write import write_imatrix
from .saver import TAKEN_OFF, plain_key

log = logging.getLogger("gguf_kit")

WRAPPER_KEY = "gguf_kit_imatrix"
DATASET = "ComfyUI"
HELD_BYTES = 64 << 20  # size of a file that is small enough to be remembered from one sampling to the next


class ImatrixFile:
    """The file that samplings add up in.

    Args:
        path_of: gives its path.
        fresh: the first sampling makes a file of its own: path_of() is asked only then, for a path that no file has.
    """

    def __init__(self, path_of: Callable[[], Path], fresh: bool) -> None:
        self._path_of = path_of
        self._path = None if fresh else path_of()
        self._held: tuple[tuple[int, ...], Imatrix] | None = None  # state of the file, and what it held then

    def check(self, columns: Mapping[str, int]) -> None:
        """Refuse a model whose entries cannot be added to the file.

        Args:
            columns: name of a weight -> columns of it.
        Raises:
            GGUFError: the file is of another model, or no importance matrix.
        """
        if self._path is None or not self._path.exists():
            return
        imatrix = self._read(self._path, with_rows=False)
        hint = "The file was made with another model: choose another filename_prefix, or the mode 'new file'."
        for name, entry in imatrix.entries.items():
            n_columns = columns.get(name, entry.n_columns)
            if (entry.n_matrices, entry.n_columns) != (1, n_columns):
                sizes = f"{entry.n_matrices} x {entry.n_columns} columns, but 1 x {n_columns} in this model"
                problem = f"the entry of '{plain_text(name)}' has {sizes}"
                raise GGUFError(problem, path=self._path, subject=name, hint=hint)
        if not imatrix.entries.keys() & columns.keys():
            problem = f"none of its {len(imatrix.entries)} entries is of a layer of this model"
            raise GGUFError(f"{problem}: {name_list([*imatrix.entries])}", path=self._path, hint=hint)

    def add(self, entries: Mapping[str, Entry], n_rows: int) -> Imatrix:
        """Add what one sampling gave; returns what the file holds now, under its path.

        Args:
            n_rows: recorded rows of each layer that the file has room for; 0: as many as a sampling gave.
        Raises:
            GGUFError: it does not fit the file, or cannot be written.
        """
        is_new = self._path is None
        path = self._path or self._path_of()
        n_inputs = max(int(entry.counts.max()) for entry in entries.values())
        found = Imatrix(path, MappingProxyType(dict(entries)), (DATASET,), chunk_count=1, chunk_size=n_inputs)
        if not is_new and path.exists():
            found = merge([self._read(path), found], max_rows=n_rows or None)
        try:
            write_imatrix(found, path, overwrite=not is_new)
        except GGUFError as error:
            problem = str(error).removesuffix(error.hint).strip()  # the hint is about a command line
            raise GGUFError(problem, hint="Choose another filename_prefix, or free some space.") from error
        self._path = path
        state = _state(path)
        self._held = (state, found) if state and state[0] <= HELD_BYTES else None
        return found

    def _read(self, path: Path, with_rows: bool = True) -> Imatrix:
        """What the file holds; from memory while nobody else has written it."""
        if self._held is not None and self._held[0] == _state(path):
            return self._held[1]
        self._held = None
        return read_imatrix(path, with_rows=with_rows)


class Collector:
    """A wrapper around the sampling of a model, for the host's SAMPLER_SAMPLE: there the model is loaded and patched.

    Args:
        file: what all samplings add up in.
        n_rows: rows of each layer's input that are kept, 0: none.
        n_steps: steps on whose calls gains are measured, 0: none.
    """

    def __init__(self, file: ImatrixFile, n_rows: int, n_steps: int) -> None:
        self.file = file
        self.n_rows = n_rows
        self.n_steps = n_steps

    def __call__(self, executor: Any, guider: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Sample as without it, and add what was seen to the file."""
        if len(sigmas) < 2:  # no step to take, which a part of a schedule may be
            untouched: torch.Tensor = executor(guider, sigmas, *args, **kwargs)
            return untouched
        model = guider.inner_model
        network = model.diffusion_model
        layers = linear_layers(network)
        names = weight_names(model, layers)
        self.file.check({names[name]: module.weight.shape[1] for name, module in layers.items()})
        listener = InputListener(layers, self.n_rows, len(sigmas) - 1)
        recorder = CallRecorder(network, sigmas.tolist(), self.n_steps, lambda sigma: output_scale(model, sigma))
        with _eager():
            with listener, recorder if self.n_steps else contextlib.nullcontext():
                samples: torch.Tensor = executor(guider, sigmas, *args, **kwargs)
            seen = listener.results()
            if not seen:
                problem = f"none of the model's {len(layers)} linear layers was called through its own forward"
                raise GGUFError(problem, hint="Bypass nodes that compile or replace the model while you collect.")
            unheard = [names[name] for name in layers if name not in seen]
            if unheard:
                log.info("Without importance, as they were not called: %d layers: %s", len(unheard), name_list(unheard))
            gains: dict[str, float] = {}
            if recorder.calls:
                try:
                    gains = self._measure(guider, recorder, {name: layers[name] for name in seen}, samples)
                except comfy.model_management.OOM_EXCEPTION:
                    log.warning("There is no memory to measure sensitivity; take fewer calls, or smaller pictures.")
        entries = {names[name]: _entry(seen[name], gains.get(name), len(recorder.calls)) for name in seen}
        _report(self.file.add(entries, self.n_rows), entries)
        return samples

    def _measure(self, guider: Any, recorder: CallRecorder, layers: Modules, samples: torch.Tensor) -> dict[str, float]:
        bar = comfy.utils.ProgressBar(len(layers))

        def before_layer() -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update(1)

        meter = make_meter(guider.inner_model.diffusion_model, recorder.calls, recorder.weights(), samples)
        if not meter.repeats():
            log.warning(
                "Sensitivity is not measured: the model gives other results when it is called again. "
                "Nodes that skip or cache parts of the model can be the reason; bypass them while you collect."
            )
            return {}
        log.info("Measuring the sensitivity of %d layers on %d calls of the model", len(layers), len(recorder.calls))
        return measure_gains(meter, layers, guider.model_patcher.load_device, before_layer)


def collect(patcher: Any, file: ImatrixFile, n_rows: int, n_steps: int) -> Any:
    """A clone of a MODEL that records its importance matrix into a file whenever it samples.

    Args:
        n_rows, n_steps: as of Collector.
    Raises:
        GGUFError: the file is there already, and of another model.
    """
    layers = linear_layers(patcher.model.diffusion_model)
    names = weight_names(patcher.model, layers)
    file.check({names[name]: module.weight.shape[1] for name, module in layers.items()})
    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, WRAPPER_KEY, Collector(file, n_rows, n_steps))
    return clone


def _state(path: Path) -> tuple[int, ...]:
    """What changes with a file's content; () where it cannot be told."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


def weight_names(model: Any, layers: Modules) -> dict[str, str]:
    """Name of a layer -> name of its weight in files of such a model."""
    config = getattr(getattr(model, "model_config", None), "unet_config", None) or {}
    prefix = TAKEN_OFF.get(config.get("image_model", ""), "")
    return {name: f"{prefix}{plain_key(name)}.weight" for name in layers}


def output_scale(model: Any, sigma: float) -> float:
    """What an Euler step moves the latent by for each unit of the network's output and of sigma: 1 for a flow.

    d = (x - denoised) / sigma, and denoised depends linearly on the output.
    Source: comfy/k_diffusion/sampling.py to_d(), sample_euler().
    """
    if sigma == 0:
        return 0.0
    at = torch.tensor([sigma])
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    denoised = model.model_sampling.calculate_denoised(at, one, zero)
    return -float(denoised) / sigma


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Let compiled parts of a model run as they are written: what was compiled before would not call hooks."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    with set_stance("force_eager") if set_stance else contextlib.nullcontext():
        yield


def _entry(inputs: LayerInputs, gain: float | None, n_calls: int) -> Entry:
    counts = torch.tensor([float(inputs.n_rows)])
    return Entry(inputs.sums.unsqueeze(0), counts, inputs.rows, gain, float(n_calls) if gain is not None else 0.0)


def _report(imatrix: Imatrix, added: Mapping[str, Entry]) -> None:
    n_kept = sum(len(entry.rows) for entry in imatrix.entries.values() if entry.rows is not None)
    n_gains = sum(entry.gain is not None for entry in imatrix.entries.values())
    rows = int(max(entry.counts.max() for entry in added.values()))
    text = "%s: importance of %d layers from %d samplings; added now: up to %d rows a layer; holds %d rows, %d gains"
    log.info(text, imatrix.path, len(imatrix.entries), imatrix.chunk_count, rows, n_kept, n_gains)
