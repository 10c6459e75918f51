"""/v1/chat/completions: messages, thinking modes, reasoning and tool calls apart from content."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from dsv4c.errors import Dsv4cError
from dsv4c.runtime import shapes
from dsv4c.runtime.answer import DONE, Job, Part, TextEvents, error_dict, event, head
from dsv4c.runtime.completion import CallDelta, Choice, Delta, chat_logprobs, prompt_logprobs
from dsv4c.runtime.fields import MANY, GenerationBody, unknown_keys
from dsv4c.runtime.modes import TEMPLATE_KEYS, Mode, read_mode
from dsv4c.runtime.openapi import route
from dsv4c.runtime.params import MAX_LOGPROBS
from dsv4c.runtime.protocol import Usage, parse_body, refuse
from dsv4c.runtime.server import Server, offload
from dsv4c.runtime.tools import ToolPlan, read_tools

PATH = "/v1/chat/completions"
_NEVER = -100.0  # the strongest bias of a logit
# What chat/messages.py reads of a message, and what the official client gives back of an answer.
_MESSAGE_KEYS = (
    *("role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id", "prefix", "wo_eos", "task"),
    *("tools", "response_format", "refusal", "annotations"),
)


def add(app: FastAPI, server: Server) -> None:
    """Adds the route."""

    @app.post(PATH, **route(ChatBody, server.model_name, shapes.chat(server.codec.vocab_size), streams=True))
    async def chat_completions(request: Request) -> Response:
        body = parse_body(ChatBody, await server.read_body(request))
        job = await chat_job(server, body)
        return server.answer(job, ChatWriter(job, body))


class ChatBody(GenerationBody):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, lt=MANY)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    reasoning_effort: str | None = None
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @property
    def ignored_fields(self) -> list[str]:
        """Those of every body, and what is not read of messages, modes and formats."""
        found = list(super().ignored_fields)
        for i, message in enumerate(self.messages):
            found += unknown_keys(f"messages[{i}]", message, _MESSAGE_KEYS)
        found += unknown_keys("thinking", self.thinking, ("type",))
        found += unknown_keys("chat_template_kwargs", self.chat_template_kwargs, TEMPLATE_KEYS)
        return sorted((*found, *unknown_keys("response_format", self.response_format, ("type", "json_schema"))))

    def new_tokens(self) -> int | None:
        """Most tokens to generate; None is as many as the context holds."""
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            refuse("`max_tokens` and `max_completion_tokens` contradict each other", "max_tokens")
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        value = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if value is not None and value < 1:
            refuse(f"`{name}` must be at least 1, not {value}", name)
        return value

    def num_logprobs(self) -> int | None:
        """How many alternatives each token carries; None is no logprobs at all."""
        if not self.logprobs:
            if self.top_logprobs:
                refuse("`top_logprobs` needs `logprobs: true`", "top_logprobs")
            return None
        return self.top_logprobs or 0

    def mode(self, default_thinking: bool) -> Mode:
        """How to answer. Raises RequestError for spellings that contradict each other."""
        return read_mode(
            default_thinking=default_thinking,
            thinking=self.thinking,
            effort=self.reasoning_effort,
            template=self.chat_template_kwargs,
        )

    def tool_plan(self) -> ToolPlan:
        """How tools are used. Raises RequestError for a tool or a choice that is not understood."""
        return read_tools(self.tools, self.tool_choice, self.parallel_tool_calls)

    def check_content(self) -> None:
        """Raises RequestError for a content part that is not text; the rest of a message is the chat format's."""
        for i, message in enumerate(self.messages):
            content = message.get("content")
            for j, part in enumerate(content if isinstance(content, list) else ()):
                kind = part.get("type") if isinstance(part, dict) else None
                if kind != "text":
                    param = f"messages[{i}].content[{j}]"
                    what = f"`{param}` has type {json.dumps(kind)[:40]}, only `text` is supported"
                    refuse(what, param, code="unsupported_content")


async def chat_prompt(server: Server, body: ChatBody) -> tuple[list[int], str]:
    """The prompt of a chat, and its end that is the beginning of the answer: of a call that must be made.

    Raises RequestError as the chat format does, and for a call that cannot be forced.
    """
    codec = server.codec
    body.check_content()
    mode = body.mode(server.default_thinking)
    plan, response_format = body.tool_plan(), body.shown_format()

    def encode(messages: list[dict[str, object]]) -> list[int]:
        return codec.chat_prompt(
            messages,
            thinking=mode.thinking,
            effort=mode.effort,
            drop_thinking=mode.drop_thinking,
            tools=plan.shown,
            response_format=response_format,
        )

    prompt = await offload(encode, body.messages, len(json.dumps([body.messages, plan.shown])))
    reasons = codec.in_reasoning(prompt)
    if not plan.forced or (reasons and server.grammars is not None):  # a grammar forces the call behind the reasoning
        return prompt, ""
    if reasons:
        hint = "ask without thinking, or with `tool_choice: auto`"
        refuse("`tool_choice` cannot force a call after thinking", "tool_choice", hint=hint)
    begun = codec.call_start(plan.forced[0] if len(plan.forced) == 1 else None)
    return prompt + codec.encode(begun), begun


