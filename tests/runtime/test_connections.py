"""Clients that begin a request and wait, that do not read, that have gone: they hold nothing for long."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import httpx
import pytest

from dsv4c.runtime import malformed
from dsv4c.runtime.connections import Connection, Patience, Phase, Watch, keep_alive
from dsv4c.runtime.operations import Operations
from dsv4c.runtime.record import RequestRecord
from tests.runtime.live import MODEL, Live, start_toy, wait_for

PATIENCE = Patience(head_s=10.0, body_s=20.0, stall_s=30.0)
SHORT: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


# --- the watch, on a clock of its own ------------------------------------------------------------------------------


@dataclass(eq=False)
class Fake:
    """A connection, and its own transport."""

    awaited: Phase | None = None
    number: int = 0
    size: int = 0
    stalled: bool = False
    ended: str = ""

    @property
    def transport(self) -> asyncio.Transport:
        return cast(asyncio.Transport, self)

    def get_write_buffer_size(self) -> int:
        return self.size

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


def watch(fake: Fake) -> Watch:
    return Watch(cast("list[Connection]", [fake]), PATIENCE)


@pytest.mark.parametrize(("phase", "limit"), [("head", 10), ("body", 25)])
def test_half_a_request_is_closed(phase: Phase, limit: int) -> None:
    fake = Fake(awaited=phase)
    looking = watch(fake)
    for now in range(limit):
        looking.sweep(100 + now)
        assert not fake.ended
    looking.sweep(100 + limit)
    assert fake.ended == "closed" and not fake.stalled


def test_every_request_has_its_own_time() -> None:
    fake = Fake()
    looking = watch(fake)
    for now in range(100):
        fake.awaited, fake.number = ("head", "body", None)[now // 3 % 3], now // 9  # type: ignore[assignment]
        looking.sweep(now)
    assert not fake.ended
    for now in range(100, 200):
        fake.awaited = None  # at work, or idle: not the client's turn
        looking.sweep(now)
    assert not fake.ended


def test_a_reader_that_takes_nothing_is_cut_off_and_a_slow_one_is_not() -> None:
    fake = Fake(size=1000)
    looking = watch(fake)
    for now in range(200):
        fake.size -= now % 29 == 0
        looking.sweep(now)
    assert not fake.ended
    for now in range(200, 231):
        looking.sweep(now)
    assert fake.ended == "aborted" and fake.stalled


# --- real connections ----------------------------------------------------------------------------------------------


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture(params=["httptools", "h11"])
def impatient(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, records: list[RequestRecord]
) -> Iterator[Live]:
    if request.param == "h11":
        monkeypatch.setattr("dsv4c.runtime.serve.http_protocol", lambda: malformed.H11)
    else:
        pytest.importorskip("httptools", reason="uvicorn then parses with h11 alone")
    monkeypatch.setattr("dsv4c.runtime.connections._GRACE_S", 0.1)
    given = Operations(head_timeout_s=0.2, body_timeout_s=0.2, stall_timeout_s=0.2, observers=(records.append,))
    live, _ = start_toy(operations=given, idle_s=1)
    live.narrow()
    yield live
    live.close()


def told(sock: socket.socket) -> bytes:
    """Everything until the server ends the connection."""
    sock.settimeout(60)  # a hang guard
    said = b""
    try:
        while piece := sock.recv(65536):
            said += piece
    except ConnectionResetError:
        pass
    sock.close()
    return said


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/compl", b"GET /health HTTP/1.1\r\nx-long: a", HEALTH + b"\r\n", HEALTH + b"GET /hea"],
    ids=["nothing", "half a line", "half a header", "a blank line behind", "half of a second one"],
)
def test_a_head_that_never_ends(impatient: Live, sent: bytes) -> None:
    sock = socket.create_connection(impatient.address)
    sock.sendall(sent)
    assert told(sock).count(b"HTTP/1.1 200") == sent.count(HEALTH)
    assert httpx.get(f"{impatient.url}/health").status_code == 200


def test_a_head_that_trickles(impatient: Live) -> None:
    sock = socket.create_connection(impatient.address)
    sock.sendall(b"GET /health HTTP/1.1\r\n")
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            sock.sendall(b"x-a: b\r\n")
            time.sleep(0.02)
    sock.close()


def test_a_body_that_nobody_reads(impatient: Live) -> None:
    """Not asked for, and trickling behind the answer: the connection ends."""
    sock = socket.create_connection(impatient.address)
    sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n")
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            sock.sendall(b"x")
            time.sleep(0.02)
    sock.close()


def test_requests_one_after_another_are_let_be(impatient: Live) -> None:
    with httpx.Client(base_url=impatient.url) as http:
        for _ in range(20):
            assert http.get("/health").status_code == 200
            assert http.post("/v1/completions", json=SHORT).status_code == 200
            time.sleep(0.02)


def blocked(live: Live, body: dict[str, Any]) -> socket.socket:
    """A client with little room that asks and never reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(live.address)
    data = json.dumps(body).encode()
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    return sock


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_takes(impatient: Live, records: list[RequestRecord], stream: bool) -> None:
    """Larger than what both kernels buffer. Its logprobs make it so."""
    records.clear()
    body = {**SHORT, "max_tokens": 100, "n": 8, "logprobs": 20, "stream": stream}
    sock = blocked(impatient, body)
    wait_for(lambda: bool(records))
    if stream:
        assert (records[0].status, records[0].error) == (499, "stalled")
    else:
        assert records[0].status == 200  # all of it was handed to the connection
    state = impatient.server.server_state
    wait_for(lambda: not (state.connections or state.tasks or impatient.pages_used()))
    impatient.engine.audit()
    assert len(told(sock)) < 100_000


def test_a_client_that_has_gone_is_found() -> None:
    """By the kernel: a connection inherits what its listening socket asks for."""
    with socket.socket() as listening:
        keep_alive(listening)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
