"""Every bad request gets one OpenAI error body with the right status, and disturbs nobody."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from dsv4c.runtime.operations import Operations
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.scheduler import Limits
from tests.runtime.live import EOS, MODEL, Live, Paced, ToyCodec, start, start_toy, wait_for
from tests.runtime.standin import StandIn, make_engine

LIMIT = 100_000
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "hello", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

BAD_COMPLETIONS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": None}, 400, "model"),
    ({"model": 3}, 400, "model"),
    ({"model": "gpt-9"}, 404, "model"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt[0]"),
    ({"prompt": {"text": "a"}}, 400, "prompt"),
    ({"prompt": ["a", 1]}, 400, "prompt"),
    ({"prompt": [61]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [[1], [2, 10**30]]}, 400, "prompt[1]"),
    ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": "a" * 2000}, 400, "prompt"),
    ({"prompt": "a" * 1024, "max_tokens": 1}, 400, "prompt"),
    ({"prompt": ["a"] * 300}, 400, "prompt"),
    ({"prompt": ["a"] * 20, "n": 100}, 400, "prompt"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": -1, "echo": True}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": "3"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 10**40}, 400, "max_tokens"),
    ({"max_tokens": 1020}, 400, "max_tokens"),
    ({"min_tokens": 5}, 400, "min_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": 10**400}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.1}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"top_k": 0.5}, 400, "top_k"),
    ({"min_p": 1.5}, 400, "min_p"),
    ({"presence_penalty": 3}, 400, "presence_penalty"),
    ({"temperature": 1.1e6}, 400, "temperature"),
    ({"temperature": 3.4028235677973366e38}, 400, "temperature"),  # infinite as float32
    ({"frequency_penalty": -3}, 400, "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"repetition_penalty": 5e-324}, 400, "repetition_penalty"),
    ({"repetition_penalty": 1e300}, 400, "repetition_penalty"),
    ({"seed": 1.5}, 400, "seed"),
    ({"seed": 2**70}, 400, "seed"),
    ({"n": 0}, 400, "n"),
    ({"n": 1000}, 400, "n"),
    ({"best_of": 4, "n": 5}, 400, "best_of"),
    ({"best_of": 2, "stream": True}, 400, "best_of"),
    ({"best_of": 2, "max_tokens": 0, "echo": True}, 400, "best_of"),
    ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, 400, "prompt_logprobs"),
    ({"logit_bias": {"03": 1}}, 400, "logit_bias"),
    ({"suffix": "end"}, 400, "suffix"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logprobs": -1}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"61": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"3": 101}}, 400, "logit_bias"),
    ({"logit_bias": {"3": "high"}}, 400, "logit_bias.3"),
    ({"logit_bias": [3]}, 400, "logit_bias"),
    ({"stop": 3}, 400, "stop"),
    ({"stop": ["a", None]}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stop_token_ids": [61]}, 400, "stop_token_ids"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
    ({"stream": True, "max_tokens": 0}, 400, "max_tokens"),
    ({"stream": True, "prompt": "a" * 1024}, 400, "prompt"),
]

BAD_CHATS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": ["hi"]}, 400, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "a" * 2000}]}, 400, "messages"),
    ({"model": "gpt-9"}, 404, "model"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": None, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ({"max_completion_tokens": 3}, 400, "max_tokens"),
    ({"max_tokens": 1020}, 400, "max_tokens"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"logprobs": 1}, 400, "logprobs"),
    ({"reasoning_effort": "enormous"}, 400, "reasoning_effort"),
    ({"reasoning_effort": "none", "thinking": {"type": "enabled"}}, 400, "thinking"),
    ({"thinking": {"type": "maybe"}}, 400, "thinking.type"),
    ({"chat_template_kwargs": {"thinking": "yes"}}, 400, "chat_template_kwargs.thinking"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": "hammer"}, 400, "tools"),
    ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": True}}},
        400,
        "response_format.json_schema.schema",
    ),
]

BAD_BODIES: list[bytes] = [
    b"",
    b"{",
    b"hello",
    b"[1]",
    b'"text"',
    b"null",
    b'{"model": "toy", "prompt": "a", "temperature": NaN}',
    b'{"model": "toy", "prompt": "a", "temperature": -Infinity}',
    b'{"model": "toy", "prompt": "a", "temperature": 1e999}',
    b'{"model": "toy", "prompt": "\\ud800"}',
    b'{"model": "toy", "prompt": "a\\uDFFF"}',
    b'{"model": "toy", "prompt": "\xff\xfe"}',
    b'{"model": "toy", "seed": ' + b"9" * 5000 + b"}",
    b"[" * 90_000,
    b"[" * 50_000 + b"]" * 50_000,
    b'{"model": "toy", "prompt": "a", "metadata": {"a": 1e400}}',
    b'{"model": "toy", "messages": [' + b'{"content": [' * 300 + b"]}" * 300 + b"]}",
    b"\xef\xbb\xbf{}",
    b"\x1f\x8b\x08\x00gzip",
    '{"model": "toy"}'.encode("utf-16"),
    b'{"a":' * 15_000,
    b'{"model": "toy", "prompt": "a", "stop": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    server, _ = start_toy(operations=Operations(max_body_bytes=LIMIT))
    yield server
    server.close()


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url) as client:
        yield client


def refused(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """Checks the error body and returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert message and "Traceback" not in message and not message.endswith(".") and message[0] == message[0].lower()
    assert len(message) < 400
    assert error["param"] == param
    assert status != 404 or error["type"] == "not_found_error"
    return error


