"""How a server treats its clients: keys, origins, limits, deadlines. All of it is given; no environment is read."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from dsv4c.errors import ConfigError
from dsv4c.runtime.logs import log_request
from dsv4c.runtime.record import Observer

MAX_BODY_BYTES = 32 * 2**20  # a million tokens as ids, or as text of any script, with room to spare
_WINDOW_S = 60.0
_LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Operations:
    """Raises ConfigError for what cannot be."""

    api_keys: tuple[str, ...] = ()
    """Any of them opens everything but /health, /ready, /metrics and the page. None: no key is needed."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser; `*` is any."""
    max_body_bytes: int = MAX_BODY_BYTES
    head_timeout_s: float = 30.0
    """For a request's line and headers to arrive whole, and for a new connection to say anything."""
    body_timeout_s: float = 60.0
    """For a body to arrive whole."""
    max_inflight: int = 4096
    """HTTP requests at hand at once: arriving, waiting, or being answered."""
    request_timeout_s: float | None = None
    """Most seconds for a request; a client may ask for fewer with `x-request-timeout`."""
    stall_timeout_s: float = 300.0
    """A client that reads nothing for so long, while there is something to read, is cut off."""
    priority: bool = False
    """Whether requests may say who goes first; else all come in the order in which they arrive."""
    page: bool = True
    """Whether `/` is the playground."""
    observers: tuple[Observer, ...] = (log_request,)
    """Told of every request that has ended, in the event loop: they must not block."""

    def __post_init__(self) -> None:
        for name in ("head_timeout_s", "body_timeout_s", "request_timeout_s", "stall_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"`{name}` must be a positive number of seconds, not {value}")
        for name in ("max_body_bytes", "max_inflight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be positive, not {getattr(self, name)}")
        for origin in self.cors_origins:
            if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.count("/") != 2):
                raise ConfigError(
                    f"`{origin}` is no origin", hint="such as https://example.org, without a path; or `*`"
                )


class Pace:
    """How fast requests end, to say when it is worth to come back."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque()

    def ended(self, now: float) -> None:
        """A request has ended at `now`, seconds on any clock that goes on."""
        self._ends.append(now)
        while self._ends[0] < now - _WINDOW_S:
            self._ends.popleft()

    def retry_after_s(self, now: float, waiting: int) -> int:
        """Whole seconds until those who wait now have probably been served; 1 to 60."""
        while self._ends and self._ends[0] < now - _WINDOW_S:
            self._ends.popleft()
        if not waiting or len(self._ends) < 2:
            return 1
        rate = len(self._ends) / max(1e-3, now - self._ends[0])
        return min(_LONGEST_RETRY_S, max(1, math.ceil(waiting / rate)))


def asked_timeout(header: str | None, limit_s: float | None) -> float | None:
    """Seconds a request may take: what `x-request-timeout` asks for, and at most the server's limit.

    Raises ValueError for a header that is no positive number.
    """
    if header is None:
        return limit_s
    asked = float(header)
    if not 0 < asked < math.inf:
        raise ValueError(f"{asked} is not a positive number of seconds")
    return asked if limit_s is None else min(asked, limit_s)
