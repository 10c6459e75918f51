"""Looks whether the worker is still registered, and sees to it if not.

Entries of file and etcd discovery live as long as they are kept alive. A worker that was paused for longer (10 s; by a
debugger, a snapshot, a host without memory) loses them, and nothing in Dynamo enters it again: it would stand there
healthy, without a request, for ever. There is no entering the model's card a second time, so the worker ends, as on
SIGTERM: what it serves it finishes, and whoever runs it starts it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

_LOG = logging.getLogger("dsv4c.dynamo")
PERIOD_S = 1.0
MISSED = 5
"""So many looks in a row must miss it: a list may be late."""
UNSEEN = 30
"""And so many before it was ever seen: registering takes a while."""


class Watchdog:
    """Counts looks that missed the worker."""

    def __init__(self, instance: int, instances: Callable[[], Collection[int]], lost: Callable[[], None]) -> None:
        """`instances`: those that clients see now. `lost`: called once, when ours is not among them."""
        self._instance, self._instances, self._lost = instance, instances, lost
        self._seen = False
        self._missed = 0

    async def run(self) -> None:
        """Looks again and again, until it is cancelled or has told."""
        while not self.look():
            await asyncio.sleep(PERIOD_S)

    def look(self) -> bool:
        """One look; whether it has told that the worker is lost."""
        if self._instance in self._instances():
            self._seen, self._missed = True, 0
            return False
        self._missed += 1
        if self._missed < (MISSED if self._seen else UNSEEN):
            return False
        _LOG.error(
            "worker %d is not registered any more, as when it was paused for too long: it ends, to be started again",
            self._instance,
        )
        self._lost()
        return True