@pytest.mark.parametrize(("change", "status", "param"), BAD_COMPLETIONS, ids=lambda v: json.dumps(v)[:50])
def test_bad_completion(http: httpx.Client, change: dict[str, Any], status: int, param: str | None) -> None:
    refused(http.post("/v1/completions", json={**COMPLETION, **change}), status, param)


@pytest.mark.parametrize(("change", "status", "param"), BAD_CHATS, ids=lambda v: json.dumps(v)[:50])
def test_bad_chat(http: httpx.Client, change: dict[str, Any], status: int, param: str | None) -> None:
    refused(http.post("/v1/chat/completions", json={**CHAT, **change}), status, param)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda b: repr(b[:40]))
def test_bad_json(http: httpx.Client, body: bytes, path: str) -> None:
    response = http.post(path, content=body)
    refused(response, 400, response.json()["error"]["param"])


def test_missing_fields_are_named(http: httpx.Client) -> None:
    assert refused(http.post("/v1/completions", json={"prompt": "a"}), 400, "model")["code"] == (
        "missing_required_parameter"
    )
    refused(http.post("/v1/chat/completions", json={"model": MODEL}), 400, "messages")


def test_context_error_says_what_fits(http: httpx.Client) -> None:
    error = refused(http.post("/v1/completions", json={**COMPLETION, "max_tokens": 1020}), 400, "max_tokens")
    assert error["code"] == "context_length_exceeded" and "1019" in error["message"]


def test_body_too_large(http: httpx.Client, live: Live) -> None:
    body = json.dumps({**COMPLETION, "prompt": "a" * LIMIT}).encode()
    refused(http.post("/v1/completions", content=body), 413)
    refused(http.post("/v1/completions", content=iter([body[:1000], body[1000:]])), 413)
    with socket.create_connection(live.address) as raw:  # a liar about its length is answered at once
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n{")
        assert b" 413 " in raw.recv(4096)


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    refused(http.get("/v1/nothing"), 404)
    refused(http.get("/nothing"), 404)
    refused(http.get("/docs"), 404)
    refused(http.get("/v1/models/gpt-9"), 404, "model")
    refused(http.get("/v1/models/../../etc/passwd"), 404)
    response = http.get("/v1/completions")
    assert refused(response, 405)["code"] == "method_not_allowed" and response.headers["allow"] == "POST"


def test_a_running_stream_does_not_notice(live: Live, http: httpx.Client) -> None:
    client = openai.OpenAI(base_url=live.api, api_key="unused", max_retries=0)
    given: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 200, "temperature": 0}
    given["extra_body"] = {"ignore_eos": True}
    alone = client.completions.create(**given).choices[0].text
    text = ""
    for i, chunk in enumerate(client.completions.create(stream=True, **given)):
        text += chunk.choices[0].text
        change, status, _ = BAD_COMPLETIONS[i % len(BAD_COMPLETIONS)]
        if i < 80:
            assert http.post("/v1/completions", json={**COMPLETION, **change}).status_code == status
    assert text == alone
    wait_for(lambda: live.pages_used() == 0)


