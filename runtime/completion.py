"""From token ids to what a client reads: text, reasoning, stop strings, logprobs, a finish reason.

    token --detokenizer--> text --parser--> reasoning | content --StopMatcher--> safe text --take()--> Delta
                                       '--> calls: name, arguments piece by piece -----------'

One `Choice` follows one sequence. Text that may still turn into a stop string, and bytes that are not yet a
character, are held back, so that nothing is ever taken back. Everything here runs in the event loop, token by
token, and does no I/O.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsv4c.runtime.grammar import GrammarCodec
from dsv4c.runtime.params import MAX_LOGPROBS
from dsv4c.runtime.protocol import logprob_number
from dsv4c.runtime.service import Score


class Detokenizer(Protocol):
    """Bytes of tokens to whole characters."""

    def push(self, token_id: int, /) -> str: ...

    def flush(self) -> str: ...


class AnswerParser(Protocol):
    """Text of a completion, as it comes, to pieces (kind, text).

    Kinds: `reasoning`, `content`; `call` with a function's name, then `arguments` with the parts of a JSON text, then
    `call_end`. A call is over before the next begins. Text of unknown fate is held back; nothing is taken back.
    """

    @property
    def in_reasoning(self) -> bool: ...

    @property
    def num_held(self) -> int:
        """Characters held back."""

    def push(self, delta: str, /) -> Sequence[tuple[str, str]]: ...

    def flush(self, *, truncated: bool = False) -> Sequence[tuple[str, str]]:
        """The rest. `truncated`: the model was not done; a call without its end then stays unfinished."""


class TextCodec(GrammarCodec, Protocol):
    """What the server needs to know about a tokenizer and a chat format; given to it, never imported."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> Sequence[int] | frozenset[int]: ...

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...

    def token_text(self, token_id: int, /) -> str: ...

    def token_bytes(self, token_id: int, /) -> bytes: ...

    def detokenizer(self) -> Detokenizer: ...

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool,
        effort: str | None,
        drop_thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        response_format: Mapping[str, Any] | None,
    ) -> list[int]: ...

    @property
    def call_token(self) -> int | None:
        """The token without which no tool call can be written."""

    def in_reasoning(self, prompt: Sequence[int], /) -> bool:
        """Whether the completion of this chat prompt begins with reasoning."""

    def call_start(self, name: str | None, /) -> str:
        """How a completion that calls a function begins, up to its name; None: the name is the model's choice."""

    def parser(self, thinking: bool, /) -> AnswerParser: ...


