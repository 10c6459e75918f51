"""Fuzzing: bodies from the OpenAPI document (schemathesis), and valid bodies with a few fields gone wrong.

Whatever comes, the answer is 2xx or an error body of 4xx (503 for a full queue), and nothing is left running. More of
both: `pytest tests/conformance/test_fuzz.py --hypothesis-profile=long`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conformance.conftest import start_nano
from tests.conformance.dsml import ANTHROPIC_TOOLS, RESPONSES_TOOLS, TOOLS
from tests.runtime.live import Live, wait_for

schemathesis = pytest.importorskip("schemathesis", reason="it is in the extra `dev`")

RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck))

TURNS: list[Any] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TURNS.append({"role": "user", "content": [{"type": "text", "text": "and?"}]})
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 2, "temperature": 0.5, "stop": ["zz"], "seed": 1, "n": 1},
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 2, "tools": TOOLS, "tool_choice": "auto"},
    "/v1/responses": {"input": TURNS[:1], "max_output_tokens": 2, "tools": RESPONSES_TOOLS, "instructions": "a"},
    "/v1/messages": {"messages": TURNS, "max_tokens": 2, "tools": ANTHROPIC_TOOLS, "system": "a"},
    "/v1/messages/count_tokens": {"messages": TURNS, "tools": ANTHROPIC_TOOLS},
    "/tokenize": {"messages": TURNS, "tools": TOOLS},
    "/detokenize": {"tokens": [5, 6]},
}
KNOBS = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "seed", "n", "best_of", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "max_tokens"),
    *("max_completion_tokens", "logprobs", "top_logprobs", "echo", "prompt_logprobs", "stream", "stream_options"),
    *("messages", "prompt", "input", "system", "tools", "tool_choice", "parallel_tool_calls", "response_format"),
    *("thinking", "reasoning", "reasoning_effort", "chat_template_kwargs", "text", "include", "output_config"),
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "priority", "suffix"),
    *("stop_sequences", "max_output_tokens", "metadata", "tokens", "model", "add_special_tokens", "odd"),
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 5, 61, 2**31, 2**63, -(2**63), 2**64, 10**30]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-300, 5e-324, 1e300, -1.5, 1e9]),
    st.sampled_from(
        ["", "a", "auto", "none", "required", "high", "\x00", "\u2028", "😀", "<think>", "é" * 50, "[a-z]+"]
    ),
    st.text(max_size=8),
)
KEYS = st.sampled_from(
    ["type", "role", "content", "text", "name", "function", "json", "schema", "0", "5", "a", "", "é"]
)
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
PLAUSIBLE = st.sampled_from(
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "whatever", "$ref": "#/nope"}}},
        {"type": "enabled"},
        {"type": "disabled"},
        {"include_usage": True},
        {"json": {"type": "integer"}},
        {"effort": "high"},
        {"type": "function", "function": {"name": "get_weather"}},
        {"type": "function", "name": "get_weather"},
        {"5": 100, "6": -100},
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "tool", "content": "a", "tool_call_id": "b"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}],
        "(((a*)*)*)*",
        'root ::= "a" root',
    ]
)


@pytest.fixture(scope="module")
def live(nano_artifact: Path) -> Iterator[Live]:
    """Nano with a short context, so that a chat ends soon. Its tokens spell every byte, which grammars need."""
    server = start_nano(nano_artifact, max_context=512).live
    yield server
    wait_for(lambda: server.pages_used() == 0)
    server.engine.audit()
    server.close()


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=120) as client:
        yield client


def check(response: httpx.Response, sent: Any) -> None:
    status = response.status_code
    if status == 200:
        assert "Traceback" not in response.text
        return
    assert 400 <= status < 500 or status == 503, (status, response.text, sent)
    body = response.json()
    assert {"message", "type", "param", "code"} == set(body["error"]), body
    assert body["error"]["message"] and "Traceback" not in response.text and len(response.text) < 2000, body


@RELAXED
@given(
    st.sampled_from(sorted(VALID)), st.dictionaries(st.sampled_from(KNOBS), JUNK | PLAUSIBLE, min_size=1, max_size=3)
)
def test_valid_bodies_gone_wrong(http: httpx.Client, path: str, change: dict[str, Any]) -> None:
    body = {"model": "nano", **VALID[path], **change}
    check(http.post(path, content=json.dumps(body).encode()), (path, change))


@RELAXED
@given(st.sampled_from(sorted(VALID)), st.binary(max_size=60), st.integers(0, 200), st.integers(0, 4))
def test_damaged_bytes(http: httpx.Client, path: str, junk: bytes, at: int, cut: int) -> None:
    raw = json.dumps({"model": "nano", **VALID[path]}).encode()
    check(http.post(path, content=raw[:at] + junk + raw[at + cut :]), (path, junk, at, cut))


def operations(live: Live) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


@RELAXED
@given(st.data())
def test_bodies_of_the_openapi_document(live: Live, http: httpx.Client, data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(operations(live)), label="operation")
    case = data.draw(operation.as_strategy(), label="case")
    response = case.call()
    assert response.status_code < 500 or response.status_code == 503, (case.as_curl_command(), response.text)
