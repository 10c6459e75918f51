"""Who owns which page: paged KV pools and state slots, driven only by the manifest's groups.

A request holds one slot while it runs. The slot is its row in the compressor states and its row in the page table
of every KV group: `tables[group][slot, i]` is the page of tokens [i * page_tokens, (i + 1) * page_tokens), or 0.

    admit()             free slot -> owned, all tables empty
    grow(slot, n)       owned pages cover the first n tokens, in every group or in none
    evict(slot, n)      pages that token n and later can no longer read go back; their table entries become 0
    release(slot)       every page and the slot go back, exactly once: a second release is an error

Page 0 and slot 0 are the null page and slot: never handed out, written by padding, read by nobody. Nothing is
cleared when a page or slot changes hands: readers are bounded by positions, so stale rows are never seen.
The pool does no I/O and holds no tensor; the executor allocates `PoolSizes` pages and slots of each group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dsv4c.artifact import KVGroup
from dsv4c.errors import ConfigError, EngineError
from dsv4c.runtime.poolsizes import PoolSizes, ceil_div, peak_pages

Int64Array = npt.NDArray[np.int64]


class _Group:
    """Pages of one KV group: a free list, and for each slot its table row and the columns [first, end) it owns."""

    def __init__(self, spec: KVGroup, pages: int, slots: int, max_context: int) -> None:
        if pages < 2:
            raise ConfigError(f"KV group `{spec.name}` needs at least 2 pages (page 0 is null), not {pages}")
        if spec.horizon is not None and spec.horizon < 1:
            raise ConfigError(f"KV group `{spec.name}` has horizon {spec.horizon}: a token reads at least itself")
        self.spec = spec
        self.pages = pages
        self.free = list(range(pages - 1, 0, -1))
        self.table: Int64Array = np.zeros((slots, ceil_div(max_context, spec.page_tokens)), dtype=np.int64)
        self.first = [0] * slots
        self.end = [0] * slots

    def missing(self, slot: int, tokens: int) -> int:
        return max(0, ceil_div(tokens, self.spec.page_tokens) - self.end[slot])

    def take(self, slot: int, count: int) -> None:
        end = self.end[slot]
        for column in range(end, end + count):
            self.table[slot, column] = self.free.pop()
        self.end[slot] = end + count

    def drop(self, slot: int, before: int) -> int:
        """Gives back the columns before `before`; returns how many pages that were."""
        first, row = self.first[slot], self.table[slot]
        before = min(before, self.end[slot])
        if before <= first:
            return 0
        self.free.extend(reversed(row[first:before].tolist()))
        row[first:before] = 0
        self.first[slot] = before
        return before - first

    def clear(self, slot: int) -> None:
        self.drop(slot, self.end[slot])
        self.first[slot] = self.end[slot] = 0


class KVPool:
    """Pages and slots of all running requests. Every change is all or nothing; counts are in pages and tokens."""

    def __init__(self, groups: Sequence[KVGroup], sizes: PoolSizes) -> None:
        self.sizes = sizes
        self._groups = [_Group(g, sizes.pages[g.name], sizes.slots, sizes.max_context) for g in groups]
        self._free_slots = list(range(sizes.slots - 1, 0, -1))
        self._owned = [False] * sizes.slots
        self._covered = [0] * sizes.slots  # tokens covered in every group: growing below it costs nothing
        self.tables: dict[str, Int64Array] = {g.spec.name: g.table for g in self._groups}
        """Group -> [slots, columns] int64 page table. Read by the batch builder; written only here."""

    @property
    def groups(self) -> tuple[KVGroup, ...]:
        return tuple(g.spec for g in self._groups)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def free_pages(self) -> dict[str, int]:
        """Group -> pages that nobody owns."""
        return {g.spec.name: len(g.free) for g in self._groups}

    def used_pages(self) -> dict[str, int]:
        """Group -> pages owned by requests."""
        return {g.spec.name: g.pages - 1 - len(g.free) for g in self._groups}

    def total_pages(self) -> dict[str, int]:
        """Group -> pages that requests can own (the null page not counted)."""
        return {g.spec.name: g.pages - 1 for g in self._groups}

    def holds(self, tokens: int) -> bool:
        """Whether one request alone can ever reach `tokens` tokens (one token a step at worst)."""
        return tokens <= self.sizes.max_context and all(peak_pages(g.spec, tokens) <= g.pages - 1 for g in self._groups)

    def longest(self) -> int:
        """Most tokens that one request alone can reach."""
        low, high = 0, self.sizes.max_context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.holds(middle) else (low, middle - 1)
        return low

    def admit(self) -> int | None:
        """A slot with empty page tables, or None if all are taken."""
        if not self._free_slots:
            return None
        slot = self._free_slots.pop()
        self._owned[slot] = True
        return slot

    def pages_needed(self, slot: int, tokens: int) -> dict[str, int]:
        """Group -> pages that `grow(slot, tokens)` would take: exact, 0 where nothing is missing."""
        self._check(slot)
        return {g.spec.name: g.missing(slot, tokens) for g in self._groups}

    def claim(self, slot: int | None, tokens: int) -> dict[str, int]:
        """Group -> pages a request (None: not yet admitted) lacks to reach `tokens` tokens, evicting as it goes."""
        claims = {}
        for group in self._groups:
            held = group.end[slot] - group.first[slot] if slot is not None else 0
            claims[group.spec.name] = max(0, peak_pages(group.spec, tokens) - held)
        return claims

    def fit(self, slot: int, tokens: int) -> int:
        """The most tokens, up to `tokens`, that `grow` could cover now with the free pages of every group."""
        self._check(slot)
        if tokens <= self._covered[slot]:
            return tokens
        reach = min((g.end[slot] + len(g.free)) * g.spec.page_tokens for g in self._groups)
        return min(tokens, reach)

    def grow(self, slot: int, tokens: int) -> bool:
        """Makes the pages of `slot` cover its first `tokens` tokens in every group; False changes nothing."""
        self._check(slot)
        if tokens <= self._covered[slot]:
            return True
        if tokens > self.sizes.max_context:
            raise EngineError(f"slot {slot} cannot grow to {tokens} tokens, the context is {self.sizes.max_context}")
        missing = [g.missing(slot, tokens) for g in self._groups]
        if any(n > len(g.free) for n, g in zip(missing, self._groups, strict=True)):
            return False
        for n, group in zip(missing, self._groups, strict=True):
            group.take(slot, n)
        self._covered[slot] = min(g.end[slot] * g.spec.page_tokens for g in self._groups)
        return True

    def evict(self, slot: int, computed: int) -> int:
        """Frees the pages of which token `computed`, the next one, and later ones read nothing.

        Returns the number of pages freed. Call it only when tokens before `computed` will not be rewritten.
        """
        self._check(slot)
        freed = 0
        for group in self._groups:
            horizon = group.spec.horizon
            if horizon is None:
                continue
            before = (computed + 1 - horizon) // group.spec.page_tokens
            if before > group.first[slot]:
                freed += group.drop(slot, before)
        return freed

    def release(self, slot: int) -> None:
        """Gives back the slot and every page it owns. Raises EngineError on a slot that is not owned."""
        self._check(slot)
        for group in self._groups:
            group.clear(slot)
        self._covered[slot] = 0
        self._owned[slot] = False
        self._free_slots.append(slot)

    def _check(self, slot: int) -> None:
        if not 0 < slot < len(self._owned) or not self._owned[slot]:
            raise EngineError(f"slot {slot} is not owned by a request")

    def audit(self) -> None:
        """Proves that every page and slot has exactly one owner. Raises EngineError that names the first fault."""
        owned_slots = {s for s, owned in enumerate(self._owned) if owned}
        _expect_partition("slots", self._free_slots, sorted(owned_slots), len(self._owned))
        for group in self._groups:
            name, owned = f"pages of group `{group.spec.name}`", []
            for slot in range(len(self._owned)):
                first, end, row = group.first[slot], group.end[slot], group.table[slot]
                if slot not in owned_slots and end:
                    raise EngineError(f"{name}: free slot {slot} still has columns")
                if not 0 <= first <= end <= row.size or row[:first].any() or row[end:].any():
                    raise EngineError(f"{name}: slot {slot} has entries outside its columns [{first}, {end})")
                owned.extend(row[first:end].tolist())
            _expect_partition(name, group.free, owned, group.pages)


def _expect_partition(what: str, free: list[int], owned: list[int], count: int) -> None:
    """`free` and `owned` together are 1 ... count - 1, each once."""
    seen = sorted(free + owned)
    if seen == list(range(1, count)):
        return
    twice = sorted({n for n in seen if seen.count(n) > 1})
    lost = sorted(set(range(1, count)) - set(seen))
    raise EngineError(f"{what}: owned twice {twice}, leaked {lost}, of {count - 1}")
