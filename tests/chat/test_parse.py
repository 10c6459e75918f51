"""The splitter and the completion parser: any cut gives the same, malformed text survives, rendering round-trips."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4c.chat.dsml import ToolCall, parse_calls
from dsv4c.chat.encoding import encode_messages
from dsv4c.chat.parse import ParsedCompletion, ReasoningSplitter, parse_completion

PIECES = st.sampled_from(
    [
        "</think>", "</thi", "<", "nk>", "a", "\n\n", "\n", " ", "<think>", "é", '">', "{}", "3",
        "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", '<｜DSML｜invoke name="', 'f">', "</｜DSML｜invoke>",
        '<｜DSML｜parameter name="', 'k" string="true">', 'k" string="false">', "</｜DSML｜parameter>",
        "<｜DSML｜", "<｜end▁of▁sentence｜>",
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=20).map("".join)


def split(pieces: list[str], thinking: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(thinking)
    parts = [splitter.push(piece) for piece in pieces] + [splitter.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@settings(deadline=None, max_examples=500)
@given(pieces=st.lists(st.one_of(PIECES, st.text(max_size=4))), thinking=st.booleans())
def test_any_cut_gives_the_same_split(pieces: list[str], thinking: bool) -> None:
    text = "".join(pieces)
    before, _, after = text.partition("</think>") if thinking else ("", "", text)
    assert split(pieces, thinking) == split(list(text), thinking) == (before, after)


def test_the_shortest_text_is_held_back() -> None:
    splitter = ReasoningSplitter(True)
    assert splitter.push("why <") == ("why ", "")
    assert splitter.push("/thi") == ("", "")
    assert splitter.push("s </thin") == ("</this ", "")
    assert splitter.push("k>so") == ("", "so")
    assert splitter.push("</think>") == ("", "</think>")
    assert splitter.flush() == ("", "")


def test_chat_mode_has_content_only() -> None:
    assert split(["a</thi", "nk>b"], thinking=False) == ("", "a</think>b")


def test_reasoning_that_never_ends_stays_reasoning() -> None:
    assert split(["why </th"], thinking=True) == ("why </th", "")
    assert parse_completion("why", thinking=True) == ParsedCompletion("", "why")


CALL = (
    '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="k" string="false">[1,  2]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>"
)


def block(inside: str) -> str:
    return f"<｜DSML｜tool_calls>\n{inside}\n</｜DSML｜tool_calls>"


def test_whole_completion() -> None:
    got = parse_completion(f"why</think>I look.\n\n{block(CALL)}<｜end▁of▁sentence｜>", thinking=True)
    assert got == ParsedCompletion("I look.", "why", (ToolCall("f", '{"k": [1,  2]}'),))


def test_calls_in_the_reasoning_are_no_calls() -> None:
    got = parse_completion(f"I could {block(CALL)}</think>done", thinking=True)
    assert got == ParsedCompletion("done", f"I could {block(CALL)}")


def test_a_value_that_is_no_json_becomes_a_string() -> None:
    inside = CALL.replace("[1,  2]", "Infinity")
    assert parse_calls(inside) == ((ToolCall("f", '{"k": "Infinity"}'),), "")
    deep = CALL.replace("[1,  2]", "[" * 100_000)
    assert json.loads(parse_calls(deep)[0][0].arguments) == {"k": "[" * 100_000}


def test_a_block_cut_off_keeps_its_whole_calls() -> None:
    got = parse_completion(f'\n\n<｜DSML｜tool_calls>\n{CALL}\n<｜DSML｜invoke name="g', thinking=False)
    assert got.tool_calls == (ToolCall("f", '{"k": [1,  2]}'),)
    assert got.leftover == '\n<｜DSML｜invoke name="g'


@pytest.mark.parametrize("inside", ["", "nothing", '<｜DSML｜invoke name="f'])
def test_a_block_without_a_call_is_content(inside: str) -> None:
    assert parse_completion(f"a\n\n{block(inside)}", thinking=False).content == f"a\n\n{block(inside)}"


def test_text_after_the_block_is_left_over() -> None:
    assert parse_completion(f"{block(CALL)} bye", thinking=False).leftover == " bye"


@settings(deadline=None, max_examples=1000)
@given(text=TEXTS, thinking=st.booleans())
@example(text=f"{block(CALL)}{block(CALL)}", thinking=False)
def test_nothing_raises_and_arguments_are_objects(text: str, thinking: bool) -> None:
    got = parse_completion(text, thinking)
    assert all(isinstance(json.loads(call.arguments), dict) for call in got.tool_calls)
    if not got.tool_calls:
        assert not got.leftover
        assert got.content in text
    if not thinking:
        assert got.reasoning_content is None


WORDS = st.text(st.characters(exclude_characters="<｜", exclude_categories=["Cs"]), max_size=20)
NAMES = st.text(st.characters(categories=["L", "Nd"], include_characters="_-. "), min_size=1, max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=4)), max_size=3)


@settings(deadline=None, max_examples=300)
@given(content=WORDS, reasoning=WORDS, calls=CALLS, thinking=st.booleans())
def test_what_is_rendered_is_parsed(
    content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]], thinking: bool
) -> None:
    wire = [{"id": "1", "function": {"name": name, "arguments": json.dumps(values)}} for name, values in calls]
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": wire}
    messages = [{"role": "user", "content": "q"}, answer]
    text = encode_messages(messages, thinking=thinking).partition("<｜Assistant｜>")[2]
    got = parse_completion(text.removeprefix("<think>" if thinking else "</think>"), thinking)
    assert got.content == content
    assert got.reasoning_content == (reasoning if thinking else None)
    assert [(call.name, json.loads(call.arguments)) for call in got.tool_calls] == calls
    assert not got.leftover
