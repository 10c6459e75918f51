"""One engine among others: its loop, its leases and its connector, as a worker or a Dynamo engine uses them.

    prefill   Request(keep=True), one token more to choose --> sink: Granted(handle) once it has its pages, then
              Prefilled, or the Event that ended it. What it computed stays until its reader, or time, lets it go
    decode    a request and the handle: it gets pages, its state is pulled into them while the prefill still runs, and
              when that and `prefilled` are both there it goes on as any request, its first event first (moves.py)

A node without a connector only computes. Sinks are called in the engine's thread; all methods from any thread.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4c.errors import Dsv4cError, EngineError, HandleError, RequestError, TransferError
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.loop import Sink as EventSink
from dsv4c.runtime.moving import First
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Event, FinishReason, Request
from dsv4c.runtime.sampler import TokenLogprob
from dsv4c.runtime.transfer.connector import Connector, TransferStats
from dsv4c.runtime.transfer.handle import Handle, tokens_sha256
from dsv4c.runtime.transfer.leases import Lease, Leases
from dsv4c.runtime.transfer.moves import Moves, Task

_LOG = logging.getLogger("dsv4c.transfer")


@dataclass(frozen=True)
class Granted:
    """What the state of a prefill can be pulled with, from now on."""

    handle: dict[str, Any]


@dataclass(frozen=True)
class Prefilled:
    """What a prefill chose: the first token, and what else its event had. A `moving.First`."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0
    finish: FinishReason = "length"


PrefillSink = Callable[[Granted | Prefilled | Event], None]


@dataclass(frozen=True)
class NodeStats:
    """A snapshot: what is there now, and totals since the node was made."""

    engine: EngineStats
    transfer: TransferStats = field(default_factory=TransferStats)
    leases: int = 0
    """Prefills that are under way or kept for their readers."""
    granted: int = 0
    expired: int = 0
    """Leases that nobody has let go of in time."""
    moving: int = 0
    """Requests whose state is wanted from elsewhere."""
    moved: int = 0
    """Requests that went on with state from elsewhere."""
    recomputed: int = 0
    """Requests whose state was wanted from elsewhere, and which were computed here."""


def prefill_params(params: SamplingParams, generated: int = 0) -> SamplingParams:
    """The parameters with which a prefill worker chooses the next token, behind `generated` ones, and no other."""
    least = min(params.min_tokens, generated + 1)
    return dataclasses.replace(params, max_tokens=generated + 1, min_tokens=least, n=1)


