"""Loads weights: from checkpoint tensors to the tensors that kernels read, streamed to the device.

    source --bytes, by units--> device --widen, narrow, lay out--> rows of the weight, in its final memory

The interpreter of `artifact.Weight.transforms`; `recipe` plans it, `streaming` moves the bytes. All that is made of the
bytes is made on the device. `narrow` must not change a value; a checkpoint whose values do not fit is refused. Such
conditions are gathered on the device and looked at together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4c.artifact import Manifest, Weight
from dsv4c.errors import CheckpointError, EngineError
from dsv4c.runtime.recipe import Recipe, Unit, WeightSource, constant, dtype_of, misfit, recipe_of, transforms_of
from dsv4c.runtime.streaming import Lane, Readers, lane

__all__ = ["LoadProgress", "LoadReport", "Progress", "WeightSource", "load_weights", "staging_bytes"]


@dataclass(frozen=True)
class LoadProgress:
    """How far loading is; `name` is the weight at hand."""

    weights: int
    num_weights: int
    bytes: int
    num_bytes: int
    name: str


Progress = Callable[[LoadProgress], None]


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: weights, their bytes as stored (or as made), and the seconds until all was on the device."""

    weights: int
    bytes: int
    seconds: float
    made: bool = False

    @property
    def gb_per_s(self) -> float:
        return self.bytes / max(self.seconds, 1e-9) / 1e9

    def __str__(self) -> str:
        return (
            f"{'made' if self.made else 'loaded'} {self.weights:,} weights, {self.bytes / 1e9:,.2f} GB in "
            f"{self.seconds:.1f} s ({self.gb_per_s:.1f} GB/s)"
        )


@dataclass(frozen=True)
class ReadAhead:
    """How bytes are staged: `unit_bytes` read and widened at once, into so many host buffers, by so many threads."""

    unit_bytes: int
    buffers: int
    readers: int


# A card takes 32 MiB in 0.6 ms, in which a unit's launches are made; a thread copies 5 to 10 GB/s from the page cache,
# so four keep up with most disks, and two buffers more than threads are uploaded or used meanwhile.
CARD = ReadAhead(32 << 20, 6, 4)
# On the host the transforms take the time; small units keep the peak near what is kept.
HOST = ReadAhead(4 << 20, 2, 1)

# Of a unit on the device, in units of `unit_bytes`: its bytes, its float32 values, their narrow form and that widened
# again with its comparison; or its rows laid out. Measured against the allocator's peak by benchmarks/loading.py.
_COPIES = 5
_SCALE_ROWS = 128  # rows of an FP8 weight that share a row of scales are widened together


def read_ahead_for(device: torch.device) -> ReadAhead:
    return HOST if device.type == "cpu" else CARD


def staging_bytes(manifest: Manifest) -> int:
    """The most memory that loading takes on the target beside the weights themselves; free again afterwards.

    On a card the staged unit and what is made of it, on the host the buffers as well.
    """
    host = manifest.target == "cpu"
    ahead = HOST if host else CARD
    largest = max((max(ahead.unit_bytes, _granule_bytes(w)) for w in manifest.weights), default=0)
    whole = max((2 * _bytes(w) for w in manifest.weights if _may_be_joined_first(w)), default=0)
    return largest * (_COPIES + (ahead.buffers if host else 0)) + whole


def _bytes(weight: Weight) -> int:
    return math.prod(weight.shape) * dtype_of(weight).itemsize


def _granule_bytes(weight: Weight) -> int:
    """The least that must be read and widened at once, in the widest dtype it takes."""
    names = {name for name, _ in transforms_of(weight)}
    item = dtype_of(weight).itemsize if "stored" in names else 4
    if "stack" in names:
        return math.prod(weight.shape) // max(1, len(weight.sources)) * item
    return min(math.prod(weight.shape), _SCALE_ROWS * math.prod(weight.shape[1:])) * item


def _may_be_joined_first(weight: Weight) -> bool:
    """Whether layouts may need the whole joined tensor: of a stack they are known to keep its rows in order."""
    transforms = transforms_of(weight)
    names = [name for name, _ in transforms]
    if "largest" in names:
        return False  # of a few numbers
    columns = any(name == "concat" and any(args) for name, args in transforms)
    laid = any(name in ("reshape", "transpose", "permute") for name in names)
    return columns or (laid and not ("stack" in names or "values" in names))


class Checks:
    """Conditions on loaded values, gathered on the device: one synchronisation for many."""

    def __init__(self, device: torch.device, most: int = 1024) -> None:
        self._found = torch.zeros(most, dtype=torch.int64, device=device)
        self._complaints: list[Callable[[int], Exception]] = []

    def refuse_if(self, found: Tensor, complaint: Callable[[int], Exception]) -> None:
        """Raises `complaint(found)` at the next look if `found` (one element, on the device) is not zero."""
        if len(self._complaints) == len(self._found):
            self.look()
        self._found[len(self._complaints)].copy_(found)
        self._complaints.append(complaint)

    def look(self) -> None:
        """Waits for the device and raises what the first condition that holds says."""
        found = self._found[: len(self._complaints)].tolist()
        for value, complaint in zip(found, self._complaints, strict=True):
            if value:
                raise complaint(value)
        self._complaints.clear()


