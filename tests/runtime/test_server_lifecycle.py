"""Clients that leave, servers that stop, ports in use, numbers that add up."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dsv4c import cli
from dsv4c.errors import EngineError, InputError
from dsv4c.runtime.app import create_app
from dsv4c.runtime.outputs import ServedEngine
from dsv4c.runtime.serve import bind, serve
from tests.runtime.live import MODEL, Live, Paced, ToyCodec, start_toy, wait_for

ROOT = Path(__file__).resolve().parents[2]
LONG: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 900, "ignore_eos": True}


@pytest.fixture
def slow() -> Iterator[tuple[Live, Paced]]:
    """A server of few seats whose steps take 2 ms, so that 900 tokens outlast any client here."""
    live, executor = start_toy(max_requests=2, step_s=0.002, drain_s=0.2)
    yield live, executor
    executor.gate.set()
    live.close()


def connect(live: Live, body: dict[str, Any]) -> socket.socket:
    """A raw client that has sent a whole request."""
    sock = socket.create_connection(live.address)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def idle(live: Live) -> bool:
    stats = live.engine.stats()
    return not (stats.running or stats.waiting or live.pages_used())


@pytest.mark.parametrize("abrupt", [False, True])
@pytest.mark.parametrize("options", [{"stream": True}, {}, {"n": 4}, {"stream": True, "n": 4}])
def test_a_client_that_leaves_is_cancelled(slow: tuple[Live, Paced], options: dict[str, Any], abrupt: bool) -> None:
    live, _ = slow
    sock = connect(live, {**LONG, **options})
    wait_for(lambda: live.pages_used() > 0)
    if options.get("stream"):
        assert b" 200 " in sock.recv(64)
    if abrupt:  # a reset in place of a goodbye
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()
    wait_for(lambda: idle(live))
    live.engine.audit()
    text = httpx.get(f"{live.url}/metrics").text
    assert 'dsv4c_http_responses_total{path="/v1/completions",status="499"} 1.0' in text
    assert f'dsv4c_sequences_finished_total{{reason="cancelled"}} {options.get("n", 1)}.0' in text


CLIENT = """
import json, socket, sys
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
data = sys.argv[2].encode()
sock.sendall(b"POST /v1/completions HTTP/1.1\\r\\nhost: x\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(data) + data)
while True:
    print(len(sock.recv(100)), flush=True)
"""


def test_clients_that_are_killed(slow: tuple[Live, Paced]) -> None:
    live, _ = slow
    clients = []
    for options in ({"stream": True}, {"n": 2}, {"stream": True}):
        command = [sys.executable, "-c", CLIENT, str(live.address[1]), json.dumps({**LONG, **options})]
        clients.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    wait_for(lambda: len(live.server.server_state.tasks) == 3)
    assert clients[0].stdout is not None and clients[0].stdout.readline()
    for client in clients:
        client.kill()
        client.communicate()
    wait_for(lambda: idle(live) and not live.server.server_state.connections)
    live.engine.audit()


def test_a_client_that_leaves_the_queue_never_runs(slow: tuple[Live, Paced]) -> None:
    live, executor = slow
    running = [connect(live, LONG) for _ in range(2)]
    wait_for(lambda: live.engine.stats().running == 2)
    executor.gate.clear()
    queued = connect(live, {**LONG, "stream": True})
    wait_for(lambda: len(live.server.server_state.connections) == 3)
    for sock in (queued, *running):
        sock.close()
    executor.gate.set()
    wait_for(lambda: idle(live))
    live.engine.audit()


def test_a_reader_that_stalls_does_not_hold_up_others(slow: tuple[Live, Paced]) -> None:
    live, _ = slow
    stalled = connect(live, {**LONG, "stream": True, "logprobs": 20})
    client = openai.OpenAI(base_url=live.api, api_key="unused", max_retries=0)
    chunks = list(client.completions.create(model=MODEL, prompt="x", max_tokens=5, stream=True))
    assert chunks[-1].choices[0].finish_reason is not None
    stalled.close()
    wait_for(lambda: idle(live))


def test_requests_in_flight_end_with_an_error_at_the_deadline(slow: tuple[Live, Paced]) -> None:
    live, executor = slow
    stream = connect(live, {**LONG, "stream": True})
    assert b" 200 " in stream.recv(64)
    executor.gate.clear()
    whole = connect(live, LONG)
    wait_for(lambda: len(live.server.server_state.tasks) == 2)
    live.server.should_exit = True
    live.thread.join()
    assert b"shutting_down" in _rest(stream) and b" 503 " in (answer := _rest(whole)) and b"shutting_down" in answer
    executor.gate.set()
    wait_for(lambda: idle(live))


def test_a_reader_that_stalls_does_not_hold_up_the_end(
    slow: tuple[Live, Paced], caplog: pytest.LogCaptureFixture
) -> None:
    live, executor = slow
    executor.step_s = 0.0
    live.narrow()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(live.address)
    data = json.dumps({**LONG, "n": 2, "max_tokens": 300, "stream": True, "logprobs": 20}).encode()
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    app_server = live.server.config.app.state.server  # type: ignore[union-attr]
    wait_for(lambda: any(group.sending and live.loop.stats().waiting == 0 for group in app_server._groups))
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).addHandler(caplog.handler)
    live.server.should_exit = True
    live.thread.join()
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).removeHandler(caplog.handler)
    assert not caplog.text and not live.server.server_state.tasks
    sock.close()
    wait_for(lambda: idle(live))


def test_a_failed_engine_is_unhealthy() -> None:
    live, _ = start_toy()
    try:
        live.loop._failure = EngineError("the engine stopped: out of luck")
        for response in (
            httpx.get(f"{live.url}/health"),
            httpx.post(f"{live.api}/completions", json={**LONG, "max_tokens": 1}),
        ):
            assert response.status_code == 503 and "out of luck" in response.json()["error"]["message"]
    finally:
        live.loop._failure = None
        live.close()


SERVE = """
from tests.runtime.live import MODEL, ToyCodec, EOS, Paced
from tests.runtime.standin import make_engine
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.outputs import ServedEngine
from dsv4c.runtime.outputs import ServedEngine
from dsv4c.runtime.serve import bind, serve
from dsv4c.runtime.app import create_app

engine, standin = make_engine(eos=[EOS])
engine.runner.executor = Paced(standin, 0.005)
loop = EngineLoop(engine).start()
sock = bind(port=0)
print(sock.getsockname()[1], flush=True)
serve(create_app(ServedEngine(loop), ToyCodec(), MODEL), sock=sock)
loop.close(drain=False)
assert not sum(engine.stats().pages_used.values())
print("done", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish(number: signal.Signals) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SERVE)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=5)
        given: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 100, "temperature": 0}
        given["extra_body"] = {"ignore_eos": True}
        alone = client.completions.create(**given).choices[0].text
        text = ""
        for i, chunk in enumerate(client.completions.create(stream=True, **given)):
            text += chunk.choices[0].text
            if i == 0:
                process.send_signal(number)
            if i == 50:
                with pytest.raises(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
        assert text == alone
        out, err = process.communicate()
        assert process.returncode == 0 and out == "done\n"
        assert "POST /v1/completions" in err and "Traceback" not in err
    finally:
        process.kill()
        process.wait()


def test_a_second_interrupt_stops_at_once_without_a_trace() -> None:
    command = [sys.executable, "-c", textwrap.dedent(SERVE)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        port = int(process.stdout.readline())
        wait_for(lambda: _listens(port))
        sock = socket.create_connection(("127.0.0.1", port))
        data = json.dumps({**LONG, "stream": True}).encode()
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        assert b" 200 " in sock.recv(64)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: not _listens(port))
        process.send_signal(signal.SIGINT)
        assert b"shutting_down" in _rest(sock)
        out, err = process.communicate()
        assert process.returncode == 0 and out == "done\n"
        assert err.count("stopped at once") == 1 and "Traceback" not in err and "CancelledError" not in err
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_port_in_use_is_an_input_error(toy_server: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = toy_server.address[1]
    with pytest.raises(InputError, match=f"port {port} on `127.0.0.1` is in use") as caught:
        bind(port=port)
    assert caught.value.exit_code == 2 and "--port" in caught.value.hint
    assert cli.main(["run", str(tmp_path), "--port", str(port)]) == 2
    assert "in use" in capsys.readouterr().err
    assert httpx.get(f"{toy_server.url}/health").status_code == 200


def test_port_taken_between_bind_and_serve(toy_server: Live) -> None:
    first, app = bind(port=0), create_app(ServedEngine(toy_server.loop), ToyCodec(), MODEL)
    with socket.socket() as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rival.bind(first.getsockname())
        rival.listen()
        with pytest.raises(InputError, match="in use"):
            serve(app, sock=first)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 70000, "between 0 and 65535"),
        ("127.0.0.1", -1, "between 0 and 65535"),
        ("no such host", 0, "is not a host name"),
        ("192.0.2.1", 0, "cannot bind"),
    ],
)
def test_bad_addresses(host: str, port: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bind(host, port)


def test_idle_connections_outlast_those_of_clients_and_proxies(toy_server: Live) -> None:
    """Else a request may be sent into a connection that is being closed: "server disconnected", now and then."""
    assert toy_server.server.config.timeout_keep_alive > 60


def test_default_host_is_loopback() -> None:
    sock = bind(port=0)
    assert sock.getsockname()[0] == "127.0.0.1"
    sock.close()


def test_metrics_add_up_and_are_not_shared() -> None:
    servers = [start_toy()[0] for _ in range(2)]
    try:
        body = {"model": MODEL, "prompt": "abc", "max_tokens": 4, "ignore_eos": True, "n": 2}
        httpx.post(f"{servers[0].api}/completions", json=body)
        httpx.post(f"{servers[0].api}/completions", json={**body, "n": 0})
        httpx.get(f"{servers[0].url}/nothing")
        first, second = (httpx.get(f"{s.url}/metrics") for s in servers)
        assert first.headers["content-type"].startswith("text/plain; version=0.0.4")
        for line in (
            "dsv4c_prompt_tokens_total 3.0",
            "dsv4c_generation_tokens_total 8.0",
            'dsv4c_sequences_finished_total{reason="length"} 2.0',
            'dsv4c_http_responses_total{path="/v1/completions",status="200"} 1.0',
            'dsv4c_http_responses_total{path="/v1/completions",status="400"} 1.0',
            'dsv4c_http_responses_total{path="other",status="404"} 1.0',
            "dsv4c_time_to_first_token_seconds_count 2.0",
            "dsv4c_time_per_output_token_seconds_count 2.0",
            "dsv4c_request_seconds_count 1.0",
            "dsv4c_requests_running 0.0",
            'dsv4c_kv_pages_used{group="c4"} 0.0',
        ):
            assert line in first.text.splitlines(), line
        assert "dsv4c_prompt_tokens_total 0.0" in second.text
    finally:
        for server in servers:
            server.close()


def test_many_clients_come_and_go(slow: tuple[Live, Paced]) -> None:
    """Half of 40 clients leave after a few bytes; the others get what they would get alone."""
    live, executor = slow
    executor.step_s = 0.0
    short = {"model": MODEL, "prompt": "abc", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    alone = httpx.post(f"{live.api}/completions", json=short).json()["choices"][0]["text"]
    texts: list[str] = []

    def stay() -> None:
        response = httpx.post(f"{live.api}/completions", json=short, timeout=60)
        texts.append(response.json()["choices"][0]["text"])

    threads = [threading.Thread(target=stay) for _ in range(20)]
    for thread in threads:
        thread.start()
        connect(live, {**LONG, "stream": True}).close()
    for thread in threads:
        thread.join()
    assert texts == [alone] * 20
    wait_for(lambda: idle(live))
    live.engine.audit()


def _rest(sock: socket.socket) -> bytes:
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    sock.close()
    return data
