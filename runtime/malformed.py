"""What is no HTTP at all: the parser's refusals get the OpenAI error body too, and headers have a limit.

uvicorn parses with httptools where it is installed, else with h11. Either way a request that cannot be parsed, or whose
line and headers exceed MAX_HEAD_BYTES, is answered with 400 and the connection closed; no handler sees it. Both say
what they wait for, so that `connections` can end what waits too long.
"""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv4c.runtime.connections import Phase, put_connection
from dsv4c.runtime.protocol import error_body, error_kind

MAX_HEAD_BYTES = 64 * 1024  # h11's own limit; what httptools takes is unlimited without ours


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

    stalled = False
    number = 0

    @property
    def awaited(self) -> Phase | None:
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        begun = self.number == 0 or bool(self.conn.trailing_data[0])
        return "head" if begun and self.conn.their_state is h11.IDLE else None

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # its task has been made and has not begun
            self.number += 1
            put_connection(self.scope, self)

    def send_400_response(self, msg: str) -> None:
        self.transport.write(refusal(msg))
        self.transport.close()


def _httptools() -> type[asyncio.Protocol]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class HttpTools(HttpToolsProtocol):
        """uvicorn's httptools protocol."""

        stalled = False
        number = 0  # heads that are whole
        awaited: Phase | None = "head"
        _head_bytes = 0
        _unparsed_bytes = 0  # of a head without an end: the parser says nothing of a field before its end

        def data_received(self, data: bytes) -> None:
            if self.awaited is None:
                self.awaited = "head"  # blank lines before it are of it, too
            in_head, number = self.awaited == "head", self.number
            super().data_received(data)
            if in_head and self.awaited == "head" and self.number == number and not self.transport.is_closing():
                self._unparsed_bytes += len(data)
                if self._unparsed_bytes > MAX_HEAD_BYTES:
                    self.send_400_response("headers too large")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes, self.awaited = 0, "head"
            put_connection(self.scope, self)

        def on_headers_complete(self) -> None:
            self.awaited, self._unparsed_bytes = "body", 0
            self.number += 1
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self.awaited = None

        def on_url(self, url: bytes) -> None:
            self._take(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._take(len(name) + len(value) + 4)
            super().on_header(name, value)

        def _take(self, size: int) -> None:
            self._head_bytes += size
            if self._head_bytes > MAX_HEAD_BYTES:
                raise ValueError("headers too large")  # httptools turns it into a refusal

        def send_400_response(self, msg: str) -> None:
            self.transport.write(refusal(msg))
            self.transport.close()

    return HttpTools
