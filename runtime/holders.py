"""Slots whose pages nobody computes with: requests whose state is on its way in, is kept to be read, or may be written.

    waiting --open--> arriving --arrive--> running            arriving --lose--> waiting
    arriving --end, once its transfer has begun--> unsettled --settle--> free      (`lose(busy)`: unsettled too)
    running --keep--> kept --let_go--> free

An arriving request counts as running for whoever asks about room, but is never preempted. Pages of a slot that is
unsettled may still be written by a transfer that cannot be stopped, so they belong to nobody until it is known dead.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsv4c.errors import EngineError
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.request import Request


class Holders:
    """The three kinds by request id. An id is of one kind at most, but a lost request may be unsettled and run."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self.arriving: dict[str, Request] = {}
        self.kept: dict[str, Request] = {}
        self.unsettled: dict[str, int] = {}
        """Request id -> slot."""
        self.opened: dict[str, Request] = {}
        """Arriving requests whose transfer was not begun yet: nobody else knows their pages."""

    def __bool__(self) -> bool:
        return bool(self.arriving or self.kept or self.unsettled)

    def __contains__(self, request_id: str) -> bool:
        """Whether anything of this id holds pages."""
        return request_id in self.arriving or request_id in self.kept or request_id in self.unsettled

    @property
    def slots(self) -> list[int]:
        """All slots that they hold."""
        requests = (*self.arriving.values(), *self.kept.values())
        return [*(r.slot for r in requests), *self.unsettled.values()]

    def open(self, request: Request) -> None:
        """An admitted request, with its slot and pages, whose state will come."""
        request.status = "arriving"
        self.arriving[request.id] = self.opened[request.id] = request

    def keep(self, request: Request) -> None:
        """A request that has ended and still has its slot."""
        self.kept[request.id] = request

    def let_go(self, request_id: str) -> bool:
        """Gives back what is kept; False if nothing is."""
        request = self.kept.pop(request_id, None)
        if request is None:
            return False
        self._pool.release(request.slot)
        request.slot = 0
        return True

    def leave(self, request: Request, *, busy: bool = False) -> None:
        """Takes an arriving request out. `busy`: its slot stays unsettled; else it is the caller's."""
        del self.arriving[request.id]
        self.opened.pop(request.id, None)
        if busy:
            self.unsettled[request.id] = request.slot

    def settle(self, request_id: str) -> None:
        """No transfer can write the pages of this request any more: they go back."""
        if request_id not in self.unsettled:
            raise EngineError(f"request `{request_id}` has nothing to settle")
        self._pool.release(self.unsettled.pop(request_id))

    def audit(self) -> None:
        """Proves the requests to be what they should. Raises EngineError that names the first fault."""
        for request in self.arriving.values():
            if request.status != "arriving" or not request.moving:
                raise EngineError(f"{request} is listed as arriving")
            _check_slot(request)
        for request in self.kept.values():
            if request.status != "ended" or not request.keep:
                raise EngineError(f"{request} is listed as kept")
            _check_slot(request)
        _disjoint(self.arriving, self.kept)
        _disjoint(self.kept, self.unsettled)
        _disjoint(self.arriving, self.unsettled)
        if not self.opened.keys() <= self.arriving.keys():
            raise EngineError("a transfer is to begin for a request that is not arriving")


def _check_slot(request: Request) -> None:
    if not request.slot:
        raise EngineError(f"{request} holds no slot")


def _disjoint(one: Iterable[str], other: Iterable[str]) -> None:
    both = set(one) & set(other)
    if both:
        raise EngineError(f"request `{min(both)}` holds two slots")
