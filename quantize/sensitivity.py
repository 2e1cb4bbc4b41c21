# SPDX-License-Identifier: Apache-2.0
"""What storing a tensor in a type costs: the squared error of the layer's outputs that it causes, measured.

Each candidate type really encodes and decodes the rows of a weight W, giving Wq; its error is the mean over inputs x of
|(W - Wq) x|^2. The inputs are the rows that an importance matrix recorded of them; without those their mean squares,
as if columns did not depend on each other; without either every column has a mean square of 1. A gain says what a
layer's output error does to the model's result, so that gain * error can be added up over tensors.

Owns which encodings are tried and how the work is spread; weight_samples.py has the arithmetic, costs_cache.py keeps
what was measured. Knows no budgets: tune.py chooses among the candidates.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from ..dequant import dequantize
from ..errors import BadFile, GGUFError, plain_text
from ..gguf_file import DEFAULT_ALIGNMENT
from ..layouts import LAYOUTS, n_bytes
from ..models import archs
from .costs_cache import CostsCache, Encoding, Measured
from .encode import FLOAT_DTYPES, Engine, encode_rows, useful_threads
from .ggml import requires_imatrix
from .imatrix import Imatrix, Weighting
from .mixed import encode_mixed
from .plan import SMALL, SMALLEST_BLOCK, STORED_TYPES, PlannedTensor, choose_arch
from .recipes import SMALL_BLOCK_TYPES
from .sources import Source
from .weight_samples import Estimate, Inputs, Sample, spread_rows

# Slowest first, so that no thread is left alone with a long one at the end.
DEFAULT_QTYPES = (
    QType.IQ2_XXS, QType.IQ2_XS, QType.IQ2_S, QType.IQ3_XXS, QType.IQ3_S, QType.IQ4_XS, QType.IQ4_NL, QType.Q2_K,
    QType.Q4_K, QType.Q5_K, QType.Q3_K, QType.Q6_K, QType.Q5_1, QType.Q5_0, QType.Q4_1, QType.Q4_0, QType.Q8_0,
)  # fmt: skip
# Beside SMALL_BLOCK_TYPES for rows that are no multiple of 256: the only type of 4.5 bits that is no IQ type.
SMALL_ROW_QTYPES = (QType.Q4_0,)
# ggml encodes these without a look at the importance it is given.
IGNORE_IMPORTANCE = frozenset(
    QType[name] for name in ("Q8_0", "Q1_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4") if name in QType.__members__
)
DEFAULT_SAMPLE_ROWS = 512
MIN_ROWS_TO_MIX = 8  # half of them choose, the others measure what was chosen
TENSORS_AT_WORK = 2  # whose sampled rows are in memory: one is finished while the next has work for idle threads

# Called with the tensor that is at work and the fraction of all work that is done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Candidate:
    """One way to store a tensor, and what it costs.

    Attributes:
        qtype, weighting: how it is encoded.
        n_bytes: in a file, with the padding to its alignment.
        error: mean over the inputs x of |(W - Wq) x|^2.
        std_error: of `error`, from measuring some rows of W only; 0 where all were measured.
    """

    qtype: QType
    weighting: Weighting
    n_bytes: int
    error: float
    std_error: float


@dataclass(frozen=True)
class TensorCosts:
    """One tensor that can be quantized, and its candidates; the predicted error of each is gain * its error.

    Attributes:
        name, category, shape: as planned.
        block: rank of the tensor's block in its stack, -1 outside.
        gain: squared error of the model's result per squared error of the layer's output.
        energy: mean over the inputs x of |W x|^2.
        candidates: the source's own precision first.
    """

    name: str
    category: archs.Category
    block: int
    shape: tuple[int, ...]
    gain: float
    energy: float
    candidates: tuple[Candidate, ...]


def is_quantizable(tensor: PlannedTensor) -> bool:
    """Whether a tensor has candidates: a weight of some size that is planned as 16 bits or fewer, in rows of 32.

    Plans of F32 files leave nothing: they do not tell what has to stay F32.
    """
    if tensor.qtype not in LAYOUTS or tensor.qtype is QType.F32 or not tensor.name.endswith(".weight"):
        return False
    return len(tensor.shape) > 1 and prod(tensor.shape) > SMALL and tensor.stored_shape[-1] % SMALLEST_BLOCK == 0


def candidate_types(tensor: PlannedTensor, qtypes: Sequence[QType] = DEFAULT_QTYPES) -> tuple[QType, ...]:
    """Those of some types that can hold a tensor's rows, and what stands in for the others where rows are short."""
    row = tensor.stored_shape[-1]
    fitting = [qtype for qtype in qtypes if row % GGML_QUANT_SIZES[qtype][0] == 0]
    if len(fitting) < len(qtypes):
        fitting += [SMALL_BLOCK_TYPES.get(qtype, qtype) for qtype in qtypes]
        fitting += SMALL_ROW_QTYPES if QType.Q4_K in qtypes else ()
    return tuple(qtype for qtype in dict.fromkeys(fitting) if row % GGML_QUANT_SIZES[qtype][0] == 0)


