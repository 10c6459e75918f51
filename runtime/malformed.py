"""What is no HTTP at all: the parser's refusals get the OpenAI error body too, and headers have a limit.

uvicorn parses with httptools where it is installed, else with h11. Either way a request that cannot be parsed, or whose
line and headers exceed MAX_HEAD_BYTES, is answered with 400 and the connection closed; no handler sees it. With
httptools a head has HEAD_TIMEOUT_S to arrive, too: a client that says nothing holds no connection.
"""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec

from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv4c.runtime.protocol import error_body, error_kind

MAX_HEAD_BYTES = 64 * 1024  # h11's own limit; what httptools takes is unlimited without ours
HEAD_TIMEOUT_S = 30.0
ABORT = "dsv4c.abort"
"""ASGI extension: `abort()` drops the connection and what its client has not taken."""


def http_protocol() -> type[asyncio.Protocol]:
    """The parser to give to uvicorn: the one it would take, with our answer to what it refuses."""
    if find_spec("httptools") is None:
        return H11
    return _httptools()


def refusal(message: str) -> bytes:
    """The whole response to a request that cannot be parsed."""
    text = message.rstrip(".").replace("Invalid HTTP", "invalid HTTP")
    body = json.dumps(error_body(text, kind=error_kind(400), code="invalid_http")).encode()
    lines = ("HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(body)}")
    return "\r\n".join((*lines, "connection: close", "", "")).encode() + body


class H11(H11Protocol):
    """uvicorn's h11 protocol."""

    def send_400_response(self, msg: str) -> None:
        self.transport.write(refusal(msg))
        self.transport.close()


def _httptools() -> type[asyncio.Protocol]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class HttpTools(HttpToolsProtocol):
        """uvicorn's httptools protocol."""

        _head_bytes = 0
        _unparsed_bytes = 0  # of a head without an end: the parser says nothing of a field before its end
        _in_head = True
        _num_heads = 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head and self._timer is None:
                self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)
            began_in_head, heads = self._in_head, self._num_heads
            super().data_received(data)
            if began_in_head and self._in_head and self._num_heads == heads and not self.transport.is_closing():
                self._unparsed_bytes += len(data)
                if self._unparsed_bytes > MAX_HEAD_BYTES:
                    self.send_400_response("headers too large")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes, self._in_head = 0, True

        def on_headers_complete(self) -> None:
            self._in_head, self._unparsed_bytes = False, 0
            self._num_heads += 1
            self._stop_timer()
            self.scope["extensions"] = {ABORT: {"abort": self.transport.abort}}
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_head = True

        def on_url(self, url: bytes) -> None:
            self._take(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._take(len(name) + len(value) + 4)
            super().on_header(name, value)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _take(self, size: int) -> None:
            self._head_bytes += size
            if self._head_bytes > MAX_HEAD_BYTES:
                raise ValueError("headers too large")  # httptools turns it into a refusal

        def send_400_response(self, msg: str) -> None:
            self.transport.write(refusal(msg))
            self.transport.close()

    return HttpTools
