"""The streaming parser of completions: any cut gives the same, malformed text survives, rendering round-trips."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsv4c.chat.dsml import ToolCall
from dsv4c.chat.encoding import encode_messages
from dsv4c.chat.parse import AnswerParser, ParsedCompletion, Piece, parse_completion
from tests.chat.cases import BLOCK_PARTS, cases

DSML = "｜DSML｜"
CALL = (
    '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="k" string="false">[1,  2]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>"
)
CALLED = (ToolCall("f", '{"k": [1,  2]}'),)


def block(inside: str) -> str:
    return f"<｜DSML｜tool_calls>\n{inside}\n</｜DSML｜tool_calls>"


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind in one piece, but every call for itself."""
    out: list[Piece] = []
    for kind, text in pieces:
        if out and out[-1][0] == kind and kind not in ("call", "call_end"):
            out[-1] = (kind, out[-1][1] + text)
        else:
            out.append((kind, text))
    return out


def parse(deltas: list[str], thinking: bool = False, truncated: bool = False) -> list[Piece]:
    parser = AnswerParser(thinking)
    pieces = [piece for delta in deltas for piece in parser.push(delta)]
    return joined(pieces + parser.flush(truncated=truncated))


def content_of(pieces: list[Piece]) -> str:
    return "".join(text for kind, text in pieces if kind == "content")


# What a model writes: well-formed parts, broken ones, and words that stand for everything that is no markup.
PARTS = st.one_of(
    st.sampled_from(BLOCK_PARTS),
    st.text(max_size=3),
    st.sampled_from(
        ["</think>", "</thi", "<", "nk>", "\n\n", "\n", " ", "<think>", "é", '">', "{}", "3", "/", "｜", "DSML"]
    ),
)


