"""Fuzzing: bodies from the OpenAPI document (schemathesis), and valid bodies gone wrong in a few places, or as bytes.

Whatever comes, the answer is 2xx or an error body of 4xx, and nothing is left running. 5,000 requests of each kind, the
same every time, with a count of what was answered where at the end:

    pytest tests/conformance/test_fuzz.py --hypothesis-profile=long --hypothesis-seed=0
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conformance.conftest import FUZZED, start_nano
from tests.conformance.dsml import ANTHROPIC_TOOLS, RESPONSES_TOOLS, SCHEMA, TOOLS
from tests.runtime.live import Live, wait_for

schemathesis = pytest.importorskip("schemathesis", reason="it is in the extra `dev`")

LONG = settings().max_examples >= 1000
# A short run asks the same every time; a long one goes by its seed.
RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=not LONG)

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

ANSWER: Any = {"role": "assistant", "reasoning_content": "a", "content": None}
ANSWER["tool_calls"] = [
    {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "days": [1]}'}}
]
SAMPLED: dict[str, Any] = {"logit_bias": {"5": 1.0}, "stop_token_ids": [7], "temperature": 0.5, "seed": 1}
STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
NAMED: Any = {"type": "function", "function": {"name": "get_time"}}
ALLOWED: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}
CALL: Any = {"type": "function_call", "call_id": "1", "name": "get_time", "arguments": "{}"}
USED: Any = {"type": "tool_use", "id": "1", "name": "get_time", "input": {"city": "Oslo"}}
DEEP: list[tuple[str, dict[str, Any]]] = [  # valid bodies that go deep
    ("/v1/completions", {**VALID["/v1/completions"], **SAMPLED, **STREAMED, "prompt": [[5, 6], [7]], "n": 2}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "response_format": FORM}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2, "structured_outputs": {"choice": ["a", "b"]}, "logprobs": 1}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "a"},
                TURNS[0],
                ANSWER,
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "a"}]},
            ],
            **{"tools": TOOLS[:1], "max_tokens": 2, "tool_choice": "auto", **SAMPLED, **STREAMED},
        },
    ),
    ("/v1/chat/completions", {"messages": TURNS[:1], "tools": TOOLS, "tool_choice": NAMED, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": TURNS[:1], "tools": TOOLS, "tool_choice": ALLOWED, "max_tokens": 2}),
    (
        "/v1/chat/completions",
        {
            **{"messages": TURNS[:1], "response_format": FORM, "thinking": {"type": "enabled"}, "max_tokens": 2},
            "chat_template_kwargs": {"thinking": True, "reasoning_effort": "high", "drop_thinking": False},
        },
    ),
    (
        "/v1/responses",
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "a"}], "summary": []},
                CALL,
                {"type": "function_call_output", "call_id": "1", "output": "noon"},
            ],
            **{"tools": RESPONSES_TOOLS[:1], "tool_choice": "auto", "reasoning": {"effort": "high"}},
            **{"max_output_tokens": 2, "include": ["message.output_text.logprobs"], "metadata": {"a": "b"}},
        },
    ),
    (
        "/v1/responses",
        {
            "input": "a",
            "max_output_tokens": 2,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
        },
    ),
    (
        "/v1/responses",
        {
            **{"input": "a", "max_output_tokens": 2, "tools": RESPONSES_TOOLS, "stream": True},
            "tool_choice": {
                **{"type": "allowed_tools", "mode": "auto"},
                "tools": [{"type": "function", "name": "get_time"}],
            },
        },
    ),
    (
        "/v1/messages",
        {
            "messages": [
                TURNS[0],
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "a", "signature": ""}, USED]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "noon"}]},
            ],
            **{"system": [{"type": "text", "text": "a"}], "tools": ANTHROPIC_TOOLS[:1], "max_tokens": 2},
            **{"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "stop_sequences": ["a"]},
            **{"thinking": {"type": "enabled", "budget_tokens": 1024}, "stream": True},
        },
    ),
    (
        "/v1/messages",
        {
            **{"messages": TURNS[:1], "max_tokens": 2, "tools": ANTHROPIC_TOOLS},
            "tool_choice": {"type": "tool", "name": "get_time"},
        },
    ),
    (
        "/v1/messages",
        {
            **{"messages": TURNS[:1], "max_tokens": 2},
            "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
        },
    ),
    ("/v1/messages/count_tokens", {**VALID["/v1/messages/count_tokens"], "thinking": {"type": "adaptive"}}),
    ("/tokenize", {"messages": [*TURNS[:1], ANSWER, TURNS[0]], "tools": TOOLS[:1], "reasoning_effort": "high"}),
]
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


@pytest.fixture(scope="module")
def answered(request: pytest.FixtureRequest) -> Iterator[Counter[tuple[str, str, int]]]:
    """How many answers there were of each kind of request, endpoint and status; told when all were asked for."""
    counts: Counter[tuple[str, str, int]] = Counter()
    yield counts
    request.config.stash[FUZZED] = counts


def check(status: int, text: str, sent: Any) -> None:
    assert "Traceback" not in text
    if status == 200:
        assert '"engine_error"' not in text and '"internal_error"' not in text, (text[-500:], sent)  # in a stream
        return
    assert 400 <= status < 500, (status, text, sent)
    body = json.loads(text)
    assert {"message", "type", "param", "code"} == set(body["error"]), body
    assert body["error"]["message"] and len(text) < 2000, body


@RELAXED
@given(
    st.sampled_from(sorted(VALID)), st.dictionaries(st.sampled_from(KNOBS), JUNK | PLAUSIBLE, min_size=1, max_size=3)
)
def test_valid_bodies_gone_wrong(
    http: httpx.Client, answered: Counter[tuple[str, str, int]], path: str, change: dict[str, Any]
) -> None:
    body = {"model": "nano", **VALID[path], **change}
    response = http.post(path, content=json.dumps(body).encode())
    answered["fields gone wrong", f"POST {path}", response.status_code] += 1
    check(response.status_code, response.text, (path, change))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside of this one."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*at, key)
        yield from places(inner, (*at, key))


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A deep body with one to three values replaced, left out or put in."""
    path, body = copy.deepcopy(draw(st.sampled_from(DEEP)))
    for _ in range(draw(st.integers(1, 3))):
        *way, key = draw(st.sampled_from(list(places(body))))
        holder: Any = body
        for step in way:
            holder = holder[step]
        what = draw(st.sampled_from(["replace", "replace", "leave out", "put in"]))
        if what == "leave out" and len(body) > 1:
            del holder[key]
        elif what == "put in" and isinstance(holder, dict):
            holder[draw(KEYS)] = copy.deepcopy(draw(JUNK | PLAUSIBLE))
        else:
            holder[key] = copy.deepcopy(draw(JUNK | PLAUSIBLE))
    return path, body


