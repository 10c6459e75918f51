"""What a kernel asks of a machine: traffic, operations of whole tiles, rounds of blocks; and the step it runs in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsv4c.schedules._schedule import OpNode, Value

Unit = Literal["fp32", "bf16", "fp8", "fp4"]


@dataclass(frozen=True)
class Card:
    """What stages need to know of a machine."""

    sms: int
    """Multiprocessors."""
    cache: float
    """Bytes of the L2 cache."""

    def again(self, size: float) -> tuple[float, float]:
        """`size` bytes that one kernel leaves and the next reads: (from memory, from the cache)."""
        kept = min(1.0, self.cache / max(size, 1.0))
        return size * (1 - kept), size * kept


@dataclass(frozen=True)
class Situation:
    """One step: `tokens` tokens of `requests` requests, each of `context` tokens when it is over."""

    tokens: int
    requests: int
    context: int
    sampling: str = "temperature"
    """What its rows ask of sampling: `greedy` or `temperature`; what filters cost depends on the logits."""

    @property
    def each(self) -> float:
        """New tokens of a request."""
        return self.tokens / max(1, self.requests)

    def seen(self, ratio: int, most: float = math.inf) -> float:
        """Entries of `ratio` tokens that a token sees on average, at most `most`; positions are taken as dense."""
        last, first = self.context / ratio, max(0.0, self.context - self.each) / ratio
        if most <= first or last - first < 1e-9:
            return min(last, most)
        if most >= last:
            return (first + last) / 2
        below = (most - first) * (first + most) / 2
        return (below + (last - most) * most) / (last - first)

    def held(self, ratio: int, window: float = math.inf) -> float:
        """Entries of one request that at least one of its tokens sees: the last `window` tokens, or all."""
        return min(self.context, window + self.each - 1) / ratio

    def ended(self, ratio: int) -> float:
        """Entries that the step completes, on average."""
        return self.tokens / ratio


@dataclass(frozen=True)
class Stage:
    """One kernel (or a few that always run together) of a call. `kernel`: whose rates apply."""

    kernel: str
    bytes: float = 0.0
    """From and to memory, what is used again counted once."""
    flops: float = 0.0
    """Operations that the result needs; a multiply-add counts two."""
    unit: Unit = "fp32"
    issued: float = 0.0
    """Operations of the whole machine while the kernel runs: of whole tiles, the last round as if it were full."""
    cached: float = 0.0
    """Bytes that are read again, from the L2 cache."""
    rounds: float = 0.0
    """Steps that run one after another on the busiest multiprocessor, beyond their arithmetic; each kernel says of
    what."""
    fill: float = 1.0
    """Share of the memory rate that its blocks can ask for: fewer blocks than multiprocessors cannot ask for all."""


def cdiv(a: float, b: float) -> int:
    """a / b, rounded up."""
    return math.ceil(a / b - 1e-9)


def value(node: OpNode, index: int) -> Value:
    """An input that is there."""
    found = node.inputs[index]
    assert found is not None
    return found


def moved(node: OpNode, symbols: Mapping[str, int]) -> float:
    """Every tensor once; of pools nothing, of what is written into them as much as the rows that are given."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.role != "pool"]
    return float(sum(v.bytes(symbols) for v in values))
