"""Workloads of what a step that verifies drafts keeps on the device: requests with 0 to K drafts, in rows of any order.

Every kernel moves integers, so results are equal or wrong; only `add_embedding` rounds.

Legend: T tokens, S rows of logits, D requests (T where an op has no others), E window ends, R rows of
tables, Z seats, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4c.config import ModelConfig
from dsv4c.ops.sampling import IN_PROMPT
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload, config_of

DRAFTS = 3  # K, the most of a request
SEATS = 300  # 299 requests, and nobody's
VOCAB = 512  # small, so that drafts are often right and counts often the most there can be


def exact(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return 0.0 if all(torch.equal(out, ref) for out, ref in zip(outputs, expected, strict=True)) else math.inf


class Draw:
    """Random int64 tensors of one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.device = generator, generator.device

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        """low <= x < high."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def rare(self, *shape: int, share: float = 0.3) -> Tensor:
        """bool."""
        return torch.rand(shape, generator=self.generator, device=self.device) < share

    def distinct(self, count: int, most: int) -> Tensor:
        """`count` of the numbers below `most`."""
        return torch.randperm(most, generator=self.generator, device=self.device)[:count]

    def seats(self, count: int) -> Tensor:
        """A seat each, and some that have none."""
        return torch.where(self.rare(count, share=0.15), 0, self.distinct(count, SEATS - 1) + 1)


ROW, SEAT = Value(("T",), "int64", "input"), Value((SEATS,), "int64", "pool")
PENDING = Value((SEATS, DRAFTS + 1), "int64", "pool")


def _drafts(requests: int, draw: Draw) -> Tensor:
    """How many each request has: 3, 2, 1, 0, 3, ..., so that sizes of a workload are no matter of chance."""
    return (DRAFTS - torch.arange(requests, device=draw.device)) % (DRAFTS + 1)


def _feed_drafts(rows: int, draw: Draw) -> Args:
    tokens, positions = draw.ints(-1 - DRAFTS, 1000, rows), draw.ints(-1 - DRAFTS, 1000, rows)
    tokens = torch.where(draw.rare(rows), draw.ints(-1 - DRAFTS, 0, rows), tokens)
    positions = torch.where(draw.rare(rows), draw.ints(-1 - DRAFTS, 0, rows), positions)
    return [
        tokens,
        positions,
        draw.ints(0, SEATS, rows),
        draw.ints(-1, 1000, SEATS, DRAFTS + 1),
        draw.ints(0, 5000, SEATS),
    ]


def _feed_spans(rows: int, draw: Draw) -> Args:
    """A table of `rows` seats."""
    known = draw.rare(rows)
    starts = torch.where(known, draw.ints(0, 5000, rows), -1)
    ends = torch.where(known, starts + draw.ints(0, 9, rows), -1 - draw.ints(0, DRAFTS + 1, rows))
    return [starts, ends, draw.ints(0, 5000, rows)]


def _feed_ends(ratio: int) -> Callable[[int, Draw], Args]:
    def make(rows: int, draw: Draw) -> Args:
        """A span a request, of 1 to K + 1 tokens; its end is known, there is none, or it depends on its positions."""
        size = _drafts(rows, draw).clamp(max=ratio - 1) + 1
        first = size.cumsum(0) - size
        seats = draw.distinct(rows, SEATS - 1) + 1
        begin = draw.ints(0, 5000, SEATS)[seats]
        starts, stops = torch.zeros(2, SEATS, dtype=torch.int64, device=draw.device)
        starts[seats], stops[seats] = begin, begin + size
        token = torch.arange(int(size.sum()), device=draw.device)
        request = torch.repeat_interleave(torch.arange(rows, device=draw.device), size)
        ends = torch.where(draw.rare(rows), torch.where(draw.rare(rows), -1, first), -2 - first)
        return [ends, begin[request] + token - first[request], seats[request], starts, stops]

    return make


def _row_facts(rows: int, draw: Draw) -> Args:
    tokens = 3 * rows
    where = draw.distinct(rows, max(tokens, 1))
    return [draw.ints(0, 1000, tokens), draw.ints(0, 5000, tokens), where, draw.ints(-5, 2, rows)]


def _accept_drafts(requests: int, draw: Draw) -> Args:
    """Requests of 0 to K drafts, most of which are right; tokens of -1, full counts, seats without penalties."""
    limits = _drafts(requests, draw)
    size = limits + 1
    starts, rows = size.cumsum(0) - size, int(size.sum())
    tokens = draw.ints(0, VOCAB, rows)
    drafted = tokens.roll(1)
    drafted = torch.where(draw.rare(rows, share=0.25), draw.ints(0, VOCAB, rows), drafted)
    tokens = torch.where(draw.rare(rows, share=0.03), -1, torch.where(draw.rare(rows), tokens % 7, tokens))
    seats = draw.seats(requests)
    penalties = torch.where(draw.rare(requests, share=0.7), seats, 0).repeat_interleave(size)
    counts = draw.ints(0, 5, SEATS, VOCAB) + torch.where(draw.rare(SEATS, VOCAB), IN_PROMPT, 0)
    counts = torch.where(draw.rare(SEATS, VOCAB, share=0.1), 2 * IN_PROMPT - 2 + draw.ints(0, 2, SEATS, VOCAB), counts)
    return [
        tokens, drafted, draw.distinct(rows, max(rows, 1)), draw.ints(0, 5000, rows), draw.ints(0, 5000, rows),
        starts, limits, seats, penalties, draw.ints(0, 1000, SEATS, DRAFTS + 1), draw.ints(0, 5000, SEATS),
        counts.to(torch.int16),
    ]  # fmt: skip


def _place_tokens(rows: int, draw: Draw) -> Args:
    tokens = 3 * rows
    where = draw.distinct(rows, max(tokens, 1))
    return [draw.ints(0, 1000, tokens), where, draw.seats(rows), draw.ints(-1, 1000, rows)]


def _advance_rows(rows: int, draw: Draw) -> Args:
    return [draw.ints(0, 5000, rows), draw.ints(0, 5000, rows)]


def _keep_draft(rows: int, draw: Draw) -> Args:
    return [draw.ints(0, 1000, SEATS, DRAFTS + 1), draw.seats(rows), draw.ints(-1, 1000, rows)]


S, TABLE, ONE = (Value((size,), "int64", "input") for size in ("S", "R", "D"))
CONTEXT = 4900  # fewer than the largest positions drawn
COUNTS = Value((SEATS, VOCAB), "int16", "pool")
Case = tuple[OpNode, Callable[[int, Draw], Args]]
CASES: tuple[Case, ...] = (
    (OpNode("feed_drafts", {}, (ROW, ROW, ROW, PENDING, SEAT), (ROW, ROW)), _feed_drafts),
    (OpNode("feed_spans", {}, (TABLE, TABLE, TABLE), (TABLE, TABLE)), _feed_spans),
    *(
        (
            OpNode("feed_ends", {"ratio": ratio}, (Value(("E",), "int64", "input"), ROW, ROW, SEAT, SEAT),
                   (Value(("E",), "int64"),)),
            _feed_ends(ratio),
        )
        for ratio in (4, 128)
    ),
    (OpNode("row_facts", {}, (ROW, ROW, S, S), (S, S)), _row_facts),
    (
        OpNode("accept_drafts", {"end": CONTEXT}, (S, S, S, ROW, S, ONE, ONE, ONE, S, PENDING, SEAT, COUNTS),
               4 * (ONE,), mutates=(9, 10, 11)),
        _accept_drafts,
    ),
    (OpNode("place_tokens", {}, (ROW, S, S, S), (), mutates=(0,)), _place_tokens),
    *((OpNode("advance_rows", {"by": by, "end": CONTEXT}, (ROW, ROW), (ROW, ROW)), _advance_rows) for by in (1, 2)),
    *((OpNode("keep_draft", {"at": at}, (PENDING, ROW, ROW), (), mutates=(0,)), _keep_draft) for at in (1, DRAFTS)),
)  # fmt: skip


def _symbols(node: OpNode, args: Args) -> dict[str, int]:
    """What the sizes of these arguments say."""
    return {
        size: int(tensor.shape[i])
        for value, tensor in zip(node.inputs, args, strict=True)
        if value is not None and tensor is not None
        for i, size in enumerate(value.shape)
        if isinstance(size, str)
    }


def workload(case: Case, rows: int) -> Workload:
    """Of `rows` requests, or rows where the op knows of none."""
    node, make = case
    label = " ".join([node.op, *(f"{name} {value}" for name, value in node.attrs.items()), str(rows)])

    def made(generator: torch.Generator) -> Args:
        return make(rows, Draw(generator))

    args = made(torch.Generator())
    moved = 8.0 * sum(a.numel() for a in args if a is not None and a.dim() == 1)
    return Workload(label, node, {"T": rows, **_symbols(node, args)}, made, moved, unit="fp32", error=exact)


def embedded(model: str | ModelConfig, rows: int) -> Workload:
    """The MTP block's input."""
    config = config_of(model)
    count, channels = config.hc_mult, config.hidden_size

    def make(generator: torch.Generator) -> Args:
        shapes = ((rows, channels), (rows, count, channels))
        return [torch.randn(s, generator=generator, device=generator.device).bfloat16() for s in shapes]

    one, streams = Value(("T", channels), "bfloat16"), Value(("T", count, channels), "bfloat16")
    return Workload(
        f"{model} streams {rows}", OpNode("add_embedding", {}, (one, streams), (streams,)), {"T": rows}, make,
        2.0 * rows * channels * (1 + 2 * count), unit="fp32", error=exact,
    )  # fmt: skip


def workloads() -> tuple[Workload, ...]:
    out = [workload(case, rows) for case in CASES for rows in (0, 1, 200)]
    return (*out, *(embedded(model, rows) for model in ("nano", "flash") for rows in (1, 64)))
