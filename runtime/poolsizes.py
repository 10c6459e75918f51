"""How many rows every pool has: pages of each KV group, and slots of the compressor states, from counts or bytes.

Slots: 0 is the null slot, then one for each request, then `snapshots` rows that belong to the prefix tree. Only the
state groups that a snapshot must copy have the latter (`snapshot_states`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsv4c.artifact import KVGroup, StateGroup
from dsv4c.errors import ConfigError

DTYPE_BYTES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e8m0fnu": 1, "uint8": 1, "int8": 1,
    "int16": 2, "int32": 4, "int64": 8,
}  # fmt: skip


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def first_page(group: KVGroup, computed: int) -> int:
    """The first page that token `computed` or a later one reads."""
    return 0 if group.horizon is None else max(0, computed + 1 - group.horizon) // group.page_tokens


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def peak_pages(group: KVGroup, tokens: int, chunk: int = 1) -> int:
    """Most pages of `group` that a request of `tokens` tokens holds at once, computed `chunk` tokens a step.

    With a horizon, a chunk and what its first token reads are `chunk + horizon - 1` tokens, which may begin on the
    last token of a page.
    """
    whole = ceil_div(tokens, group.page_tokens)
    if group.horizon is None:
        return whole
    return min(whole, (chunk + group.horizon + 2 * group.page_tokens - 3) // group.page_tokens)


def step_pages(group: KVGroup, requests: int, tokens: int, step_tokens: int) -> int:
    """Most pages of `group` that `requests` requests of `tokens` tokens hold at once, `step_tokens` a step for all.

    With a horizon, every request keeps its tail, `peak_pages` of no chunk; of the step's tokens, the first `first`
    that a request gets may begin another page, and then every page's worth does.
    """
    size, whole = group.page_tokens, ceil_div(tokens, group.page_tokens)
    tail = peak_pages(group, tokens, 0)
    if group.horizon is None or tail == whole:
        return requests * whole
    first = size - (group.horizon - 3) % size
    growing = min(requests, step_tokens // first)
    more = min(growing * (whole - tail - 1), (step_tokens - growing * first) // size)
    return requests * tail + growing + more


def _row_bytes(entry_shape: Sequence[int], dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"pool dtype `{dtype}` is unknown", hint=f"known: {', '.join(sorted(DTYPE_BYTES))}")
    return int(np.prod(entry_shape, dtype=np.int64)) * DTYPE_BYTES[dtype]


def page_bytes(group: KVGroup) -> int:
    """Bytes of one page of `group`, over all its pools (all layers)."""
    return group.entries_per_page * sum(_row_bytes(p.entry_shape, p.dtype) for p in group.pools)


def slot_bytes(states: Sequence[StateGroup]) -> int:
    """Bytes of one request's row in all state pools."""
    return sum(_row_bytes(p.entry_shape, p.dtype) for s in states for p in s.pools)


def block_tokens(groups: Sequence[KVGroup]) -> int:
    """Tokens of the smallest block that is made of whole pages of every group: what the prefix tree deals in."""
    return math.lcm(*(g.page_tokens for g in groups))


def tail_pages(group: KVGroup) -> int:
    """Pages of `group` that a request needs to go on at a block's end, for groups with a horizon; 0 for others."""
    return 0 if group.horizon is None else ceil_div(group.horizon - 1, group.page_tokens)


def snapshot_states(states: Sequence[StateGroup], groups: Sequence[KVGroup]) -> tuple[StateGroup, ...]:
    """The state groups whose rows a request needs to go on at a block's end."""
    return tuple(s for s in states if not s.empty_at(block_tokens(groups)))


@dataclass(frozen=True)
class PoolSizes:
    """Rows the executor allocates: `pages` of each KV group and `slots` of the states, null page and slot included.

    `max_context` is the longest request in tokens; `max_requests` = slots - 1. `snapshots` more rows, behind the
    slots, in the state groups that `snapshot_states` names; without any there is no prefix cache.
    """

    pages: Mapping[str, int]
    slots: int
    max_context: int
    snapshots: int = 0

    @property
    def max_requests(self) -> int:
        return self.slots - 1

    @classmethod
    def for_requests(
        cls,
        groups: Sequence[KVGroup],
        max_requests: int,
        max_context: int,
        step_tokens: int = 1,
        snapshots: int = 0,
    ) -> PoolSizes:
        """Enough that `max_requests` requests of `max_context` tokens never lack a page at `step_tokens` a step.

        Snapshots have their window pages on top; what they need besides is what requests leave.
        """
        _check_counts(max_requests, max_context, step_tokens, snapshots)
        pages = {}
        for group in groups:
            pages[group.name] = 1 + step_pages(group, max_requests, max_context, step_tokens)
            pages[group.name] += snapshots * tail_pages(group)
        return cls(pages, max_requests + 1, max_context, snapshots)

    @classmethod
    def for_bytes(
        cls,
        groups: Sequence[KVGroup],
        states: Sequence[StateGroup],
        budget_bytes: int,
        max_requests: int,
        max_context: int,
        step_tokens: int = 1,
        snapshots: int = 0,
    ) -> PoolSizes:
        """The most tokens that `budget_bytes` hold: states and windows for `max_requests` first, the rest for context.

        Never more than `for_requests` would give. Raises ConfigError if not even one request of `max_context`
        tokens fits, with both numbers.
        """
        full = cls.for_requests(groups, max_requests, max_context, step_tokens, snapshots)
        fixed = full.state_bytes(groups, states)
        fixed += sum(full.pages[g.name] * page_bytes(g) for g in groups if g.horizon is not None)
        growing = [g for g in groups if g.horizon is None]

        def pages_at(tokens: int) -> dict[str, int]:
            return {g.name: min(1 + ceil_div(tokens, g.page_tokens), full.pages[g.name]) for g in growing}

        def bytes_at(tokens: int) -> int:
            counts = pages_at(tokens)
            return fixed + sum(counts[g.name] * page_bytes(g) for g in growing)

        if bytes_at(max_context) > budget_bytes:
            raise ConfigError(
                f"one request of {max_context} tokens among {max_requests} needs {bytes_at(max_context)} bytes of KV "
                f"memory, the budget is {budget_bytes}",
                hint="give more memory, or lower the context or the number of requests",
            )
        low = max_context
        high = max([low, *((full.pages[g.name] - 1) * g.page_tokens for g in growing)])
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if bytes_at(middle) <= budget_bytes else (low, middle - 1)
        return cls({**full.pages, **pages_at(low)}, full.slots, max_context, snapshots)

    def state_bytes(self, groups: Sequence[KVGroup], states: Sequence[StateGroup]) -> int:
        """Bytes of all states, snapshots included."""
        return self.slots * slot_bytes(states) + self.snapshots * slot_bytes(snapshot_states(states, groups))

    def total_bytes(self, groups: Sequence[KVGroup], states: Sequence[StateGroup]) -> int:
        """Bytes of all pools and states."""
        return self.state_bytes(groups, states) + sum(self.pages[g.name] * page_bytes(g) for g in groups)


def _check_counts(max_requests: int, max_context: int, step_tokens: int, snapshots: int) -> None:
    for name, value in (("max_requests", max_requests), ("max_context", max_context), ("step_tokens", step_tokens)):
        if value < 1:
            raise ConfigError(f"`{name}` must be at least 1, not {value}")
    if snapshots < 0:
        raise ConfigError(f"`snapshots` must be at least 0, not {snapshots}")