@st.composite
def damaged(draw: st.DrawFn) -> list[str]:
    """A well-formed answer with a few pieces lost, doubled or put in, cut somewhere."""
    value = draw(st.sampled_from(["Paris", "[1, 2]", '{"a": "b"}', "x\n</｜DSML｜invoke>", "", "3"]))
    one = (
        f'<｜DSML｜parameter name="k" string="{draw(st.sampled_from(["true", "false"]))}">{value}</｜DSML｜parameter>\n'
    )
    invoke = '<｜DSML｜invoke name="f">\n' + one * draw(st.integers(0, 2)) + "</｜DSML｜invoke>\n"
    text = f"why</think>I look.\n\n<｜DSML｜tool_calls>\n{invoke * draw(st.integers(1, 2))}</｜DSML｜tool_calls>"
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(text)))
        end = min(len(text), at + draw(st.integers(0, 30)))
        kind = draw(st.sampled_from(["lose", "double", "put in"]))
        text = text[:at] + {"lose": "", "double": text[at:end] * 2, "put in": draw(PARTS)}[kind] + text[end:]
    edges = [0, *sorted(draw(st.lists(st.integers(0, len(text)), max_size=10))), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


PIECES = st.lists(PARTS, max_size=16) | damaged()
TEXTS = PIECES.map("".join)


@cases(2000)
@given(
    pieces=PIECES,
    cuts=st.lists(st.integers(0, 200), max_size=8),
    thinking=st.booleans(),
    truncated=st.booleans(),
)
@example(pieces=["<｜DSML｜tool_calls>", CALL[:70], CALL[70:]], cuts=[], thinking=False, truncated=False)
def test_any_cut_gives_the_same(pieces: list[str], cuts: list[int], thinking: bool, truncated: bool) -> None:
    text = "".join(pieces)
    edges = [0, *sorted(cuts), len(text)]
    cut = [text[a:b] for a, b in itertools.pairwise(edges)]
    whole = parse([text], thinking, truncated)
    assert parse(pieces, thinking, truncated) == whole
    assert parse(list(text), thinking, truncated) == whole
    assert parse(cut, thinking, truncated) == whole


@cases(2000)
@given(text=TEXTS, thinking=st.booleans(), truncated=st.booleans())
@example(text=f"{block(CALL)}{block(CALL)}", thinking=False, truncated=False)
@example(text="｜DS<｜DSML｜x>ML｜", thinking=False, truncated=False)
def test_no_tag_leaks_and_arguments_are_objects(text: str, thinking: bool, truncated: bool) -> None:
    pieces = parse([text], thinking, truncated)
    assert DSML not in content_of(pieces)
    got = parse_completion(text, thinking, truncated=truncated)
    ends = sum(kind == "call_end" for kind, _ in pieces)
    assert ends == len(got.tool_calls) or (truncated and ends == len(got.tool_calls) - 1)
    assert all(isinstance(json.loads(call.arguments), dict) for call in got.tool_calls[:ends])
    assert all(call.name for call in got.tool_calls)
    open_calls = 0
    for kind, _ in pieces:
        open_calls += (kind == "call") - (kind == "call_end")
        assert open_calls == 1 if kind == "arguments" else open_calls in (0, 1)


@cases(2000)
@given(parts=PIECES, thinking=st.booleans(), truncated=st.booleans())
def test_no_text_is_lost(parts: list[str], thinking: bool, truncated: bool) -> None:
    words = [f"{i}w" for i in range(len(parts))]
    text = "".join(f"{part}{word}" for part, word in zip(parts, words, strict=True))
    shown = "".join(piece for _, piece in parse([text], thinking, truncated))
    at = 0
    for word in words:  # all of them, in their order
        assert word in shown[at:], (word, text, shown)
        at = shown.index(word, at) + len(word)


@cases(1000)
@given(
    parts=st.lists(st.sampled_from(["</think>", "<think>", "</thi", "\n\n", "<", "</", "é", "DSML", ">"]) | st.text()),
    thinking=st.booleans(),
    truncated=st.booleans(),
)
def test_text_without_markup_is_as_it_is(parts: list[str], thinking: bool, truncated: bool) -> None:
    text = "".join(parts).replace("｜", "")
    reasoning, _, content = text.partition("</think>") if thinking else ("", "", text)
    whole = [("reasoning", reasoning)] * bool(reasoning) + [("content", content)] * bool(content)
    assert parse([text], thinking, truncated) == whole
    assert parse(list(text), thinking, truncated) == whole


@cases(1000)
@given(text=st.text("a\n<｜DSML/ 2", max_size=12))
@example(text="a\n\n<｜DSML｜")
def test_the_shortest_text_is_held_back(text: str) -> None:
    parser = AnswerParser(False)
    shown = content_of(parser.push(text))
    held = text[len(shown) :]
    assert DSML in text or text == shown + held
    if held and DSML not in text:  # a tag may follow of which all that is held is part
        tags = [f"{newlines}{start}{DSML}tool_calls>" for newlines in ("", "\n\n") for start in ("<", "</", "/", "")]
        assert any(tag.startswith(held) for tag in tags)
    for first in "ab":
        assert held == "" or DSML in text or content_of(parse([text, first])) == text + first


def test_reasoning_holds_back_the_shortest_text() -> None:
    parser = AnswerParser(True)
    assert parser.push("why <") == [("reasoning", "why ")]
    assert parser.push("/thi") == []
    assert parser.num_held == 5
    assert parser.push("s </thin") == [("reasoning", "</this ")]
    assert parser.in_reasoning
    assert parser.push("k>so") == [("content", "so")]
    assert not parser.in_reasoning
    assert parser.push("</think>") == [("content", "</think>")]
    assert parser.flush() == []


def test_chat_mode_has_content_only() -> None:
    assert parse(["a</thi", "nk>b"]) == [("content", "a</think>b")]


def test_reasoning_that_never_ends_stays_reasoning() -> None:
    assert parse(["why </th"], thinking=True) == [("reasoning", "why </th")]
    assert parse_completion("why", thinking=True) == ParsedCompletion("", "why")


def test_text_that_only_looked_like_a_tag_is_shown_at_the_end() -> None:
    assert parse_completion("2 <", thinking=False).content == "2 <"
    assert parse_completion("a\n\n<｜DS", thinking=False).content == "a\n\n<｜DS"


def test_whole_completion() -> None:
    got = parse_completion(f"why</think>I look.\n\n{block(CALL)}<｜end▁of▁sentence｜>", thinking=True)
    assert got == ParsedCompletion("I look.", "why", CALLED)


def test_calls_stream_as_they_come() -> None:
    parser = AnswerParser(False)
    deltas = [
        "I ",
        "look.\n",
        "\n<",
        DSML,
        "tool_calls",
        '>\n<｜DSML｜invoke name="f',
        '">',
        '\n<｜DSML｜parameter name="q" string',
    ]
    assert [parser.push(delta) for delta in deltas] == [
        [("content", "I ")], [("content", "look.")], [], [], [], [], [("call", "f")], [],
    ]  # fmt: skip
    assert joined(parser.push('="true">two "wor')) == [("arguments", '{"q": "two \\"wor')]
    assert parser.push("ds</") == [("arguments", "ds")]
    assert parser.push("s></｜DSML｜parameter") == [("arguments", "</s>")]
    assert parser.push(">\n<｜DSML｜parameter") == [("arguments", '"')]
    assert joined(parser.push(' name="n" string="false">[1,')) == [("arguments", ', "n": ')]
    assert parser.push("2]") == [], "only its end shows that it is JSON"
    assert parser.push("</｜DSML｜parameter>\n</｜DSML｜invoke>") == [
        ("arguments", "[1,2]"),
        ("arguments", "}"),
        ("call_end", ""),
    ]
    assert parser.push("\n</｜DSML｜tool_calls>") == []
    assert parser.flush() == []


def test_parallel_calls() -> None:
    second = '<｜DSML｜invoke name="g">\n\n</｜DSML｜invoke>'
    got = parse_completion(f"\n\n{block(CALL + second)}", thinking=False)
    assert got == ParsedCompletion("", None, (*CALLED, ToolCall("g", "{}")))


def test_a_call_ends_the_reasoning_that_nothing_else_ended() -> None:
    for text in (f"I look.\n\n{block(CALL)}", f"I look.{CALL}"):
        assert parse_completion(text, thinking=True) == ParsedCompletion("", "I look.", CALLED)


def test_reasoning_goes_on_after_a_call_until_its_end() -> None:
    text = f"I could\n\n{block(CALL)} or not</think>\ndone"
    assert parse_completion(text, thinking=True) == ParsedCompletion("\ndone", "I could or not", CALLED)


@pytest.mark.parametrize(
    "thought",
    [
        "it would be <｜DSML｜tool_calls> and then", "</｜DSML｜tool_calls>", "｜DSML｜", "<｜DSML｜tool_calls>\n\n",
        '<｜DSML｜invoke name="', '<｜DSML｜invoke name="">',
        '<｜DSML｜tool_calls>\n<｜DSML｜parameter name="k" string="true">v',
    ],
)  # fmt: skip
def test_markup_that_is_no_call_is_reasoning_as_it_is(thought: str) -> None:
    assert parse_completion(f"{thought}</think>done", thinking=True) == ParsedCompletion("done", thought)
    assert parse(list(f"{thought}</think>done"), thinking=True) == [("reasoning", thought), ("content", "done")]
    assert parse_completion(thought, thinking=True) == ParsedCompletion("", thought)


@pytest.mark.parametrize(
    ("value", "argument"),
    [("Infinity", "Infinity"), ("[1, 2", "[1, 2"), ("", ""), ("[" * 100_000, "[" * 100_000), ('{"a": 1}', {"a": 1})],
    ids=["no number", "unfinished", "empty", "deep", "object"],
)
def test_a_value_that_is_no_json_becomes_a_string(value: str, argument: Any) -> None:
    got = parse_completion(block(CALL.replace("[1,  2]", value)), thinking=False)
    assert json.loads(got.tool_calls[0].arguments) == {"k": argument}


@pytest.mark.parametrize(
    "text",
    [
        block(CALL).replace("tool_calls", "toolcalls", 1),
        block(CALL).replace("tool_calls", "function_calls"),
        block(CALL).replace("<｜DSML｜tool_calls>", "｜DSML｜tool_calls>", 1),
        CALL,
        block(CALL).replace("</｜DSML｜parameter>", ""),
        block(CALL).replace("</｜DSML｜parameter>", "</｜DSML｜param>"),
        block(CALL).replace("</｜DSML｜invoke>", ""),
        block(CALL).removesuffix("</｜DSML｜tool_calls>"),
        block('<｜DSML｜invoke name="f">\n{"k": [1,  2]}\n</｜DSML｜invoke>'),
        block(CALL.replace('"false"', '"False"')),
    ],
    ids=["misspelt block", "old block", "no bracket", "no block", "value without end", "misspelt end of value",
         "call without end", "block without end", "JSON arguments", "flag in capitals"],
)  # fmt: skip
def test_slightly_wrong_markup_still_is_a_call(text: str) -> None:
    got = parse_completion(f"a\n\n{text}", thinking=False)
    assert (got.content, got.tool_calls[0].name) == ("a", "f")
    assert json.loads(got.tool_calls[0].arguments) in ({"k": [1, 2]}, {"k": "[1,  2]\n"}, {"k": "[1,  2]"})


def test_a_head_that_never_ends_is_content() -> None:
    text = '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="record_item {\ncategory: Dexes\n\nHmm'
    assert parse_completion(text, thinking=False) == ParsedCompletion("record_item {\ncategory: Dexes\n\nHmm", None)


@pytest.mark.parametrize("size", [256, 257, 1024, 1025])
def test_a_head_has_a_longest_name(size: int) -> None:
    for head, most in (
        (f'<｜DSML｜invoke name="{"f" * size}">', 256),
        (f'{CALL[:23]}<｜DSML｜parameter name="{"k" * size}">', 1024),
    ):
        whole = parse([head])
        assert parse(list(head)) == whole
        assert any(size == len(text) or f'"{"k" * size}"' in text for _, text in whole) == (size <= most)
        assert sum(text.count("f" * 200) + text.count("k" * 200) for _, text in whole) == size // 200


@pytest.mark.parametrize("inside", ["", "\n"])
def test_a_block_without_a_call_is_nothing(inside: str) -> None:
    assert parse_completion(f"a\n\n{block(inside)}", thinking=False) == ParsedCompletion("a", None)


def test_text_beside_calls_is_content() -> None:
    assert parse_completion(f"{block(CALL)} bye", thinking=False) == ParsedCompletion(" bye", None, CALLED)
    inside = CALL.replace("\n</｜DSML｜invoke>", "so\n</｜DSML｜invoke>")
    assert parse_completion(block(inside), thinking=False) == ParsedCompletion("so\n", None, CALLED)


def test_a_value_may_hold_other_tags() -> None:
    value = 'see </｜DSML｜invoke> and <｜DSML｜parameter name="x" string="true">'
    inside = f'<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="k" string="true">{value}</｜DSML｜parameter>\n'
    got = parse_completion(block(f"{inside}</｜DSML｜invoke>"), thinking=False)
    assert json.loads(got.tool_calls[0].arguments) == {"k": value}


@pytest.mark.parametrize(
    ("cut", "arguments"),
    [
        ('[1,  2]', '{"k": [1,  2]'), ("</｜DSML｜para", '{"k": [1,  2]'), ("</｜DSML｜parameter>", '{"k": [1,  2]'),
        ('string="false">', '{"k": '), ("</｜DSML｜invoke>", '{"k": [1,  2]}'),
    ],
)  # fmt: skip
def test_a_truncated_call_is_not_completed(cut: str, arguments: str) -> None:
    text = CALL[: CALL.index(cut) + len(cut)]
    got = parse_completion(f"\n\n<｜DSML｜tool_calls>\n{text}", thinking=False, truncated=True)
    assert got == ParsedCompletion("", None, (ToolCall("f", arguments),))
    words = text.replace('"false">[1,  2]', '"true">rm -rf /home')[: len(text) - 1]
    if "</" not in words:
        cut_off = parse_completion(words, thinking=False, truncated=True).tool_calls
        assert not cut_off or not cut_off[0].arguments.endswith('"')


WORDS = st.text(st.characters(exclude_characters="｜", exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: "</think>" not in text
)
NAMES = st.text(st.characters(categories=["L", "Nd"], include_characters="_-. "), min_size=1, max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=4)), max_size=3)


