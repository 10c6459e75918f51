"""Another API's request, said as a chat: its fields translated, its faults told in its own names.

    body --translate--> Chat (fields, messages, where each came from) --chat_job--> Job --that API's writer--> bytes

What the other API cannot say of this model is refused; what it says without effect is named, as everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dsv4c.errors import Dsv4cError, RequestError
from dsv4c.runtime.answer import Job
from dsv4c.runtime.endpoints.chat import ChatBody, chat_job, chat_prompt
from dsv4c.runtime.protocol import parse_body, refuse
from dsv4c.runtime.server import Server

# Fields of a chat that the other APIs have other words for, or no place.
_TRANSLATED = frozenset(
    (
        "model",
        "messages",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "tools",
        "tool_choice",
    )
) | frozenset(("logprobs", "top_logprobs", "prompt_logprobs", "parallel_tool_calls", "reasoning_effort"))
EXTENSIONS = frozenset(ChatBody.model_fields) - _TRANSLATED - {"response_format", "thinking", "stop"}
"""Sampling fields and others of the chat endpoint that are taken under the same name."""
_NAME = re.compile(r"`([a-z_]+[][a-z0-9_.]*)")  # of a field, in a message


@dataclass
class Chat:
    """A chat's fields as they are gathered, and the names that they have in the request."""

    fields: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """Chat field -> the request's own."""
    ignored: list[str] = field(default_factory=list)
    """What the request says without effect."""

    def say(self, message: dict[str, Any], param: str) -> None:
        """Adds a message that comes from `param`."""
        self.names[f"messages[{len(self.messages)}]"] = param
        self.messages.append(message)

    def put(self, name: str, value: Any, param: str) -> None:
        """Sets a field that the request calls `param`; None says nothing."""
        self.names[name] = param
        if value is not None:
            self.fields[name] = value

    def extend(self, extra: Mapping[str, Any] | None, inert: frozenset[str]) -> None:
        """Takes the request's further fields: those of a chat as they are, the rest is named."""
        for name, value in (extra or {}).items():
            if name in EXTENSIONS:
                self.fields[name] = value
            elif value is not None and name not in inert:
                self.ignored.append(name)

    def body(self) -> ChatBody:
        """The chat's body. Raises RequestError in the request's names."""
        with self._own_names():
            return parse_body(ChatBody, {**self.fields, "messages": self.messages})

    async def job(self, server: Server, request_id: str, headers: Mapping[str, str]) -> Job:
        """The checked job, with the request's own id. Raises RequestError in the request's names."""
        body = self.body()
        with self._own_names():
            job = await chat_job(server, body)
        job.request_id, job.headers, job.own_words = request_id, {**job.headers, **headers}, self._own_words
        return job

    async def num_prompt_tokens(self, server: Server) -> int:
        """How long the prompt is. Raises RequestError in the request's names."""
        body = self.body()
        with self._own_names():
            return len((await chat_prompt(server, body))[0])

    @contextmanager
    def _own_names(self) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            raise self._own_words(error) from error

    def _own_words(self, error: Dsv4cError) -> Dsv4cError:
        if not isinstance(error, RequestError):
            return error
        param = None if error.param is None else self._own_name(error.param)
        message, hint = (_NAME.sub(lambda m: f"`{self._own_name(m[1])}", text) for text in (error.message, error.hint))
        return RequestError(message, status=error.status, param=param, code=error.code, hint=hint)

    def _own_name(self, name: str) -> str:
        """The request's own name of a chat's field, or of a part of one."""
        for known in sorted(self.names, key=len, reverse=True):
            if name.startswith(known) and name[len(known) :][:1] in ("", ".", "["):
                return self.names[known] + name[len(known) :]
        return name


def unsupported(kind: Any, param: str, offered: str) -> NoReturn:
    """Raises the RequestError of a piece of content that this model cannot read."""
    what = f"`{param}` has type {json.dumps(kind)[:40]}, only {offered} is supported"
    refuse(what, param, code="unsupported_content")


def text_parts(content: Any, param: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Text parts of a chat message, from a string or a list of typed texts. Raises RequestError for anything else."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        refuse(f"`{param}` must be a string or a list", param)
    parts = []
    for i, part in enumerate(content):
        at = f"{param}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            unsupported(kind, at, f"`{kinds[0]}`")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            refuse(f"`{at}.text` must be a string", f"{at}.text")
        parts.append({"type": "text", "text": text})
    return parts