class StopMatcher:
    """Passes text through until a stop string is complete; holds back the shortest text that may begin one.

    The stop that is complete first wins, the longest one of several that end together: the result does not depend
    on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self.matched: str | None = None
        """The stop that was complete first; nothing is shown after it."""
        self.dropped = 0
        """Characters of the text that the stop cut off: the stop itself and what came with it."""

    def push(self, text: str) -> str:
        """The text that is safe to show now."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        if not self._held and self._firsts.isdisjoint(text):  # nearly always
            return text
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            self.dropped, self._held = len(text) - start, ""
            return text[:start]
        keep = self._prefix_len(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when nothing follows."""
        text, self._held = self._held, ""
        return text

    @property
    def stopped(self) -> bool:
        return self.matched is not None

    @property
    def num_held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def _prefix_len(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts and any(stop.startswith(text[start:]) for stop in self._stops):
                return len(text) - start
        return 0


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One token with the text it completes; `score` is None for the first token of a prompt."""

    token_id: int
    text: str
    score: Score | None


@dataclass(slots=True)
class CallDelta:
    """More of tool call number `index`. Its first delta, and no other, has an id and the function's name."""

    index: int
    arguments: str = ""
    """The next part of a JSON text; all parts joined are the arguments."""
    id: str | None = None
    name: str | None = None
    done: bool = False
    """Nothing follows. A call that was cut off never gets there."""


@dataclass(slots=True)
class Delta:
    """What became visible since the last look; at most one item for each call, in order."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[CallDelta] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls or self.tokens)


class Choice:
    """One generated sequence on its way to the client.

    `begun`: text at the end of the prompt that the parser takes for the completion's beginning. `max_calls`: the
    sequence ends with this many tool calls complete. With calls, an end by the model itself is `tool_calls`.
    """

    def __init__(
        self,
        codec: TextCodec,
        *,
        index: int = 0,
        stops: Sequence[str] = (),
        parser: AnswerParser | None = None,
        begun: str = "",
        max_calls: int | None = None,
        scored: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        """The stop string, or the stop token other than the end-of-sentence one, that ended it."""
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_calls = 0
        self._in_call = False
        self._detokenizer = codec.detokenizer()
        self._parser = parser
        self._max_calls = max_calls
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._scored = scored
        self._delta = Delta()
        self._pending: list[ScoredToken] = []  # tokens whose text is not all visible yet
        self._show(begun)

    def push(self, token_id: int, score: Score | None = None) -> None:
        """Takes the next token; sets `finish_reason` when it completes a stop string. Later tokens are ignored."""
        if self.finish_reason is not None:
            return
        self.num_tokens += 1
        text = self._detokenizer.push(token_id)
        if self._scored:
            self._pending.append(ScoredToken(token_id, text, score))
        thought = self._parser is not None and self._parser.in_reasoning
        self._show(text)
        self.num_reasoning_tokens += thought

    def end(self, reason: str, *, hidden_token: bool = False, stop_token: int | None = None) -> None:
        """Ends the sequence unless a stop string did. `hidden_token`: an end token came last and is only counted.

        `stop_token`: the end token, if it is the request's own; like a limit it may cut a tool call off.
        """
        if self.finish_reason is not None:
            return
        self.num_tokens += hidden_token
        self._show(self._detokenizer.flush())
        if self._parser is not None and self.finish_reason is None:
            self._relay(self._parser.flush(truncated=reason != "stop" or stop_token is not None))
        if self.finish_reason is None:
            self._delta.content += self._matcher.flush()
            whole = self.num_calls > 0 and not self._in_call
            self.finish_reason, self.stop_reason = "tool_calls" if reason == "stop" and whole else reason, stop_token

    def take(self) -> Delta:
        """What became visible since the last call. Tokens come along with the text that they complete."""
        delta = self._delta
        if not (delta or self.finish_reason):
            return delta
        if self._pending:
            visible = self._num_visible()
            delta.tokens, self._pending = self._pending[:visible], self._pending[visible:]
        self._delta = Delta()
        return delta

    def _num_visible(self) -> int:
        """How many pending tokens have all their text shown."""
        visible, hidden = len(self._pending), self._matcher.num_held
        if self.finish_reason is not None:
            return visible
        while visible and (hidden > 0 or not self._pending[visible - 1].text):
            visible -= 1
            hidden -= len(self._pending[visible].text)
        return visible

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._parser is None:
            self._match(text)
        else:
            self._relay(self._parser.push(text))

    def _relay(self, pieces: Sequence[tuple[str, str]]) -> None:
        """Sorts pieces of the parser into the delta, up to the one that ends the sequence."""
        for kind, text in pieces:
            if kind == "reasoning":
                self._delta.reasoning += text
            elif kind == "content":
                self._match(text)
            else:
                self._relay_call(kind, text)
            if self.finish_reason is not None:
                return

    def _relay_call(self, kind: str, text: str) -> None:
        calls = self._delta.tool_calls
        if kind == "call":
            self._delta.content += self._matcher.flush()  # a stop string does not reach across a call
            calls.append(CallDelta(self.num_calls, id=f"call_{uuid.uuid4().hex[:24]}", name=text))
            self.num_calls += 1
            self._in_call = True
            return
        if not calls:
            calls.append(CallDelta(self.num_calls - 1))
        calls[-1].arguments += text
        if kind == "call_end":
            calls[-1].done, self._in_call = True, False
            if self.num_calls == self._max_calls:
                self.finish_reason = "tool_calls"

    def _match(self, text: str) -> None:
        if self.num_tokens < self._min_tokens:
            self._delta.content += self._matcher.flush() + text
            return
        self._delta.content += self._matcher.push(text)
        if self._matcher.stopped:
            self.finish_reason, self.stop_reason = "stop", self._matcher.matched
            held = 0 if self._parser is None else self._parser.num_held
            self._forget(self._matcher.dropped + held)

    def _forget(self, dropped: int) -> None:
        """Takes back the pending tokens that lie wholly in the text which the stop cut off."""
        while dropped and self._pending and len(self._pending[-1].text) <= dropped:
            dropped -= len(self._pending.pop().text)


def score_prompt(codec: TextCodec, prompt: Sequence[int], scores: Sequence[Score | None] = ()) -> list[ScoredToken]:
    """The tokens of an echoed prompt; `scores[i]` belongs to `prompt[i]`, the first is None; none at all is fine."""
    detokenizer = codec.detokenizer()
    texts = [detokenizer.push(token) for token in prompt]
    if texts:
        texts[-1] += detokenizer.flush()
    given = scores or [None] * len(prompt)
    return [ScoredToken(token, text, score) for token, text, score in zip(prompt, texts, given, strict=True)]


def token_key(codec: TextCodec, token_id: int) -> str:
    """A token's name in /v1/completions: its text, or `bytes:\\x..` where it is no whole character."""
    text = codec.token_text(token_id)
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in codec.token_bytes(token_id))


