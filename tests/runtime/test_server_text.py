"""Stop strings and choices: how a text was cut into pieces never changes what a client reads."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dsv4c.chat.parse import AnswerParser
from dsv4c.runtime.completion import Choice, StopMatcher, completion_logprobs, score_prompt, token_key
from tests.runtime.live import EOS, TOKENS, ToyCodec

TEXTS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)
TOKEN_IDS = st.lists(st.integers(2, len(TOKENS) - 1), max_size=40)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """What a reader of one character at a time would see."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(TEXTS, STOPS, st.lists(st.integers(0, 30)))
def test_stop_matcher_ignores_how_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, shown = StopMatcher(stops), ""
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    expected, stopped = cut_at_stop(text, stops)
    for start, end in itertools.pairwise(edges):
        shown += matcher.push(text[start:end])
        assert expected.startswith(shown)  # never past a stop, never taken back
        held = text[len(shown) : end]
        assert matcher.stopped or not held or any(stop.startswith(held) for stop in stops)  # the shortest hold
    shown += matcher.flush()
    assert (shown, matcher.stopped) == (expected, stopped)
    assert not stopped or matcher.dropped > 0


@given(TOKEN_IDS, STOPS, st.integers(1, 5), st.booleans())
def test_choice_ignores_how_often_it_is_read(ids: list[int], stops: list[str], every: int, thinking: bool) -> None:
    codec = ToyCodec()

    def read(step: int) -> tuple[str, str, list[int], str | None, int]:
        choice = Choice(codec, stops=stops, parser=codec.parser(thinking), scored=True)
        reasoning, content, tokens = "", "", []
        for i, token in enumerate(ids):
            choice.push(token, (-1.0, ()))
            if i % step == 0:
                delta = choice.take()
                reasoning, content = reasoning + delta.reasoning, content + delta.content
                tokens += [t.token_id for t in delta.tokens]
        choice.end("length")
        delta = choice.take()
        tokens += [t.token_id for t in delta.tokens]
        return reasoning + delta.reasoning, content + delta.content, tokens, choice.finish_reason, choice.num_tokens

    one, other = read(1), read(every)
    assert (one[0], one[1], one[3], one[4]) == (other[0], other[1], other[3], other[4])
    if one[3] == "length":
        assert one[2] == other[2] == ids
        assert (one[0] + one[1]).replace("</think>", "") == codec.decode(ids).replace("</think>", "")
    assert all(stop not in one[1] for stop in stops)


def test_no_half_character_is_shown() -> None:
    codec = ToyCodec()
    choice = Choice(codec)
    shown = []
    for token in [TOKENS.index(piece) for piece in (b"\xe6", b"\x97", b"\xa5", b"a", b"\xc3")]:
        choice.push(token)
        shown.append(choice.take().content)
    assert shown == ["", "", "日", "a", ""]
    choice.end("length")
    assert choice.take().content == "\ufffd"


def test_hidden_stop_token_is_counted_only() -> None:
    choice = Choice(ToyCodec(), scored=True)
    choice.push(TOKENS.index(b"the"), (-0.5, ()))
    choice.end("stop", hidden_token=True)
    delta = choice.take()
    assert (delta.content, len(delta.tokens), choice.num_tokens, choice.finish_reason) == ("the", 1, 2, "stop")


def test_stop_strings_wait_for_min_tokens() -> None:
    codec = ToyCodec()
    choice = Choice(codec, stops=["a"], min_tokens=3)
    for token in codec.encode("aabab"):
        choice.push(token)
    choice.end("length")
    assert (choice.take().content, choice.finish_reason, choice.num_tokens) == ("aab", "stop", 4)


def test_stop_string_hides_its_tokens() -> None:
    codec = ToyCodec()
    choice = Choice(codec, stops=["end"], scored=True)
    tokens = []
    for token in codec.encode("abend"):
        choice.push(token, (-1.0, ()))
        tokens += choice.take().tokens
    assert [t.text for t in tokens] == ["a", "b"]


def test_logprobs_name_pieces_of_characters_by_bytes() -> None:
    codec = ToyCodec()
    half = TOKENS.index(b"\xc3")
    assert token_key(codec, half) == "bytes:\\xc3"
    scored = score_prompt(codec, [half, TOKENS.index(b"\xa9"), EOS], [None, (-1.0, ((half, -0.5),)), (-2.0, ())])
    body = completion_logprobs(codec, scored, 0)
    assert body["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "<eos>"]
    assert body["text_offset"] == [0, 0, 1]
    assert body["token_logprobs"] == [None, -1.0, -2.0]
    assert body["top_logprobs"] == [None, {"bytes:\\xc3": -0.5, "bytes:\\xa9": -1.0}, {"<eos>": -2.0}]


def test_a_stop_token_of_the_request_completes_no_call() -> None:
    begun = '<｜DSML｜invoke name="rm">\n<｜DSML｜parameter name="path" string="true">/home'
    for stop_token, arguments, reason in ((None, '{"path": "/home"}', "tool_calls"), (7, '{"path": "/home', "stop")):
        choice = Choice(ToyCodec(), parser=AnswerParser(False), begun=begun)
        choice.end("stop", hidden_token=True, stop_token=stop_token)
        (call,) = choice.take().tool_calls
        assert (call.name, call.arguments, call.done) == ("rm", arguments, stop_token is None)
        assert (choice.finish_reason, choice.stop_reason) == (reason, stop_token)
