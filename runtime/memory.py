"""Where memory goes, known before anything is loaded: pure functions of the manifest; no tensor, no device.

    limit = share of the total - what others hold                                   Room
      fixed   weights, arena, inputs, kernels; on a GPU also graphs, workspaces, the CUDA context
      pools   pages of every KV group, a row of the states a request: by concurrency and context

    plan = MemoryPlan.of(manifest, kernel_bytes)
    plan.fit(room, context)                  most requests of that context at once, and what binds
    plan.longest(room, requests)             longest context of so many at once
    plan.reserve(room, requests, context)    the pools to serve with; refuses what does not fit, with both numbers

`fit` and `longest` give every request its whole context. `reserve` oversubscribes, as serving does: a slot and a
window for every request, one whole context, and of what is left as many pages as there is room for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from dsv4c.artifact import KVGroup, Manifest, StateGroup
from dsv4c.errors import ConfigError
from dsv4c.runtime.footprint import CONTEXT_BYTES, Item, fixed_items, part_of, weight_bytes
from dsv4c.runtime.limits import Bounds, bounds_of
from dsv4c.runtime.poolsizes import (
    PoolSizes,
    ceil_div,
    page_bytes,
    slot_bytes,
    snapshot_states,
    step_pages,
    tail_pages,
)

CARD_SHARE = 0.92  # of a card, as vLLM's default; the rest is for what estimates do not know
HOST_POOL_SHARE = 0.5  # of free host memory; the system and the page cache that weights are read through need the rest


def text_of(count: int) -> str:
    """Bytes for people, in powers of ten: `900 bytes`, `31.4 MB`, `140.25 GB`."""
    if abs(count) < 1000:
        return f"{count} bytes"
    if abs(count) < 10**9:
        return f"{count / 1e3:,.1f} KB" if abs(count) < 10**6 else f"{count / 1e6:,.1f} MB"
    return f"{count / 1e9:,.2f} GB"


@dataclass(frozen=True)
class Room:
    """The memory there is: all of it, what others hold of it, and the share that this engine may fill."""

    total_bytes: int
    share: float
    others_bytes: int = 0
    pool_share: float = 1.0
    """Of `limit_bytes`, the most for pools."""

    @classmethod
    def of_card(cls, total_bytes: int, free_bytes: int | None = None, share: float = CARD_SHARE) -> Room:
        """A GPU's. `free_bytes`: as measured by this process, whose own CUDA context it lacks; None: all is free."""
        _check_share(share)
        others = 0 if free_bytes is None else max(0, total_bytes - free_bytes - CONTEXT_BYTES)
        return cls(total_bytes, share, others)

    @classmethod
    def of_host(cls, free_bytes: int) -> Room:
        """A machine's, of which `free_bytes` can be taken without swapping; pools take half of that at most."""
        return cls(free_bytes, 1.0, pool_share=HOST_POOL_SHARE)

    @property
    def limit_bytes(self) -> int:
        """What this engine may fill."""
        return max(0, int(self.share * self.total_bytes) - self.others_bytes)

    def pool_bytes(self, fixed_bytes: int) -> int:
        """What is left for pools beside `fixed_bytes`; negative if those alone do not fit."""
        return min(self.limit_bytes - fixed_bytes, int(self.pool_share * self.limit_bytes))


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(f"`--gpu-memory-utilization` is {share:g}, it must be above 0 and at most 1")


@dataclass(frozen=True)
class Fit:
    """How many requests of a context fit at once, and what keeps one more (or a longer one) out."""

    requests: int
    context: int
    pool_bytes: int
    binds: Literal["requests", "context", "memory"]
    """The artifact's most requests, its longest context, or memory."""
    pool: str
    """The pool that one more request, or one token more of all, takes the most for."""
    next_bytes: int
    """All pools with one more request, or with one token more of all."""
    available_bytes: int
    """There is for pools."""