def candidate_weightings(qtype: QType, has_importance: bool, has_rows: bool = False) -> tuple[Weighting, ...]:
    """The weightings that are worth a try: those that give a type different bytes.

    With recorded rows a mixture of them is better than each alone; that without importance stays for comparison.
    """
    if not has_importance:
        return () if requires_imatrix(qtype) else (Weighting.NONE,)
    if qtype in FLOAT_DTYPES or qtype in IGNORE_IMPORTANCE:
        return (Weighting.FULL,)
    if requires_imatrix(qtype):
        return (Weighting.MIXED,) if has_rows else (Weighting.FULL, Weighting.ROOT)
    return (Weighting.NONE, Weighting.MIXED) if has_rows else (Weighting.NONE, Weighting.ROOT, Weighting.FULL)


@dataclass(frozen=True)
class Measurement:
    """Everything that a measurement needs.

    Attributes:
        source: where weights are read.
        imatrix: what is known of inputs and gains, or None.
        engine: what encodes.
        qtypes: candidates, as far as the engine can make them.
        sample_rows: rows to measure of a tensor that has more; 0: all of every tensor.
    """

    source: Source
    imatrix: Imatrix | None
    engine: Engine
    qtypes: tuple[QType, ...]
    sample_rows: int

    def knows_inputs(self, tensor: PlannedTensor) -> bool:
        """Whether the importance matrix speaks of a tensor; it does so of matrices only, stored as they are."""
        return self.imatrix is not None and tensor.is_matrix and tensor.name in self.imatrix.entries

    def can_mix(self, tensor: PlannedTensor) -> bool:
        """Whether a tensor's inputs were recorded, so that it can be put together by them."""
        if self.imatrix is None or not self.knows_inputs(tensor):
            return False
        rows = self.imatrix.entries[tensor.name].rows
        return rows is not None and len(rows) >= MIN_ROWS_TO_MIX

    def own_qtype(self, tensor: PlannedTensor) -> QType:
        """The type without a loss that matters: the planned one if it is no quantization, or else the source's."""
        stored = self.source.tensors[tensor.name]
        if tensor.qtype in FLOAT_DTYPES or tensor.qtype is stored.qtype:
            return tensor.qtype
        return STORED_TYPES[stored.dtype]

    def encodings(self, tensor: PlannedTensor) -> tuple[Encoding, ...]:
        """Everything to measure of a tensor; its own type, in the one weighting that is enough for it, comes first."""
        own, known = self.own_qtype(tensor), self.knows_inputs(tensor)
        found = [Encoding(own, Weighting.FULL if known else Weighting.NONE)]
        for qtype in candidate_types(tensor, self.qtypes):
            if qtype is not own and qtype in self.engine.qtypes:
                weightings = candidate_weightings(qtype, known, self.can_mix(tensor))
                found += [Encoding(qtype, weighting) for weighting in weightings]
        return tuple(found)

    def n_sampled(self, tensor: PlannedTensor) -> int:
        """Rows that are measured of a tensor."""
        n_rows = prod(tensor.stored_shape[:-1])
        return min(n_rows, self.sample_rows or n_rows)

    def read(self, tensor: PlannedTensor) -> Sample:
        """The rows to measure, on the CPU.

        Raises:
            GGUFError: the weights cannot be read or are not finite, or the importance matrix is another model's.
        """
        path, n_columns = self.source.path, tensor.stored_shape[-1]
        weights = self.source.read(tensor.name)
        if tuple(weights.shape) != tensor.shape:
            problem = f"tensor '{plain_text(tensor.name)}' has shape {tuple(weights.shape)}, announced as"
            raise GGUFError(f"{problem} {tensor.shape}", path=path, subject=tensor.name)
        rows = weights.reshape(-1, n_columns)
        n_rows = rows.shape[0]
        if self.n_sampled(tensor) < n_rows:
            rows = rows[spread_rows(n_rows, self.n_sampled(tensor))]
        if not bool(torch.isfinite(rows).all()):
            problem = f"tensor '{plain_text(tensor.name)}' has weights that are NaN or infinite"
            hint = "The source is damaged; take another one."
            raise GGUFError(problem, path=path, subject=tensor.name, hint=hint)
        qtype = self.source.tensors[tensor.name].qtype
        return Sample(tensor.name, rows, n_rows, qtype, self._importance(tensor), self._inputs(tensor))

    def _importance(self, tensor: PlannedTensor) -> dict[Weighting, torch.Tensor | None]:
        if self.imatrix is None or not self.knows_inputs(tensor):
            return {}
        return {w: self.imatrix.importance(tensor.name, tensor.shape[-1], w) for w in Weighting}

    def _inputs(self, tensor: PlannedTensor) -> Inputs:
        if self.imatrix is None or not self.knows_inputs(tensor):
            return Inputs(torch.ones(tensor.stored_shape[-1]))
        rows = self.imatrix.entries[tensor.name].rows
        if rows is not None and not rows.shape[0]:
            rows = None
        return Inputs(self.imatrix.columns[tensor.name], None if rows is None else rows.float())

    def measure_encoding(self, sample: Sample, encoding: Encoding) -> Estimate | None:
        """The error of one encoding; None if it cannot hold the weights."""
        qtype, weighting = encoding
        if qtype is sample.qtype or qtype is STORED_TYPES[sample.rows.dtype]:
            return Estimate(0.0, 0.0)
        importance = sample.importance.get(weighting)
        # Judged by the inputs that it was chosen by, a mixture would look better than it is.
        choosing, inputs = sample.inputs.halves() if weighting is Weighting.MIXED else (None, sample.inputs)
        name, path, errors = sample.name, self.source.path, []
        for rows in sample.chunks():
            try:
                if choosing is not None:
                    data = encode_mixed(self.engine, rows, qtype, choosing, name, path)
                else:
                    data = encode_rows(self.engine, rows, qtype, importance, name, path)
            except GGUFError as error:
                # The plain kind says that the weights do not fit the type; others say that the engine does not work.
                if type(error.__cause__) is not GGUFError:
                    raise
                return None
            decoded = dequantize(data.to(rows.device), qtype, rows.shape)
            errors.append(inputs.mean_square_outputs(decoded.sub_(rows)))
        estimate = sample.estimate(torch.cat(errors))
        return estimate if math.isfinite(estimate.error) and math.isfinite(estimate.std_error) else None


