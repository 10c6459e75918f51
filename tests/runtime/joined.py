"""Two engines over stand-ins, joined by copying arrays: what one has kept is put where the other wants it.

No ledger, no thread, no clock: between two steps the test says which transfers end, and how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dsv4c.artifact import KVGroup, StateGroup
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.moving import Arrival
from dsv4c.runtime.poolsizes import first_page
from dsv4c.runtime.request import Event, Request


class Memory(Protocol):
    """The pools of an engine's executor, as arrays whose first dimension is rows."""

    def kv(self, group: str) -> Sequence[np.ndarray]: ...

    def state(self, group: str) -> Sequence[np.ndarray]: ...


@dataclass
class Followed:
    """A Progress that notes what it is told, and checks that it makes sense."""

    engine: Engine
    log: list[tuple[object, ...]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    """Request id -> tokens that are final, while it has a slot."""
    coming: dict[str, int] = field(default_factory=dict)
    marks: list[int] = field(default_factory=list)

    def admitted(self, request: Request, /) -> None:
        assert request.keep and request.slot and request.id not in self.tokens
        self.tokens[request.id] = 0
        self.log.append(("admitted", request.id))

    def launching(self, request: Request, end: int, /) -> None:
        assert end > self.coming.get(request.id, 0) and self.engine.pool.covers(request.slot, end)
        self.coming[request.id] = end
        self.marks.clear()

    def mark(self, number: int, /) -> None:
        assert number == len(self.marks)
        self.marks.append(number)

    def computed(self, request: Request, tokens: int, /) -> None:
        assert self.tokens[request.id] <= tokens <= request.num_computed
        self.tokens[request.id] = tokens
        self.log.append(("computed", request.id, tokens))

    def preempted(self, request: Request, /) -> None:
        assert request.slot
        self.tokens.pop(request.id)
        self.coming.pop(request.id, None)
        self.log.append(("preempted", request.id))

    def ended(self, request: Request, complete: bool, /) -> None:
        assert complete == (request.id in self.engine.kept)
        if complete:
            assert self.tokens[request.id] == request.num_computed
        self.tokens.pop(request.id, None)
        self.coming.pop(request.id, None)
        self.log.append(("ended", request.id, complete))


@dataclass
class Copying:
    """Transfers that begin when they are told to and end when the test says so."""

    begun: dict[str, Arrival] = field(default_factory=dict)
    abandoned: list[str] = field(default_factory=list)

    def begin(self, arrival: Arrival, /) -> None:
        assert arrival.request.id not in self.begun
        self.begun[arrival.request.id] = arrival

    def ended(self, request_id: str, /) -> None:
        assert request_id in self.begun
        self.abandoned.append(request_id)


def copy_state(
    source: Engine, kept: Request, target: Arrival, groups: Sequence[KVGroup], states: Sequence[StateGroup],
    pools: tuple[Memory, Memory],
) -> None:  # fmt: skip
    """What a transfer does: the pages and rows of a kept request to where an arrival wants them."""
    assert kept.num_computed == target.target
    tables = source.pool.columns_of(kept.slot)
    for group in groups:
        there, pages = target.tables[group.name]
        here, own = tables[group.name]
        first = first_page(group, target.target) if group.horizon else target.start // group.page_tokens
        assert there == (first if group.horizon else 0)
        for column in range(first, there + len(pages)):
            a, b = own[column - here], pages[column - there]
            n = group.entries_per_page
            for from_, to in zip(pools[0].kv(group.name), pools[1].kv(group.name), strict=True):
                to[b * n : (b + 1) * n] = from_[a * n : (a + 1) * n]
    for state in states:
        if not state.empty_at(target.target):
            for from_, to in zip(pools[0].state(state.name), pools[1].state(state.name), strict=True):
                to[target.slot] = from_[kept.slot]


def tokens_of(events: Sequence[Event]) -> list[int]:
    return [t for e in events for t in e.tokens]


Tables = Mapping[str, tuple[int, tuple[int, ...]]]