class Node:
    """An engine that may take state from others and give it to them."""

    def __init__(
        self, engine: Engine, connector: Connector | None = None, leases: Leases | None = None, *, ttl_s: float = 30.0
    ) -> None:
        """`leases`: for an engine that prefills for others; `ttl_s`: how long what is complete waits for its reader."""
        self.loop = EngineLoop(engine)
        self._engine, self._connector, self._leases, self._ttl_s = engine, connector, leases, ttl_s
        self._moves = None if connector is None else Moves(engine, connector, self._do)
        self._changed = threading.Condition()
        self._sinks: dict[str, PrefillSink] = {}
        self._num_expired = 0
        self._closing = False
        engine.connect(transfers=self._moves, progress=leases)
        if connector is not None and leases is not None:
            connector.on_released = lambda row, lease: self.release(lease)
            leases.granted, leases.completed, leases.changed = self._grant, self._complete, self._count

    @property
    def peer_id(self) -> str:
        """Its name in its handles; "" without a connector."""
        return "" if self._connector is None else self._connector.backend.peer_id

    @property
    def failure(self) -> Dsv4cError | None:
        """Why it cannot serve any more, or None while it is well."""
        return self.loop.failure

    def start(self) -> Node:
        """Starts the engine's thread; call it once."""
        self.loop.start()
        return self

    # prefill

    def prefill(self, request: Request, sink: PrefillSink, /) -> None:
        """Computes a request made with `keep` and `prefill_params`. Raises RequestError as `EngineLoop.submit` does."""
        if self._leases is None or self._connector is None:
            raise RequestError("this engine does not prefill for others", status=503, code="unavailable")
        if not request.keep or request.params.max_tokens != request.num_given + 1:
            raise EngineError(f"{request} is no prefill: it must be kept, and choose one token")
        if self._sinks.setdefault(request.id, sink) is not sink:
            raise RequestError(f"request id `{request.id}` is in use", param="request_id", code="invalid_value")

        def events(event: Event) -> None:
            if event.end is not None:
                del self._sinks[request.id]
            if event.end is None or event.end.reason not in ("stop", "length"):
                sink(event)
                return
            what = event.tokens, event.logprobs, event.prompt_logprobs, event.cached_tokens, event.end.reason
            sink(Prefilled(*what))

        try:
            self.loop.submit(request, events)
        except RequestError:
            del self._sinks[request.id]
            raise

    def release(self, lease: int, /) -> None:
        """Ends a lease: a prefill that still runs is cancelled, what is kept goes back. Nothing if it has ended."""
        self._do(lambda engine: self._let_go(engine, lease))

    def _grant(self, lease: Lease) -> None:
        """In the engine's thread: a prefill has its pages for the first time."""
        assert self._connector is not None
        request = lease.request
        handle = self._connector.export(lease.row, lease.number, lease.target, tokens_sha256(request.tokens()))
        try:
            self._sinks[request.id](Granted(handle))
        except Exception:  # noqa: BLE001  as in EngineLoop: a reader that fails has gone
            self.loop.cancel(request.id)

    def _complete(self, lease: Lease) -> None:
        assert self._connector is not None
        self._connector.after(self._ttl_s, lambda: self._do(lambda engine: self._expire(engine, lease.number)))

    def _count(self, leases: int) -> None:
        assert self._connector is not None
        self._connector.watch(leases)
        with self._changed:
            self._changed.notify_all()

    def _expire(self, engine: Engine, number: int) -> list[Event]:
        if self._leases is not None and self._leases.get(number) is not None:
            self._num_expired += 1
            _LOG.warning("lease %d has expired: its state was not read within %g s", number, self._ttl_s)
        return self._let_go(engine, number)

    def _let_go(self, engine: Engine, number: int) -> list[Event]:
        lease = None if self._leases is None else self._leases.get(number)
        if lease is None:
            return []
        assert self._leases is not None
        self._leases.free(lease)  # before its pages go
        if lease.complete:
            engine.let_go(lease.request.id)
            return []
        event = engine.cancel(lease.request.id)
        return [] if event is None else [event]

    # decode

    def decode(
        self, request: Request, handle: Mapping[str, Any] | None, sink: EventSink, /, first: First | None = None
    ) -> None:
        """Serves a request; with a handle its state is pulled, and `first`, or `prefilled` later, has its first token.

        Sets `request.moving`. A handle of no use is told to the log, and the prompt computed. Raises RequestError as
        `EngineLoop.submit` does.
        """
        made = None if handle is None else self._checked(request, handle)
        moves = self._moves
        request.moving = made is not None
        if made is None or moves is None:
            self.loop.submit(request, sink)
            return
        moves.add(request, made, first)

        def events(event: Event) -> None:
            if event.end is not None:
                moves.drop(request)
            sink(event)

        try:
            self.loop.submit(request, events)
        except RequestError:
            moves.drop(request)
            raise

    def prefilled(self, request_id: str, first: First, /) -> None:
        """The first token of a request that `decode` was given a handle for. Nothing if it is not awaited."""
        moves = self._moves
        if moves is not None:
            self._do(lambda engine: moves.prefilled(engine, request_id, first))

    def prefill_failed(self, request_id: str, why: str, /) -> None:
        """No first token will come for a request that `decode` was given a handle for: its prompt is computed here."""
        moves = self._moves
        if moves is not None:
            self._do(lambda engine: moves.give_up(engine, request_id, TransferError(why)))

    def forgo(self, handle: Mapping[str, Any], /) -> None:
        """Tells the owner of a handle that it will not be used here. What cannot be told is left to expire."""
        if self._connector is None:
            return
        try:
            self._connector.forgo(Handle.from_json(handle))
        except HandleError as error:
            _LOG.info("a handle is left to expire: %s", error.message)

    def peer_gone(self, peer_id: str, /) -> None:
        """Another engine is known to be dead: what was wanted from it is computed here."""
        moves = self._moves
        if moves is not None and self._connector is not None:
            self._connector.peer_gone(peer_id)
            self._do(lambda engine: moves.peer_gone(engine, peer_id))

    def cancel(self, request_id: str, /) -> None:
        """Ends a request, in whatever state and role; what it keeps goes back."""
        self.loop.cancel(request_id)

        def task(engine: Engine) -> list[Event]:
            lease = None if self._leases is None else self._leases.of(request_id)
            return [] if lease is None else self._let_go(engine, lease.number)

        self._do(task)

    def _checked(self, request: Request, handle: Mapping[str, Any]) -> Handle | None:
        if self._connector is None or self._moves is None:
            raise RequestError("this engine takes no state from others", status=503, code="unavailable")
        try:
            return self._connector.check(handle, request.num_tokens, tokens_sha256(request.tokens()))
        except HandleError as error:
            self._moves.recompute(request.id, error)
            return None

    # the whole

    def stats(self) -> NodeStats:
        """A snapshot."""
        leases, moves, connector = self._leases, self._moves, self._connector
        return NodeStats(
            self.loop.stats(),
            TransferStats() if connector is None else connector.stats(),
            0 if leases is None else len(leases),
            0 if leases is None else leases.num_granted,
            self._num_expired,
            *((0, 0, 0) if moves is None else (len(moves), moves.num_moved, moves.num_recomputed)),
        )

    def quiescent(self) -> bool:
        """Whether nobody may still want to read anything here."""
        return self._leases is None or not len(self._leases)

    def audit(self) -> None:
        """Proves, between two steps, that pages, slots, leases and moves agree. Raises EngineError. From any thread."""
        found: list[EngineError] = []
        over = threading.Event()

        def task(engine: Engine) -> None:
            try:
                self._audit(engine)
            except EngineError as error:
                found.append(error)
            over.set()

        if not self.loop.inside and self.loop.call(task):
            over.wait()
        else:
            task(self._engine)
        if found:
            raise found[0]

    def _audit(self, engine: Engine) -> None:
        engine.audit()
        strange = set(engine.kept) - set(() if self._leases is None else self._leases.ids())
        if strange:
            raise EngineError(f"requests {sorted(strange)} are kept without a lease")
        if self._moves is not None:
            self._moves.audit(engine)

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Lets requests finish, or fails them, lets readers finish reading, and ends all threads.

        `timeout_s`: for all of that; without it readers have as long as their leases. Whether all ended by itself.
        """
        began, again = time.monotonic(), self._closing
        self._closing = True
        finished = self.loop.close(drain=drain, timeout_s=timeout_s)
        if drain and not again and self.loop.failure is None:
            left = self._ttl_s if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - began))
            with self._changed:
                finished &= self._changed.wait_for(self.quiescent, left)
        if self._connector is not None:
            self._connector.close()
        return finished

    def _do(self, task: Task) -> None:
        """Has the engine's thread do something; once that has ended in order, what is left of leases is done here."""
        if not self.loop.call(task) and self._closing and self.loop.failure is None:
            with self._changed:
                task(self._engine)