def measure(
    source: Source,
    tensors: Sequence[PlannedTensor],
    imatrix: Imatrix | None,
    engine: Engine,
    *,
    qtypes: Sequence[QType] = DEFAULT_QTYPES,
    sample_rows: int = DEFAULT_SAMPLE_ROWS,
    n_threads: int = 1,
    cache: Path | None = None,
    progress: Progress | None = None,
    arch: archs.Arch | None = None,
) -> tuple[TensorCosts, ...]:
    """Measure every candidate of every tensor that can be quantized.

    The caller keeps torch on one thread (torch.set_num_threads): the threads are those of this function. Memory is
    bounded by the sampled rows of two tensors, and by what is read of one.

    Args:
        tensors: of a plan of BF16, F16 or of a recipe; those without candidates are passed over.
        qtypes: which types to try, beside each tensor's own precision.
        sample_rows: rows, evenly spread, that stand for a tensor that has more; 0: all rows of every tensor.
        cache: file that remembers what was measured; made if it is not there.
        arch: of the plan; None: it is detected.
    Raises:
        GGUFError: weights cannot be read or are not finite, the importance matrix is another model's, or the cache
            cannot be used.
    """
    if sample_rows < 0 or sample_rows == 1:
        raise GGUFError(f"{sample_rows} sample rows are too few", hint="Take 2 or more, or 0 for all rows.")
    measurement = Measurement(source, imatrix, engine, tuple(qtypes), sample_rows)
    chosen = [tensor for tensor in tensors if is_quantizable(tensor)]
    check_imatrix(measurement, chosen)
    measured = dict(_measure_all(measurement, chosen, useful_threads(engine, n_threads), CostsCache(cache), progress))
    gains = choose_gains({name: m.energy for name, m in measured.items()}, measured_gains(measurement, chosen))
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    roles = archs.roles(arch or choose_arch(source.path, shapes, "")[0], shapes)
    return tuple(
        TensorCosts(
            tensor.name,
            tensor.category,
            roles[tensor.name].block,
            tensor.shape,
            gains[tensor.name],
            measured[tensor.name].energy,
            _candidates(tensor, measurement.encodings(tensor), measured[tensor.name]),
        )
        for tensor in chosen
    )


def check_imatrix(measurement: Measurement, tensors: Sequence[PlannedTensor]) -> None:
    """Refuse an importance matrix of another model before anything is measured.

    Raises:
        BadFile: an entry has another number of columns than its tensor, or none belongs to a tensor.
    """
    if measurement.imatrix is None:
        return
    known = [tensor for tensor in tensors if measurement.knows_inputs(tensor)]
    for tensor in known:
        measurement.imatrix.importance(tensor.name, tensor.shape[-1])
    if tensors and not known:
        hint = "The importance matrix was made with another model."
        raise BadFile("none of its entries is a matrix of the model", path=measurement.imatrix.path, hint=hint)


