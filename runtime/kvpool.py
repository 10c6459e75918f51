"""Who owns which page: paged KV pools and state slots, driven only by the manifest's groups.

A request holds one slot while it runs. The slot is its row in the compressor states and its row in the page table
of every KV group: `tables[group][slot, i]` is the page of tokens [i * page_tokens, (i + 1) * page_tokens), or 0.

    admit()               free slot -> owned, all tables empty
    adopt(slot, pages, n) pages that others hold become its first n tokens; it writes behind them only
    open(slot, n, pages)  the same without a window: it will begin where token n reads first
    grow(slot, n)         owned pages cover the first n tokens, in every group or in none
    evict(slot, n)        pages that token n and later can no longer read go back; their table entries become 0
    release(slot)         every page and the slot go back, exactly once: a second release is an error

A page is free when nobody refers to it. Requests do, once for each place in a table, and so does the prefix tree, which
holds pages (`hold`, `let_go`) for requests to come: one that only the tree refers to is idle, and can be had by asking
the tree to let go. `fit` and `claim` count idle pages as available, `grow` takes free ones only.

Page 0 and slot 0 are the null page and slot: never handed out, written by padding, read by nobody. Nothing is
cleared when a page or slot changes hands: readers are bounded by positions, so stale rows are never seen.
The pool does no I/O and holds no tensor; the executor allocates `PoolSizes` pages and slots of each group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dsv4c.artifact import KVGroup
from dsv4c.errors import ConfigError, EngineError
from dsv4c.runtime.poolsizes import PoolSizes, ceil_div, first_page, peak_pages

Int64Array = npt.NDArray[np.int64]
Update = tuple[int, int, int]
"""Slot, column, page: one entry written into a page table."""


class _Group:
    """Pages of one KV group: references, and for each slot its table row and the columns [first, end) it has."""

    def __init__(self, spec: KVGroup, pages: int, slots: int, max_context: int, log: list[Update] | None) -> None:
        if pages < 2:
            raise ConfigError(f"KV group `{spec.name}` needs at least 2 pages (page 0 is null), not {pages}")
        if spec.horizon is not None and spec.horizon < 1:
            raise ConfigError(f"KV group `{spec.name}` has horizon {spec.horizon}: a token reads at least itself")
        self.spec = spec
        self.pages = pages
        self.free = list(range(pages - 1, 0, -1))
        self.refs = [0] * pages
        """References by page, the tree's included."""
        self.held = [0] * pages
        """References of the tree."""
        self.idle = 0
        """Pages that only the tree refers to."""
        self.table: Int64Array = np.zeros((slots, ceil_div(max_context, spec.page_tokens)), dtype=np.int64)
        self.first = [0] * slots
        self.end = [0] * slots
        self.log = log

    @property
    def available(self) -> int:
        return len(self.free) + self.idle

    def missing(self, slot: int, tokens: int) -> int:
        return max(0, ceil_div(tokens, self.spec.page_tokens) - self.end[slot])

    def take(self, slot: int, count: int) -> None:
        end = self.end[slot]
        for column in range(end, end + count):
            page = self.free.pop()
            self.refs[page] = 1
            self._write(slot, column, page)
        self.end[slot] = end + count

    def share(self, slot: int, column: int, page: int) -> None:
        """Puts a page that somebody refers to into the table."""
        if self.refs[page] < 1:
            raise EngineError(f"group `{self.spec.name}`: page {page} is free and cannot be shared")
        self.idle -= self.refs[page] == self.held[page]
        self.refs[page] += 1
        self._write(slot, column, page)

    def hold(self, page: int) -> None:
        if self.refs[page] < 1:
            raise EngineError(f"group `{self.spec.name}`: page {page} is free and cannot be held")
        self.refs[page] += 1
        self.held[page] += 1

    def let_go(self, page: int) -> None:
        if self.held[page] < 1:
            raise EngineError(f"group `{self.spec.name}`: page {page} is not held")
        self.refs[page] -= 1
        self.held[page] -= 1
        if self.refs[page] == 0:
            self.idle -= 1
            self.free.append(page)

    def unref(self, page: int) -> None:
        """One table entry less."""
        self.refs[page] -= 1
        if self.refs[page] == 0:
            self.free.append(page)
        elif self.refs[page] == self.held[page]:
            self.idle += 1

    def drop(self, slot: int, before: int) -> int:
        """Gives back the columns before `before`; returns how many that were."""
        first, row = self.first[slot], self.table[slot]
        before = min(before, self.end[slot])
        if before <= first:
            return 0
        for page in reversed(row[first:before].tolist()):
            self.unref(page)
        row[first:before] = 0
        self.first[slot] = before
        return before - first

    def clear(self, slot: int) -> None:
        self.drop(slot, self.end[slot])
        self.first[slot] = self.end[slot] = 0

    def _write(self, slot: int, column: int, page: int) -> None:
        self.table[slot, column] = page
        if self.log is not None:
            self.log.append((slot, column, page))


