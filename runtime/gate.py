"""The first and the last to see a request: its id, its key, how many are at hand at once, and what is said of it.

    client --> CORS (if allowed) --> Gate --401, 503--> client
                                       '--> routes --> response, with `x-request-id` --> observers (log, traces)

Plain ASGI: a layer that buffers would hold streams up. A client's own `x-request-id` is kept if it is harmless.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4c.runtime.answer import ErrorShape, put_direct
from dsv4c.runtime.keys import KeyRing
from dsv4c.runtime.protocol import error_body, error_kind
from dsv4c.runtime.record import Observer, RequestRecord, put_record

OPEN_PATHS = frozenset(("/", "/health", "/ready", "/metrics"))
"""Answered without a key and however many requests are at hand: what watches the server, and the page, which asks."""
OPEN_FOLDER = "/page/"
_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_ID_HEADER = b"x-request-id"


class Gate:
    """The middleware. `max_inflight`: requests at hand at once, whether they arrive, wait or are being answered."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        max_inflight: int,
        observers: Sequence[Observer] = (),
        shapes: Mapping[str, ErrorShape] | None = None,
    ) -> None:
        self._app = app
        self._shapes = {} if shapes is None else shapes
        self._keys = keys
        self._max_inflight = max_inflight
        self._observers = observers
        self._inflight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])  # of headers that repeat, the last
        given = headers.get(_ID_HEADER, b"")
        own = given if _ID.fullmatch(given) else None
        record = _record(scope, headers, own)
        put_record(scope, record)
        put_direct(scope, send)
        send = _Sender(send, record, own)
        free = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER)
        self._inflight += not free
        try:
            refusal = None if free else self._refusal(headers, record)
            await (refusal or self._app)(scope, receive, send)
        finally:
            self._inflight -= not free
            record.duration_s = time.perf_counter() - record.began_s
            for observe in self._observers:
                observe(record)

    def _refusal(self, headers: dict[bytes, bytes], record: RequestRecord) -> JSONResponse | None:
        """Why this request goes no further, if it does not."""
        if self._keys:
            record.key = self._keys.match(_key_of(headers))
            if record.key is None:
                record.error = "invalid_api_key"
                message = "the API key is missing or wrong; hint: send `Authorization: Bearer KEY`"
                return self._refused(401, message, record, {"www-authenticate": "Bearer"})
        if self._inflight > self._max_inflight:
            record.error = "overloaded"
            message = f"{self._max_inflight} requests are at hand already; hint: try again later"
            return self._refused(503, message, record, {"retry-after": "1", "connection": "close"})
        return None

    def _refused(self, status: int, message: str, record: RequestRecord, headers: dict[str, str]) -> JSONResponse:
        body, shape = error_body(message, kind=error_kind(status), code=record.error), self._shapes.get(record.path)
        return JSONResponse(body if shape is None else shape(body, status), status, headers=headers)


class _Sender:
    """`send` that notes the status and sees to the response's `x-request-id`."""

    def __init__(self, send: Send, record: RequestRecord, own: bytes | None) -> None:
        self._send = send
        self._record = record
        self._own = own

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            pairs = list(message.get("headers", ()))
            chosen = next((value for name, value in pairs if name == _ID_HEADER), None)
            if chosen is not None and self._own is None:
                self._record.request_id = chosen.decode("latin-1")
            else:
                pairs = [pair for pair in pairs if pair[0] != _ID_HEADER]
                pairs.append((_ID_HEADER, self._record.request_id.encode("latin-1")))
            message = {**message, "headers": pairs}
        await self._send(message)


def _record(scope: Scope, headers: dict[bytes, bytes], own: bytes | None) -> RequestRecord:
    client = scope.get("client")
    parent = headers.get(b"traceparent")
    return RequestRecord(
        request_id=own.decode("latin-1") if own is not None else f"req-{uuid.uuid4().hex}",
        method=scope["method"],
        path=scope["path"],
        client=f"{client[0]}:{client[1]}" if client else "-",
        traceparent=None if parent is None else parent.decode("latin-1"),
    )


def _key_of(headers: dict[bytes, bytes]) -> str:
    """The key as OpenAI's clients send it, or as Anthropic's do; empty if there is none."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip().decode("latin-1")
    return headers.get(b"x-api-key", b"").decode("latin-1")
