"""ChatCodec: all that a server asks about text, tokens and chat, in one object that is given to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4c.chat.dsml import call_start
from dsv4c.chat.encoding import awaits_completion, encode_messages
from dsv4c.chat.grammar import Marks, answer_grammar
from dsv4c.chat.parse import AnswerParser
from dsv4c.chat.prompts import Release
from dsv4c.chat.release import release_of
from dsv4c.chat.tokenizer import Detokenizer, Tokenizer
from dsv4c.chat.tokens import ASSISTANT, DSML, THINK_END, THINK_START
from dsv4c.errors import RequestError


class ChatCodec:
    """A tokenizer and the chat format of one release of the model.

        vocab_size      int                     one more than the largest id
        eos_token_ids   tuple[int, ...]         any of them ends a completion
        encode(text) -> ids                     adds nothing, not even BOS
        decode(ids) -> text                     without special tokens
        token_text(id) -> text                  of one token, special ones too; U+FFFD where it is no whole character
        token_bytes(id) -> bytes
        detokenizer() -> Detokenizer            push(id) -> text, flush() -> text; without special tokens
        chat_prompt(messages, ...) -> ids       BOS included
        in_reasoning(prompt ids) -> bool        whether its completion begins with reasoning
        answer_start(ids) -> int | None         where a chat's prompt ends, if it ends where an answer begins
        call_start(name) -> text                of a completion that must call a function
        call_token      int | None              without it no call can be written
        parser(thinking) -> AnswerParser        push(text) -> pieces, flush() -> pieces: (kind, text)
        added_token_ids frozenset[int]          of roles, markup, thinking, ends: no text that a grammar may produce
        vocabulary() -> list[bytes]             token_bytes of every id
        answer_grammar(content, ...) -> str     what an answer may be, for llguidance

    Safe to share between threads; what `detokenizer` and `parser` return belongs to one completion.
    """

    def __init__(self, tokenizer: Tokenizer, *, release: Release = "preview") -> None:
        self._tokenizer = tokenizer
        self.release: Release = release
        self.release_known = True
        """Whether the release was asked for or is the checkpoint's, not assumed."""
        self.call_token: int | None = tokenizer.id_of(DSML)
        self._think_start = tokenizer.id_of(THINK_START)
        self._think_end = tokenizer.id_of(THINK_END)
        self._assistant = tokenizer.id_of(ASSISTANT)
        self.vocab_size = tokenizer.vocab_size
        self.eos_token_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        self.added_token_ids = tokenizer.added_ids

    @classmethod
    def from_folder(cls, folder: str | Path, *, release: Release | None = None) -> ChatCodec:
        """The codec of the checkpoint or artifact in `folder`, or of its `tokenizer.json`.

        `release` None: the one it is of or, where it does not say, the preview. Raises ConfigError if its tokenizer
        is not usable.
        """
        tokenizer, folder = Tokenizer.from_file(folder), Path(folder)
        if release is None:
            release = release_of(folder if folder.is_dir() else folder.parent)
        codec = cls(tokenizer, release=release or "preview")
        codec.release_known = release is not None
        return codec

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def detokenizer(self) -> Detokenizer:
        return self._tokenizer.detokenizer()

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool,
        effort: str | None = None,
        drop_thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of the prompt that asks for the next assistant turn.

        Raises RequestError (400) for a bad message, effort, tool or format, and for messages that ask for nothing.
        """
        text = encode_messages(
            messages,
            thinking=thinking,
            effort=effort,
            drop_thinking=drop_thinking,
            tools=tools,
            response_format=response_format,
            release=self.release,
        )
        if not awaits_completion(messages):
            raise RequestError(
                f"the last message is of role `{messages[-1]['role']}`, so there is nothing to answer",
                param="messages",
                code="invalid_value",
                hint="end with a user or tool message, or with an assistant message that has `prefix: true`",
            )
        return self.encode(text)

    def in_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether the completion of this prompt begins with reasoning."""
        return bool(prompt) and prompt[-1] == self._think_start

    def answer_start(self, ids: Sequence[int]) -> int | None:
        """How many of these tokens are a chat's prompt, whatever of its last answer follows; None if they are none."""
        for at in range(len(ids) - 1, 0, -1):
            if ids[at - 1] == self._assistant and ids[at] in (self._think_start, self._think_end):
                return at + 1
        return None

    def call_start(self, name: str | None) -> str:
        """How a completion begins that calls function `name`, or that calls one of the model's choice."""
        return call_start(name)

    def parser(self, thinking: bool) -> AnswerParser:
        return AnswerParser(thinking)

    def vocabulary(self) -> list[bytes]:
        """The bytes of every token, by id."""
        return [self._tokenizer.token_bytes(i) for i in range(self.vocab_size)]

    def answer_grammar(
        self,
        content: Mapping[str, Any] | None,
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        forced: bool = False,
        parallel: bool = True,
    ) -> str:
        """The grammar of an answer, for llguidance: see `dsv4c.chat.grammar.answer_grammar`."""
        marks = Marks(self._tokenizer.id_of(DSML), self._tokenizer.id_of(THINK_END))
        return answer_grammar(marks, content, thinking=thinking, tools=tools, forced=forced, parallel=parallel)
