"""A worker: a node behind a link to a router, which it serves until it is told to end.

    dial -> Hello -> Welcome -> work ... the link ends -> cancel everything -> dial again

Whatever it computes, it computes for the router it talks to. So when the link ends, for whatever reason, everything
that runs is cancelled and every lease let go; what stays is the prefix cache, of which the next router, or the same
one, is told. A router that says nothing for as long as it gave its workers is taken for lost likewise.

The link's thread does what the router says; the node answers in its engine's thread, where tokens are collected and go
out in as few messages as the link allows. Grammars are compiled in threads of their own, and what else the router says
of that request waits until its grammar is there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from dsv4c.errors import ConfigError, Dsv4cError, EngineError, LinkError, RunnerBroken
from dsv4c.runtime.cluster import wire
from dsv4c.runtime.cluster.link import Link
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.grammar import Grammar, Grammars
from dsv4c.runtime.request import End, Event, Request
from dsv4c.runtime.transfer.node import Granted, Node, NodeStats, Prefilled, prefill_params

_LOG = logging.getLogger("dsv4c")
_TICK_S = 0.05
_REDIAL_S = (0.05, 0.1, 0.2, 0.5, 1.0)  # the last one again and again
_GRAMMAR_THREADS = 2

_About = wire.Prefill | wire.Decode | wire.Handed | wire.Alone | wire.Cancel


class Worker:
    """Serves one node. `run` in the main thread; `leave` and `stop` from any, signal handlers too."""

    def __init__(
        self,
        node: Node,
        hello: wire.Hello,
        dial: Callable[[], Link],
        *,
        grammars: Grammars | None = None,
        patience_s: float | None = None,
        drain_s: float = 30.0,
    ) -> None:
        """`dial` raises LinkError where no router answers. `patience_s`: for how long to dial in vain; None: for ever.

        `drain_s`: for what runs to end after `leave`.
        """
        self._node = node
        self._hello = hello
        self._dial = dial
        self._grammars = grammars
        self._patience_s = patience_s
        self._drain_s = drain_s
        self._leaving_since_s: float | None = None
        self._stopped = threading.Event()
        self._session: _Session | None = None
        self._blocks = _Blocks()
        self._compiling = ThreadPoolExecutor(_GRAMMAR_THREADS, thread_name_prefix="dsv4c-grammar")

    @property
    def leaving(self) -> bool:
        """Whether it takes nothing new."""
        return self._leaving_since_s is not None

    def leave(self) -> None:
        """Takes nothing new, finishes what there is, and ends."""
        if self._leaving_since_s is None:
            self._leaving_since_s = time.monotonic()
            if (session := self._session) is not None:
                session.link.send(wire.encode(wire.Leaving()))
            else:
                self.stop()

    def stop(self) -> None:
        """Ends at once."""
        self._stopped.set()
        if (session := self._session) is not None:
            session.link.close()

    def run(self) -> None:
        """Serves routers until it is told to end. Raises what ended it otherwise: a refusal, a broken engine."""
        self._node.loop.call(Engine.track_blocks)
        try:
            while (link := self._call()) is not None:
                session = self._session = _Session(self._node, link, self._blocks, self._grammars, self._compiling)
                watch = threading.Thread(target=self._watch, args=(session,), name="dsv4c-beat", daemon=True)
                try:
                    if self._leaving_since_s is not None:
                        return
                    session.serve(self._hello, watch)
                finally:
                    self._session = None
                    link.close()
                    session.end()
                    if watch.ident is not None:
                        watch.join()
                if session.failure is not None:
                    raise session.failure
        finally:
            self._compiling.shutdown(wait=False, cancel_futures=True)

    def _call(self) -> Link | None:
        """A link to a router, as soon as one answers; None when it is time to end."""
        began, tries = time.monotonic(), 0
        while not self._stopped.is_set() and self._leaving_since_s is None:
            try:
                return self._dial()
            except LinkError as error:
                if tries == 0:
                    _LOG.info("%s; dialling again", error.message)
                if self._patience_s is not None and time.monotonic() - began > self._patience_s:
                    _LOG.warning("%s: giving up", error.message)
                    return None
            self._stopped.wait(_REDIAL_S[min(tries, len(_REDIAL_S) - 1)])
            tries += 1
        return None

    def _watch(self, session: _Session) -> None:
        """Sends beats, listens for the router's silence and the engine's failure, and sees to leaving."""
        interval_s, last_s = session.silence_s / 5, 0.0
        while not session.link.closed:
            now = time.monotonic()
            if now - last_s >= min(1.0, interval_s):
                session.beat()
                last_s = now
            if now - session.heard_s > session.silence_s:
                _LOG.warning("the router has said nothing for %.1f s", now - session.heard_s)
                session.link.close()
            if (failure := self._node.loop.failure) is not None:
                session.fail(failure)
            if self._leaving_since_s is not None:
                late = now - self._leaving_since_s > self._drain_s
                if late or _is_idle(self._node.stats()):
                    _LOG.log(logging.WARNING if late else logging.INFO, "leaving%s", ", with work left" if late else "")
                    self._stopped.set()
                    session.link.finish(1.0)
            time.sleep(_TICK_S)


class _Session:
    """What a worker does for one router, over one link."""

    def __init__(
        self, node: Node, link: Link, blocks: _Blocks, grammars: Grammars | None, compiling: ThreadPoolExecutor
    ) -> None:
        self.link = link
        self.silence_s = 5.0
        self.heard_s = time.monotonic()
        self.failure: Dsv4cError | None = None
        self._node = node
        self._blocks = blocks
        self._grammars = grammars
        self._compiling = compiling
        self._lock = threading.Lock()
        self._live: set[str] = set()
        """Requests of this session that the node may still know."""
        self._leases: dict[str, int] = {}
        self._waiting: dict[str, list[_About]] = {}
        """What was said of requests whose grammar is being compiled."""
        self._spoken: list[wire.Spoken] = []
        self._ended = False

    def serve(self, hello: wire.Hello, watch: threading.Thread) -> None:
        """Until the link ends. Raises ConfigError if the router refuses this worker."""
        try:
            self.link.send(wire.encode(hello))
            first = wire.decode_for_worker(self.link.receive())
            if isinstance(first, wire.Refused):
                raise ConfigError(first.message, hint=first.hint)
            if not isinstance(first, wire.Welcome):
                raise LinkError("the router did not welcome this worker")
            self.silence_s = first.silence_s
            self._node.loop.call(self._tell_all_blocks)
            watch.start()
            while True:
                message = wire.decode_for_worker(self.link.receive())
                self.heard_s = time.monotonic()
                self._do(message)
        except LinkError as error:
            if self.failure is None:
                _LOG.info("%s", error.message)

    def end(self) -> None:
        """Cancels and lets go whatever this session has begun."""
        with self._lock:
            self._ended = True
            live, leases = list(self._live), list(self._leases.values())
            self._live.clear()
            self._leases.clear()
            self._waiting.clear()
        for name in live:
            self._node.cancel(name)
        for lease in leases:
            self._node.release(lease)

    def fail(self, error: Dsv4cError) -> None:
        """The engine is broken: what it had goes on elsewhere."""
        self.failure = error
        self.link.close()

    def beat(self) -> None:
        """Tells how the node is."""
        stats = self._node.stats()
        moved = stats.transfer
        transfers = {
            "pulled": moved.pulled, "pulled_bytes": moved.pulled_bytes, "failed": sum(moved.failed.values()),
            "restarts": moved.restarts, "recomputed": stats.recomputed, "expired": stats.expired,
        }  # fmt: skip
        self.link.send(wire.encode(wire.Beat(stats.engine, stats.leases, transfers)))

    # what the router says

    def _do(self, message: wire.ToWorker) -> None:
        match message:
            case wire.Prefill() | wire.Decode():
                self._begin(message)
            case wire.Handed():
                self._about(message.handover.id, message)
            case wire.Alone() | wire.Cancel():
                self._about(message.id, message)
            case wire.PeerGone():
                self._node.peer_gone(message.peer)
            case wire.Audit():
                self._compiling.submit(self._audit, message.number)
            case wire.Beat():
                pass
            case wire.Welcome() | wire.Refused():
                raise LinkError("the router greets twice")

    def _begin(self, message: wire.Prefill | wire.Decode) -> None:
        """Starts a request, when its grammar is there."""
        job = message.job
        with self._lock:
            self._live.add(job.id)
            if job.grammar is not None:
                self._waiting[job.id] = []
        if job.grammar is None:
            self._start(message, None)
        else:
            self._compiling.submit(self._compile, message)

    def _compile(self, message: wire.Prefill | wire.Decode) -> None:
        job = message.job
        assert job.grammar is not None
        try:
            grammar = self._grammar(job.grammar)
        except Dsv4cError as error:
            grammar = None
            self._say(_failed(job.id, error))
        with self._lock:
            if self._waiting.get(job.id) is None:
                return  # the session has ended
        if grammar is not None:
            self._start(message, grammar)
        while True:
            with self._lock:
                later = self._waiting.get(job.id)
                if not later:
                    self._waiting.pop(job.id, None)
                    return
                next_one = later.pop(0)
            self._tell(next_one)

    def _grammar(self, structure: wire.Structure) -> Grammar:
        if self._grammars is None:
            raise EngineError("this worker enforces no grammars")
        grammar = self._grammars.compile_here(wire.source_of(structure))
        return grammar.ahead(structure.begun) if structure.begun else grammar

    def _start(self, message: wire.Prefill | wire.Decode, grammar: Grammar | None) -> None:
        job = message.job
        try:
            params = wire.params_of(job.sampling, grammar)
            prompt, generated = wire.tokens_of(job.prompt), wire.tokens_of(job.generated).tolist()
            if isinstance(message, wire.Prefill):
                params = prefill_params(params, len(generated))
                request = Request(job.id, prompt, params, generated=generated, keep=True)
                self._node.prefill(request, lambda said: self._prefilled(job.id, said))
            else:
                request = Request(job.id, prompt, params, generated=generated)
                self._node.decode(request, message.handle, self._event)
        except Dsv4cError as error:
            self._forget(job.id)
            self._say(_failed(job.id, error))

    def _about(self, name: str, message: _About) -> None:
        """Does what is said of a request that has begun, or keeps it until it has."""
        with self._lock:
            if (later := self._waiting.get(name)) is not None:
                later.append(message)
                return
        self._tell(message)

    def _tell(self, message: _About) -> None:
        match message:
            case wire.Handed():
                found = message.handover
                self._node.prefilled(found.id, _prefilled_of(found))
            case wire.Alone():
                self._node.prefill_failed(message.id, message.reason)
            case wire.Cancel():
                self._cancel(message.id)
            case _:
                raise LinkError(f"{type(message).__name__} came before its request")

    def _cancel(self, name: str) -> None:
        with self._lock:
            self._live.discard(name)
            lease = self._leases.pop(name, None)
        self._node.cancel(name)
        if lease is not None:
            self._node.release(lease)

    # what the node says, in its engine's thread

    def _prefilled(self, name: str, said: Granted | Prefilled | Event) -> None:
        if isinstance(said, Granted):
            lease = int(said.handle["lease"])
            with self._lock:
                if name in self._live:
                    self._leases[name] = lease
                    lease = -1
            if lease >= 0:  # it was cancelled while it was being admitted
                self._node.release(lease)
                return
            self.link.send(wire.encode(wire.Granted(name, said.handle)))
        elif isinstance(said, Prefilled):
            self.link.send(wire.encode(_handover_of(name, said)))
            self._node.loop.call(self._tell_blocks)
        else:
            self._event(said)

    def _event(self, event: Event) -> None:
        if event.end is not None:
            self._forget(event.request_id)
            if self._node.loop.failure is not None or isinstance(event.end.error, RunnerBroken):
                return  # not its end: the router will hear that this worker is lost
            self._node.loop.call(self._tell_blocks)
        self._say(wire.spoken_of(event))

    def _forget(self, name: str) -> None:
        with self._lock:
            self._live.discard(name)
            self._leases.pop(name, None)

    def _say(self, spoken: wire.Spoken) -> None:
        with self._lock:
            self._spoken.append(spoken)
            if len(self._spoken) > 1:
                return  # the link's thread will find it
        self.link.send(self._collect)

    def _collect(self) -> bytes:
        with self._lock:
            spoken, self._spoken = self._spoken, []
        return wire.encode(wire.Said(spoken))

    def _tell_blocks(self, engine: Engine) -> None:
        """Tells what the prefix cache has taken and dropped since the last time."""
        for blocks in self._blocks.changes(engine):
            self.link.send(wire.encode(blocks))

    def _tell_all_blocks(self, engine: Engine) -> None:
        """Tells all that the prefix cache has, to a router that knows nothing of it."""
        self._blocks.changes(engine)
        self.link.send(wire.encode(wire.Blocks(stored=list(self._blocks.known), cleared=True)))

    def _audit(self, number: int) -> None:
        fault = ""
        try:
            self._node.audit()
        except EngineError as error:
            fault = error.message
        self.link.send(wire.encode(wire.Audited(number, fault, _is_idle(self._node.stats()))))


class _Blocks:
    """The blocks of the prefix cache by hash, as its events tell. Touched in the engine's thread."""

    def __init__(self) -> None:
        self.known: dict[int, None] = {}

    def changes(self, engine: Engine) -> list[wire.Blocks]:
        """What has happened since the last call, in order."""
        told: list[wire.Blocks] = []
        for event in engine.block_events():
            if event.kind == "cleared":
                self.known.clear()
                told.append(wire.Blocks(cleared=True))
                continue
            # within a message what is removed goes before what is stored
            if not told or (event.kind == "removed" and told[-1].stored):
                told.append(wire.Blocks())
            if event.kind == "stored":
                self.known[event.hash] = None
                told[-1].stored.append(event.hash)
            else:
                self.known.pop(event.hash, None)
                told[-1].removed.append(event.hash)
        return told