def test_ignored_fields_are_named_or_refused(http: httpx.Client) -> None:
    odd = {"top_a": 1, "user": "u", "x\r\nset-cookie: a": 1, "é": 2}
    response = http.post("/v1/completions", json={**COMPLETION, **odd})
    assert response.status_code == 200
    assert sorted(response.headers["x-ignored-fields"].split(", ")) == ["?", "?", "top_a"]
    assert "set-cookie" not in response.headers
    assert "x-ignored-fields" not in http.post("/v1/completions", json={**COMPLETION, "user": "u"}).headers
    strict, _ = start_toy(strict=True)
    try:
        refused(httpx.post(f"{strict.api}/completions", json={**COMPLETION, "top_a": 1}), 400, "top_a")
        assert httpx.post(f"{strict.api}/completions", json={**COMPLETION, "user": "u"}).status_code == 200
    finally:
        strict.close()


def test_full_queue_is_503_with_retry_after() -> None:
    live, executor = start_toy(max_requests=1, max_waiting=1)
    try:
        executor.gate.clear()
        with httpx.Client(base_url=live.url) as http:
            refused_batch = http.post("/v1/completions", json={**COMPLETION, "prompt": ["a", "b", "c"]})
            refused(refused_batch, 503)
            assert refused_batch.headers["retry-after"] == "1"
            assert refused_batch.json()["error"]["code"] == "queue_full"
            executor.gate.set()
            # the engine's thread still has to read the cancellations: until then the queue stays full
            wait_for(lambda: http.post("/v1/completions", json=COMPLETION).status_code == 200)
    finally:
        executor.gate.set()
        live.close()


def test_out_of_pages_is_503() -> None:
    sizes = PoolSizes({"window": 8, "c4": 2, "c128": 2, "index": 2}, slots=3, max_context=1024)
    engine, _ = make_engine(sizes, Limits(max_requests=2, max_step_tokens=64), eos=[EOS])
    live = start(engine, ToyCodec())
    try:
        given = {**COMPLETION, "max_tokens": 600}
        for stream in (False, True):
            response = httpx.post(f"{live.api}/completions", json={**given, "stream": stream})
            refused(response, 503, response.json()["error"]["param"])
            assert response.headers["retry-after"] and response.json()["error"]["code"] == "out_of_pages"
        assert httpx.post(f"{live.api}/completions", json=COMPLETION).status_code == 200
    finally:
        live.close()


def test_a_failed_step_is_a_clear_500_and_the_server_goes_on() -> None:
    live, executor = start_toy()
    client = openai.OpenAI(base_url=live.api, api_key="unused", max_retries=0)
    given: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 8}
    given.update(temperature=0, extra_body={"ignore_eos": True})  # random tokens may be halves of a character
    try:
        standin = _standin(executor)
        standin.fail_at = {standin.steps + 2}
        with pytest.raises(openai.InternalServerError, match="kernel exploded"):
            client.completions.create(**given)
        standin.fail_at = {standin.steps + 4}
        texts = []
        with pytest.raises(openai.APIError, match="kernel exploded"):
            for chunk in client.completions.create(stream=True, **given):
                texts.append(chunk.choices[0].text)
        assert 1 <= len(texts) <= 3
        usage = client.completions.create(**given).usage
        assert usage is not None and usage.completion_tokens == 8
        wait_for(lambda: live.pages_used() == 0)
    finally:
        live.close()


def test_a_fault_of_ours_shows_no_trace() -> None:
    live, _ = start_toy()
    try:
        live.codec.encode = None  # a bug
        error = refused(httpx.post(f"{live.api}/completions", json=COMPLETION), 500)
        assert error["message"] == "internal error"
        assert httpx.post(f"{live.api}/completions", json={**COMPLETION, "prompt": [5]}).status_code == 200
    finally:
        live.close()


def _standin(executor: Paced) -> StandIn:
    inner = executor.inner
    assert isinstance(inner, StandIn)
    return inner
