"""Moves state between this engine and its peers: one thread, which alone touches the backend.

    export(row, lease, ...) -> handle    JSON values, for whoever is to pull; the ledger says the rest (ledger.py)
    pull(handle, place, ...) -> Pull     follows the handle's row and copies (pull.py), until `done` is called

A pull ends once: all is here, or with a TransferError; `done` is then called, in the connector's thread, which must
not be kept. A Read may still be under way when it ends early (a peer that hangs): the pull is then `busy`, and its
pages stay in quarantine until `quiet` is called, which always happens last and once, if need be right after `done`.

Deadlines are durations without any progress, on this process's monotonic clock; nobody's clock is ever compared.
The thread sleeps on a condition while there is nothing to move, to await or to watch.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4c.errors import HandleError, PeerGone, TransferError, TransferTimeout
from dsv4c.runtime.transfer.backend import Backend, Peer, Read
from dsv4c.runtime.transfer.handle import Handle
from dsv4c.runtime.transfer.layout import Layout
from dsv4c.runtime.transfer.pull import Moved, Place, PullSteps

_LOG = logging.getLogger("dsv4c.transfer")
READ_POLL_S = 0.0001
"""Between two looks at a Read under way."""
PEER_CHECK_S = 0.05
"""Between two checks of a peer that does not move; ten times as long for peers that nobody waits for."""


@dataclass(frozen=True)
class TransferStats:
    """Totals since the connector was made, and what is under way."""

    pulling: int = 0
    quarantined: int = 0
    """Pulls that ended while a Read was under way, and still is."""
    peers: int = 0
    pulled: int = 0
    pulled_bytes: int = 0
    early_bytes: int = 0
    """Of these, moved while the prefill still ran."""
    pulled_ranges: int = 0
    restarts: int = 0
    pull_s: float = 0.0
    """Seconds from the beginning of each pull to its end, added up."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """Pulls that failed, by the name of the error."""


class Pull:
    """One transfer under way; made by `Connector.pull`."""

    def __init__(self, peer_id: str, deadline_s: float, done: Callable[[Pull], None], quiet: Callable[[Pull], None]):
        self.peer_id = peer_id
        self.error: TransferError | None = None
        """Why it failed, once it has ended."""
        self.moved = Moved()
        self._deadline_s = deadline_s
        self._done, self._quiet = done, quiet
        self._steps: PullSteps | None = None
        self._run: Any = None
        self._read: Read | None = None
        self._release: Callable[[], None] | None = None
        self._ended = False
        self._wake_s = 0.0
        self._progress = -1
        self._began_s = self._moved_s = self._checked_s = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether a Read may still write into the pages, although it has ended."""
        return self._read is not None and self._steps is not None and self._steps.writing


