"""Between HTTP and the engine: one inbox for each HTTP request, filled by the engine's thread, read by the loop.

    handler --submit--> engine thread --Output--> Bridge --one wake-up for a whole step--> Inbox --take--> handler

An HTTP request owns its engine requests through one `Group`: leaving it, by any way, cancels what still runs, so
that a client that goes away gives its pages back. The engine's side is a Protocol; tests script it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from dsv4c.errors import Dsv4cError, EngineError, RequestError
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.params import SamplingParams

Score = tuple[float, Sequence[tuple[int, float]]]
"""A token's logprob, and the most likely tokens at its place with theirs."""


@dataclass(slots=True)  # not frozen, which costs a microsecond a token
class Output:
    """What the engine says about one request after one step.

    `finish_reason` is `stop`, `length`, `cancelled` or `error`; an `error` carries its reason. The end-of-sequence
    token arrives like any other, in the Output that says `stop`. `prompt_scores` comes once, with the first
    Output, when asked for: one entry a prompt token, None for the first. `cached_tokens`: of the prompt, those that
    were not computed; `queued_s`: seconds waited for the first step. Both come with the first token, else 0.
    """

    token_id: int | None = None
    score: Score | None = None
    prompt_scores: Sequence[Score | None] | None = None
    cached_tokens: int = 0
    queued_s: float = 0.0
    finish_reason: str | None = None
    error: Dsv4cError | None = None


Sink = Callable[[Output], None]


class Engine(Protocol):
    """What the server asks of an engine. Every method may be called from the event loop and returns at once."""

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and completion together."""

    def submit(self, prompt: Sequence[int], params: SamplingParams, sink: Sink, /) -> int:
        """Queues a request and returns its id; `sink` is called in the engine's thread.

        Raises RequestError: 400 if it can never run, 503 if the queue is full or pages cannot suffice.
        """

    def cancel(self, request_id: int, /) -> None:
        """Ends a request and frees its pages soon; does nothing if it has ended."""

    def stats(self) -> EngineStats: ...

    @property
    def failure(self) -> Dsv4cError | None:
        """Why the engine stopped serving, or None while it is well."""


class Bridge:
    """Carries outputs from the engine's thread into the event loop, with one wake-up for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: deque[tuple[Inbox, int, Output]] = deque()
        self._scheduled = False

    def put(self, inbox: Inbox, index: int, output: Output) -> None:
        """From any thread. Outputs for a loop that has gone are dropped: nobody is left to read them."""
        self._queue.append((inbox, index, output))
        if self._scheduled:
            return
        self._scheduled = True  # cleared before the queue is drained, so nothing is left behind
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _drain(self) -> None:
        self._scheduled = False
        while self._queue:
            inbox, index, output = self._queue.popleft()
            inbox.add(index, output)


class Inbox:
    """Outputs of the sequences of one HTTP request, in order of arrival, read by one task in the loop."""

    def __init__(self) -> None:
        self._outputs: list[tuple[int, Output]] = []
        self._error: Dsv4cError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def add(self, index: int, output: Output) -> None:
        self._outputs.append((index, output))
        self._wake()

    def fail(self, error: Dsv4cError) -> None:
        """Makes the next `take` raise."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[tuple[int, Output]]:
        """Waits for at least one output; returns all that are there. Raises the error it was failed with."""
        if not self._outputs and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error
        outputs, self._outputs = self._outputs, []
        return outputs


class Group:
    """The engine requests of one HTTP request: `async with Group(...) as group`, then `take` until there is no more."""

    def __init__(self, engine: Engine, bridge: Bridge) -> None:
        self._engine = engine
        self._bridge = bridge
        self._inbox = Inbox()
        self._running: dict[int, int] = {}
        self.sending = False
        """Whether its client has yet to take something before more can be sent."""
        self.abort: Callable[[], None] | None = None
        """Drops the client's connection."""

    async def __aenter__(self) -> Group:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for index in list(self._running):
            self.cancel(index)

    def submit(self, prompt: Sequence[int], params: SamplingParams, index: int) -> None:
        """Queues sequence `index`. Raises RequestError as the engine does."""
        inbox, bridge = self._inbox, self._bridge
        self._running[index] = self._engine.submit(prompt, params, lambda output: bridge.put(inbox, index, output))

    def cancel(self, index: int) -> None:
        """Ends one sequence if it still runs; nothing more is heard of it."""
        if (request_id := self._running.pop(index, None)) is not None:
            self._engine.cancel(request_id)

    def fail(self, error: Dsv4cError) -> None:
        """Makes the next `take` raise. From the event loop."""
        self._inbox.fail(error)

    def expire(self, error: Dsv4cError) -> None:
        """Fails it with this error, though its client takes nothing: there is no telling it then."""
        self.fail(error)
        if self.sending and self.abort is not None:
            self.abort()

    async def take(self) -> list[tuple[int, Output]]:
        """(index, output) of what has come, at least one; none once every sequence has ended or was cancelled.

        Raises the error of a sequence that failed, and RequestError (503) if somebody else cancelled one.
        """
        while self._running:
            batch = [item for item in await self._inbox.take() if item[0] in self._running]
            for index, output in batch:
                if output.finish_reason is not None:
                    del self._running[index]
                    _check_end(output)
            if batch:
                return batch
        return []


def _check_end(output: Output) -> None:
    if output.finish_reason in ("stop", "length"):
        return
    if output.error is not None:
        raise output.error
    if output.finish_reason == "cancelled":
        raise RequestError("the request was cancelled", status=503, code="cancelled", hint="try again later")
    raise EngineError("the request failed without a reason")