@cases(500)
@given(content=WORDS, reasoning=WORDS, calls=CALLS, thinking=st.booleans(), size=st.integers(1, 40))
def test_what_is_rendered_is_parsed(
    content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]], thinking: bool, size: int
) -> None:
    wire = [{"id": "1", "function": {"name": name, "arguments": json.dumps(values)}} for name, values in calls]
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": wire}
    messages = [{"role": "user", "content": "q"}, answer]
    text = encode_messages(messages, thinking=thinking).partition("<｜Assistant｜>")[2]
    text = text.removeprefix("<think>" if thinking else "</think>")
    got = parse_completion(text, thinking)
    assert got.content == content
    assert got.reasoning_content == (reasoning if thinking else None)
    assert [(call.name, json.loads(call.arguments)) for call in got.tool_calls] == calls
    text = text.removesuffix("<｜end▁of▁sentence｜>")
    cut = [text[i : i + size] for i in range(0, len(text), size)]
    assert parse(cut, thinking) == parse([text], thinking)
    again = {**answer, "tool_calls": [{"function": {"name": c.name, "arguments": c.arguments}} for c in got.tool_calls]}
    rendered = encode_messages([messages[0], again], thinking=thinking)
    assert rendered == encode_messages(messages, thinking=thinking), "parsed and rendered again it is the same string"
