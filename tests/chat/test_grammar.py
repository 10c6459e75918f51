"""Grammars of answers: what the encoder renders is allowed, to the last token; what breaks a schema is not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.chat.dsml import ToolCall, render_calls
from dsv4c.errors import RequestError
from dsv4c.runtime.grammar import Grammar, Grammars, GrammarSource, fill_masks
from tests.runtime.scripted import small_codec

CODEC = small_codec()
GRAMMARS = Grammars(CODEC)
POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}
TOOLS: list[dict[str, Any]] = [
    {"name": "free"},
    {"name": "none", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    {
        "name": "all",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "short": {"type": "string", "maxLength": 3},
                "word": {"enum": ["one", "two</", 3]},
                "count": {"type": "integer", "minimum": 0},
                "maybe": {"type": ["string", "null"]},
                "points": {"type": "array", "items": {"$ref": "#/$defs/point"}},
            },
            "required": ["text", "count"],
            "$defs": {"point": POINT},
        },
    },
    {"name": "first", "parameters": {"properties": {"a": {"type": "boolean"}, "b": {"const": "x"}}, "required": ["b"]}},
]
TEXT = st.text(st.characters(codec="utf-8"), max_size=12).filter(
    lambda text: CODEC.added_token_ids.isdisjoint(CODEC.encode(text))  # the name of an added token is no text
)
ARGUMENTS = {
    "free": st.dictionaries(st.from_regex(r"[a-z_é]{1,6}", fullmatch=True), st.none() | TEXT | st.integers(-99, 99)),
    "none": st.just({}),
    "all": st.fixed_dictionaries(
        {"text": TEXT, "count": st.integers(0, 10**6)},
        optional={
            "short": TEXT.filter(lambda t: len(t) < 4),
            "word": st.sampled_from(["one", "two</", 3]),
            "maybe": st.none() | TEXT,
            "points": st.lists(st.fixed_dictionaries({"x": st.integers(-9, 9)}), max_size=2),
        },
    ).map(lambda d: {key: d[key] for key in TOOLS[2]["parameters"]["properties"] if key in d}),
    "first": st.fixed_dictionaries({"b": st.just("x")}, optional={"a": st.booleans()}).map(
        lambda d: {key: d[key] for key in ("a", "b") if key in d}
    ),
}
CALLS = st.lists(st.sampled_from(sorted(ARGUMENTS)).flatmap(lambda n: st.tuples(st.just(n), ARGUMENTS[n])), min_size=1)


def grammar(**options: Any) -> Grammar:
    return GRAMMARS.build(GrammarSource(CODEC.answer_grammar(None, **options), "tools"))


def refused_at(grammar: Grammar, text: str) -> str | None:
    """The text up to the token that is not allowed; None if it is all allowed, and may end there."""
    cursor, done = grammar.start(CODEC.eos_token_ids), b""
    for token in [*CODEC.encode(text), CODEC.eos_token_ids[0]]:
        if cursor.over and token == CODEC.eos_token_ids[0]:
            return None
        (row,) = fill_masks([cursor], grammar.vocab_size)
        if not np.unpackbits(row.view(np.uint8), bitorder="little")[token]:
            return done.decode(errors="replace")
        cursor.accept(token)
        assert cursor.fault is None
        done += CODEC.token_bytes(token)
    return None


FORCED = grammar(tools=TOOLS, forced=True, thinking=False)
EITHER = grammar(tools=TOOLS, forced=False, thinking=True)


def rendered(calls: list[tuple[str, dict[str, Any]]]) -> str:
    return "\n\n" + render_calls([ToolCall(name, json.dumps(arguments)) for name, arguments in calls])


@settings(max_examples=150, deadline=None)
@given(CALLS, TEXT)
def test_what_the_encoder_renders_is_allowed(calls: list[tuple[str, dict[str, Any]]], before: str) -> None:
    block = rendered(calls)
    assert refused_at(FORCED, block) is None
    assert refused_at(EITHER, f"{before}</think>{before}{block}") is None
    assert refused_at(EITHER, f"{before}</think>{before}") is None


@pytest.mark.parametrize(
    "call",
    [
        ("nobody", {}),
        ("none", {"a": 1}),
        ("all", {"text": "x"}),
        ("all", {"text": "x", "count": -1}),
        ("all", {"text": "x", "short": "long", "count": 1}),
        ("all", {"text": "x", "word": "three", "count": 1}),
        ("all", {"text": "x", "count": 1, "points": [{"y": 1}]}),
        ("first", {"b": "y"}),
        ("first", {"b": "x", "a": True}),
    ],
)
def test_what_breaks_the_schema_is_not(call: tuple[str, dict[str, Any]]) -> None:
    assert refused_at(FORCED, rendered([call])) is not None


def test_one_call_where_calls_are_not_parallel() -> None:
    single = grammar(tools=TOOLS, forced=True, thinking=False, parallel=False)
    assert refused_at(single, rendered([("free", {})])) is None
    assert refused_at(single, rendered([("free", {}), ("free", {})])) is not None


def test_neither_reasoning_nor_values_hold_markup() -> None:
    inside = rendered([("free", {"a": "x"})]).replace(">x<", ">x<｜DSML｜y<")
    assert refused_at(FORCED, inside) is not None
    assert refused_at(EITHER, "so <｜DSML｜ think</think>ok") is not None
    assert refused_at(EITHER, "so <think> think</think>ok") is not None


@pytest.mark.parametrize("parameters", [{"type": "array"}, {"properties": []}, {"required": "a"}])
def test_parameters_that_are_no_object_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        CODEC.answer_grammar(None, tools=[{"name": "f", "parameters": parameters}], thinking=False, forced=True)
    assert caught.value.param == "tools[0].function.parameters"