def load_weights(
    weights: Sequence[Weight],
    source: WeightSource,
    progress: Progress | None = None,
    device: torch.device | None = None,
    ahead: ReadAhead | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Every weight by name, dense, on `device` (default: the CPU). `ahead` is for measuring.

    Raises CheckpointError if the source lacks or misshapes a tensor, before anything is read, or if values do not
    fit; ArtifactError for transforms that make no sense. No thread is left behind, whatever happens.
    """
    started = time.perf_counter()
    device = device or torch.device("cpu")
    ahead = ahead or read_ahead_for(device)
    constants = {weight.name: value for weight in weights if (value := constant(weight)) is not None}
    recipes = [recipe_of(weight, source) for weight in weights if weight.name not in constants]
    out = {weight.name: torch.empty(weight.shape, dtype=dtype_of(weight), device=device) for weight in weights}
    for name, value in constants.items():
        out[name].copy_(value)
    units = [unit for recipe in recipes for unit in recipe.units(ahead.unit_bytes)]
    total = sum(unit.nbytes for unit in units)
    done, read = len(constants), 0

    def fill(unit: Unit, buffer: Tensor) -> None:
        for part in unit.reads:
            source.read(part.name, part.start, buffer[part.at : part.at + part.nbytes])

    largest = max((unit.room for unit in units), default=0)
    to = lane(device, largest)
    buffers = [to.buffer(largest) for _ in range(min(ahead.buffers, len(units)))]
    with to, Readers(units, fill, buffers, ahead.readers) as filled:
        builder = _Builder(to, source, out)
        for unit, buffer in filled:
            staged = to.upload(buffer[: unit.room])
            fence = to.fence()
            builder.add(unit, staged)
            filled.give_back(buffer, fence)
            done, read = done + unit.last, read + unit.nbytes
            if progress:
                progress(LoadProgress(done, len(weights), read, total, unit.recipe.weight.name))
        builder.checks.look()
    source.release()
    return out, LoadReport(len(weights), total, time.perf_counter() - started)


class _Builder:
    """Makes weights of staged units, in order, on the device."""

    def __init__(self, to: Lane, source: WeightSource, out: dict[str, Tensor]) -> None:
        self.checks = Checks(to.device)
        self._source = source
        self._out = out
        self._joined: Tensor | None = None

    def add(self, unit: Unit, staged: Tensor) -> None:
        recipe = unit.recipe
        rows = self._stored(unit, staged) if recipe.stored else self._logical(unit, staged)
        for name, limit in recipe.limits:
            self._bound(recipe, rows, name, limit)
        whole = self._out[recipe.weight.name]
        if recipe.granule is not None:
            laid = recipe.lay_out(rows)
            at = unit.first * whole.shape[0] // recipe.shape[0]
            whole[at : at + laid.shape[0]].copy_(laid)
            return
        if self._joined is None:
            self._joined = torch.empty(recipe.shape, dtype=recipe.dtype, device=whole.device)
        if recipe.dim:
            column = self._joined.narrow(recipe.dim, unit.origin.at, unit.origin.shape[recipe.dim])
            column[unit.row : unit.row + unit.rows].copy_(rows)
        else:
            self._joined[unit.first : unit.first + unit.rows].copy_(rows)
        if unit.last:
            whole.copy_(recipe.lay_out(self._joined))
            self._joined = None

    def _stored(self, unit: Unit, staged: Tensor) -> Tensor:
        """The rows as they are stored: their bytes seen as the final dtype, or scales widened to it."""
        recipe, first = unit.recipe, unit.reads[0]
        shape = (len(unit.reads), *first.shape) if recipe.stacked else first.shape
        raw = staged[: unit.nbytes].view(first.dtype).view(shape)
        if recipe.viewed:
            return raw.view(recipe.dtype)
        rows = raw.to(recipe.dtype)
        self.checks.refuse_if((~torch.isfinite(rows)).sum(), lambda found: _not_finite(unit, found))
        return rows

    def _logical(self, unit: Unit, staged: Tensor) -> Tensor:
        """The rows' values in the final dtype."""
        recipe, source, name = unit.recipe, self._source, unit.origin.name
        parts = [staged[r.at : r.at + r.nbytes].view(r.dtype).view(r.shape) for r in unit.reads]
        suspect = source.suspect(name, parts)
        if suspect is not None:
            self.checks.refuse_if(suspect, lambda found: _said_by(source, name))
        wide = source.widen(parts, torch.float32)
        rows = wide.to(recipe.dtype) if wide.is_floating_point() else wide
        if recipe.exact and rows.dtype != wide.dtype:
            self.checks.refuse_if((rows.to(wide.dtype) != wide).any(), lambda found: _inexact(unit))
        return rows.unsqueeze(0) if recipe.stacked else rows

    def _bound(self, recipe: Recipe, rows: Tensor, name: str, limit: float) -> None:
        if not rows.numel():
            return
        if name == "at_least":
            under = (~(rows.float() >= limit)).sum()
            reason = f"{{}} stored values are NaN or not {limit:g} or more"
            self.checks.refuse_if(under, lambda found: misfit(recipe.weight, reason.format(found)))
        else:
            limit = int(limit)
            over = (rows.max().to(torch.int64) - limit).clamp(min=0)
            reason = "a stored value is {}, the kernel takes {} at most"
            self.checks.refuse_if(over, lambda found: misfit(recipe.weight, reason.format(found + limit, limit)))


def _inexact(unit: Unit) -> CheckpointError:
    return CheckpointError(
        f"`{unit.origin.name}` holds values that {unit.recipe.weight.dtype} cannot hold exactly",
        hint="its scales are no powers of two; this artifact was compiled for a checkpoint where they are",
    )


def _not_finite(unit: Unit, found: int) -> CheckpointError:
    return CheckpointError(
        f"`{unit.origin.name}` holds {found} NaN or infinite scales", hint="download the checkpoint again"
    )


def _said_by(source: WeightSource, name: str) -> EngineError:
    """The source says what is wrong; if it finds nothing, the bytes were changed on their way."""
    source.check(name)
    return EngineError(f"`{name}` is damaged on the device but whole in its file", hint="is the card's memory faulty?")