def _is_idle(stats: NodeStats) -> bool:
    return not (stats.engine.running or stats.engine.waiting or stats.leases or stats.moving)


def _failed(name: str, error: Dsv4cError) -> wire.Spoken:
    return wire.spoken_of(Event(name, end=End("failed", 0, 0, error=error)))


def _handover_of(name: str, said: Prefilled) -> wire.Handover:
    prompt = tuple(None if entry is None else wire.score_of(entry) for entry in said.prompt_logprobs)
    return wire.Handover(
        name, tuple(said.tokens), wire.scores_of(tuple(said.logprobs)), prompt, said.cached_tokens,
        finish=said.finish,
    )  # fmt: skip


def _prefilled_of(found: wire.Handover) -> Prefilled:
    return Prefilled(
        tokens=found.tokens,
        logprobs=tuple(wire.logprob_of(score) for score in found.logprobs),
        prompt_logprobs=tuple(None if s is None else wire.logprob_of(s) for s in found.prompt_logprobs),
        cached_tokens=found.cached_tokens,
        finish=found.finish,
    )


def hello_of(
    role: wire.Role, name: str, layout: dict[str, str], engine: Engine, transfer: str, peer: str
) -> wire.Hello:
    """How a worker introduces itself."""
    pool = engine.pool
    facts = wire.Facts(
        pool.sizes.max_context, pool.longest(), engine.scheduler.limits.max_requests, pool.total_pages(), transfer, peer
    )
    return wire.Hello(wire.VERSION, role, name, os.getpid(), layout, facts)
