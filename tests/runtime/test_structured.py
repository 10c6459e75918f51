"""Structured output over HTTP: what fields ask for is enforced, or refused by name; nano matches its schemas."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from benchmarks.structured import judge, random_schema
from dsv4c.chat.codec import ChatCodec
from dsv4c.runtime.app import create_app
from dsv4c.runtime.grammar import Grammar, Grammars, fill_masks
from tests.runtime.live import Live
from tests.runtime.scripted import ScriptedEngine, small_codec

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "get", "parameters": {**SCHEMA}}}
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get">\n<｜DSML｜parameter name="a" string="false">4'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return small_codec()


def allows(codec: ChatCodec, grammar: Grammar, text: str) -> bool:
    """Whether every token of the text is allowed in its place, and it may end behind them."""
    cursor = grammar.start(codec.eos_token_ids)
    for token in [*codec.encode(text), codec.eos_token_ids[0]]:
        if cursor.over:
            return token == codec.eos_token_ids[0]
        (row,) = fill_masks([cursor], grammar.vocab_size)
        if not np.unpackbits(row.view(np.uint8), bitorder="little")[token]:
            return False
        cursor.accept(token)
    return True


Ask = Callable[..., httpx.Response]


@contextmanager
def serving(codec: ChatCodec, answer: str = "x", **options: Any) -> Iterator[tuple[Ask, ScriptedEngine]]:
    engine = ScriptedEngine(codec, [answer])
    with TestClient(create_app(engine, codec, "m", grammars=Grammars(codec), **options)) as http:

        def ask(path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
            said = {"messages": [{"role": "user", "content": "q"}]} if "chat" in path else {"prompt": "q"}
            return http.post(path, json={"model": "m", **said, **body})

        yield ask, engine


def grammar_asked(codec: ChatCodec, **body: Any) -> Grammar | None:
    with serving(codec) as (ask, engine):
        response = ask(**body)
        assert response.status_code == 200, response.text
        return engine.params[-1].grammar


def accepted(codec: ChatCodec, texts: list[str], **body: Any) -> list[bool]:
    grammar = grammar_asked(codec, **body)
    assert grammar is not None
    return [allows(codec, grammar, text) for text in texts]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("body", "good", "bad"),
    [
        ({"response_format": FORMAT}, '{"a": 4}', '{"b": 4}'),
        ({"response_format": {"type": "json_object"}}, '{"b": [null]}', "[1]"),
        ({"guided_json": SCHEMA}, '{"a": 4}', '{"a": "x"}'),
        ({"guided_json": json.dumps(SCHEMA)}, '{"a": 4}', '{"a": "x"}'),
        ({"guided_json": True}, '"x"', "x"),
        ({"guided_regex": "a/b\n[0-9]"}, "a/b\n7", "a/b7"),
        ({"guided_choice": ['say "x"', "ja/nein"]}, 'say "x"', "ja"),
        ({"guided_grammar": 'root ::= "(" root ")" | "x"'}, "((x))", "((x)"),
        ({"guided_grammar": 'start: "a" start | "b"'}, "aab", "aa"),
        ({"structured_outputs": {"regex": "[ab]{2}"}}, "ab", "abc"),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, '{"a": 4}', '{"a":\n4}'),
        ({"structured_outputs": {"json_object": True}}, "{}", "1"),
        (
            {"structured_outputs": {"json": {"properties": {"a": {}}}, "disable_additional_properties": True}},
            '{"a": 1}',
            '{"b": 1}',
        ),
    ],
)
def test_what_is_asked_for_is_enforced(codec: ChatCodec, path: str, body: dict[str, Any], good: str, bad: str) -> None:
    assert accepted(codec, [good, bad], path=path, **body) == [True, False]


def test_white_space_is_free_but_bounded(codec: ChatCodec) -> None:
    texts = ['{\n  "a": 4\n}', '{"a":4}', '{"a":' + " " * 21 + "4}"]
    assert accepted(codec, texts, response_format=FORMAT) == [True, True, False]


def test_nothing_asked_for_is_nothing_enforced(codec: ChatCodec) -> None:
    loose = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": False}}
    for body in ({}, {"response_format": {"type": "text"}}, {"response_format": loose}, {"tools": [TOOL]}):
        assert grammar_asked(codec, **body) is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"guided_json": {"uniqueItems": True}}, "guided_json"),
        ({"guided_json": False}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "object", "minProperties": 2}}, "guided_json"),
        ({"guided_json": {"multipleOf": 1_000_003}}, "guided_json"),
        ({"guided_json": {"x-guidance": {"lenient": True}, "uniqueItems": True}}, "guided_json"),
        ({"guided_json": {"$ref": "file:///etc/passwd"}}, "guided_json"),
        ({"guided_json": {"$ref": "#"}}, "guided_json"),
        ({"guided_json": {"properties": {f"p{i}": {} for i in range(401)}}}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"] * 2000}, "guided_choice"),
        ({"guided_grammar": "root ::= foo"}, "guided_grammar"),
        ({"guided_grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "guided_grammar"),
        ({"guided_grammar": 'start: %json {"uniqueItems": true}'}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_a_400_that_names_the_field(
    codec: ChatCodec, body: dict[str, Any], param: str
) -> None:
    with serving(codec) as (ask, engine):
        for path in ("/v1/chat/completions", "/v1/completions"):
            response = ask(path, **body)
            assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
        assert not engine.params


def test_a_schema_that_is_only_shown_may_say_anything(codec: ChatCodec) -> None:
    odd = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"uniqueItems": True}, "strict": False}}
    assert grammar_asked(codec, response_format=odd) is None


def test_an_engine_without_masks_refuses(codec: ChatCodec) -> None:
    with TestClient(create_app(ScriptedEngine(codec, ["x"]), codec, "m")) as http:
        body = {"model": "m", "prompt": "q", "guided_regex": "a"}
        error = http.post("/v1/completions", json=body).json()["error"]
        assert (error["param"], error["code"]) == ("guided_regex", "unsupported")


# --- thinking and tools ---------------------------------------------------------------------------------------------


def test_reasoning_is_free_and_what_follows_is_not(codec: ChatCodec) -> None:
    texts = ['so {</think>{"a": 4}', '{"a": 4}', 'so</think>{"b": 4}']
    thinking = {"type": "enabled"}
    assert accepted(codec, texts, response_format=FORMAT, thinking=thinking) == [True, False, False]


def test_a_forced_call_keeps_to_its_schema(codec: ChatCodec) -> None:
    begun = codec.call_start("get")
    assert CALL.startswith(begun)
    rest = CALL.removeprefix(begun)
    choice = {"type": "function", "function": {"name": "get"}}
    for text, wanted in ((rest, True), (rest.replace(">4<", ">x<"), False), ("hello", False)):
        assert accepted(codec, [text], tools=[TOOL], tool_choice=choice) == [wanted], text


def test_a_call_can_be_forced_behind_reasoning(codec: ChatCodec) -> None:
    texts = [f"I call</think>{CALL}", "I do not</think>ok"]
    thinking = {"type": "enabled"}
    assert accepted(codec, texts, tools=[TOOL], tool_choice="required", thinking=thinking) == [True, False]


def test_strict_tools_are_enforced_only_where_they_are_called(codec: ChatCodec) -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    texts = ["hello", CALL, f"I call{CALL}", CALL.replace(">4<", ">x<")]
    assert accepted(codec, texts, tools=[strict]) == [True, True, True, False]


def test_a_format_and_tools_are_either(codec: ChatCodec) -> None:
    texts = ['{"a": 4}', CALL, "hello"]
    assert accepted(codec, texts, tools=[TOOL], response_format=FORMAT) == [True, True, False]


def test_parameters_that_are_no_object_are_refused(codec: ChatCodec) -> None:
    tool = {"type": "function", "function": {"name": "get", "parameters": {"type": "array"}}}
    with serving(codec) as (ask, _):
        response = ask(tools=[tool], tool_choice="required")
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools[0].function.parameters"


# --- nano -----------------------------------------------------------------------------------------------------------


def complete(live: Live, **body: Any) -> dict[str, Any]:
    given = {"model": live.model, "prompt": "The package provides", "max_tokens": 1500, **body}
    response = httpx.post(f"{live.api}/completions", json=given, timeout=600)
    assert response.status_code == 200, response.text
    choices: dict[str, Any] = response.json()
    return choices


def test_random_schemas_are_matched_by_nano(nano_server: Live) -> None:
    """A few; benchmarks/structured.py takes 500."""
    rng = random.Random(7)
    for number in range(12):
        schema = random_schema(rng)
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        (choice,) = complete(nano_server, response_format=wanted, seed=number)["choices"]
        assert choice["finish_reason"] == "stop" and not judge(schema, choice["text"]), (schema, choice)


@pytest.mark.parametrize("grammar", ['root ::= "a" root', 'start: "a"~1000000'])
def test_a_grammar_that_grows_too_complex_is_the_request_s_fault(nano_server: Live, grammar: str) -> None:
    given = {"model": nano_server.model, "prompt": "a", "guided_grammar": grammar}
    response = httpx.post(f"{nano_server.api}/completions", json=given, timeout=600)
    assert response.status_code == 400 and response.json()["error"]["param"] == "guided_grammar"
    assert response.json()["error"]["code"] == "invalid_grammar" and "Too many items" in response.text
    streamed = httpx.post(f"{nano_server.api}/completions", json={**given, "stream": True}, timeout=600)
    assert "invalid_grammar" in streamed.text and "engine_error" not in streamed.text


@pytest.mark.parametrize(("path", "field", "part"), [
    ("responses", "text.format", {"input": "a", "max_output_tokens": 20}),
    ("messages", "output_config.format", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 20}),
])  # fmt: skip
def test_such_a_fault_names_the_field_of_its_own_api(
    nano_server: Live, path: str, field: str, part: dict[str, Any]
) -> None:
    objects = [{"type": "object", "properties": {f"{a}{i}": {} for i in range(265)}} for a in "ab"]
    wanted = {"type": "json_schema", "name": "n", "schema": {"anyOf": objects}}
    outer, inner = field.split(".")
    given = {"model": nano_server.model, **part, outer: {inner: wanted}}
    for stream in (False, True):
        response = httpx.post(f"{nano_server.api}/{path}", json={**given, "stream": stream}, timeout=600)
        assert "too complex" in response.text and f"`{field}" in response.text, response.text[-500:]
        assert "response_format" not in response.text


def test_everything_at_once(nano_server: Live) -> None:
    """Several choices, a stop string, log-probabilities, penalties and a bias, streamed or not: the same answers."""
    options = {
        "n": 3, "seed": 5, "stop": ["b1"], "logprobs": 2, "presence_penalty": 0.5, "repetition_penalty": 1.2,
        "logit_bias": {"20": 2.0}, "guided_regex": "([ab][0-9]){3,30}z", "ignore_eos": True, "min_tokens": 4,
    }  # fmt: skip
    for choice in complete(nano_server, **options)["choices"]:
        text = choice["text"]
        assert choice["finish_reason"] == "stop" and "b1" not in text
        assert re.fullmatch("([ab][0-9]){3,30}z", text) or re.fullmatch("([ab][0-9])*b?", text), text
        assert "".join(choice["logprobs"]["tokens"]) == text