async def chat_job(server: Server, body: ChatBody) -> Job:
    """Checks a /v1/chat/completions body against model, chat format, context and limits."""
    codec, request_id = server.codec, f"chatcmpl-{uuid.uuid4().hex}"
    server.check_model(body.model)
    body.check_scores()
    asked, logprobs, stops = body.new_tokens(), body.num_logprobs(), body.stops()
    include_usage = body.include_usage()
    headers = server.extra_headers(request_id, body.ignored_fields)
    mode, plan = body.mode(server.default_thinking), body.tool_plan()
    prompt, begun = await chat_prompt(server, body)
    reasons = codec.in_reasoning(prompt)
    room = server.room(len(prompt), asked, "messages")
    grammar = await server.grammar(body, reasons=reasons, plan=plan, begun=begun)
    parts = []
    for number in range(body.num_choices):
        params = body.sampling(
            choice=number,
            max_tokens=room if asked is None else asked,
            vocab_size=codec.vocab_size,
            logprobs=logprobs,
            prompt_logprobs=body.prompt_logprobs,
            grammar=grammar,
        )
        if plan.forbidden and codec.call_token is not None:
            params = replace(params, logit_bias={**params.logit_bias, codec.call_token: _NEVER})
        choice = Choice(
            codec,
            index=number,
            stops=stops,
            parser=codec.parser(reasons),
            begun=begun,
            max_calls=plan.max_calls,
            scored=logprobs is not None,
            min_tokens=params.min_tokens,
        )
        parts.append(Part(prompt, params, choice))
    return Job(
        request_id,
        server.model_name,
        codec,
        parts,
        len(prompt),
        stream=bool(body.stream),
        include_usage=include_usage,
        continuous_usage=body.continuous_usage(),
        scored=logprobs is not None,
        thinking=mode.thinking,
        fingerprint=server.fingerprint,
        headers=headers,
    )


class ChatWriter:
    """The wire format: a message a choice; in a stream its role first, its finish reason last."""

    path = PATH

    def __init__(self, job: Job, body: ChatBody) -> None:
        self._job = job
        self._prompt_logprobs = body.prompt_logprobs
        self._greeted: set[int] = set()
        self._plain = TextEvents(lambda index, kind, text: self._event([_chunk(index, {kind: text})]))
        self._is_plain = not (job.scored or job.continuous_usage)

    def whole(self, usage: Usage) -> dict[str, Any]:
        choices = [self._choice(index, part.choice) for index, part in enumerate(self._job.parts)]
        said = {**head(self._job, "chat.completion"), "choices": choices, "usage": usage.to_dict()}
        if self._prompt_logprobs is not None:
            part = self._job.parts[0]  # of all choices the same
            scores = part.prompt_scores or ()
            said["prompt_logprobs"] = prompt_logprobs(self._job.codec, part.prompt, scores, self._prompt_logprobs)
        return said

    def begin(self) -> bytes:
        return b""

    def chunks(self, index: int, delta: Delta, finish: str | None) -> bytes:
        data = b""
        if index not in self._greeted:
            self._greeted.add(index)
            data = self._event([_chunk(index, {"role": "assistant", "content": ""})])
        if self._is_plain and finish is None and bool(delta.content) != bool(delta.reasoning) and not delta.tool_calls:
            kind = "content" if delta.content else "reasoning_content"
            return data + self._plain.of(index, kind, delta.content or delta.reasoning)
        if delta:
            said: dict[str, Any] = {}
            if delta.reasoning:
                said["reasoning_content"] = delta.reasoning
            if delta.content or not (delta.reasoning or delta.tool_calls):
                said["content"] = delta.content
            if delta.tool_calls:
                said["tool_calls"] = [_call(call, streamed=True) for call in delta.tool_calls]
            chunk = _chunk(index, said)
            if self._job.scored:
                chunk["logprobs"] = chat_logprobs(self._job.codec, delta.tokens)
            data += self._event([chunk])
        if finish is not None:
            stop_reason = self._job.parts[index].choice.stop_reason
            data += self._event([{**_chunk(index, {}, finish), "stop_reason": stop_reason}])
        return data

    def end(self, usage: Usage) -> bytes:
        return (self._event([], usage) if self._job.include_usage else b"") + DONE

    def fail(self, error: Dsv4cError) -> bytes:
        return event(error_dict(error))

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        job, delta = self._job, choice.take()
        calls = [_call(call, streamed=False) for call in delta.tool_calls]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not delta.content else delta.content,
        }
        if calls:
            message["tool_calls"] = calls
        if job.thinking:
            message["reasoning_content"] = delta.reasoning
        scores = chat_logprobs(job.codec, delta.tokens) if job.scored else None
        ended = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        return {"index": index, "message": message, "logprobs": scores, **ended}

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        body = head(self._job, "chat.completion.chunk")
        body["choices"] = choices
        if self._job.include_usage:
            usage = self._job.usage() if self._job.continuous_usage else usage
            body["usage"] = None if usage is None else usage.to_dict()
        return event(body)


def _call(call: CallDelta, streamed: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"index": call.index} if streamed else {}
    function = {"arguments": call.arguments}
    if call.id is not None:
        said |= {"id": call.id, "type": "function"}
        function = {"name": call.name or "", **function}
    return {**said, "function": function}


def _chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