@dataclass(frozen=True)
class MemoryPlan:
    """What an artifact needs: the same whoever is served, and pools by concurrency and context."""

    target: str
    fixed: tuple[Item, ...]
    weights_by_dtype: Mapping[str, int]
    weights_by_part: Mapping[str, int]
    """Weights of equal name but for the layer's number, largest first."""
    groups: tuple[KVGroup, ...]
    states: tuple[StateGroup, ...]
    bounds: Bounds
    max_context: int

    @classmethod
    def of(cls, manifest: Manifest, kernel_bytes: int = 0) -> MemoryPlan:
        """The plan of an artifact. `kernel_bytes`: of its compiled code (`code_files`), as it lies on disk."""
        by_dtype: dict[str, int] = defaultdict(int)
        by_part: dict[str, int] = defaultdict(int)
        for weight in manifest.weights:
            by_dtype[weight.dtype] += weight_bytes(weight)
            by_part[part_of(weight.name)] += weight_bytes(weight)
        return cls(
            manifest.target,
            fixed_items(manifest, kernel_bytes),
            dict(sorted(by_dtype.items(), key=lambda item: -item[1])),
            dict(sorted(by_part.items(), key=lambda item: -item[1])),
            manifest.kv_groups,
            manifest.state_groups,
            bounds_of(manifest),
            manifest.max_context,
        )

    @property
    def fixed_bytes(self) -> int:
        return sum(item.size_bytes for item in self.fixed)

    def sizes(self, requests: int, context: int, snapshots: int = 0) -> PoolSizes:
        """Pools in which so many requests of that context never lack a page, with snapshots for each request."""
        return PoolSizes.for_requests(self.groups, requests, context, self.bounds.tokens, snapshots * requests)

    def pools(self, sizes: PoolSizes) -> dict[str, int]:
        """KV group or state group -> bytes of its pools."""
        out = {g.name: sizes.pages[g.name] * page_bytes(g) for g in self.groups}
        copied = snapshot_states(self.states, self.groups)
        rows = {s.name: sizes.slots + sizes.snapshots * (s in copied) for s in self.states}
        return out | {s.name: rows[s.name] * slot_bytes([s]) for s in self.states}

    def token_bytes(self) -> dict[str, float]:
        """KV group -> bytes that one token more of a long request costs; 0 where only a window is kept."""
        return {g.name: 0.0 if g.horizon else page_bytes(g) / g.page_tokens for g in self.groups}

    def snapshot_bytes(self) -> int:
        """What a snapshot of the prefix cache takes besides pages that requests leave: window pages and states."""
        window = sum(tail_pages(g) * page_bytes(g) for g in self.groups)
        return window + slot_bytes(snapshot_states(self.states, self.groups))

    def fit(self, room: Room, context: int, snapshots: int = 0) -> Fit:
        """The most requests of `context` tokens that fit at once. Raises ConfigError for a context out of range."""
        self._check(1, context)
        budget = room.pool_bytes(self.fixed_bytes)
        count = _most(self.bounds.requests, lambda n: self._bytes(n, context, snapshots) <= budget)
        binds: Literal["requests", "memory"] = "requests" if count == self.bounds.requests else "memory"
        return self._fit((count, context), (count + 1, context), snapshots, binds, budget)

    def longest(self, room: Room, requests: int, snapshots: int = 0) -> Fit:
        """The longest context of which `requests` requests fit at once; 0 if not even of one token."""
        self._check(requests, 1)
        budget = room.pool_bytes(self.fixed_bytes)
        context = _most(self.max_context, lambda tokens: self._bytes(requests, tokens, snapshots) <= budget)
        binds: Literal["context", "memory"] = "context" if context == self.max_context else "memory"
        return self._fit((requests, context), (requests, context + 1), snapshots, binds, budget)

    def _fit(
        self,
        most: tuple[int, int],
        more: tuple[int, int],
        snapshots: int,
        binds: Literal["requests", "context", "memory"],
        budget: int,
    ) -> Fit:
        now = self.pools(self.sizes(*most, snapshots)) if all(most) else {}
        then = self.pools(self.sizes(*more, snapshots))
        pool = max(then, key=lambda name: then[name] - now.get(name, 0))
        return Fit(*most, sum(now.values()), binds, pool, sum(then.values()), budget)

    def reserve(
        self, room: Room, requests: int, context: int, pool_bytes: int | None = None, snapshots: int = 0
    ) -> PoolSizes:
        """Pools to serve with: at most `pool_bytes` (None: all there is room for), and no more than can be used.

        Raises ConfigError with what is needed and what is available if weights and the like do not fit, or not
        `requests` requests with a page each and one of `context` tokens among them.
        """
        self._check(requests, context)
        available = room.pool_bytes(self.fixed_bytes)
        if available <= 0:
            largest = max(self.fixed, key=lambda item: item.size_bytes)
            raise ConfigError(
                f"the artifact needs {text_of(self.fixed_bytes)} before any request ({largest.name} "
                f"{text_of(largest.size_bytes)}), {text_of(room.limit_bytes)} are available",
                hint="use a machine with more memory, or compile a model of fewer layers",
            )
        if pool_bytes is not None and pool_bytes > room.limit_bytes - self.fixed_bytes:
            raise ConfigError(
                f"`--kv-memory` is {text_of(pool_bytes)}, {text_of(room.limit_bytes - self.fixed_bytes)} are available "
                f"beside the {text_of(self.fixed_bytes)} of weights and the rest",
                hint="lower it, or leave it out to use what there is",
            )
        budget = available if pool_bytes is None else pool_bytes
        needed = self.least_bytes(requests, context, snapshots)
        if needed > budget:
            raise ConfigError(
                f"{requests} requests, one of them of {context} tokens, need {text_of(needed)} of pools, "
                f"{text_of(budget)} are available beside the {text_of(self.fixed_bytes)} of weights and the rest",
                hint=self._smaller(budget, requests, context, snapshots),
            )
        total = snapshots * requests
        return PoolSizes.for_bytes(self.groups, self.states, budget, requests, context, self.bounds.tokens, total)

    def least_bytes(self, requests: int, context: int, snapshots: int = 0) -> int:
        """Pools with which `requests` can run at once: their states and windows, a page each, one whole context."""
        full = self.sizes(requests, context, snapshots)
        pages = dict(full.pages)
        for group in self.groups:
            if group.horizon is None:
                pages[group.name] = ceil_div(context, group.page_tokens) + requests  # the null page in one's stead
        return replace(full, pages=pages).total_bytes(self.groups, self.states)

    def _smaller(self, budget: int, requests: int, context: int, snapshots: int) -> str:
        fewer = _most(requests, lambda n: self.least_bytes(n, context, snapshots) <= budget)
        shorter = _most(context, lambda tokens: self.least_bytes(requests, tokens, snapshots) <= budget)
        ways = [f"`--max-requests {fewer}`"] * bool(fewer) + [f"`--max-context {shorter}`"] * bool(shorter)
        return f"{' or '.join(ways)} would fit" if ways else "give more memory, or lower both requests and context"

    def _bytes(self, requests: int, context: int, snapshots: int) -> int:
        return self.sizes(requests, context, snapshots).total_bytes(self.groups, self.states)

    def _check(self, requests: int, context: int) -> None:
        for what, option, asked, most in (
            ("requests", "--max-requests", requests, self.bounds.requests),
            ("tokens of context", "--max-context", context, self.max_context),
        ):
            if not 1 <= asked <= most:
                raise ConfigError(
                    f"{asked} {what} are asked for, the artifact was compiled for 1 to {most}",
                    hint=f"ask for fewer, or compile it with a larger `{option}`",
                )


def requests_fit(groups: Sequence[KVGroup], sizes: PoolSizes, context: int, step_tokens: int) -> tuple[int, str]:
    """How many requests of `context` tokens given pools hold at once whatever the order of steps, and what binds.

    What binds is `slots` or the name of a KV group.
    """
    limits = {"slots": sizes.max_requests}
    for group in groups:
        limits[group.name] = _most(sizes.max_requests, partial(_holds, group, sizes, context, step_tokens))
    binds = min(limits, key=lambda name: limits[name])
    return limits[binds], binds


def _holds(group: KVGroup, sizes: PoolSizes, context: int, step_tokens: int, requests: int) -> bool:
    room = sizes.pages[group.name] - 1 - sizes.snapshots * tail_pages(group)
    return step_pages(group, requests, context, step_tokens) <= room


def _most(top: int, holds: Callable[[int], bool]) -> int:
    """The largest n within 1 and `top` for which `holds`, true up to some n; 0 if there is none."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
