"""Drives an Engine in a thread of its own, and carries requests in and events out.

    any thread: submit, cancel --> inbox --> engine thread: step, step, ... --> sink(Event) of each request

Submitting validates in the caller's thread and raises there; everything else happens in the engine's, which sleeps
on a condition while there is nothing to do and never polls; `call` runs anything else there. Sinks are called in the
engine's thread, in order, and get exactly one Event with an `end`, the last. A stop string is best given as the
request's `text_stop`: it then ends in the step that completed it. Cancelling instead lets it run on until the
cancellation is read, before the next step; what was computed meanwhile is for the caller to ignore.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from dsv4c.errors import Dsv4cError, EngineError, RequestError
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.request import Event, Request

Sink = Callable[[Event], None]
Task = Callable[[Engine], Iterable[Event] | None]


class EngineLoop:
    """An engine that serves until it is closed. All but `close` return at once; any thread may call them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._condition = threading.Condition()
        self._submitted: deque[tuple[Request, Sink]] = deque()
        self._cancelled: deque[str] = deque()
        self._tasks: deque[Task] = deque()
        self._stopped = False  # the thread takes no more tasks
        self._live: dict[str, tuple[Request, Sink]] = {}  # written by the engine's thread alone
        self._closing: Dsv4cError | None = None
        self._drain = True
        self._failure: Dsv4cError | None = None
        self._thread = threading.Thread(target=self._run, name="dsv4c-engine", daemon=True)

    def start(self) -> EngineLoop:
        """Starts the thread; call it once."""
        self._thread.start()
        return self

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and completion together."""
        return self._engine.max_context

    @property
    def failure(self) -> Dsv4cError | None:
        """Why the engine stopped serving, or None while it is well."""
        return self._failure

    @property
    def inside(self) -> bool:
        """Whether the caller is the engine's thread."""
        return threading.current_thread() is self._thread

    def stats(self) -> EngineStats:
        """A snapshot; requests that the engine's thread has not seen yet count as waiting."""
        return self._engine.stats(ahead=len(self._submitted))

    def submit(self, request: Request, sink: Sink, /) -> None:
        """Queues a request; `sink` is called in the engine's thread, with the request's end last.

        Raises RequestError: 400 if it can never run or its id is in use, 503 if the queue is full, pages cannot
        suffice, or the engine is closing or has failed.
        """
        with self._condition:
            closed = self._failure or self._closing
            if closed is not None:
                raise RequestError(closed.message, status=503, code="unavailable", hint=closed.hint)
            if request.id in self._live or any(request.id == r.id for r, _ in self._submitted):
                raise RequestError(f"request id `{request.id}` is in use", param="request_id", code="invalid_value")
            self._engine.check(request, ahead=len(self._submitted))
            self._submitted.append((request, sink))
            self._condition.notify_all()

    def cancel(self, request_id: str, /) -> None:
        """Ends a request and frees its pages before the next step; does nothing if it has ended."""
        with self._condition:
            self._cancelled.append(request_id)
            self._condition.notify_all()

    def call(self, task: Task, /) -> bool:
        """Has the engine's thread run `task(engine)` before its next step, and deliver the events that it returns.

        Tasks run in order, behind what was submitted before. What one raises is a fault of the engine. False if the
        engine has stopped: the task will not run.
        """
        with self._condition:
            if self._stopped:
                return False
            self._tasks.append(task)
            self._condition.notify_all()
            return True

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Refuses new requests, lets those in hand finish (or, without `drain`, fails them), and joins the thread.

        After `timeout_s` seconds of draining the rest fails too. Returns whether everything finished by itself.
        """
        with self._condition:
            self._closing = RequestError("the server is shutting down", status=503, code="unavailable")
            self._drain = self._drain and drain
            self._condition.notify_all()
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        finished = drain and not self._thread.is_alive() and self._failure is None
        with self._condition:
            self._drain = False  # read before every step: the thread leaves after the one it is in
            self._condition.notify_all()
        self._thread.join()
        return finished

    def _run(self) -> None:
        try:
            while self._await_work():
                self._take_inbox()
                for event in self._engine.step():
                    self._deliver(event)
                if self._engine.failure is not None:
                    raise self._engine.failure
            self._take_inbox()
            for event in self._engine.fail_all(self._closing or EngineError("the engine is closed")):
                self._deliver(event)
            while self._engine.has_work:
                self._engine.step()  # waits for what is in flight; its requests have ended
            with self._condition:
                self._stopped = True
            self._take_tasks()
        except Exception as error:  # noqa: BLE001  a fault of the engine itself: every client must hear of it
            message = error.message if isinstance(error, Dsv4cError) else f"{type(error).__name__}: {error}"
            self._end_all(EngineError(f"the engine stopped: {message}", hint="restart the server"))

    def _await_work(self) -> bool:
        """Sleeps until there is something to do; False when it is time to leave."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._submitted or self._cancelled or self._tasks or not self._engine.idle or self._leaves()
            )
            return not self._leaves()

    def _leaves(self) -> bool:
        """Whether it is time to leave."""
        if self._closing is None:
            return False
        return not self._drain or not (self._submitted or self._tasks or self._engine.has_work)

    def _take_inbox(self) -> None:
        """Hands new requests and cancellations to the engine, in this order: a cancelled request is known."""
        with self._condition:
            submitted, cancelled = list(self._submitted), list(self._cancelled)
            self._live.update((request.id, (request, sink)) for request, sink in submitted)
            self._cancelled.clear()
        for request, _ in submitted:
            try:
                self._engine.submit(request)
            except RequestError as error:
                self._deliver(Event(request.id, end=request.ended("failed", error=error)))
            with self._condition:
                self._submitted.popleft()  # only now: it counts as waiting until the engine counts it
        for request_id in cancelled:
            event = self._engine.cancel(request_id)
            if event is not None:
                self._deliver(event)
        self._take_tasks()

    def _take_tasks(self) -> None:
        while self._tasks:
            for event in self._tasks.popleft()(self._engine) or ():
                self._deliver(event)

    def _deliver(self, event: Event) -> None:
        request_id = event.request_id
        if request_id not in self._live:
            return  # its reader failed in this very step
        _, sink = self._live[request_id]
        if event.end is not None:
            del self._live[request_id]
        try:
            sink(event)
        except Exception:  # noqa: BLE001  a reader that fails has gone: its request is cancelled, the others go on
            if event.end is None:
                del self._live[request_id]
                self._engine.cancel(request_id)

    def _end_all(self, failure: Dsv4cError) -> None:
        """Tells every reader, without the engine's help: it is broken."""
        with self._condition:
            self._failure = failure
            self._stopped = True
            self._tasks.clear()
            self._live.update((request.id, (request, sink)) for request, sink in self._submitted)
            self._submitted.clear()
        for request, _ in list(self._live.values()):
            self._deliver(Event(request.id, end=request.ended("failed", error=failure)))
