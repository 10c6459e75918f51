"""What is told of one HTTP request when it has ended: to the log, to traces. Never a word of its prompt or answer.

The gate puts a record into the ASGI scope, the answer fills in what it knows, observers read it at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

_KEY = "dsv4c.record"


@dataclass
class RequestRecord:
    """One HTTP request. Seconds; `started_s` is the time of day, all others are lengths. None: there was none."""

    request_id: str
    method: str
    path: str
    client: str
    started_s: float = field(default_factory=time.time)
    began_s: float = field(default_factory=time.perf_counter)
    """`started_s` on the clock of the lengths."""
    status: int = 500
    duration_s: float = 0.0
    response_id: str | None = None
    """The id in the body, such as `chatcmpl-...`."""
    key: str | None = None
    """Which API key: the first 8 digits of its SHA-256."""
    error: str | None = None
    """The error's `code`."""
    model: str | None = None
    stream: bool = False
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reasons: tuple[str, ...] = ()
    queue_s: float | None = None
    first_token_s: float | None = None
    traceparent: str | None = None
    """The caller's W3C trace context, as it came."""


Observer = Callable[[RequestRecord], None]


def put_record(scope: MutableMapping[str, Any], record: RequestRecord) -> None:
    """Makes it the record of this request."""
    scope[_KEY] = record


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord | None:
    """The record of a request, where somebody keeps one."""
    found = scope.get(_KEY)
    return found if isinstance(found, RequestRecord) else None