def measured_gains(measurement: Measurement, tensors: Sequence[PlannedTensor]) -> dict[str, float]:
    """Name -> gain that the importance matrix has for a tensor; where inputs are unknown errors are in other units."""
    found = {}
    for tensor in tensors:
        if measurement.imatrix is not None and measurement.knows_inputs(tensor):
            gain = measurement.imatrix.entries[tensor.name].gain
            if gain is not None:
                found[tensor.name] = gain
    return found


def choose_gains(energies: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Name -> gain for every tensor: the measured one, or one by which relative errors count as elsewhere.

    Args:
        energies: name -> mean over the inputs x of |W x|^2.
        measured: name -> gain, for some of these names, or none.
    """
    typical = [gain * energies[name] for name, gain in measured.items() if gain * energies[name] > 0]
    product = statistics.median(typical) if typical else 1.0
    fallback = {name: product / energy if energy > 0 else 0.0 for name, energy in energies.items()}
    return fallback | dict(measured)


def _candidates(tensor: PlannedTensor, encodings: Sequence[Encoding], measured: Measured) -> tuple[Candidate, ...]:
    found = []
    for qtype, weighting in encodings:
        estimate = measured.errors[Encoding(qtype, weighting)]
        if estimate is not None:
            size = n_bytes(qtype, tensor.stored_shape)
            size += -size % DEFAULT_ALIGNMENT
            found.append(Candidate(qtype, weighting, size, estimate.error, estimate.std_error))
    return tuple(found)


@dataclass(frozen=True)
class _AtWork:
    """A tensor whose encodings are being measured: what is known of it, and what will be."""

    tensor: PlannedTensor
    key: str
    known: Measured
    futures: Mapping[Encoding, Future[Estimate | None]]


def _measure_all(
    measurement: Measurement,
    tensors: Sequence[PlannedTensor],
    n_threads: int,
    cache: CostsCache,
    progress: Progress | None,
) -> Iterator[tuple[str, Measured]]:
    """(name, what is known of it) of all tensors, in order."""
    meter = _Meter(measurement, tensors, progress)
    at_work: deque[_AtWork] = deque()
    pool = ThreadPoolExecutor(n_threads)
    try:
        for tensor in tensors:
            while len(at_work) >= TENSORS_AT_WORK:
                yield _finish(at_work.popleft(), cache, meter)
            at_work.append(_start(measurement, tensor, pool, cache))
            meter.advance(tensor, len(measurement.encodings(tensor)) - len(at_work[-1].futures))
        while at_work:
            yield _finish(at_work.popleft(), cache, meter)
    finally:
        pool.shutdown(cancel_futures=True)


def _start(measurement: Measurement, tensor: PlannedTensor, pool: ThreadPoolExecutor, cache: CostsCache) -> _AtWork:
    """Read a tensor and hand its encodings to the threads, as far as the cache does not know them."""
    sample = measurement.read(tensor)
    key = sample.key
    known = cache.get(key) or Measured(sample.energy())
    moved = sample.to(measurement.engine.device)
    missing = [encoding for encoding in measurement.encodings(tensor) if encoding not in known.errors]
    futures = {encoding: pool.submit(measurement.measure_encoding, moved, encoding) for encoding in missing}
    return _AtWork(tensor, key, known, futures)


def _finish(work: _AtWork, cache: CostsCache, meter: _Meter) -> tuple[str, Measured]:
    """Wait for a tensor's encodings and remember them."""
    errors = {}
    for encoding, future in work.futures.items():
        errors[encoding] = future.result()
        meter.advance(work.tensor, 1)
    if errors:
        cache.add(work.key, work.tensor.name, Measured(work.known.energy, errors))
    return work.tensor.name, Measured(work.known.energy, {**work.known.errors, **errors})


class _Meter:
    """Tells how much is done, by weights that are encoded."""

    def __init__(self, measurement: Measurement, tensors: Sequence[PlannedTensor], progress: Progress | None) -> None:
        self._measurement = measurement
        self._progress = progress
        self._done = 0
        self._total = sum(self._weights(tensor) * len(measurement.encodings(tensor)) for tensor in tensors)

    def _weights(self, tensor: PlannedTensor) -> int:
        return self._measurement.n_sampled(tensor) * tensor.stored_shape[-1]

    def advance(self, tensor: PlannedTensor, n_encodings: int) -> None:
        """So many encodings of a tensor are done."""
        self._done += self._weights(tensor) * n_encodings
        if self._progress and n_encodings:
            self._progress(tensor.name, self._done / self._total)
