"""Header and path abuse on a raw socket: one OpenAI error body each, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from dsv4c.runtime import malformed
from tests.runtime.live import Live, start_toy

LINE = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
BODY = b'{"model": "toy", "prompt": "a", "max_tokens": 1}'

NOT_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,  # a TLS client
    b"hello\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /nothing HTTP/9.9\r\nhost: x\r\n\r\n",
    b"GET /nothing HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n",
    b"GET /nothing HTTP/1.1\r\nhost: x\r\nbad name: 1\r\n\r\n",
    b"GET /nothing HTTP/1.1\r\nhost: x\r\na: b\x00c\r\n\r\n",
    LINE + b"content-length: -1\r\n\r\n",
    LINE + b"content-length: two\r\n\r\n",
    LINE + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",
    LINE + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\nzz\r\n",  # request smuggling
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /nothing HTTP/1.1\r\nhost: x\r\na: " + b"b" * 200_000 + b"\r\n\r\n",
    b"GET /nothing HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
]

ODD_PATHS = [
    b"/v1/completions/",
    b"//v1/completions",
    b"/v1/../v1/completions",
    b"/v1/%2e%2e/secret",
    b"/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    b"/v1/models/%00",
    b"/v1/models/%ff%fe",
    b"/v1/models/%F0%9F%92%A9",
    b"/v1/models/" + b"a" * 5000,
    b"/v1/models/",
    b"/v1/models/a%0d%0aset-cookie:%20b",
    b"/nothing?" + b"a=b&" * 5000,
    b"/%",
]


@pytest.fixture(params=["httptools", "h11"])
def live(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    if request.param == "h11":
        monkeypatch.setattr("dsv4c.runtime.serve.http_protocol", lambda: malformed.H11)
    else:
        pytest.importorskip("httptools", reason="uvicorn then parses with h11 alone")
    server, _ = start_toy()
    yield server
    server.close()


def sent(live: Live, request: bytes) -> bytes:
    """All that the server says to these bytes until it closes, or until a whole body is there."""
    with socket.create_connection(live.address) as raw:
        raw.settimeout(30)  # a hang guard
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            raw.sendall(request)  # a server may answer before it has read all; what it said is still to be read
        said = b""
        while True:
            try:
                piece = raw.recv(65536)
            except ConnectionResetError:
                return said
            if not piece:
                return said
            said += piece
            head, _, body = said.partition(b"\r\n\r\n")
            length = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            if length and len(body) >= length[0]:
                return said


@pytest.mark.parametrize("size", [70_000, 200_000])
def test_a_body_in_the_same_read_is_no_head(live: Live, size: int) -> None:
    """Sent at once, so that head and body may come together; answered for what the body says."""
    body = b'{"model": "toy", "prompt": "' + b"a" * size + b'"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    for _ in range(10):
        said = sent(live, head + body)
        assert b"context_length_exceeded" in said, said[:300]


def refused(said: bytes, *statuses: int) -> dict[str, object]:
    head, _, body = said.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in statuses, said[:300]
    assert b"content-type: application/json" in head.lower() and b"set-cookie" not in head.lower()
    error: dict[str, object] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and b"Traceback" not in body
    return error


def test_what_is_no_http_or_too_long_gets_the_error_body(live: Live) -> None:
    for request in NOT_HTTP:
        said = sent(live, request)
        # a kernel may drop the answer to a client that is still sending; it never is another answer
        if said or len(request) < 65536:
            refused(said, 400, 404)
    assert httpx.post(f"{live.api}/completions", content=BODY).status_code == 200


def test_a_long_body_that_comes_with_its_head_is_no_long_head(live: Live) -> None:
    body = json.dumps({**json.loads(BODY), "user": "x" * 200_000}).encode()
    request = LINE + b"content-length: %d\r\n\r\n" % len(body) + body
    for _ in range(3):
        assert sent(live, request).split()[1] == b"200"
    with httpx.Client(base_url=live.url) as http:  # the head alone, the body in pieces, on one connection
        for _ in range(3):
            pieces = [body[i : i + 50_000] for i in range(0, len(body), 50_000)]
            assert http.post("/v1/completions", content=iter(pieces)).status_code == 200


def test_odd_paths_are_not_found_and_never_redirected(live: Live) -> None:
    for path in ODD_PATHS:
        refused(sent(live, b"GET " + path + b" HTTP/1.1\r\nhost: evil.example\r\n\r\n"), 400, 404)
    for method in (b"HEAD", b"DELETE", b"PATCH", b"TRACE", b"CONNECT", b"OPTIONS", b"PROPFIND"):
        request = method + b" /v1/completions HTTP/1.1\r\nhost: x\r\n"
        said = sent(live, request + b"connection: close\r\n\r\n")
        assert int(said.split()[1]) in (400, 404, 405), said
    assert httpx.post(f"{live.api}/completions", content=BODY).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "multipart/form-data; boundary=" + "x" * 1000},
        {"content-type": "application/json; charset=utf-16"},
        {"accept": "image/png"},
        {"authorization": "Bearer " + "x" * 30_000},
        {"x-forwarded-for": "a, b, c", "x-request-id": "<script>"},
        {"expect": "100-continue"},
        {"host": "evil.example"},
    ],
    ids=lambda h: next(iter(h)),
)
def test_odd_headers_change_nothing(toy_server: Live, headers: dict[str, str]) -> None:
    response = httpx.post(f"{toy_server.api}/completions", content=BODY, headers=headers)
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 1


def test_an_upgrade_is_not_offered(live: Live) -> None:
    """httptools takes a body after `upgrade` for the other protocol's, h11 for the request's."""
    asked = {"upgrade": "websocket", "connection": "upgrade", "sec-websocket-key": "a", "sec-websocket-version": "13"}
    response = httpx.post(f"{live.api}/completions", content=BODY, headers=asked)
    assert response.status_code == 200 or response.json()["error"]["code"] == "invalid_json"
    assert httpx.post(f"{live.api}/completions", content=BODY).status_code == 200


def test_the_parser_is_the_one_uvicorn_would_take() -> None:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    chosen = malformed.http_protocol()
    assert issubclass(chosen, AutoHTTPProtocol) and issubclass(chosen, asyncio.Protocol)
