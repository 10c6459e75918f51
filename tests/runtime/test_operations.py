"""Keys, origins, ids, limits, deadlines, priorities, TLS, the end of a server; what is logged and traced."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dsv4c.errors import ConfigError
from dsv4c.runtime.app import create_app
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.keys import KeyRing, read_keys
from dsv4c.runtime.logs import JsonFormatter, TextFormatter
from dsv4c.runtime.operations import Operations, Pace, asked_timeout
from dsv4c.runtime.record import Observer, RequestRecord
from dsv4c.runtime.serve import GracefulServer, bind
from dsv4c.runtime.tls import Tls
from tests.runtime.live import MODEL, Live, Paced, ToyCodec, start_toy, wait_for

KEYS = ("first-key-123", "second-key-456")
SHORT: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
LONG: dict[str, Any] = {**SHORT, "max_tokens": 900}


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture
def served(records: list[RequestRecord]) -> Iterator[tuple[Live, Paced]]:
    """A server of two seats and three places in its queue, with keys, an origin, and an observer."""
    operations = Operations(
        api_keys=KEYS,
        cors_origins=("https://example.org",),
        priority=True,
        observers=(noting(records),),
        max_inflight=8,
    )
    live, executor = start_toy(max_requests=2, max_waiting=3, operations=operations, drain_s=0.2)
    yield live, executor
    executor.gate.set()
    live.close()


def noting(records: list[RequestRecord]) -> Observer:
    """Keeps the records of what the test asks; `start_toy` asks for /health."""
    return lambda record: records.append(record) if record.path != "/health" else None


def post(live: Live, body: dict[str, Any] | None = None, key: str | None = KEYS[0], **headers: str) -> httpx.Response:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return httpx.post(f"{live.api}/completions", json=body or SHORT, headers=headers, timeout=60)


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_any_of_the_keys_opens(served: tuple[Live, Paced], key: str, header: str) -> None:
    value = f"Bearer {key}" if header == "authorization" else key
    response = httpx.post(f"{served[0].api}/completions", json=SHORT, headers={header: value})
    assert response.status_code == 200


@pytest.mark.parametrize("key", [None, "first-key-12", "first-key-1234", "FIRST-KEY-123", "é" * 12])
@pytest.mark.parametrize("path", ["/v1/models", "/openapi.json", "/v1/nothing", "/page"])
def test_nothing_opens_without_a_key(served: tuple[Live, Paced], key: str | None, path: str) -> None:
    headers = {} if key is None else {"authorization": b"Bearer " + key.encode()}
    response = httpx.get(f"{served[0].url}{path}", headers=headers)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error["code"] == "invalid_api_key" and (not key or key not in error["message"])


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/", "/page/page.js"])
def test_what_watches_the_server_needs_no_key(served: tuple[Live, Paced], path: str) -> None:
    assert httpx.get(f"{served[0].url}{path}").status_code == 200


def test_the_official_client_sends_the_key(served: tuple[Live, Paced], records: list[RequestRecord]) -> None:
    client = openai.OpenAI(base_url=served[0].api, api_key=KEYS[1], max_retries=0)
    assert client.models.list().data[0].id == MODEL
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    wait_for(lambda: len(records) == 2)
    assert records[0].key and records[1].key is None and KEYS[1] not in str(records)


def test_anthropics_client_is_refused_in_its_words(served: tuple[Live, Paced]) -> None:
    response = httpx.post(f"{served[0].api}/messages", json={}, headers={"x-api-key": "wrong-key"})
    assert response.status_code == 401
    assert response.json()["type"] == "error" and response.json()["error"]["type"] == "authentication_error"


def test_a_ring_compares_every_key() -> None:
    ring = KeyRing(("a" * 8, "b" * 8))
    assert ring and not KeyRing(()) and ring.match("a" * 8) != ring.match("b" * 8)
    assert ring.match("") is None and ring.match("\udc80") is None


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nkey-in-file\n\n  another-one  \n", encoding="utf-8")
    assert read_keys(["given-key"], file) == ("given-key", "key-in-file", "another-one")
    for text in ("", "# none\n", "short\n", "with a space\n"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            read_keys([], file)
        assert not text.strip() or text.strip() not in str(caught.value) or text.startswith("#")
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys([], tmp_path / "absent")


# --- origins, ids ----------------------------------------------------------------------------------------------------


def test_cors_is_off_unless_given(served: tuple[Live, Paced], toy_server: Live) -> None:
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type"
    allowed = httpx.options(f"{served[0].api}/completions", headers=asked)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://example.org"
    refused = httpx.get(f"{served[0].api}/models", headers=asked)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://example.org"
    other = httpx.options(f"{served[0].api}/completions", headers={**asked, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    for response in (
        httpx.get(f"{toy_server.api}/models", headers=asked),
        httpx.options(toy_server.api, headers=asked),
    ):
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "ftp://example.org", ""])
def test_an_origin_is_no_address(origin: str) -> None:
    with pytest.raises(ConfigError, match="origin"):
        Operations(cors_origins=(origin,))


def test_every_response_has_an_id(served: tuple[Live, Paced], records: list[RequestRecord]) -> None:
    live, _ = served
    given = post(live, **{"x-request-id": "mine-1"})
    made = post(live)
    nasty = post(live, **{"x-request-id": 'a"b c'})
    lost = httpx.get(f"{live.url}/nothing", headers={"x-api-key": KEYS[0]})
    ids = [r.headers["x-request-id"] for r in (given, made, nasty, lost)]
    assert ids[0] == "mine-1" and ids[1] == made.json()["id"] and ids[2] == nasty.json()["id"]
    wait_for(lambda: len(records) == len(ids))  # told of a request when its client has all of the answer
    assert ids[3].startswith("req-") and [r.request_id for r in records] == ids
    assert records[0].response_id == given.json()["id"]


# --- limits ----------------------------------------------------------------------------------------------------------


def start_long(live: Live, count: int, body: dict[str, Any] | None = None) -> list[socket.socket]:
    """So many streams that have begun to be served, or wait."""
    socks = []
    for _ in range(count):
        sock = socket.create_connection(live.address)
        data = json.dumps({**LONG, "stream": True, **(body or {})}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-api-key: {KEYS[0]}\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        sock.sendall(head.encode() + data)
        socks.append(sock)
    return socks


def start_running(live: Live, executor: Paced) -> list[socket.socket]:
    """Takes both seats, and stops the engine."""
    executor.step_s = 0.01
    socks = start_long(live, 2)
    wait_for(lambda: live.loop.stats().running == 2)
    executor.gate.clear()
    return socks


def test_a_full_queue_says_when_to_come_back(served: tuple[Live, Paced]) -> None:
    live, executor = served
    socks = start_running(live, executor)
    socks += start_long(live, 3)
    wait_for(lambda: live.loop.stats().waiting == 3)
    response = post(live)
    assert response.status_code == 503 and response.json()["error"]["code"] == "queue_full"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    ready = httpx.get(f"{live.url}/ready")
    assert ready.status_code == 503 and ready.json()["error"]["code"] == "queue_full" and ready.headers["retry-after"]
    assert httpx.get(f"{live.url}/health").status_code == 200
    for sock in socks:
        sock.close()
    executor.gate.set()
    wait_for(lambda: httpx.get(f"{live.url}/ready").status_code == 200)


def test_too_many_at_hand_are_turned_away(records: list[RequestRecord]) -> None:
    live, executor = start_toy(operations=Operations(max_inflight=2, observers=(noting(records),)))
    try:
        executor.gate.clear()
        socks = start_long(live, 2)
        wait_for(lambda: live.loop.stats().running + live.loop.stats().waiting == 2)
        refused = post(live, key=None)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1" and httpx.get(f"{live.url}/metrics").status_code == 200
        for sock in socks:
            sock.close()
        executor.gate.set()
        wait_for(lambda: post(live, key=None).status_code == 200)
    finally:
        executor.gate.set()
        live.close()


def test_retry_after_follows_the_pace() -> None:
    pace = Pace()
    assert pace.retry_after_s(0.0, 100) == 1
    for second in range(10):
        pace.ended(float(second))
    assert pace.retry_after_s(10.0, 20) == 20 and pace.retry_after_s(10.0, 0) == 1
    assert pace.retry_after_s(10.0, 10_000) == 60 and pace.retry_after_s(100.0, 20) == 1


def test_a_body_that_never_comes_is_given_up(records: list[RequestRecord]) -> None:
    live, _ = start_toy(operations=Operations(body_timeout_s=0.1, observers=(noting(records),)))
    try:
        sock = socket.create_connection(live.address)
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
        wait_for(lambda: bool(records))
        assert b" 408 " in answer and b"request_timeout" in answer and records[0].status == 408
        sock.close()
    finally:
        live.close()


# --- deadlines and stalled readers ------------------------------------------------------------------------------------


def test_a_request_has_its_time(served: tuple[Live, Paced], records: list[RequestRecord]) -> None:
    live, executor = served
    executor.step_s = 0.005
    whole = post(live, LONG, **{"x-request-timeout": "0.1"})
    assert whole.status_code == 504 and whole.json()["error"]["code"] == "deadline_exceeded"
    stream = post(live, {**LONG, "stream": True}, **{"x-request-timeout": "0.1"})
    assert stream.status_code == 200 and "deadline_exceeded" in stream.text and "[DONE]" not in stream.text
    wait_for(lambda: len(records) == 2)
    assert [r.error for r in records] == ["deadline_exceeded"] * 2 and records[0].status == 504
    wait_for(lambda: not live.pages_used())
    live.engine.audit()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_bad_deadline_is_refused(served: tuple[Live, Paced], value: str) -> None:
    response = post(served[0], **{"x-request-timeout": value})
    assert response.status_code == 400 and response.json()["error"]["param"] == "x-request-timeout"


def test_the_server_bounds_the_deadline() -> None:
    assert asked_timeout(None, None) is None and asked_timeout(None, 5.0) == 5.0
    assert asked_timeout("3", 5.0) == 3.0 and asked_timeout("30", 5.0) == 5.0 and asked_timeout("30", None) == 30.0


def test_a_reader_that_takes_nothing_is_given_up(records: list[RequestRecord]) -> None:
    """Its logprobs fill the buffers of both sides; then it blocks, and must cost nothing for long."""
    live, _ = start_toy(operations=Operations(stall_timeout_s=0.2, observers=(noting(records),)))
    try:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        live.narrow()
        sock.connect(live.address)
        data = json.dumps({**LONG, "max_tokens": 400, "n": 2, "stream": True, "logprobs": 20}).encode()
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        wait_for(lambda: bool(records))
        assert records[0].error == "stalled" and records[0].status == 499
        wait_for(lambda: not live.pages_used() and not live.server.server_state.tasks)
        assert "Traceback" not in repr(records)
        sock.close()
    finally:
        live.close()


# --- priority ---------------------------------------------------------------------------------------------------------


def test_the_lowest_priority_goes_first(served: tuple[Live, Paced]) -> None:
    live, executor = served
    running = start_running(live, executor)
    order: list[int] = []

    def ask(priority: int) -> None:
        assert post(live, {**SHORT, "max_tokens": 40, "priority": priority}).status_code == 200
        order.append(priority)

    threads = []
    for number, priority in enumerate((5, 0, -5), 1):
        threads.append(threading.Thread(target=ask, args=(priority,)))
        threads[-1].start()
        wait_for(lambda n=number: live.loop.stats().waiting == n)  # type: ignore[misc]
    waiting = [r.params.priority for r in live.engine.scheduler.waiting]
    for sock in running[1:]:
        sock.close()  # one seat: who waits goes one by one
    executor.gate.set()
    executor.step_s = 0.0
    for thread in threads:
        thread.join()
    running[0].close()
    assert order[-1] == 5 and waiting == sorted(waiting)


def test_without_the_policy_a_priority_is_refused(toy_server: Live) -> None:
    response = post(toy_server, {**SHORT, "priority": 1})
    assert response.status_code == 400 and response.json()["error"]["param"] == "priority"
    assert post(toy_server, {**SHORT, "priority": 0}).status_code == 200


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_server_that_leaves_is_not_ready_and_still_serves() -> None:
    live, _ = start_toy()
    server = GracefulServer(live.server.config.app, bind(port=0), drain_s=1, drain_delay_s=30, log_level="error")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        server.should_exit = True
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert httpx.post(f"{server.url}/v1/completions", json=SHORT).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.force_exit = True
        thread.join()
    finally:
        live.close()


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-out",
        str(cert),
        "-keyout",
        str(key),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no `openssl` to make a certificate with")
    return cert, key


def test_tls(certificate: tuple[Path, Path]) -> None:
    live, _ = start_toy()
    server = GracefulServer(live.server.config.app, bind(port=0), tls=Tls(*certificate), log_level="error")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(verify=context) as client:
            assert client.post(f"{server.url}/v1/completions", json=SHORT).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        server.should_exit = True
        thread.join()
    finally:
        live.close()


def test_bad_certificates_are_refused_at_once(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("", encoding="utf-8")
    for cert, key in ((tmp_path / "absent", certificate[1]), (certificate[0], empty), (certificate[1], certificate[0])):
        with pytest.raises(ConfigError, match="TLS does not work"):
            Tls(cert, key)


# --- what is said of a request ----------------------------------------------------------------------------------------


def test_a_record_says_how_it_went(served: tuple[Live, Paced], records: list[RequestRecord]) -> None:
    live, _ = served
    post(live, {**SHORT, "prompt": "a secret", "stream": True, "n": 2})
    wait_for(lambda: bool(records))
    record = records[-1]
    assert (record.method, record.path, record.status, record.model) == ("POST", "/v1/completions", 200, MODEL)
    assert record.stream and record.prompt_tokens == 8 and record.completion_tokens == 6
    assert record.finish_reasons == ("length", "length") and record.client.startswith("127.0.0.1:")
    assert record.queue_s is not None and record.first_token_s is not None
    assert 0 <= record.queue_s <= record.first_token_s <= record.duration_s and "secret" not in str(record)


def test_log_lines() -> None:
    record = RequestRecord("id-1", "POST", "/a\nb", "1.2.3.4:5", status=200, duration_s=0.5, prompt_tokens=3)
    said = logging.LogRecord("dsv4c.requests", logging.INFO, "", 0, "request", None, None)
    said.record = record
    line = TextFormatter().format(said)
    assert "INFO POST /a\\nb 200 0.500s id=id-1 client=1.2.3.4:5 prompt=3" in line and "\n" not in line
    found = json.loads(JsonFormatter().format(said))
    assert found["request_id"] == "id-1" and found["status"] == 200 and found["prompt_tokens"] == 3
    assert "began_s" not in found and "error" not in found


def test_spans_have_the_caller_as_parent(served: tuple[Live, Paced], records: list[RequestRecord]) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed; see the extra `otel`")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from dsv4c.runtime.tracing import trace_requests, trace_to

    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    post(served[0], traceparent=f"00-{trace}-{parent}-01")
    exporter = InMemorySpanExporter()
    observe = trace_to(exporter, batched=False)
    wait_for(lambda: bool(records))
    observe(records[0])
    observe(replace(records[0], status=500, error="engine_error", traceparent="nonsense"))
    observe(replace(records[0], path="/health"))
    first, second = exporter.get_finished_spans()
    assert first.name == "POST /v1/completions" and first.parent is not None
    assert f"{first.context.trace_id:032x}" == trace and f"{first.parent.span_id:016x}" == parent
    assert first.attributes["gen_ai.usage.completion_tokens"] == 3 and first.events[0].name == "first token"
    assert first.end_time > first.start_time and second.parent is None and not second.status.is_ok
    with pytest.raises(ConfigError, match="address"):
        trace_requests("localhost:4318")


@pytest.mark.parametrize("value", [{"stall_timeout_s": 0.0}, {"max_inflight": 0}, {"request_timeout_s": float("nan")}])
def test_operations_that_cannot_be(value: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(value))):
        Operations(**value)


def test_an_engine_without_a_limit_is_never_full() -> None:
    class Idle:
        max_context, failure = 10, None

        def stats(self) -> EngineStats:
            return EngineStats(waiting=5)

    create_app(Idle(), ToyCodec(), MODEL).state.server.check_ready()  # type: ignore[arg-type]
