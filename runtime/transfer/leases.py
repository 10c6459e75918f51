"""The owner's side of hand-overs: a lease for every kept request, from its admission until it is let go.

    admitted --> computing --> complete --> let go      by its reader, by its time to live, or by the engine's owner
                  ^   |  \\-----> failed                 it ended otherwise: nothing is kept
                  +---+ preempted: a new epoch, the reader starts over

It is the engine's Progress hook: everything here happens in the engine's thread. Pages of kept requests are never
exchanged for others (reuse.py), so what the ledger says of them holds until the epoch changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.poolsizes import ceil_div
from dsv4c.runtime.request import Request
from dsv4c.runtime.transfer.layout import Int64Array
from dsv4c.runtime.transfer.ledger import (
    COMPLETE,
    COMPUTING,
    EPOCH,
    FAILED,
    FREE,
    LEASE,
    MARK,
    NEXT_TOKENS,
    RELEASED,
    SLOT,
    STATUS,
    TARGET,
    TOKENS,
    Ledger,
)


@dataclass(eq=False)
class Lease:
    """One kept request, as peers see it in its row of the ledger."""

    number: int
    row: int
    request: Request
    target: int
    """Tokens of which the state is exported."""
    complete: bool = False
    stepping: bool = False
    """Whether a step was launched for it that is not computed yet."""
    tables: list[Int64Array] = field(default_factory=list)
    """Its rows of the page tables, as the ledger has them."""


class Leases:
    """All leases of one engine, over its ledger. Implements `moving.Progress`."""

    def __init__(self, ledger: Ledger, pool: KVPool, lag: int = 0) -> None:
        """`pool` and `lag`: the engine's. The ledger needs as many rows as the pool has slots."""
        self._ledger, self._pool, self._lag = ledger, pool, lag
        self.granted: Callable[[Lease], None] = lambda lease: None
        """Called when a request is admitted for the first time."""
        self.completed: Callable[[Lease], None] = lambda lease: None
        """Called when a request has ended and is kept."""
        self.changed: Callable[[int], None] = lambda count: None
        """Called with the number of leases when that has changed."""
        self._by_id: dict[str, Lease] = {}
        self._by_number: dict[int, Lease] = {}
        self._free_rows = deque(range(ledger.rows))
        self._numbers = self._epochs = 0
        self.num_granted = self.num_revoked = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, number: int) -> Lease | None:
        """A lease by its number, if it is there."""
        return self._by_number.get(number)

    def of(self, request_id: str) -> Lease | None:
        """The lease of a request, if it has one."""
        return self._by_id.get(request_id)

    def ids(self) -> list[str]:
        """Requests that have one."""
        return list(self._by_id)

    # moving.Progress

    def admitted(self, request: Request) -> None:
        lease, new = self._by_id.get(request.id), False
        if lease is None:
            lease, new = self._grant(request), True
        self._epochs += 1
        # what the prefix cache knew may, with a lag, still be computed by a step in flight
        known = 0 if self._lag else request.num_computed
        head = {
            LEASE: lease.number, EPOCH: self._epochs, STATUS: COMPUTING, SLOT: request.slot, TARGET: lease.target,
            TOKENS: known, NEXT_TOKENS: known, MARK: 0,
        }  # fmt: skip
        self._write(lease, head)
        if new:
            self.granted(lease)

    def launching(self, request: Request, end: int) -> None:
        lease = self._by_id.get(request.id)
        if lease is not None:
            lease.stepping = True
            self._write(lease, {NEXT_TOKENS: min(end, lease.target), MARK: 0})

    def mark(self, number: int) -> None:
        for lease in self._by_id.values():
            if lease.stepping:
                self._ledger.mark(lease.row, number + 1)

    def computed(self, request: Request, tokens: int) -> None:
        lease = self._by_id.get(request.id)
        if lease is not None:
            lease.stepping = False
            self._write(lease, {TOKENS: min(tokens, lease.target)})

    def ended(self, request: Request, complete: bool) -> None:
        lease = self._by_id.get(request.id)
        if lease is None:
            return
        if not complete:
            self._free(lease, FAILED)
            return
        lease.complete, lease.stepping = True, False
        self._write(lease, {STATUS: COMPLETE, TOKENS: lease.target, NEXT_TOKENS: lease.target})
        self.completed(lease)

    def preempted(self, request: Request) -> None:
        lease = self._by_id.get(request.id)
        if lease is None:
            return
        lease.stepping = False
        self._epochs += 1
        lease.tables = [np.zeros_like(t) for t in lease.tables]
        head = {EPOCH: self._epochs, SLOT: 0, TOKENS: 0, NEXT_TOKENS: 0, MARK: 0}
        self._ledger.write(lease.row, head, lease.tables)

    # the rest

    def free(self, lease: Lease) -> None:
        """Ends a lease: from now on its readers find nothing. To be called before its pages go."""
        if self._by_number.get(lease.number) is lease:
            self._free(lease, FREE)

    def _grant(self, request: Request) -> Lease:
        if not self._free_rows:
            # every lease with a slot has a row of its own, so one without waits: it has nothing to show yet
            waiting = next(lease for lease in self._by_id.values() if not lease.request.slot)
            self._free(waiting, FAILED)
            self.num_revoked += 1
        self._numbers += 1
        lease = Lease(self._numbers, self._free_rows.popleft(), request, request.num_tokens)
        self._by_id[request.id] = self._by_number[lease.number] = lease
        self.num_granted += 1
        self._ledger.write(lease.row, {RELEASED: 0})
        self.changed(len(self))
        return lease

    def _free(self, lease: Lease, status: int) -> None:
        self._epochs += 1
        self._ledger.write(
            lease.row, {EPOCH: self._epochs, STATUS: status, SLOT: 0, TOKENS: 0, NEXT_TOKENS: 0, MARK: 0}
        )
        del self._by_id[lease.request.id], self._by_number[lease.number]
        self._free_rows.append(lease.row)
        self.changed(len(self))

    def _tables(self, lease: Lease) -> list[Int64Array]:
        """Views of its rows of the page tables, up to `target`."""
        slot, tables = lease.request.slot, self._pool.tables
        return [tables[g.name][slot, : ceil_div(lease.target, g.page_tokens)] for g in self._pool.groups]

    def _write(self, lease: Lease, head: dict[int, int]) -> None:
        """Writes these words, and the pages as they are now."""
        lease.tables = [table.copy() for table in self._tables(lease)]
        self._ledger.write(lease.row, head, lease.tables)