class KVPool:
    """Pages and slots of all running requests. Every change is all or nothing; counts are in pages and tokens.

    `track`: page-table entries are logged for `drain_updates`.
    """

    def __init__(self, groups: Sequence[KVGroup], sizes: PoolSizes, *, track: bool = False) -> None:
        self.sizes = sizes
        self._updates: dict[str, list[Update]] = {g.name: [] for g in groups}
        self._groups = [
            _Group(g, sizes.pages[g.name], sizes.slots, sizes.max_context, self._updates[g.name] if track else None)
            for g in groups
        ]
        self._by_name = {g.spec.name: g for g in self._groups}
        self._free_slots = list(range(sizes.slots - 1, 0, -1))
        self._owned = [False] * sizes.slots
        self._evict_at = [0] * sizes.slots  # computed tokens at which the next window page goes, at the earliest
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
        """Group -> pages that nobody refers to."""
        return {g.spec.name: len(g.free) for g in self._groups}

    def idle_pages(self) -> dict[str, int]:
        """Group -> pages that only the prefix tree holds."""
        return {g.spec.name: g.idle for g in self._groups}

    def available_pages(self) -> dict[str, int]:
        """Group -> free and idle pages."""
        return {g.spec.name: g.available for g in self._groups}

    def used_pages(self) -> dict[str, int]:
        """Group -> pages of running requests."""
        return {g.spec.name: g.pages - 1 - g.available for g in self._groups}

    def num_used(self, group: str, pages: Iterable[int]) -> int:
        """How many of these pages requests refer to."""
        of = self._by_name[group]
        return sum(of.refs[page] > of.held[page] for page in pages)

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

    def adopt(self, slot: int, pages: Mapping[str, Sequence[int]], tokens: int) -> None:
        """Makes these pages the first `tokens` tokens of a slot just admitted: group -> its last pages up to there.

        Whole pages; in groups without a horizon from the first on. The slot refers to them beside whoever does.
        """
        self._check(slot)
        for group in self._groups:
            count, columns = len(pages[group.spec.name]), tokens // group.spec.page_tokens
            least = columns - first_page(group.spec, tokens)
            if group.end[slot] or tokens % group.spec.page_tokens or not least <= count <= columns:
                raise EngineError(f"slot {slot} cannot begin with {count} pages of `{group.spec.name}` at {tokens}")
        for group in self._groups:
            shared, end = pages[group.spec.name], tokens // group.spec.page_tokens
            for column, page in enumerate(shared, end - len(shared)):
                group.share(slot, column, page)
            group.first[slot], group.end[slot] = end - len(shared), end
        self._covered[slot] = tokens

    def open(self, slot: int, tokens: int, shared: Mapping[str, Sequence[int]] | None = None) -> None:
        """Lets a slot just admitted take in the state of `tokens` tokens: `grow` then gives it what lacks to hold it.

        In groups with a horizon that is the pages that token `tokens` and later ones read. In the others it begins with
        the pages `shared`, whole ones that somebody refers to, the same number of tokens in each.
        """
        self._check(slot)
        shared = shared or {}
        for group in self._groups:
            pages = shared.get(group.spec.name, ())
            if group.end[slot] or len(pages) * group.spec.page_tokens > tokens or (pages and group.spec.horizon):
                raise EngineError(f"slot {slot} cannot begin with {len(pages)} pages of `{group.spec.name}`")
        for group in self._groups:
            pages = shared.get(group.spec.name, ())
            for column, page in enumerate(pages):
                group.share(slot, column, page)
            group.first[slot] = first_page(group.spec, tokens)
            group.end[slot] = max(len(pages), group.first[slot])
        self._covered[slot] = min(g.end[slot] * g.spec.page_tokens for g in self._groups)

    def columns_of(self, slot: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Group -> first column that the slot has, and its pages from there on."""
        self._check(slot)
        return {
            g.spec.name: (g.first[slot], tuple(g.table[slot, g.first[slot] : g.end[slot]].tolist()))
            for g in self._groups
        }

    def exchange(self, slot: int, group: str, column: int, pages: Sequence[int]) -> None:
        """Puts these pages, which hold the same, in place of the slot's own from `column` on."""
        self._check(slot)
        of = self._by_name[group]
        if not of.first[slot] <= column <= column + len(pages) <= of.end[slot]:
            raise EngineError(f"slot {slot} has no {len(pages)} pages of `{group}` at column {column}")
        for at, page in enumerate(pages, column):
            own = int(of.table[slot, at])
            of.share(slot, at, page)
            of.unref(own)

    def pages_of(self, slot: int, group: str, start: int, end: int) -> tuple[int, ...]:
        """The slot's pages of tokens [start, end): whole pages, which it has."""
        of = self._by_name[group]
        first, last = start // of.spec.page_tokens, end // of.spec.page_tokens
        if not of.first[slot] <= first <= last <= of.end[slot]:
            raise EngineError(f"slot {slot} has no pages of `{group}` for tokens [{start}, {end})")
        return tuple(of.table[slot, first:last].tolist())

    def hold(self, group: str, pages: Iterable[int]) -> None:
        """One reference more to each page, for the prefix tree. Somebody must refer to them already."""
        for page in pages:
            self._by_name[group].hold(page)

    def let_go(self, group: str, pages: Iterable[int]) -> None:
        """Takes back what `hold` gave."""
        for page in pages:
            self._by_name[group].let_go(page)

    def pages_needed(self, slot: int, tokens: int) -> dict[str, int]:
        """Group -> pages that `grow(slot, tokens)` would take: exact, 0 where nothing is missing."""
        self._check(slot)
        return {g.spec.name: g.missing(slot, tokens) for g in self._groups}

    def lacking(self, slot: int, tokens: int) -> dict[str, int]:
        """Group -> pages that must become free before `grow(slot, tokens)` can succeed; only groups that lack some."""
        if tokens <= self._covered[slot]:
            return {}
        short = {g.spec.name: g.missing(slot, tokens) - len(g.free) for g in self._groups}
        return {name: count for name, count in short.items() if count > 0}

    def claim(self, slot: int | None, tokens: int) -> dict[str, int]:
        """Group -> pages a request (None: not yet admitted) lacks to reach `tokens` tokens, evicting as it goes."""
        claims = {}
        for group in self._groups:
            held = group.end[slot] - group.first[slot] if slot is not None else 0
            claims[group.spec.name] = max(0, peak_pages(group.spec, tokens) - held)
        return claims

    def fit(self, slot: int, tokens: int) -> int:
        """The most tokens, up to `tokens`, that `grow` could cover with the free and idle pages of every group."""
        self._check(slot)
        if tokens <= self._covered[slot]:
            return tokens
        reach = min((g.end[slot] + g.available) * g.spec.page_tokens for g in self._groups)
        return min(tokens, reach)

    def covers(self, slot: int, tokens: int) -> bool:
        """Whether the slot has the pages of its first `tokens` tokens already, in every group."""
        return tokens <= self._covered[slot]

    def reaches_back(self, slot: int, tokens: int) -> bool:
        """Whether the slot still has every page that token `tokens` and later ones read."""
        return all(first_page(g.spec, tokens) >= g.first[slot] for g in self._groups)

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
        """Gives back the pages of which token `computed`, the next one, and later ones read nothing.

        Returns how many. Call it only when tokens before `computed` will not be rewritten.
        """
        self._check(slot)
        if computed < self._evict_at[slot]:
            return 0
        dropped, due = 0, 2**62
        for group in self._groups:
            before = first_page(group.spec, computed)
            if before > group.first[slot]:
                dropped += group.drop(slot, before)
            if group.spec.horizon is not None:
                due = min(due, (before + 1) * group.spec.page_tokens + group.spec.horizon - 1)
        self._evict_at[slot] = due
        return dropped

    def release(self, slot: int) -> None:
        """Gives back the slot and every page it has. Raises EngineError on a slot that is not owned."""
        self._check(slot)
        for group in self._groups:
            group.clear(slot)
        self._covered[slot] = self._evict_at[slot] = 0
        self._owned[slot] = False
        self._free_slots.append(slot)

    def drain_updates(self) -> dict[str, list[Update]]:
        """Group -> what was written into its page table since the last call, in order; zeroes are not logged."""
        drained = {name: list(log) for name, log in self._updates.items()}
        for log in self._updates.values():
            log.clear()
        return drained

    def _check(self, slot: int) -> None:
        if not 0 < slot < len(self._owned) or not self._owned[slot]:
            raise EngineError(f"slot {slot} is not owned by a request")

    def audit(self, held: Mapping[str, Iterable[int]] | None = None) -> None:
        """Proves that every page and slot is free or referred to as counted. Raises EngineError naming the fault.

        `held`: what the prefix tree holds, a page once for each `hold`.
        """
        slots = sorted([*self._free_slots, *(s for s, owned in enumerate(self._owned) if owned)])
        if slots != list(range(1, len(self._owned))):
            raise EngineError(f"slots: free and owned ones are {slots}, of {len(self._owned) - 1}")
        for group in self._groups:
            self._audit_group(group, Counter((held or {}).get(group.spec.name, ())))

    def _audit_group(self, group: _Group, held: Counter[int]) -> None:
        name, refs = f"pages of group `{group.spec.name}`", Counter(held)
        for slot, owned in enumerate(self._owned):
            first, end, row = group.first[slot], group.end[slot], group.table[slot]
            if not owned and end:
                raise EngineError(f"{name}: free slot {slot} still has columns")
            if not 0 <= first <= end <= row.size or row[:first].any() or row[end:].any():
                raise EngineError(f"{name}: slot {slot} has entries outside its columns [{first}, {end})")
            refs.update(row[first:end].tolist())
        for page in range(group.pages):
            if group.refs[page] != refs[page] or group.held[page] != held[page]:
                raise EngineError(
                    f"{name}: {group.refs[page]} references to page {page} are counted, {group.held[page]} of the "
                    f"tree's; there are {refs[page]} and {held[page]}"
                )
        if sorted(group.free) != [page for page in range(1, group.pages) if not refs[page]]:
            raise EngineError(f"{name}: the free list is not the pages without references, leaked or free twice")
        if group.idle != sum(count > 0 and refs[page] == count for page, count in held.items()):
            raise EngineError(f"{name}: {group.idle} are counted as idle")