class Connector:
    """One engine's side. All methods may be called from any thread; callbacks come from the connector's."""

    def __init__(
        self,
        backend: Backend,
        layout: Layout,
        columns: Sequence[int],
        *,
        deadline_s: float = 10.0,
    ) -> None:
        """`columns`: of our own ledger's page tables; `deadline_s`: of pulls that say none."""
        self.backend, self.layout = backend, layout
        self.on_released: Callable[[int, int], None] = lambda row, lease: None
        """Called in the connector's thread with ledger row and lease; perhaps more than once for one."""
        self.deadline_s = deadline_s
        self._columns = tuple(columns)
        self._at = backend.describe()
        self._condition = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._exported = 0
        self._pulls: list[Pull] = []
        self._quarantine: list[Pull] = []
        self._peers: dict[str, Peer] = {}
        self._counts: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._pull_s = 0.0
        self._released_s = self._swept_s = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="dsv4c-transfer", daemon=True)
        self._thread.start()

    # any thread

    def export(self, row: int, lease: int, target: int, tokens_sha256: str) -> dict[str, Any]:
        """A handle for the lease in this row of the ledger: JSON values."""
        layout = self.layout
        return Handle(
            self.backend.kind, self.backend.peer_id, row, lease, target, tokens_sha256, self._columns,
            layout.fingerprint, layout.fields, self._at,
        ).to_json()  # fmt: skip

    def check(self, handle: Mapping[str, Any], target: int, tokens_sha256: str) -> Handle:
        """The handle, if it can be pulled here for a request of these tokens. Raises HandleError."""
        made = Handle.from_json(handle)
        self.layout.check(made.layout, made.fields)
        if made.kind != self.backend.kind:
            raise HandleError(
                f"the prefill side moves state by `{made.kind}`, this one by `{self.backend.kind}`",
                hint="start both with the same `--transfer`",
            )
        if made.target != target or made.tokens_sha256 != tokens_sha256:
            raise HandleError("the handle was made for other tokens than the request's")
        if len(made.columns) != len(self.layout.groups):
            raise HandleError("the handle is malformed: its ledger has other groups")
        return made

    def pull(
        self,
        handle: Handle,
        place: Place,
        done: Callable[[Pull], None],
        quiet: Callable[[Pull], None],
        deadline_s: float | None = None,
    ) -> Pull:
        """Begins to copy what a checked handle stands for into `place`."""
        pull = Pull(handle.peer, deadline_s or self.deadline_s, done, quiet)
        self._call(lambda: self._begin(pull, handle, place))
        return pull

    def nudge(self, pull: Pull) -> None:
        """Has a pull look at its row now: there is reason to think that something has changed."""
        self._call(lambda: setattr(pull, "_wake_s", 0.0))

    def cancel(self, pull: Pull, error: TransferError) -> None:
        """Ends a pull with this error, if it has not ended."""
        self._call(lambda: self._end(pull, error))

    def forgo(self, handle: Handle) -> None:
        """Tells the owner of a checked handle that nobody will pull it. If that fails, its lease expires."""
        self._call(lambda: self._forgo(handle))

    def peer_gone(self, peer_id: str) -> None:
        """Ends every pull from this peer, which is known to be dead."""
        self._call(lambda: self._lose(peer_id, PeerGone(f"peer `{peer_id}` is gone")))

    def watch(self, leases: int) -> None:
        """Says how many leases are out: while there are any, readers' releases are looked for."""
        self._call(lambda: setattr(self, "_exported", leases))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls this later, in the connector's thread. There is no taking it back: it must look whether it matters."""
        due = time.monotonic() + seconds
        self._call(lambda: heapq.heappush(self._timers, (due, next(self._numbers), call)))

    def stats(self) -> TransferStats:
        """A snapshot."""
        counts = self._counts
        return TransferStats(
            len(self._pulls), len(self._quarantine), len(self._peers), counts["pulled"], counts["bytes"],
            counts["early_bytes"], counts["ranges"], counts["restarts"], self._pull_s, dict(self._failed),
        )  # fmt: skip

    def close(self) -> None:
        """Ends every pull and the thread, and closes the backend: nothing is written afterwards."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _call(self, call: Callable[[], None]) -> None:
        with self._condition:
            self._calls.append(call)
            self._condition.notify()

    # the connector's thread

    def _serve(self) -> None:
        while not self._closing:
            for call in self._take():
                self._guard(call)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                self._guard(heapq.heappop(self._timers)[2])
            for pull in list(self._pulls):
                if pull._wake_s <= now and not pull._ended:
                    self._advance(pull)
            for pull in list(self._quarantine):
                self._settle(pull)
            self._watch(now)
            self._sleep()
        for pull in list(self._pulls):
            self._end(pull, TransferError("the connector is closed"))
        for peer in self._peers.values():
            peer.close()
        self.backend.close()
        for pull in list(self._quarantine):
            pull._read = None
            self._settle(pull)

    def _take(self) -> list[Callable[[], None]]:
        with self._condition:
            calls = list(self._calls)
            self._calls.clear()
            return calls

    def _sleep(self) -> None:
        """Until the next thing is due; for ever if nothing is."""
        due = [p._wake_s for p in self._pulls]
        due += [timer[0] for timer in self._timers[:1]]
        now = time.monotonic()
        if self._quarantine:
            due.append(now + PEER_CHECK_S)
        if self._exported:
            due.append(self._released_s + self.backend.released_poll_s)
        if self._peers:
            due.append(self._swept_s + 10 * PEER_CHECK_S)
        with self._condition:
            if not self._calls and not self._closing:
                self._condition.wait(None if not due else max(0.0, min(due) - now))

    def _begin(self, pull: Pull, handle: Handle, place: Place) -> None:
        if pull._ended:
            return  # cancelled before it began
        pull._began_s = pull._moved_s = pull._checked_s = time.monotonic()
        self._pulls.append(pull)
        try:
            peer = self._peer(handle)
        except TransferError as error:
            self._end(pull, error)
            return
        except Exception as error:  # noqa: BLE001  as in `_advance`: the pulls of others go on
            self._fault(pull, error)
            return
        pull._steps = PullSteps(self.layout, handle, place, peer)
        pull.moved = pull._steps.moved
        pull._run = pull._steps.run()
        pull._release = lambda: peer.release(handle.row, handle.lease)
        self._advance(pull)

    def _forgo(self, handle: Handle) -> None:
        try:
            self._peer(handle).release(handle.row, handle.lease)
        except TransferError as error:
            _LOG.info("lease %d of `%s` is left to expire: %s", handle.lease, handle.peer, error.message)

    def _peer(self, handle: Handle) -> Peer:
        peer = self._peers.get(handle.peer)
        if peer is None:
            peer = self._peers[handle.peer] = self.backend.open(handle.at)
        return peer

    def _advance(self, pull: Pull) -> None:
        """Goes on with a pull until it has to wait."""
        steps, now = pull._steps, time.monotonic()
        assert steps is not None
        try:
            if pull._read is not None and not pull._read.poll():
                pull._wake_s = now + READ_POLL_S
            else:
                pull._read = None
                self._resume(pull, now)
        except StopIteration:
            self._end(pull, None)
            return
        except TransferError as error:
            pull._read = None  # a Read that has raised writes nothing any more
            self._end(pull, error)
            return
        except Exception as error:  # noqa: BLE001  a fault of the backend or ours, made one of this pull
            pull._read = None
            self._fault(pull, error)
            return
        if steps.progress != pull._progress:
            pull._progress, pull._moved_s = steps.progress, time.monotonic()
        else:
            self._check(pull, now)

    def _fault(self, pull: Pull, error: Exception) -> None:
        _LOG.error("pulling from `%s` failed", pull.peer_id, exc_info=error)
        self._end(pull, TransferError(f"{type(error).__name__}: {error}"))

    def _resume(self, pull: Pull, now: float) -> None:
        """Runs a pull's steps up to a piece that was copied at once, a Read that takes longer, or a sleep."""
        while True:
            step = next(pull._run)
            if isinstance(step, float):
                pull._wake_s = now + step
                return
            moving = pull._steps is not None and pull._steps.writing
            if not step.poll():
                pull._read, pull._wake_s = step, now + READ_POLL_S
                return
            if moving:
                pull._wake_s = now  # another pull's turn
                return

    def _check(self, pull: Pull, now: float) -> None:
        """Of a pull that does not move: whether its peer lives, and its time is over."""
        if now - pull._moved_s > pull._deadline_s:
            self._end(pull, TransferTimeout(f"nothing came from `{pull.peer_id}` for {pull._deadline_s:g} s"))
        elif now - max(pull._checked_s, pull._moved_s) > PEER_CHECK_S:
            pull._checked_s = now
            self._look_after(pull.peer_id)

    def _look_after(self, peer_id: str) -> None:
        try:
            self._peers[peer_id].check()
        except PeerGone as error:
            self._lose(peer_id, error)

    def _lose(self, peer_id: str, error: PeerGone) -> None:
        for pull in [p for p in self._pulls if p.peer_id == peer_id]:
            self._end(pull, error)
        if peer_id in self._peers and not any(p.peer_id == peer_id for p in self._quarantine):
            self._peers.pop(peer_id).close()

    def _end(self, pull: Pull, error: TransferError | None) -> None:
        if pull._ended:
            return
        pull._ended, pull.error = True, error
        if pull in self._pulls:
            self._pulls.remove(pull)
        if error is None:
            self._counts.update(
                pulled=1, bytes=pull.moved.bytes, early_bytes=pull.moved.early_bytes, ranges=pull.moved.ranges,
                restarts=pull.moved.restarts,
            )  # fmt: skip
            self._pull_s += time.monotonic() - pull._began_s
        else:
            self._failed[type(error).__name__] += 1
        if pull._release is not None:
            try:
                pull._release()  # also to a peer that is said to be gone: it may not be
            except TransferError as gone:
                _LOG.info("%s", gone.message)
        self._guard(lambda: pull._done(pull))
        self._quarantine.append(pull)
        self._settle(pull)

    def _settle(self, pull: Pull) -> None:
        """Tells that nothing of an ended pull writes any more, as soon as that is so."""
        if pull._read is not None:
            try:
                if not pull._read.poll():
                    return
            except Exception as error:  # noqa: BLE001  whatever it was: a Read that raises is over
                _LOG.info("a read of `%s` that was given up has ended: %s", pull.peer_id, error)
            pull._read = None
        self._quarantine.remove(pull)
        if pull._run is not None:
            pull._run.close()
        self._guard(lambda: pull._quiet(pull))

    def _guard(self, call: Callable[[], None]) -> None:
        """Calls what may be foreign: its failure must not end the thread, on which every pull depends."""
        try:
            call()
        except Exception:  # noqa: BLE001  see above; it is told in full
            _LOG.exception("a callback of the transfer failed")

    def _watch(self, now: float) -> None:
        """Looks for leases that were let go, and for peers that have died while nobody waited for them."""
        if self._exported and now - self._released_s >= self.backend.released_poll_s:
            self._released_s = now
            for row, lease in self.backend.poll_released():
                self.on_released(row, lease)
        if self._peers and now - self._swept_s >= 10 * PEER_CHECK_S:
            self._swept_s = now
            for peer_id in list(self._peers):
                self._look_after(peer_id)
