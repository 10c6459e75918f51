"""The memory plan for every concurrency and context that the report offers: what is held, and what the pools take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsv4c.describe_memory import answer_of
from dsv4c.runtime.footprint import Item
from dsv4c.runtime.memory import MemoryPlan, Room

CONTEXTS = (2048, 8192, 32768, 131072, 524288, 1048576)
REQUESTS = (1, 4, 16, 64, 128, 256)


@dataclass(frozen=True)
class Load:
    """So many requests of one context, and the bytes of every pool with them."""

    context: int
    requests: int
    pools: tuple[int, ...]
    fits: bool

    @property
    def pool_bytes(self) -> int:
        return sum(self.pools)


@dataclass(frozen=True)
class MemoryPicture:
    """What the report draws. `loads` holds a row for each context; `chosen` is the first one shown."""

    room: Room
    fixed: tuple[Item, ...]
    weights_by_dtype: tuple[tuple[str, int], ...]
    weights_by_part: tuple[tuple[str, int], ...]
    pools: tuple[str, ...]
    notes: tuple[str, ...]
    """Of each pool: what a page or a row of it costs."""
    loads: tuple[tuple[Load, ...], ...]
    answers: tuple[str, ...]
    """For each context: how many requests fit, and what binds."""
    chosen: Load
    snapshots: int

    @property
    def answer(self) -> str | None:
        """The answer, where it is one for every context."""
        return self.answers[0] if len(set(self.answers)) == 1 else None

    @property
    def fixed_bytes(self) -> int:
        return sum(item.size_bytes for item in self.fixed)

    @property
    def most_bytes(self) -> int:
        """Of all loads that are shown, and of the memory there is."""
        return max(self.room.total_bytes, self.fixed_bytes + max(one.pool_bytes for row in self.loads for one in row))


def memory_picture(
    plan: MemoryPlan, room: Room, snapshots: int, context: int | None = None, requests: int | None = None
) -> MemoryPicture:
    """Loads up to the plan's limits, with `context` and `requests` among them (default: the longest, what fits).

    Raises ConfigError for a context or a number of requests out of the plan's range.
    """
    context = plan.max_context if context is None else context
    fit = plan.fit(room, context, snapshots)  # checks the context
    if requests is None:
        requests = max(1, fit.requests)
    plan.longest(room, requests, snapshots)  # checks the requests
    contexts = _offered(CONTEXTS, plan.max_context, context)
    counts = _offered(REQUESTS, plan.bounds.requests, requests)
    budget = room.pool_bytes(plan.fixed_bytes)

    def load(count: int, tokens: int) -> Load:
        taken = plan.pools(plan.sizes(count, tokens, snapshots))
        return Load(tokens, count, tuple(taken.values()), sum(taken.values()) <= budget)

    return MemoryPicture(
        room,
        tuple(item for item in plan.fixed if item.size_bytes),
        tuple(plan.weights_by_dtype.items()),
        tuple(plan.weights_by_part.items()),
        (*(g.name for g in plan.groups), *(s.name for s in plan.states)),
        tuple(_notes(plan)),
        tuple(tuple(load(count, tokens) for count in counts) for tokens in contexts),
        tuple(answer_of(plan, room, plan.fit(room, tokens, snapshots)) for tokens in contexts),
        load(requests, context),
        snapshots,
    )


def _offered(usual: Iterable[int], most: int, asked: int) -> list[int]:
    return sorted({n for n in usual if n <= most} | {asked} | ({most} if most < 2**31 else set()))


def _notes(plan: MemoryPlan) -> Iterable[str]:
    tokens = plan.token_bytes()
    for group in plan.groups:
        kept = f"last {group.horizon} tokens" if group.horizon else f"{tokens[group.name]:,.0f} bytes a token"
        yield f"{group.page_tokens} tokens a page, {kept}"
    for _ in plan.states:
        yield "a row a request"
