"""An engine that says what it is told to: texts become the tokens of a chat codec, handed out one by one."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv4c.chat.bpe import train_bpe
from dsv4c.chat.codec import ChatCodec
from dsv4c.chat.prompts import Release
from dsv4c.chat.tokenizer import Tokenizer
from dsv4c.errors import Dsv4cError
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.service import Output, Sink

TEXTS = ["What is the weather in Paris? I look it up, and then tell you what it is; 12345 degrees are many.\n" * 3]


def small_codec(release: Release = "preview") -> ChatCodec:
    """A chat codec with every special token and a few merges."""
    return ChatCodec(Tokenizer(train_bpe(TEXTS, 330)), release=release)


@dataclass
class ScriptedEngine:
    """`answers` in the order of submission, over and over. An answer of more than `max_tokens` tokens is cut off."""

    codec: ChatCodec
    answers: Sequence[str]
    max_context: int = 4096
    failure: Dsv4cError | None = None
    prompts: list[list[int]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(0))

    def submit(self, prompt: Sequence[int], params: SamplingParams, sink: Sink) -> int:
        number = next(self._numbers)
        self.prompts.append(list(prompt))
        self.params.append(params)
        ids = self.codec.encode(self.answers[number % len(self.answers)])
        threading.Thread(target=self._say, args=(ids, params, sink), daemon=True).start()
        return number

    def _say(self, ids: Sequence[int], params: SamplingParams, sink: Sink) -> None:
        most = params.max_tokens or self.max_context
        score = None if params.logprobs is None else (-0.5, ())
        for i, token in enumerate(ids[:most]):
            sink(Output(token, score, finish_reason="length" if i + 1 == most else None))
        if len(ids) < most:
            sink(Output(self.codec.eos_token_ids[0], score, finish_reason="stop"))

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats()
