"""The decode side of a node: requests whose state is to come, from their handle to their first token here.

    waiting --begin--> pulling --all here--> here --first token--> running
       |                  +--- error ---------+------------------> waiting, to be computed
       +---- handle of no use, or prefill failed ----------------> waiting, to be computed

What fails is computed here instead: slower, never wrong, and nobody need be told. A request that ends while its state
is pulled has ended at once; its slot and pages are settled when nothing can write them any more. So are those of one
that is lost while a Read is under way.

It is the engine's Transfers hook. All but `add` and `drop` belongs to the engine's thread; tasks for it go through
`do`, with the events that they give.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dsv4c.errors import EngineError, RequestError, TransferError, TransferTimeout
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.moving import Arrival, First
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.transfer.connector import Connector, Pull
from dsv4c.runtime.transfer.handle import Handle
from dsv4c.runtime.transfer.pull import Place

_LOG = logging.getLogger("dsv4c.transfer")
Task = Callable[[Engine], Iterable[Event] | None]


@dataclass(eq=False)
class _Move:
    """One of them."""

    request: Request
    handle: Handle
    first: First | None
    pull: Pull | None = None
    failed: TransferError | None = None
    """It has pages, and will be lost as soon as the engine lets somebody else know them."""
    here: bool = False
    ended: bool = False
    """The request has, while its state was pulled."""
    unsettled: bool = False
    """Its slot and pages belong to nobody until the pull is quiet."""


class Moves:
    """All of one engine. Implements `moving.Transfers`."""

    def __init__(self, engine: Engine, connector: Connector, do: Callable[[Task], None]) -> None:
        self._engine, self._connector, self._do = engine, connector, do
        self._moves: dict[str, _Move] = {}
        self.num_moved = self.num_recomputed = 0

    def __len__(self) -> int:
        return len(self._moves)

    def add(self, request: Request, handle: Handle, first: First | None) -> None:
        """A request that is about to be submitted. Raises RequestError if its id is in use."""
        if self._moves.setdefault(request.id, made := _Move(request, handle, first)) is not made:
            raise RequestError(f"request id `{request.id}` is in use", param="request_id", code="invalid_value")

    def drop(self, request: Request) -> None:
        """A request has ended or was refused: there is nothing to move, unless that is under way."""
        move = self._moves.get(request.id)
        if move is not None and move.request is request and move.pull is None:
            del self._moves[request.id]
            self._connector.forgo(move.handle)

    def recompute(self, request_id: str, error: TransferError) -> None:
        """Counts and tells that a request is computed here."""
        self.num_recomputed += 1
        _LOG.warning("request `%s` is computed here: %s", request_id, error.message)

    # moving.Transfers

    def begin(self, arrival: Arrival, /) -> None:
        move = self._moves[arrival.request.id]
        if move.failed is not None:
            error = move.failed
            self._do(lambda engine: self._pulled(engine, move, error, False))
            return
        place = Place(arrival.slot, arrival.start, arrival.target, arrival.tables)

        def done(pull: Pull) -> None:
            error, busy = pull.error, pull.busy
            self._do(lambda engine: self._pulled(engine, move, error, busy))

        def quiet(pull: Pull) -> None:
            self._do(lambda engine: self._settle(engine, move))

        move.pull = self._connector.pull(move.handle, place, done, quiet)

    def ended(self, request_id: str, /) -> None:
        move = self._moves[request_id]
        move.ended = True
        if move.here:
            self._engine.settle(request_id)
            del self._moves[request_id]
        elif move.pull is not None:
            self._connector.cancel(move.pull, TransferError("the request has ended"))
        # else it has failed, and a task that says so is on its way

    # what has come, and what will not

    def prefilled(self, engine: Engine, request_id: str, first: First) -> list[Event]:
        """The first token."""
        move = self._awaited(request_id)
        if move is None:
            return []
        move.first = first
        if move.here:
            return self._arrive(engine, move, first)
        if move.pull is not None:
            self._connector.nudge(move.pull)  # the prefill is over, so the rest is final
        return []

    def give_up(self, engine: Engine, request_id: str, error: TransferError) -> list[Event]:
        """No first token will come, or no state."""
        move = self._awaited(request_id)
        if move is None:
            return []
        if move.pull is not None and not move.here:
            self._connector.cancel(move.pull, error)  # `_pulled` does the rest
            return []
        if move.pull is None:
            self._connector.forgo(move.handle)
            if move.request.status == "arriving":
                move.failed = error  # `begin` will come
                return []
        self.recompute(request_id, error)
        del self._moves[request_id]
        if move.here:
            return engine.lost(request_id)
        move.request.moving = False  # it waits, and will be admitted like any other
        return []

    def peer_gone(self, engine: Engine, peer_id: str) -> list[Event]:
        """Another engine is dead; pulls have been told already."""
        error = TransferError(f"peer `{peer_id}` is gone")
        waiting = [m.request.id for m in self._moves.values() if m.handle.peer == peer_id and m.pull is None]
        return [event for request_id in waiting for event in self.give_up(engine, request_id, error)]

    def audit(self, engine: Engine) -> None:
        """Proves that whatever holds pages for state to come is known here. Raises EngineError."""
        strange = {*engine.arriving, *engine.unsettled} - self._moves.keys()
        if strange:
            raise EngineError(f"requests {sorted(strange)} hold pages that nobody fills")

    def _awaited(self, request_id: str) -> _Move | None:
        move = self._moves.get(request_id)
        return None if move is None or move.ended or move.unsettled or move.failed else move

    def _pulled(self, engine: Engine, move: _Move, error: TransferError | None, busy: bool) -> list[Event]:
        request_id = move.request.id
        if move.ended and move.pull is None:
            engine.settle(request_id)
            del self._moves[request_id]
            return []
        if move.ended:
            move.unsettled = True  # until it is quiet, which is next unless a Read is under way
            return []
        if error is not None:
            self.recompute(request_id, error)
            move.unsettled = busy
            if not busy:
                del self._moves[request_id]
            return engine.lost(request_id, busy=busy)
        move.here = True
        if move.first is not None:
            return self._arrive(engine, move, move.first)
        patience = self._connector.deadline_s
        late = TransferTimeout(f"its state is here, but for {patience:g} s its first token was not")

        def task(engine: Engine) -> list[Event]:
            return self.give_up(engine, request_id, late) if self._moves.get(request_id) is move else []

        self._connector.after(patience, lambda: self._do(task))
        return []

    def _arrive(self, engine: Engine, move: _Move, first: First) -> list[Event]:
        del self._moves[move.request.id]
        self.num_moved += 1
        return engine.arrived(move.request.id, first)

    def _settle(self, engine: Engine, move: _Move) -> None:
        if move.unsettled:
            engine.settle(move.request.id)
            del self._moves[move.request.id]
