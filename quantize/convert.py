# SPDX-License-Identifier: Apache-2.0
"""Carries out a plan: reads tensor by tensor, encodes in chunks on several threads, writes in order.

Memory is bounded by the chunks in flight, not by the model: a chunk is a few rows of one tensor, and reading never runs
further ahead than the threads need.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from ..dequant import PLAIN_DTYPES
from ..errors import GGUFError, name_list, plain_text
from .encode import Engine, check_engine, encode_rows, scales_are_finite
from .ggml import requires_imatrix
from .imatrix import Imatrix, Weighting
from .mixed import encode_mixed
from .plan import STORED_TYPES, Plan, PlannedTensor
from .sources import Source
from .weight_samples import Inputs
from .writer import Writer, file_size, make_header, merged_metadata

CHUNK_WEIGHTS = 2**21  # 8 MB as float32; with many threads chunks are smaller
MIN_CHUNK_WEIGHTS = 2**18
MAX_WEIGHTS_IN_FLIGHT = 2**24
GPU_CHUNK_WEIGHTS = 2**25
CHUNKS_PER_THREAD = 3  # in flight: one at work, one waiting, one done

# Called with the tensor that is being written and the bytes of it that were just done.
Progress = Callable[[PlannedTensor, int], None]


@dataclass(frozen=True)
class Conversion:
    """Everything that a conversion needs.

    Attributes:
        source: what is read.
        plan: what is made of it.
        name: value of general.name.
        imatrix: importance of columns, or None.
    """

    source: Source
    plan: Plan
    name: str
    imatrix: Imatrix | None = None

    @cached_property
    def header(self) -> bytes:
        """The file's bytes before its data."""
        used = any(_has_importance(self, tensor) for tensor in self.plan.tensors)
        imatrix_name = self.imatrix.path.name if self.imatrix and used else ""
        return make_header(self.plan, self.name, merged_metadata(self.source.metadata)[0], imatrix_name)


