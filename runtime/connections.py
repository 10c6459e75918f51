"""For how long a connection may wait for its client: to send a head, to send a body, to take what it is sent.

    every second, of every connection: what does it wait for? --the same for too long--> closed, or cut off

uvicorn itself bounds idle connections alone. A client that sends half a head and waits, trickles a body that nobody
reads, or does not read its answer, streamed or whole, would hold its connection, and what waits on it, for ever.
Clients whose machine has gone are found by TCP: `keep_alive`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from starlette.types import Scope

_EXTENSION = "dsv4c.connection"  # of ASGI scopes
_SWEEP_S = 1.0
_GRACE_S = 5.0  # for the 408 of a handler that waits for a body itself
_PROBE_AFTER_S, _PROBE_EVERY_S, _PROBES = 60, 15, 4

Phase = Literal["head", "body"]


class Connection(Protocol):
    """What is asked of uvicorn's protocols: see `malformed`."""

    stalled: bool
    """Whether it was cut off because its client took nothing."""

    @property
    def transport(self) -> asyncio.Transport: ...

    @property
    def awaited(self) -> Phase | None:
        """What of a request its client still has to send; None for one that is whole, or not begun."""

    @property
    def number(self) -> int:
        """Of the request, counted from the connection's first."""


def put_connection(scope: Any, connection: Connection) -> None:
    """Tells the request of this scope by which connection it came."""
    scope["extensions"] = {_EXTENSION: {"connection": connection}}


def connection_of(scope: Scope) -> Connection | None:
    """The connection that a request came by, under `serve`; None under another server."""
    found: Connection | None = scope.get("extensions", {}).get(_EXTENSION, {}).get("connection")
    return found


@dataclass(frozen=True)
class Patience:
    """Seconds."""

    head_s: float
    body_s: float
    stall_s: float


class Watch:
    """Looks at the connections of one server, while its event loop runs."""

    def __init__(self, connections: Iterable[Connection], patience: Patience) -> None:
        self._connections = connections
        self._patience = patience
        self._since: dict[Connection, tuple[Hashable, float]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Looks now, and again every second, or sooner where patience is short."""
        loop, patience = asyncio.get_running_loop(), self._patience
        shortest = min(patience.head_s, patience.body_s, patience.stall_s)
        self._timer = loop.call_later(min(_SWEEP_S, shortest / 2), self.start)
        self.sweep(loop.time())

    def stop(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()

    def sweep(self, now: float) -> None:
        """Ends the connections that have waited for the same thing for too long at `now`, seconds on any clock."""
        since: dict[Connection, tuple[Hashable, float]] = {}
        for connection in list(self._connections):
            size = connection.transport.get_write_buffer_size()
            phase = connection.awaited
            if size:  # any change is a sign of life: of the client, or of a stream that still fills the buffer
                waits: Hashable = ("taken", size)
                limit_s = self._patience.stall_s
            elif phase is not None:
                waits = (phase, connection.number)  # however much of it trickles in
                limit_s = self._patience.head_s if phase == "head" else self._patience.body_s + _GRACE_S
            else:
                continue
            before, began = self._since.get(connection, (None, now))
            if before != waits:
                began = now
            if now - began < limit_s:
                since[connection] = (waits, began)
            elif size:
                connection.stalled = True
                connection.transport.abort()  # closing would wait for the client
            else:
                connection.transport.close()
        self._since = since


def keep_alive(sock: socket.socket) -> None:
    """Has the kernel ask silent clients of this listening socket whether they are there: gone in about 2 minutes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _PROBE_AFTER_S), ("TCP_KEEPINTVL", _PROBE_EVERY_S), ("TCP_KEEPCNT", _PROBES)
    ):  # fmt: skip
        if hasattr(socket, name):  # Linux has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