def completion_logprobs(
    codec: TextCodec, tokens: Sequence[ScoredToken], offset: int, count: int = MAX_LOGPROBS
) -> dict[str, Any]:
    """`logprobs` of a /v1/completions choice; `offset` is where the first token's text begins in the choice.

    `count`: alternatives shown, where more were scored. `top_logprobs` always holds the token itself. Of tokens that
    read alike, the most likely one keeps the key.
    """
    offsets: list[int] = []
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
        if token.score is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for token_id, logprob in (*token.score[1][:count], (token.token_id, token.score[0])):
            key, value = token_key(codec, token_id), logprob_number(logprob)
            top[key] = max(value, top.get(key, value))
        tops.append(top)
    return {
        "tokens": [token_key(codec, token.token_id) for token in tokens],
        "token_logprobs": [None if t.score is None else logprob_number(t.score[0]) for t in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(
    codec: TextCodec, prompt: Sequence[int], scores: Sequence[Score | None], count: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: of every token of the prompt, itself and the `count` most likely in its place, by id.

    `rank` counts from 1 and is null for a token that is not among the most likely.
    """
    entries: list[dict[str, Any] | None] = []
    for token_id, score in zip(prompt, scores, strict=True):
        if score is None:
            entries.append(None)
            continue
        ranks = {other: rank for rank, (other, _) in enumerate(score[1], 1)}
        entry = {}
        for other, logprob in ((token_id, score[0]), *score[1][:count]):
            shown = {"logprob": logprob_number(logprob), "rank": ranks.get(other)}
            entry[str(other)] = {**shown, "decoded_token": codec.token_text(other)}
        entries.append(entry)
    return entries


def chat_logprobs(codec: TextCodec, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = []
    for token in tokens:
        if token.score is None:
            continue
        entry = _chat_entry(codec, token.token_id, token.score[0])
        entry["top_logprobs"] = [_chat_entry(codec, token_id, logprob) for token_id, logprob in token.score[1]]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(codec: TextCodec, token_id: int, logprob: float) -> dict[str, Any]:
    text, raw = codec.token_text(token_id), list(codec.token_bytes(token_id))
    return {"token": text, "logprob": logprob_number(logprob), "bytes": raw}