def convert(
    conversion: Conversion,
    path: Path,
    engine: Engine,
    *,
    n_threads: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the file; it appears under its name only when complete.

    Raises:
        GGUFError: a tensor cannot be read or encoded, or the file cannot be written.
    """
    check_engine(engine, encoded_qtypes(conversion.source, conversion.plan))
    check_importance(conversion)
    header = conversion.header
    with Writer(path, file_size(conversion.plan, header), overwrite=overwrite) as writer:
        writer.write(header)
        for tensor, data, is_last in _encoded(conversion, engine, n_threads):
            writer.write(data)
            if is_last:
                writer.end_tensor()
            if progress:
                progress(tensor, data.numel())


def encoded_qtypes(source: Source, plan: Plan) -> frozenset[QType]:
    """Types that an engine has to make: those of the tensors that are not quantized so already."""
    return frozenset(t.qtype for t in plan.tensors if not _is_kept(source, t))


def _is_kept(source: Source, tensor: PlannedTensor) -> bool:
    """Whether the bytes of the source are what the plan wants."""
    return source.tensors[tensor.name].qtype is tensor.qtype


def check_importance(conversion: Conversion) -> None:
    """Refuse an importance matrix of another model, or one without what it must have; nothing is read or written.

    Raises:
        GGUFError: no entry or not every needed entry is of this model.
    """
    for tensor in conversion.plan.tensors:
        _importance(conversion, tensor)
        _recorded_rows(conversion, tensor)
    if conversion.imatrix and not {t.name for t in conversion.plan.tensors} & conversion.imatrix.entries.keys():
        hint = "The importance matrix was made with another model."
        raise GGUFError("none of its entries is a tensor of the model", path=conversion.imatrix.path, hint=hint)
    without = [
        t.name
        for t in conversion.plan.tensors
        if requires_imatrix(t.qtype) and not _has_importance(conversion, t) and not _is_kept(conversion.source, t)
    ]
    if without:
        raise GGUFError(
            f"{len(without)} tensors are to have a type that needs importance, and have none: {name_list(without)}",
            path=conversion.source.path,
            subject=without[0],
            hint="Give them another type with --tensor-type.",
        )


def _has_importance(conversion: Conversion, tensor: PlannedTensor) -> bool:
    """Whether the importance matrix speaks of a tensor that is quantized; it does so of matrices only, as they are."""
    if conversion.imatrix is None or tensor.qtype in PLAIN_DTYPES or tensor.weighting is Weighting.NONE:
        return False
    return tensor.is_matrix and tensor.name in conversion.imatrix.entries


def _importance(conversion: Conversion, tensor: PlannedTensor) -> torch.Tensor | None:
    """float32 (n_columns,) for a matrix that the importance matrix speaks of."""
    if conversion.imatrix is None or not _has_importance(conversion, tensor):
        return None
    return conversion.imatrix.importance(tensor.name, tensor.shape[-1], tensor.weighting)


def _recorded_rows(conversion: Conversion, tensor: PlannedTensor) -> torch.Tensor | None:
    """Inputs (n, n_columns) by which a matrix is put together of blocks; None: it is encoded as a whole."""
    if tensor.weighting is not Weighting.MIXED or tensor.qtype in PLAIN_DTYPES:
        return None
    entry = conversion.imatrix.entries.get(tensor.name) if conversion.imatrix else None
    if entry is None or entry.rows is None or not len(entry.rows) or not _has_importance(conversion, tensor):
        raise GGUFError(
            f"tensor '{plain_text(tensor.name)}' is to be mixed, which needs recorded rows of its inputs",
            path=conversion.imatrix.path if conversion.imatrix else conversion.source.path,
            subject=tensor.name,
            hint="Give the importance matrix that the recipe was made with, as --imatrix.",
        )
    return entry.rows


Chunk = tuple[PlannedTensor, torch.Tensor, bool]


def _encoded(conversion: Conversion, engine: Engine, n_threads: int) -> Iterator[Chunk]:
    """Bytes of all tensors in the order of the plan: (tensor, uint8 chunk, whether it is the tensor's last)."""
    pending: deque[tuple[PlannedTensor, Future[torch.Tensor], bool]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for tensor, work, is_last in _work(conversion, engine, chunk_weights(engine, n_threads)):
                pending.append((tensor, pool.submit(work), is_last))
                if len(pending) >= CHUNKS_PER_THREAD * n_threads:
                    yield _take(pending)
            while pending:
                yield _take(pending)
        finally:
            for _, future, _ in pending:
                future.cancel()


def _take(pending: deque[tuple[PlannedTensor, Future[torch.Tensor], bool]]) -> Chunk:
    tensor, future, is_last = pending.popleft()
    return tensor, future.result(), is_last


def chunk_weights(engine: Engine, n_threads: int) -> int:
    """Weights in a chunk: fewer with more threads, down to a least, so that memory does not grow with few of them."""
    if engine.device.type != "cpu":
        return GPU_CHUNK_WEIGHTS
    share = MAX_WEIGHTS_IN_FLIGHT // (CHUNKS_PER_THREAD * n_threads)
    return min(CHUNK_WEIGHTS, max(MIN_CHUNK_WEIGHTS, share))


def _work(
    conversion: Conversion, engine: Engine, size: int
) -> Iterator[tuple[PlannedTensor, Callable[[], torch.Tensor], bool]]:
    """What is to be done for each chunk, in order; a tensor is read when its first chunk is asked for."""
    for tensor in conversion.plan.tensors:
        if _is_kept(conversion.source, tensor):
            yield from _kept_blocks(conversion, tensor, size)
            continue
        rows = _rows(conversion, tensor)
        encode = _encoder(conversion, engine, tensor)
        n_rows = max(1, size // max(rows.shape[1], 1))
        starts = range(0, rows.shape[0], n_rows)
        for start in starts:
            yield tensor, functools.partial(encode, rows[start : start + n_rows]), start == starts[-1]


def _kept_blocks(
    conversion: Conversion, tensor: PlannedTensor, size: int
) -> Iterator[tuple[PlannedTensor, Callable[[], torch.Tensor], bool]]:
    """The same for a tensor that has the type of the plan already: its bytes as they are."""
    data = conversion.source.read_blocks(tensor.name).reshape(-1)
    if data.numel() != tensor.n_bytes:
        problem = f"tensor '{plain_text(tensor.name)}' has {data.numel()} bytes, expected {tensor.n_bytes}"
        raise GGUFError(problem, path=conversion.source.path, subject=tensor.name)
    block_size, type_size = GGML_QUANT_SIZES[tensor.qtype]
    n_bytes = max(1, size // block_size) * type_size
    starts = range(0, data.numel(), n_bytes)
    for start in starts:
        chunk = data[start : start + n_bytes]
        yield tensor, functools.partial(_checked_blocks, conversion, tensor, chunk), start == starts[-1]


def _checked_blocks(conversion: Conversion, tensor: PlannedTensor, chunk: torch.Tensor) -> torch.Tensor:
    data = chunk.cpu().contiguous()
    if not scales_are_finite(data, tensor.qtype):
        raise GGUFError(
            f"tensor '{plain_text(tensor.name)}' has scales that are NaN or infinite",
            path=conversion.source.path,
            subject=tensor.name,
            hint="The model is damaged; take another file of it.",
        )
    return data


def _encoder(conversion: Conversion, engine: Engine, tensor: PlannedTensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns rows of a tensor, of any float type, into bytes."""
    name, path = tensor.name, conversion.source.path
    importance, recorded = _importance(conversion, tensor), _recorded_rows(conversion, tensor)
    inputs = None
    if importance is not None and recorded is not None:
        inputs = Inputs(importance, recorded.float()).to(engine.device)

    def encode(rows: torch.Tensor) -> torch.Tensor:
        if STORED_TYPES[rows.dtype] is tensor.qtype:
            return rows.to(PLAIN_DTYPES[tensor.qtype]).contiguous().view(torch.uint8).flatten()
        if inputs is not None:
            return encode_mixed(engine, rows, tensor.qtype, inputs, name, path)
        return encode_rows(engine, rows, tensor.qtype, importance, name, path)

    return encode


def _rows(conversion: Conversion, tensor: PlannedTensor) -> torch.Tensor:
    """A tensor as the rows in which it is stored."""
    if tensor.is_empty:
        return torch.zeros(1, 1, dtype=PLAIN_DTYPES[tensor.qtype])
    weights = conversion.source.read(tensor.name)
    if tuple(weights.shape) != tensor.shape:
        raise GGUFError(
            f"tensor '{plain_text(tensor.name)}' has shape {tuple(weights.shape)}, announced as {tensor.shape}",
            path=conversion.source.path,
            subject=tensor.name,
        )
    return weights.reshape(-1, tensor.stored_shape[-1])


def tensors_without_importance(conversion: Conversion) -> list[str]:
    """Names of quantized matrices that the importance matrix ought to weigh and says nothing about; [] without one."""
    if conversion.imatrix is None:
        return []
    weighed = [t for t in conversion.plan.tensors if t.weighting is not Weighting.NONE]
    return [t.name for t in weighed if t.qtype not in PLAIN_DTYPES and not _has_importance(conversion, t)]
