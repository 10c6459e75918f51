"""Calls -> segments: runs that a CUDA graph can hold, broken by those that it cannot, and the contract of each.

A contract is written from what the ops declare (`Op.indices`) and from the plan's buffers; nothing is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dsv4c.artifact import Buffer, Call, Contract, IndexRange, Input, Segment
from dsv4c.ops import Op, TensorType
from dsv4c.schedules._schedule import Choice

PADDED_KINDS = frozenset({"token_ids", "window_ends", "edit_tokens", "masks", "draft_seats"})
"""Inputs whose size a bucket rounds up. Rows of logits are padded too, with copies of a live row."""

Ranges = tuple[IndexRange, ...]


def segments_of(
    calls: Sequence[Call],
    ranges: Sequence[Ranges],
    choices: Mapping[str, Choice],
    buffers: Iterable[Buffer],
    padded: tuple[str, ...],
) -> tuple[Segment, ...]:
    """The segments of these calls; `ranges[i]` belong to call i, `padded` are sizes that a bucket rounds up."""
    strided = {b.name: b.strides for b in buffers if b.of is not None}
    out = []
    for capturable, run in itertools.groupby(range(len(calls)), lambda i: choices[calls[i].kernel].capturable):
        held = list(run)
        names = sorted({choices[calls[i].kernel].schedule for i in held})
        why = "" if capturable else f"`{'`, `'.join(names)}` cannot be captured"
        used = sorted({arg for i in held for arg in calls[i].args if isinstance(arg, str) and arg in strided})
        known = dict.fromkeys(r for i in held for r in ranges[i])
        contract = Contract(padded, {name: strided[name] for name in used}, tuple(known))
        out.append(Segment("graph" if capturable else "eager", tuple(calls[i] for i in held), why, contract))
    return tuple(out)


def padded_symbols(inputs: Iterable[Input], symbols: Iterable[str] = ()) -> set[str]:
    """Sizes that hold live rows and padding behind them; of `symbols` also those that count streams of such rows."""
    found = {size for item in inputs if item.kind in PADDED_KINDS for size in item.shape if isinstance(size, str)}
    return found | {name for name in symbols if name.removesuffix("_streams") in found}


def index_ranges(
    op: Op,
    operands: Mapping[str, tuple[str, TensorType] | None],
    results: Mapping[int, str],
    attrs: Mapping[str, Any],
) -> Iterator[IndexRange]:
    """What one call of `op` says of its values. `operands`: parameter -> name and type; `results`: output -> name."""
    for key, index in op.indices.items():
        of, given = operands[index.of], operands.get(key) if isinstance(key, str) else (results[key], None)
        if of is None or given is None:
            continue
        sizes = tuple(of[1].shape[dim] for dim in index.dims)
        yield IndexRange(given[0], index.low, (*sizes, int(attrs[index.times])) if index.times else sizes)
