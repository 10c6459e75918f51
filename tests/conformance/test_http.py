"""The wire itself, with curl and httpx: bytes of streams, headers, models, tokens, strict mode, error bodies."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conformance.conftest import Host, start_nano

Q: list[Any] = [{"role": "user", "content": "what is a socket?"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 20},
    "/v1/chat/completions": {"messages": Q, "max_tokens": 20},
    "/v1/responses": {"input": "a", "max_output_tokens": 20},
    "/v1/messages": {"messages": Q, "max_tokens": 20},
}
TOKENS: dict[str, dict[str, Any]] = {
    "/v1/messages/count_tokens": {"messages": Q},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}


def curl(*arguments: str) -> str:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    return subprocess.run([program, "-sS", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", sorted(BODIES))
def test_curl(host: Host, path: str) -> None:
    host.will_say("one two")
    body = json.dumps({"model": host.model, **BODIES[path]})
    said = curl(host.url + path, "-H", "Content-Type: application/json", "-d", body)
    assert "one two" in json.dumps(json.loads(said))


@pytest.mark.parametrize("path", sorted(BODIES))
def test_curl_streams(host: Host, path: str) -> None:
    """Server-sent events, line by line; those of the newer APIs are named, OpenAI's older ones end with [DONE]."""
    host.will_say("one two")
    body = json.dumps({"model": host.model, "stream": True, **BODIES[path]})
    said = curl("-i", "-N", host.url + path, "-d", body)
    head, _, text = said.replace("\r\n", "\n").partition("\n\n")
    headers = dict(line.lower().split(": ", 1) for line in head.split("\n")[1:])
    assert headers["content-type"].startswith("text/event-stream") and headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no" and "content-length" not in headers
    blocks = text.rstrip("\n").split("\n\n")
    named = path in ("/v1/responses", "/v1/messages")
    if not named:
        assert blocks.pop() == "data: [DONE]"
    for block in blocks:
        lines = block.split("\n")
        data = json.loads(lines[-1].removeprefix("data: "))
        assert len(lines) == 1 + named and (not named or lines[0] == f"event: {data['type']}")


@pytest.mark.parametrize("path", sorted(BODIES))
def test_request_ids(host: Host, path: str) -> None:
    ids = set()
    for _ in range(2):
        host.will_say("a")
        response = host.post(path, BODIES[path])
        ids.add(response.headers["x-request-id"])
        assert response.json()["id"] == response.headers["x-request-id"]
    assert len(ids) == 2
    host.will_say("a")
    assert host.post(path, BODIES[path], headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_models(host: Host) -> None:
    listed = httpx.get(f"{host.url}/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == [host.model]
    assert listed["data"][0]["max_model_len"] == 4096
    assert httpx.get(f"{host.url}/v1/models/{host.model}").json() == listed["data"][0]
    assert httpx.get(f"{host.url}/v1/models/gpt-9").json()["error"]["code"] == "model_not_found"


def test_tokens(host: Host) -> None:
    ids = host.post("/tokenize", {"prompt": "one two"}).json()["tokens"]
    assert host.post("/detokenize", {"tokens": ids}).json() == {"prompt": "one two"}
    counts = [
        host.post("/tokenize", {"messages": Q}).json()["count"],
        host.post("/v1/messages/count_tokens", {"messages": Q}).json()["input_tokens"],
    ]
    host.will_say("a")
    counts.append(host.post("/v1/chat/completions", BODIES["/v1/chat/completions"]).json()["usage"]["prompt_tokens"])
    assert len(set(counts)) == 1


def test_the_openapi_document(host: Host) -> None:
    document = httpx.get(f"{host.url}/openapi.json").json()
    for path in (*BODIES, *TOKENS):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"]["model"] == {"enum": [host.model]}


BAD_BODIES: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b'{"model": "nano", "a": NaN}',
    b'{"model": "nano", "a": 1e999}',
    b'{"model": "nano", "a": "\\ud800"}',
    b'{"model": "nano", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b'{"model": "nano", "a": ' + b"9" * 100_000 + b"}",
]


@pytest.mark.parametrize("path", sorted(BODIES | TOKENS))
def test_bad_json(host: Host, path: str) -> None:
    for body in BAD_BODIES:
        response = httpx.post(host.url + path, content=body)
        assert response.status_code == 400 and response.headers["content-type"] == "application/json", body[:40]
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 300
        assert error["type"] == "invalid_request_error" and error["code"] == "invalid_json"


@pytest.mark.parametrize("path", sorted(BODIES | TOKENS))
def test_wrong_methods_and_models(host: Host, path: str) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        response = httpx.request(method, host.url + path)
        assert response.status_code == 405 and response.headers["allow"] == "POST"
        assert response.json()["error"]["code"] == "method_not_allowed"
    response = host.post(path, {**(BODIES | TOKENS)[path], "model": "gpt-9"})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", sorted(BODIES))
def test_null_is_the_default(host: Host, path: str) -> None:
    names = ("temperature", "top_p", "stream", "tools", "tool_choice", "metadata", "seed", "odd_field")
    host.will_say("one")
    response = host.post(path, {**BODIES[path], **dict.fromkeys(names)})
    assert response.status_code == 200 and "x-ignored-fields" not in response.headers


@pytest.fixture(scope="module")
def strict(nano_artifact: Path) -> Iterator[Host]:
    host = start_nano(nano_artifact, strict=True)
    yield host
    host.live.close()


@pytest.mark.parametrize("path", sorted(BODIES | TOKENS))
def test_fields_without_effect(host: Host, strict: Host, path: str) -> None:
    body = (BODIES | TOKENS)[path]
    if path in BODIES:
        host.will_say("a")
        strict.will_say("a")
    assert host.post(path, {**body, "odd": 1, "user": "u"}).headers["x-ignored-fields"] == "odd"
    refused = strict.post(path, {**body, "odd": 1})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "unknown_parameter"
    assert refused.json()["error"]["param"] == "odd"
    assert strict.post(path, {**body, "user": "u"}).status_code == 200


NESTED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"messages": [{**Q[0], "odd": 1}]}, "messages[0].odd"),
    ("/v1/chat/completions", {"thinking": {"type": "disabled", "odd": 1}}, "thinking.odd"),
    ("/v1/chat/completions", {"stream": True, "stream_options": {"odd": 1}}, "stream_options.odd"),
    ("/v1/chat/completions", {"verbosity": "low"}, "verbosity"),
    ("/v1/completions", {"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ("/v1/completions", {"use_beam_search": True}, "use_beam_search"),
    ("/v1/responses", {"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ("/v1/messages", {"thinking": {"type": "disabled", "odd": 1}}, "thinking.odd"),
]


@pytest.mark.parametrize(("path", "change", "name"), NESTED, ids=[name for _, _, name in NESTED])
def test_fields_without_effect_inside_of_others(
    host: Host, strict: Host, path: str, change: dict[str, Any], name: str
) -> None:
    host.will_say("a")
    assert host.post(path, {**BODIES[path], **change}).headers["x-ignored-fields"] == name
    refused = strict.post(path, {**BODIES[path], **change})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == name


def test_a_field_that_asks_for_what_is_done_anyway_is_none_without_effect(strict: Host) -> None:
    strict.will_say("a")
    same = {"skip_special_tokens": True, "include_stop_str_in_output": False, "add_special_tokens": False}
    assert strict.post("/v1/completions", {**BODIES["/v1/completions"], **same}).status_code == 200
