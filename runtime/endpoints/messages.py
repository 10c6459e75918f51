"""/v1/messages: Anthropic's API as a chat: text, thinking and tool use; /v1/messages/count_tokens.

Errors have the shape that Anthropic's clients know, around OpenAI's fields.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from dsv4c.runtime import shapes
from dsv4c.runtime.dialect import Chat, text_parts, unsupported
from dsv4c.runtime.endpoints.message_blocks import PATH, MessagesWriter, error_shape
from dsv4c.runtime.fields import INERT, MANY, Body, unknown_keys
from dsv4c.runtime.openapi import route
from dsv4c.runtime.protocol import parse_body, refuse
from dsv4c.runtime.server import Server

_INERT = INERT | {"cache_control"}
_COUNT_PATH = f"{PATH}/count_tokens"
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_BLOCK_KEYS = ("type", "text", "cache_control", "citations", "signature", "thinking", "id", "name", "input", "caller")


def add(app: FastAPI, server: Server) -> None:
    """Adds the routes."""
    server.error_shapes |= {PATH: error_shape, _COUNT_PATH: error_shape}
    told = shapes.anthropic(server.codec.vocab_size)

    @app.post(PATH, **route(MessagesBody, server.model_name, told, streams=True))
    async def messages(request: Request) -> Response:
        body = parse_body(MessagesBody, await server.read_body(request))
        server.check_model(body.model)
        chat, request_id = body.chat(), f"msg_{uuid.uuid4().hex}"
        headers = {**server.extra_headers(request_id, sorted(chat.ignored)), "request-id": request_id}
        job = await chat.job(server, request_id, headers)
        return server.answer(job, MessagesWriter(job))

    @app.post(_COUNT_PATH, **route(CountBody, server.model_name, told))
    async def count_tokens(request: Request) -> JSONResponse:
        body = parse_body(CountBody, await server.read_body(request))
        server.check_model(body.model)
        chat = body.chat()
        headers = server.ignored_header(sorted(chat.ignored))
        return JSONResponse({"input_tokens": await chat.num_prompt_tokens(server)}, headers=headers)


class CountBody(Body):
    """Body of /v1/messages/count_tokens: what shapes the prompt."""

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: Any = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None

    def chat(self) -> Chat:
        """The chat that this request means. Raises RequestError for what is not offered."""
        chat = Chat({"model": self.model}, names={"system": "system"})
        chat.extend(self.model_extra, _INERT)
        self._put_modes(chat)
        self._put_tools(chat)
        if self.system is not None:
            chat.say({"role": "system", "content": text_parts(self.system, "system", ("text",))}, "system")
        for i, message in enumerate(self.messages):
            _read_message(message, f"messages[{i}]", chat)
        last = chat.messages[-1]
        if last["role"] == "assistant" and "tool_calls" not in last:
            if self._thinks():
                refuse("an answer that is begun does not go with `thinking`", f"messages[{len(self.messages) - 1}]")
            last["prefix"] = True  # it is continued
        return chat

    def _thinks(self) -> bool:
        return self.thinking is not None and self.thinking.get("type") != "disabled"

    def _put_modes(self, chat: Chat) -> None:
        """Thinking, effort, format; what is not read of them is named."""
        config, thinking = self.output_config or {}, self.thinking or {}
        if self.thinking is not None:
            kind = thinking.get("type")
            if kind not in ("enabled", "adaptive", "disabled"):
                refuse("`thinking.type` must be `enabled`, `adaptive` or `disabled`", "thinking.type")
            # the model thinks for as long as it likes, which may be not at all: that is adaptive
            chat.fields["thinking"] = {"type": "disabled" if kind == "disabled" else "enabled"}
        chat.put("reasoning_effort", config.get("effort"), "output_config.effort")
        chat.names |= {"response_format": "output_config.format"}
        if (given := config.get("format")) is not None:
            if not isinstance(given, dict) or given.get("type") != "json_schema":
                refuse("`output_config.format.type` must be `json_schema`", "output_config.format")
            schema = {"name": "answer", "schema": given.get("schema")}
            chat.fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        chat.ignored += unknown_keys("thinking", thinking, ("type",))
        chat.ignored += unknown_keys("output_config", config, ("effort", "format"))

    def _put_tools(self, chat: Chat) -> None:
        if self.tools is not None:
            chat.fields["tools"] = [_tool(tool, f"tools[{i}]", chat) for i, tool in enumerate(self.tools)]
        if self.tool_choice is None:
            return
        kind = self.tool_choice.get("type")
        chat.names |= {"tool_choice.function": "tool_choice"}
        if kind == "tool":
            chat.fields["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.get("name")}}
        elif isinstance(kind, str) and kind in _CHOICES:
            chat.fields["tool_choice"] = _CHOICES[kind]
        else:
            refuse("`tool_choice.type` must be `auto`, `any`, `tool` or `none`", "tool_choice.type")
        alone = self.tool_choice.get("disable_parallel_tool_use")
        if alone is not None and not isinstance(alone, bool):
            param = "tool_choice.disable_parallel_tool_use"
            refuse(f"`{param}` must be true or false", param)
        if alone:
            chat.fields["parallel_tool_calls"] = False


class MessagesBody(CountBody):
    """Body of /v1/messages."""

    max_tokens: int = Field(ge=1, lt=MANY)
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=0, lt=MANY)

    def chat(self) -> Chat:
        chat = super().chat()
        chat.fields["stream"] = self.stream
        chat.put("stop", self.stop_sequences, "stop_sequences")
        for name in ("max_tokens", "temperature", "top_p", "top_k"):
            chat.put(name, getattr(self, name), name)
        return chat


def _tool(tool: dict[str, Any], param: str, chat: Chat) -> dict[str, Any]:
    """A chat's tool."""
    if tool.get("type", "custom") != "custom":
        refuse(f"`{param}.type` must be `custom`: there are no built-in tools", f"{param}.type")
    if not isinstance(tool.get("input_schema"), dict):
        refuse(f"`{param}.input_schema` must be an object", f"{param}.input_schema")
    chat.names |= {f"{param}.function": param, f"{param}.function.parameters": f"{param}.input_schema"}
    chat.ignored += unknown_keys(
        param, tool, ("type", "name", "description", "input_schema", "strict", "cache_control")
    )
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    return {"type": "function", "function": function | {k: tool[k] for k in ("description", "strict") if k in tool}}


