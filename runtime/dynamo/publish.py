"""What the router is told between requests: blocks that the prefix cache has stored and removed, and how full it is.

    engine's thread: block events --> event loop, every 0.1 s while requests run and once after --> Dynamo's publishers

The hashes are the engine's own (blockkeys.py); the router makes others of the tokens, and keeps ours to know what is
removed. Where nothing runs nothing is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from dsv4c.runtime.blockkeys import KVEvent
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.loop import EngineLoop

PERIOD_S = 0.1


class EventPublisher(Protocol):
    """Dynamo's KvEventPublisher, as far as it is used."""

    def publish_batch(self, events: Sequence[dict[str, Any]], /) -> None: ...


class Publishing:
    """Reads the engine's events and numbers, and passes them on. All methods belong to the event loop."""

    def __init__(
        self, engine: EngineLoop, block_tokens: int, snapshot: Callable[[EngineStats], None] | None = None
    ) -> None:
        """`snapshot`: where the engine's numbers go."""
        self.events: EventPublisher | None = None
        self.snapshot = snapshot
        self._engine = engine
        self._block_tokens = block_tokens
        self._stored: set[int] = set()
        self._active = asyncio.Event()
        self._running = 0
        self._task: asyncio.Future[None] | None = None

    def start(self, events: EventPublisher) -> None:
        """Begins with what the prefix cache holds already."""
        self.events = events
        self._engine.call(lambda engine: engine.track_blocks())
        self._active.set()

    def begin(self) -> None:
        """Starts the task that looks."""
        self._task = asyncio.ensure_future(self._run())

    def close(self) -> None:
        """Ends it."""
        if self._task is not None:
            self._task.cancel()

    def entered(self) -> None:
        """A request has begun."""
        self._running += 1
        self._active.set()

    def left(self) -> None:
        """One has ended; what it has stored is looked for once more."""
        self._running -= 1
        self._active.set()

    async def _run(self) -> None:
        while True:
            await self._active.wait()
            if not self._running:
                self._active.clear()  # once more, then not before the next request
            await self._look()
            await asyncio.sleep(PERIOD_S)

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[KVEvent]] = loop.create_future()

        def give(found: list[KVEvent]) -> None:
            if not answer.cancelled():
                answer.set_result(found)

        def look(engine: Engine) -> None:
            found = engine.block_events()
            if not loop.is_closed():
                loop.call_soon_threadsafe(give, found)

        if self.events is not None and self._engine.call(look):
            events = list(batch_of(await answer, self._stored, self._block_tokens))
            if events:
                self.events.publish_batch(events)
        if self.snapshot is not None:
            self.snapshot(self._engine.stats())


def batch_of(events: Iterable[KVEvent], stored: set[int], block_tokens: int) -> Iterable[dict[str, Any]]:
    """As Dynamo wants them, one a block. `stored`: hashes of what is there, kept up to date."""
    for event in events:
        if event.kind == "stored":
            stored.add(event.hash)
            yield {
                "type": "stored",
                "token_ids": list(event.tokens),
                "num_block_tokens": [block_tokens],
                "block_hashes": [event.hash],
                "parent_hash": event.parent_hash,
            }
            continue
        gone = [event.hash] if event.kind == "removed" else sorted(stored)
        stored.difference_update(gone)
        if gone:
            yield {"type": "removed", "block_hashes": gone}
