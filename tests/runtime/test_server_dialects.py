"""The newer APIs when things go wrong: late faults in streams, full queues, keys, clients that leave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest

from dsv4c.runtime.operations import Operations
from tests.runtime.live import MODEL, Live, Paced, start_toy, wait_for

TURNS: list[Any] = [{"role": "user", "content": "hi"}]
EXTRA = {"temperature": 0, "ignore_eos": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"model": MODEL, "input": "hi", "max_output_tokens": 400, **EXTRA},
    "/v1/messages": {"model": MODEL, "messages": TURNS, "max_tokens": 400, **EXTRA},
}

LONE: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 2}


@pytest.fixture(scope="module")
def toy() -> Iterator[tuple[Live, Paced]]:
    live, executor = start_toy()
    yield live, executor
    live.close()


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("path", sorted(BODIES))
@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step(toy: tuple[Live, Paced], path: str, stream: bool) -> None:
    live, executor = toy
    standin: Any = executor.inner
    standin.fail_at = {standin.steps + 3}
    response = httpx.post(live.url + path, json={**BODIES[path], "stream": stream})
    if not stream:
        assert response.status_code == 500 and "exploded" in response.json()["error"]["message"]
        return
    said = events(response.text)
    assert response.status_code == 200
    if path == "/v1/messages":
        assert said[-1]["type"] == "error" and said[-1]["error"]["type"] == "api_error"
        return
    assert [event["type"] for event in said[-2:]] == ["error", "response.failed"]
    assert said[-1]["response"]["status"] == "failed" and "exploded" in said[-1]["response"]["error"]["message"]
    assert [event["sequence_number"] for event in said] == list(range(len(said)))


def test_clients_raise_what_a_stream_fails_with(toy: tuple[Live, Paced]) -> None:
    live, executor = toy
    standin: Any = executor.inner
    claude = anthropic.Anthropic(base_url=live.url, api_key="unused", max_retries=0)
    standin.fail_at = {standin.steps + 3}
    with pytest.raises(anthropic.APIStatusError, match="exploded"):
        for _ in claude.messages.create(model=MODEL, messages=TURNS, max_tokens=9, extra_body=EXTRA, stream=True):
            pass
    client = openai.OpenAI(base_url=live.api, api_key="unused", max_retries=0)
    standin.fail_at = {standin.steps + 3}
    last = list(client.responses.create(model=MODEL, input="hi", extra_body={"ignore_eos": True}, stream=True))[-1]
    assert last.type == "response.failed" and last.response.error is not None


@pytest.mark.parametrize("path", sorted(BODIES))
def test_a_client_that_leaves_frees_its_pages(toy: tuple[Live, Paced], path: str) -> None:
    live, _ = toy
    with httpx.stream("POST", live.url + path, json={**BODIES[path], "stream": True}) as response:
        next(response.iter_raw())
    wait_for(lambda: live.pages_used() == 0)
    live.engine.audit()


def test_refusals_have_the_clients_own_shape() -> None:
    live, executor = start_toy(max_requests=1, max_waiting=1, operations=Operations(api_keys=("secret",)))
    try:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            anthropic.Anthropic(base_url=live.url, api_key="wrong", max_retries=0).messages.create(
                model=MODEL, messages=TURNS, max_tokens=2
            )
        assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index, call-overload]
        claude = anthropic.Anthropic(base_url=live.url, api_key="secret", max_retries=0)
        claude.messages.create(model=MODEL, messages=TURNS, max_tokens=2)
        client = openai.OpenAI(base_url=live.api, api_key="secret", max_retries=0)
        client.responses.create(model=MODEL, input="hi", max_output_tokens=2)
        live.server._app_server.drain()
        response = httpx.post(f"{live.api}/messages", json=BODIES["/v1/messages"], headers={"x-api-key": "secret"})
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["type"] == "error" and response.json()["error"]["type"] == "overloaded_error"
    finally:
        executor.gate.set()
        live.close()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/chat/completions"])
def test_the_gate_speaks_as_the_endpoint_does(path: str) -> None:
    """401 and 503 before anything of the request is read: Anthropic's body around OpenAI's fields, or OpenAI's."""
    live, executor = start_toy(operations=Operations(api_keys=("a secret key",), max_inflight=1))
    said = {"model": MODEL, "messages": TURNS, "input": "hi", "max_tokens": 4}
    key = {"authorization": "Bearer a secret key"}
    try:
        locked = httpx.post(live.url + path, json=said)
        executor.gate.clear()
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(httpx.post, f"{live.api}/completions", json=LONE, headers=key, timeout=60)
            wait_for(lambda: live.engine.stats().running > 0)
            full = httpx.post(live.url + path, json=said, headers=key)
            executor.gate.set()
            assert first.result().status_code == 200
    finally:
        executor.gate.set()
        live.close()
    anthropics = "messages" in path
    kinds = ("authentication_error", "overloaded_error")
    if not anthropics:
        kinds = ("invalid_request_error", "service_unavailable_error")
    codes = ("invalid_api_key", "overloaded")
    assert (locked.status_code, locked.headers["www-authenticate"]) == (401, "Bearer")
    assert (full.status_code, full.headers["retry-after"]) == (503, "1")
    for response, kind, code in zip((locked, full), kinds, codes, strict=True):
        body = response.json()
        assert body.get("type") == ("error" if anthropics else None) and response.headers["x-request-id"]
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert (body["error"]["type"], body["error"]["code"]) == (kind, code)