def _read_message(message: dict[str, Any], param: str, chat: Chat) -> None:
    """Adds one message; tool results become messages of their own, in their order."""
    role, content = message.get("role"), message.get("content")
    chat.ignored += unknown_keys(param, message, ("role", "content"))
    if role not in ("user", "assistant"):
        refuse(f"`{param}.role` must be `user` or `assistant`", f"{param}.role", hint="instructions go into `system`")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks) or not blocks:
        refuse(f"`{param}.content` must be a string or a list of blocks", f"{param}.content")
    if role == "assistant":
        chat.say(_assistant(blocks, f"{param}.content", chat), param)
        return
    texts: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        at = f"{param}.content[{i}]"
        if block.get("type") != "tool_result":
            texts += _text(block, at, "`text` or `tool_result`", chat)
            continue
        if texts:
            chat.say({"role": "user", "content": texts}, param)
            texts = []
        chat.say(_tool_result(block, at, chat), at)
    if texts:
        chat.say({"role": "user", "content": texts}, param)


def _text(block: dict[str, Any], param: str, offered: str, chat: Chat) -> list[dict[str, Any]]:
    if block.get("type") != "text":
        unsupported(block.get("type"), param, offered)
    chat.ignored += unknown_keys(param, block, _BLOCK_KEYS)
    return [{"type": "text", "text": _string(block, "text", param)}]


def _tool_result(block: dict[str, Any], param: str, chat: Chat) -> dict[str, Any]:
    content = block.get("content")
    texts = text_parts("" if content is None else content, f"{param}.content", ("text",))
    if block.get("is_error"):
        chat.ignored.append(f"{param}.is_error")
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", param), "content": texts}


def _assistant(blocks: list[dict[str, Any]], param: str, chat: Chat) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant"}
    for i, block in enumerate(blocks):
        at, kind = f"{param}[{i}]", block.get("type")
        if kind == "thinking":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _string(block, "thinking", at)
        elif kind == "tool_use":
            given = block.get("input")
            if not isinstance(given, dict):
                refuse(f"`{at}.input` must be an object", f"{at}.input")
            function = {"name": _string(block, "name", at), "arguments": json.dumps(given, ensure_ascii=False)}
            call = {"type": "function", "id": _string(block, "id", at), "function": function}
            turn["tool_calls"] = [*turn.get("tool_calls", ()), call]
        elif "tool_calls" in turn:
            refuse(f"`{at}` comes after a call: only calls may", at)
        else:
            texts = _text(block, at, "`text`, `thinking` or `tool_use`", chat)
            turn["content"] = [*turn.get("content", ()), *texts]
    return turn


def _string(block: dict[str, Any], name: str, param: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        refuse(f"`{param}.{name}` must be a string", f"{param}.{name}")
    return value
