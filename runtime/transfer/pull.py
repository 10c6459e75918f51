"""One pull: follows a row of a peer's ledger and copies what is new and final into our own pools, until all is there.

    snapshot  the row at one moment; another lease there, or a failed one: LeaseLost; another epoch: from the start
    prove     what was copied before it counts if its pages are still those of the row; else it is wanted again
    want      pool by pool, what is final and not here yet
                groups without horizon   whole pages, as tokens advance; the last, partial one when all of `target` is
                groups with one          pages from `first_page(target)` on, when the pool is final to `target`
                states                   the row, then too, unless it is empty at `target`
    copy      in pieces, so that many pulls share a thread, and a deadline is seen
    ...       until nothing is left to want and all is proved

A pool is final to `tokens`; to `next_tokens`, once the step that computes them has passed the mark behind which none
of its calls writes the pool. So after the prefill's last layer only that layer's bytes remain.

It is a generator: it yields a Read, to go on when that is done, or seconds to sleep. Nothing here knows a thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsv4c.errors import EngineError, LeaseLost
from dsv4c.runtime.poolsizes import ceil_div, first_page
from dsv4c.runtime.transfer.backend import Peer, Read
from dsv4c.runtime.transfer.handle import Handle
from dsv4c.runtime.transfer.layout import Int64Array, Layout, Ranges
from dsv4c.runtime.transfer.ledger import (
    COMPLETE,
    COMPUTING,
    EPOCH,
    FAILED,
    HEAD_WORDS,
    LEASE,
    MARK,
    NEXT_TOKENS,
    RELEASED,
    SLOT,
    STATUS,
    TARGET,
    TOKENS,
    VERSION,
)

PIECE_BYTES = 8 << 20  # about a millisecond of memcpy: how long one pull keeps the others, and a cancellation, waiting
LEAST_SLEEP_S, MOST_SLEEP_S = 0.0002, 0.005  # between two looks at a row where nothing moves
Steps = Generator[Read | float, None, None]


@dataclass(frozen=True)
class Place:
    """Where pulled state goes: our own state row, and pages by group from a column on; for tokens [start, target)."""

    slot: int
    start: int
    target: int
    tables: Mapping[str, tuple[int, Sequence[int]]]


@dataclass
class Moved:
    """What a pull has done so far."""

    bytes: int = 0
    ranges: int = 0
    early_bytes: int = 0
    """Bytes that were here before the prefill had ended."""
    restarts: int = 0
    """Times that the prefill began again, having lost its pages."""
    again: int = 0
    """Parts that were copied again, because their pages were exchanged meanwhile."""


@dataclass
class _Track:
    """Pools that come together: of their columns [first, end), those below `done` are here; a state row is column 0."""

    numbers: list[int]
    group: int | None
    """None: a state."""
    page_tokens: int
    first: int
    end: int
    at_once: bool
    """Not before all of it is final."""
    mark: int | None
    """The number of the mark behind which a step no longer writes them."""
    done: int = 0


@dataclass
class _Row:
    """A ledger row at one moment."""

    head: Int64Array
    pages: Int64Array


def _agree(a: Int64Array, b: Int64Array) -> bool:
    """Whether two heads are of one version, and not half of one and half of another.

    Not compared: the words that change without a version. An older mark promises less; a newer one of a later step
    stands behind what an earlier step was to make final.
    """
    return bool(((a == b) | _ALONE).all())


_ALONE = np.isin(np.arange(HEAD_WORDS), (MARK, RELEASED))
_Part = tuple[_Track, int, Int64Array]
"""The column at which a copy of a track ends, and the pages of the peer that it was read from."""


class PullSteps:
    """The steps of one pull; use once. `progress` grows whenever anything has moved."""

    def __init__(self, layout: Layout, handle: Handle, place: Place, peer: Peer) -> None:
        self.moved = Moved()
        self.progress = 0
        self.writing = False
        """Whether a Read of pools is under way."""
        self._layout, self._handle, self._place, self._peer = layout, handle, place, peer
        ends = np.cumsum([0, *handle.columns]).tolist()
        self._spans = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self._ours = [np.asarray(place.tables[g.name][1], np.int64) for g in layout.groups]
        self._firsts = [place.tables[g.name][0] for g in layout.groups]
        self._tracks = self._begin()
        self._unproved: list[_Part] = []
        self._row: _Row | None = None

    def run(self) -> Steps:
        """Does all of it. Raises LeaseLost, and what the peer raises."""
        sleep = LEAST_SLEEP_S
        while True:
            before, row = self._row, (yield from self._snapshot())
            moved = before is None or not np.array_equal(before.head, row.head)
            self._check(row, before)
            self._prove(row)
            self._row = row
            if all(t.done >= t.end for t in self._tracks):
                return
            parts = self._want(row)
            if parts:
                yield from self._copy(parts, row)
            if moved or parts:
                self.progress += 1
                sleep = LEAST_SLEEP_S
            elif row.head[STATUS] == COMPLETE:
                raise LeaseLost("the prefill has ended, but the ledger lacks pages of it")
            if not parts:
                yield sleep
                sleep = min(MOST_SLEEP_S, 1.2 * sleep)  # at most a fifth of the wait is slept too long

    def _begin(self) -> list[_Track]:
        """What there is to pull, with nothing here yet."""
        layout, place, out = self._layout, self._place, []
        for at, group in enumerate(layout.groups):
            end, growing = ceil_div(place.target, group.page_tokens), group.horizon is None
            first = place.start // group.page_tokens if growing else first_page(group, place.target)
            for mark, numbers in layout.by_mark[group.name]:
                out.append(_Track(numbers, at, group.page_tokens, first, end, not growing, mark, first))
        for states in layout.states:
            rows = 0 if states.empty_at(place.target) else 1
            out += [_Track(numbers, None, 1, 0, rows, True, mark) for mark, numbers in layout.by_mark[states.name]]
        return out

    def _snapshot(self) -> Generator[Read | float, None, _Row]:
        """The row as it is now. Waits while it is being written: that takes the owner microseconds, if it lives."""
        words, row = self._peer.words, self._handle.row
        while True:
            head = np.zeros(HEAD_WORDS, np.int64)
            yield words(row, 0, head)
            if self._row is not None and _agree(head, self._row.head):
                return _Row(head, self._row.pages)
            if head[VERSION] % 2 == 0:
                pages, again = np.zeros(sum(self._handle.columns), np.int64), np.zeros(HEAD_WORDS, np.int64)
                yield words(row, HEAD_WORDS, pages)
                yield words(row, 0, again)
                if _agree(head, again):
                    return _Row(again, pages)
            yield LEAST_SLEEP_S

    def _check(self, row: _Row, before: _Row | None) -> None:
        """Raises LeaseLost if the row is another's or of no use; starts over if the prefill has."""
        head = row.head
        if head[LEASE] != self._handle.lease or head[TARGET] != self._handle.target:
            raise LeaseLost(f"lease {self._handle.lease} of `{self._handle.peer}` is over, its place is another's")
        if head[STATUS] not in (COMPUTING, COMPLETE):
            what = "was cancelled or failed" if head[STATUS] == FAILED else "has expired or was let go"
            raise LeaseLost(f"lease {self._handle.lease} of `{self._handle.peer}` {what}")
        if before is not None and before.head[EPOCH] != head[EPOCH]:
            self._tracks, self._unproved = self._begin(), []
            self.moved.restarts += 1

    def _prove(self, row: _Row) -> None:
        """Counts what was copied from pages that the row still names: nobody else has written them meanwhile."""
        for track, end, source in self._unproved:
            if track.group is None or np.array_equal(row.pages[self._spans[track.group]][track.done : end], source):
                track.done = end
            else:
                self.moved.again += 1
        self._unproved = []

    def _want(self, row: _Row) -> list[_Part]:
        """What is final and not here."""
        parts: list[_Part] = []
        tokens, coming, mark = (int(row.head[word]) for word in (TOKENS, NEXT_TOKENS, MARK))
        for track in self._tracks:
            final = max(tokens, coming) if track.mark is not None and track.mark < mark else tokens
            if final >= self._place.target:
                end = track.end
            else:
                end = track.done if track.at_once else min(track.end, final // track.page_tokens)
            if end <= track.done:
                continue
            if track.group is None:
                source = row.head[SLOT : SLOT + 1]
            else:
                source = row.pages[self._spans[track.group]][track.done : end]
            if source.size < end - track.done or not source.all():
                what = self._layout.pools[track.numbers[0]]
                raise LeaseLost(f"the ledger of `{self._handle.peer}` lacks pages of `{what}`")
            parts.append((track, end, source))
        return parts

    def _copy(self, parts: list[_Part], row: _Row) -> Steps:
        """Copies the parts, in pieces."""
        ranges = [
            self._layout.ranges(track.numbers, source, self._target(track.group, track.done, end))
            for track, end, source in parts
        ]
        for piece in Ranges.join(ranges).pieces(PIECE_BYTES):
            self.writing = True
            yield self._peer.read(piece)
            self.writing = False
            self.progress += 1
            self.moved.bytes += piece.total_bytes
            self.moved.ranges += len(piece)
            if row.head[STATUS] != COMPLETE:
                self.moved.early_bytes += piece.total_bytes
        self._unproved = parts

    def _target(self, group: int | None, start: int, end: int) -> Int64Array:
        """Our own pages of these columns."""
        if group is None:
            return np.array([self._place.slot], np.int64)
        first = self._firsts[group]
        if start < first or end > first + self._ours[group].size:
            raise EngineError(
                f"no pages were opened for columns [{start}, {end}) of `{self._layout.groups[group].name}`"
            )
        return self._ours[group][start - first : end - first]
