"""Events of one Dynamo request on their way from the engine's thread to the event loop that serves it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from dsv4c.runtime.request import Event


class Mailbox:
    """Gathers the events of one request's choices; read by one task of `loop`. Any thread may put.

    The reader is woken for the first token of a choice, for its end, and whenever `interval` tokens have come for it
    since: what has come meanwhile waits, so that a chunk carries several tokens.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: int = 1) -> None:
        self._loop = loop
        self._interval = interval
        self._events: deque[tuple[int, Event]] = deque()
        self._due: dict[int, int] = {}  # tokens still to come for a choice before its reader is woken
        self._ready = asyncio.Event()
        self._error: Exception | None = None

    def sink(self, index: int) -> Callable[[Event], None]:
        """Where the engine puts the events of choice `index`."""
        return lambda event: self.put(index, event)

    def put(self, index: int, event: Event) -> None:
        """From the engine's thread. Events for a loop that has gone are dropped: nobody is left to read them."""
        self._events.append((index, event))
        self._due[index] = self._due.get(index, 1) - len(event.tokens)
        if self._due[index] > 0 and event.end is None:
            return
        self._due[index] = self._interval
        self._wake()

    def fail(self, error: Exception) -> None:
        """Makes `take` and `failure` raise from now on. From the event loop."""
        self._error = error
        self._ready.set()

    async def failure(self) -> None:
        """Waits for `fail`, and raises what it was given; for readers who take nothing."""
        while self._error is None:
            await self._ready.wait()
            self._ready.clear()
        raise self._error

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    async def take(self) -> dict[int, list[Event]]:
        """Waits until there is something to read; returns all that is there, by choice. Raises what it failed with."""
        await self._ready.wait()
        if self._error is not None:
            raise self._error
        self._ready.clear()  # before the events are taken: nothing that comes later is left behind
        found: dict[int, list[Event]] = {}
        while self._events:
            index, event = self._events.popleft()
            found.setdefault(index, []).append(event)
        return found
