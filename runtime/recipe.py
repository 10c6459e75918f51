"""How a weight comes about, planned before anything is read: its sources, their places in it, and the units of reading.

    sources --joined (stack, concat)--> rows --layouts--> the weight

A unit is as many rows of the joined tensor as fit in a buffer. Where layouts leave leading rows in order (a stack of
experts, panels of rows) each unit is laid out alone and copied to its place; else the joined tensor is made first.
Everything that shapes and dtypes can tell is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4c.artifact import Weight
from dsv4c.errors import ArtifactError, CheckpointError
from dsv4c.runtime import layouts

_ALIGNMENT = 64  # of a part in a buffer: any dtype may be viewed there
_OTHER_MODEL = "serve the checkpoint that the artifact was compiled for"
_TYPING = ("dequantise", "stored", "cast", "narrow", "view")  # done with each source
_JOINS = ("stack", "concat")
_LIMITS = ("at_most", "at_least")

Transforms = tuple[tuple[str, tuple[Any, ...]], ...]


class StoredTensor(Protocol):
    """What a source has under a name; one of its rows belongs to `covers` rows of the logical tensor."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def covers(self) -> int: ...


class WeightSource(Protocol):
    """A checkpoint, or seeded random weights of the same names. All raise CheckpointError for what is not there."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a logical tensor."""

    def stored(self, name: str) -> StoredTensor:
        """What is stored under this name."""

    def parts(self, name: str) -> Sequence[StoredTensor]:
        """The stored tensors that make a logical one, after checking their presence, shapes and types."""

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fills `into` (uint8 [n], on the host) with a stored tensor's bytes from `start` on; from any thread."""

    def widen(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """The same rows of a logical tensor's parts -> these rows as `dtype`, where the parts are; ids stay int64."""

    def suspect(self, name: str, parts: Sequence[Tensor]) -> Tensor | None:
        """How much in these rows cannot be right, a count where the parts are; None if there is nothing to look at."""

    def check(self, name: str) -> None:
        """Raises CheckpointError that says what `suspect` found in a logical tensor."""

    def release(self) -> None:
        """Gives back memory that reading took."""


@dataclass(frozen=True)
class Origin:
    """One source of a weight: its parts, its shape in the joined tensor, and the row (or column) it begins at there."""

    name: str
    parts: tuple[StoredTensor, ...]
    shape: tuple[int, ...]
    at: int


@dataclass(frozen=True)
class Read:
    """Consecutive rows of a stored tensor, and the byte of a buffer where they go."""

    name: str
    start: int
    nbytes: int
    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """Rows [first, first + rows) of a joined tensor, from `row` of `origin` on: what is read and laid out at once."""

    recipe: Recipe
    origin: Origin
    row: int
    first: int
    rows: int
    reads: tuple[Read, ...]
    last: bool
    """Whether the weight is whole with it."""

    @property
    def nbytes(self) -> int:
        """What is read."""
        return sum(read.nbytes for read in self.reads)

    @property
    def room(self) -> int:
        """Bytes of a buffer that it takes."""
        return max(read.at + read.nbytes for read in self.reads)


@dataclass(frozen=True)
class Recipe:
    """A weight's transforms by what they do, checked against what the source has."""

    weight: Weight
    dtype: torch.dtype
    stored: bool
    """Whether bytes stay as they are, or (`viewed` false) only become `dtype`; else sources are widened first."""
    viewed: bool
    exact: bool
    stacked: bool
    dim: int
    """Along which sources are joined."""
    layouts: Transforms
    limits: tuple[tuple[str, float], ...]
    """What no value may exceed or fall below, by the transforms' names."""
    origins: tuple[Origin, ...]
    shape: tuple[int, ...]
    """Of the joined tensor."""
    granule: int | None
    """Fewest leading rows of it that can be laid out alone; None if it must be whole."""

    def lay_out(self, rows: Tensor) -> Tensor:
        """Some leading rows (multiples of `granule`), or the whole joined tensor, as the kernel wants them."""
        count, total = rows.shape[0], self.shape[0]
        for name, args in self.layouts:
            if name == "reshape" and count != total:
                first, *rest = args[0]
                args = ((first * count // total, *rest),)
            rows = layouts.LAYOUTS[name](rows, *args)
        return rows

    def units(self, limit: int) -> Iterator[Unit]:
        """In order; each takes at most `limit` bytes as it is read and widened, unless a granule is larger."""
        if self.stored and self.stacked:
            yield from self._stacked_units(limit)
            return
        for index, origin in enumerate(self.origins):
            last = index == len(self.origins) - 1
            if self.stacked:
                yield self._unit(origin, 0, origin.shape[0], last=last)
                continue
            wide = math.prod(origin.shape[1:]) * (self.dtype.itemsize if self.stored else 4)
            row_bytes = max(1, wide, _row_bytes(origin.parts[0]))
            step = math.lcm(self.granule or 1, *(part.covers for part in origin.parts))
            count = max(step, limit // row_bytes // step * step)
            for row in range(0, origin.shape[0], count):
                end = min(row + count, origin.shape[0])
                yield self._unit(origin, row, end - row, last=last and end == origin.shape[0])

    def _stacked_units(self, limit: int) -> Iterator[Unit]:
        """Several sources at once: equal tensors that lie one behind the other in the buffer as in the stack."""
        part = self.origins[0].parts[0]
        size = math.prod(part.shape) * part.dtype.itemsize
        wide = math.prod(part.shape) * self.dtype.itemsize
        count = max(1, limit // max(1, size, wide))
        for first in range(0, len(self.origins), count):
            some = self.origins[first : first + count]
            reads = tuple(
                Read(o.parts[0].name, 0, size, i * size, part.dtype, o.parts[0].shape) for i, o in enumerate(some)
            )
            yield Unit(self, some[0], 0, first, len(some), reads, first + count >= len(self.origins))

    def _unit(self, origin: Origin, row: int, count: int, *, last: bool) -> Unit:
        reads, at = [], 0
        for part in origin.parts:
            first, end = row // part.covers, -(-(row + count) // part.covers)
            size = _row_bytes(part)
            reads.append(
                Read(part.name, first * size, (end - first) * size, at, part.dtype, (end - first, *part.shape[1:]))
            )
            at += -(-(end - first) * size // _ALIGNMENT) * _ALIGNMENT
        first, rows = (origin.at, 1) if self.stacked else (origin.at + row, count)
        return Unit(self, origin, row, first, rows, tuple(reads), last)


def _row_bytes(part: StoredTensor) -> int:
    return math.prod(part.shape[1:]) * part.dtype.itemsize


def transforms_of(weight: Weight) -> Transforms:
    """Name and arguments of each transform. Raises ArtifactError for one that this version has not."""
    for name, *_ in weight.transforms:
        if name not in ("values", *_TYPING, *_JOINS, *layouts.LAYOUTS):
            raise ArtifactError(
                f"weight `{weight.name}` has the unknown transform `{name}`", hint="compile it again with this version"
            )
    return tuple((str(name), tuple(args)) for name, *args in weight.transforms)


def dtype_of(weight: Weight) -> torch.dtype:
    """Raises ArtifactError for a dtype that torch has not."""
    dtype = getattr(torch, weight.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"weight `{weight.name}` has the unknown dtype `{weight.dtype}`")
    return dtype


def constant(weight: Weight) -> Tensor | None:
    """The weight whose values stand in the manifest, on the host; None for one that has sources."""
    values = [args[0] for name, args in transforms_of(weight) if name == "values"]
    if not values:
        return None
    tensor = torch.tensor(values[0], dtype=dtype_of(weight))
    laid = _laid(weight, tensor, [t for t in transforms_of(weight) if t[0] not in (*_TYPING, "values")])
    check_fits(weight, tuple(laid.shape), laid.dtype)
    return laid.contiguous()


def recipe_of(weight: Weight, source: WeightSource) -> Recipe:
    """Raises ArtifactError for transforms that make no sense, CheckpointError for sources that do not fit them."""
    transforms, dtype = transforms_of(weight), dtype_of(weight)
    names = {name for name, _ in transforms}
    stored, viewed, stacked = "stored" in names, "view" in names, "stack" in names
    dim = next((int(args[0]) for name, args in transforms if name == "concat" and args), 0)
    found = [_stored(weight, source, n, dtype, viewed) if stored else _logical(source, n) for n in weight.sources]
    shape, starts = _join(weight, [origin.shape for origin in found], transforms, dim)
    origins = tuple(Origin(o.name, o.parts, o.shape, at) for o, at in zip(found, starts, strict=True))
    kept = origins[0].parts[0].dtype if not stored and origins[0].parts[0].dtype == torch.int64 else dtype
    after = [t for t in transforms if t[0] not in (*_TYPING, *_JOINS, *_LIMITS)]
    limits = tuple((name, args[0]) for name, args in transforms if name in _LIMITS)
    check_fits(weight, tuple(_laid(weight, torch.empty(shape, dtype=kept, device="meta"), after).shape), kept)
    granule = None if dim else _granule(after, shape)
    if granule is not None and any(at % granule for at in starts):
        granule = None
    return Recipe(
        weight, kept, stored, viewed, "narrow" in names, stacked, dim, tuple(after), limits, origins, shape, granule
    )


def check_fits(weight: Weight, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises CheckpointError if this is not what the manifest says."""
    if shape != tuple(weight.shape) or dtype != dtype_of(weight):
        raise CheckpointError(
            f"weight `{weight.name}` is {dtype} {list(shape)}, the artifact expects {weight.dtype} "
            f"{list(weight.shape)}",
            hint=_OTHER_MODEL,
        )


def misfit(weight: Weight, reason: object) -> CheckpointError:
    """The error for a tensor whose shape or values a layout does not take."""
    return CheckpointError(f"weight `{weight.name}` does not fit its layout: {reason}", hint=_OTHER_MODEL)


def _logical(source: WeightSource, name: str) -> Origin:
    return Origin(name, tuple(source.parts(name)), source.shape(name), 0)


def _stored(weight: Weight, source: WeightSource, name: str, dtype: torch.dtype, viewed: bool) -> Origin:
    part = source.stored(name)
    if viewed and part.dtype.itemsize != dtype.itemsize:
        raise CheckpointError(
            f"`{name}` is stored as {part.dtype}, the artifact reads it as {weight.dtype}",
            hint="this artifact was compiled for a checkpoint that stores it in as many bits",
        )
    return Origin(name, (part,), part.shape, 0)


def _join(
    weight: Weight, shapes: Sequence[tuple[int, ...]], transforms: Transforms, dim: int
) -> tuple[tuple[int, ...], list[int]]:
    """The shape of all sources together, and where each begins along `dim`."""
    joins = [name for name, _ in transforms if name in _JOINS]
    if not joins:
        if len(shapes) != 1:
            raise ArtifactError(f"weight `{weight.name}` joins {len(shapes)} sources without saying how")
        return shapes[0], [0]
    if joins[0] == "stack":
        for shape in shapes:
            _check_together(weight, shape, shape == shapes[0], shapes[0])
        return (len(shapes), *shapes[0]), list(range(len(shapes)))
    starts, at = [], 0
    for shape in shapes:
        same = len(shape) > dim and (*shape[:dim], *shape[dim + 1 :]) == (*shapes[0][:dim], *shapes[0][dim + 1 :])
        _check_together(weight, shape, same, shapes[0][1:])
        starts.append(at)
        at += shape[dim]
    if dim == 0:
        expected = math.prod(weight.shape) // max(1, math.prod(shapes[0][1:]))
        _check_together(weight, shapes[-1], at <= expected, shapes[0][1:])
        if at < expected:
            raise CheckpointError(f"weight `{weight.name}` has {at} rows, expected {expected}", hint=_OTHER_MODEL)
    return (*shapes[0][:dim], at, *shapes[0][dim + 1 :]), starts


def _check_together(weight: Weight, shape: tuple[int, ...], fits: bool, after: tuple[int, ...]) -> None:
    if not fits:
        raise CheckpointError(
            f"the tensors of weight `{weight.name}` do not fit together: {list(shape)} after {list(after)}",
            hint=_OTHER_MODEL,
        )


def _laid(weight: Weight, tensor: Tensor, transforms: Sequence[tuple[str, tuple[Any, ...]]]) -> Tensor:
    for name, args in transforms:
        try:
            tensor = layouts.LAYOUTS[name](tensor, *args)
        except (ValueError, RuntimeError) as error:
            raise misfit(weight, error) from error
    return tensor


def _granule(transforms: Sequence[tuple[str, tuple[Any, ...]]], shape: tuple[int, ...]) -> int | None:
    """Fewest leading rows of a joined tensor that become leading rows of the result; None if rows are mixed."""
    total, dims, granule = shape[0], len(shape), 1
    for name, args in transforms:
        if name == "reshape":
            granule, dims = math.lcm(granule, total // math.gcd(total, args[0][0])), len(args[0])
            continue
        in_order = (name == "permute" and args[0][0] == 0) or (name == "transpose" and dims > 2)
        if not in_order:
            return None
    return granule