@pytest.mark.parametrize(("path", "body"), [*VALID.items(), *DEEP])
def test_the_bodies_are_valid(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = http.post(path, json={"model": "nano", **body})
    assert response.status_code == 200, response.text


@RELAXED
@given(damaged())
def test_deep_bodies_gone_wrong(
    http: httpx.Client, answered: Counter[tuple[str, str, int]], sent: tuple[str, dict[str, Any]]
) -> None:
    path, body = sent
    response = http.post(path, content=json.dumps({"model": "nano", **body}).encode())
    answered["places gone wrong", f"POST {path}", response.status_code] += 1
    check(response.status_code, response.text, sent)


@RELAXED
@given(st.sampled_from(sorted(VALID)), st.binary(max_size=60), st.integers(0, 200), st.integers(0, 4))
def test_damaged_bytes(
    http: httpx.Client, answered: Counter[tuple[str, str, int]], path: str, junk: bytes, at: int, cut: int
) -> None:
    raw = json.dumps({"model": "nano", **VALID[path]}).encode()
    response = http.post(path, content=raw[:at] + junk + raw[at + cut :])
    answered["damaged bytes", f"POST {path}", response.status_code] += 1
    check(response.status_code, response.text, (path, junk, at, cut))


@pytest.fixture(scope="module")
def cases(live: Live) -> st.SearchStrategy[Any]:
    """Requests as the OpenAPI document has them, and some that it excludes; those with a body more often."""
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    plain = [operation.as_strategy() for operation in operations]
    full = [operation for operation in operations if operation.body]
    wrong = [operation.as_strategy(schemathesis.GenerationMode.NEGATIVE) for operation in full]
    right = [operation.as_strategy() for operation in full]
    return st.one_of(st.one_of(plain), st.one_of(right), st.one_of(right), st.one_of(wrong))


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as kept:
        yield kept


@RELAXED
@given(data=st.data())
def test_requests_of_the_openapi_document(
    cases: st.SearchStrategy[Any],
    session: requests.Session,
    answered: Counter[tuple[str, str, int]],
    data: st.DataObject,
) -> None:
    case = data.draw(cases, label="case")
    response = case.call(session=session)
    answered["schemathesis", case.operation.label, response.status_code] += 1
    check(response.status_code, response.text, case.as_curl_command())


def test_all_was_asked_for(live: Live, answered: Counter[tuple[str, str, int]]) -> None:
    """The last of this file: as many requests as were asked for; in long runs, over every endpoint of the document."""
    if not answered:
        pytest.skip("nothing was asked: run the whole file")
    asked = Counter[str]()
    for (kind, _, _), count in answered.items():
        asked[kind] += count
    assert len(asked) == 4 and min(asked.values()) >= settings().max_examples, asked
    if not LONG:
        return
    document = httpx.get(f"{live.url}/openapi.json").json()
    known = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert {endpoint for kind, endpoint, _ in answered if kind == "schemathesis"} == known
