"""/v1/responses: OpenAI's newer API as a chat: text, reasoning and function calls, whole or as typed events.

Nothing is stored: a request carries all its turns, and what needs the server to remember is refused.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from dsv4c.runtime import shapes
from dsv4c.runtime.dialect import Chat, text_parts, unsupported
from dsv4c.runtime.endpoints.response_items import ResponsesWriter
from dsv4c.runtime.fields import INERT, MANY, Body, unknown_keys
from dsv4c.runtime.openapi import route
from dsv4c.runtime.params import MAX_LOGPROBS
from dsv4c.runtime.protocol import parse_body, refuse
from dsv4c.runtime.server import Server

PATH = "/v1/responses"
_TEXTS = ("input_text", "output_text", "text", "refusal")
_INERT = INERT - {"store"}


def add(app: FastAPI, server: Server) -> None:
    """Adds the route."""

    @app.post(PATH, **route(ResponsesBody, server.model_name, shapes.responses(server.codec.vocab_size), streams=True))
    async def responses(request: Request) -> Response:
        body = parse_body(ResponsesBody, await server.read_body(request))
        server.check_model(body.model)
        chat, request_id = body.chat(), f"resp_{uuid.uuid4().hex}"
        job = await chat.job(server, request_id, server.extra_headers(request_id, sorted(chat.ignored)))
        return server.answer(job, ResponsesWriter(job, body.echoed()))


class ResponsesBody(Body):
    """Body of /v1/responses."""

    model: str
    input: Any
    instructions: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=MANY)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None

    def echoed(self) -> dict[str, Any]:
        """What a response repeats of its request."""
        reasoning = self.reasoning or {}
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.get("effort"), "summary": None},
            "store": False,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": (self.text or {}).get("format") or {"type": "text"}},
            "tool_choice": "auto" if self.tool_choice is None else self.tool_choice,
            "tools": self.tools or [],
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "background": False,
        }

    def chat(self) -> Chat:
        """The chat that this request means. Raises RequestError for what is not offered."""
        self._check_offered()
        chat = Chat({"model": self.model, "stream": self.stream})
        chat.extend(self.model_extra, _INERT)
        chat.put("max_completion_tokens", self.max_output_tokens, "max_output_tokens")
        chat.put("max_tokens", None, "max_output_tokens")
        for name in ("temperature", "top_p", "parallel_tool_calls"):
            chat.put(name, getattr(self, name), name)
        chat.put("tools", self._tools(), "tools")
        chat.put("tool_choice", _tool_choice(self.tool_choice), "tool_choice")
        chat.names |= {f"tools[{i}].function": f"tools[{i}]" for i in range(len(self.tools or ()))}
        chat.names |= {"tool_choice.function": "tool_choice", "tool_choice.allowed_tools": "tool_choice"}
        self._put_modes(chat)
        if self.instructions is not None:
            chat.say({"role": "system", "content": self.instructions}, "instructions")
        chat.names["messages"] = "input"
        _read_input(self.input, chat)
        return chat

    def _check_offered(self) -> None:
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name) is not None:
                refuse(f"`{name}` is not supported: nothing is stored", name, hint="send all turns in `input`")
        if self.background:
            refuse("`background` is not supported: nothing is stored", "background", hint="stream instead")
        if self.truncation not in (None, "disabled"):
            refuse("`truncation` must be `disabled`: no turn is dropped unseen", "truncation")
        if self.stream_options is not None and not self.stream:
            refuse("`stream_options` needs `stream: true`", "stream_options")

    def _tools(self) -> list[dict[str, Any]] | None:
        if self.tools is None:
            return None
        tools = []
        for i, tool in enumerate(self.tools):
            if tool.get("type") != "function":
                refuse(f"`tools[{i}].type` must be `function`: there are no built-in tools", f"tools[{i}].type")
            tools.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
        return tools

    def _put_modes(self, chat: Chat) -> None:
        """Reasoning, format of the text, log-probabilities; what is not read of them is named."""
        reasoning, text = self.reasoning or {}, self.text or {}
        chat.put("reasoning_effort", reasoning.get("effort"), "reasoning.effort")
        chat.names |= {"response_format": "text.format", "response_format.json_schema": "text.format"}
        if (given := text.get("format")) is not None:
            chat.fields["response_format"] = _format(given)
        wanted = "message.output_text.logprobs"
        if wanted in (self.include or ()) or self.top_logprobs is not None:
            chat.fields["logprobs"] = True
            chat.put("top_logprobs", self.top_logprobs, "top_logprobs")
        chat.ignored += unknown_keys("reasoning", reasoning, ("effort",)) + unknown_keys("text", text, ("format",))
        chat.ignored += unknown_keys("stream_options", self.stream_options, ())
        chat.ignored += [f"include[{i}]" for i, what in enumerate(self.include or ()) if what != wanted]
        if self.store:
            chat.ignored.append("store")


def _format(given: Any) -> dict[str, Any]:
    """A chat's `response_format`."""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "json_schema":
        return {"type": kind, kind: {k: v for k, v in given.items() if k != "type"}}
    if kind not in ("text", "json_object"):
        refuse("`text.format.type` must be `text`, `json_object` or `json_schema`", "text.format")
    return {"type": kind}


def _tool_choice(choice: Any) -> Any:
    """A chat's `tool_choice`."""
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return {"type": kind, "function": {"name": choice.get("name")}}
    if kind == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [{"type": "function", "function": t} if isinstance(t, dict) else t for t in choice["tools"]]
        return {"type": kind, kind: {"mode": choice.get("mode", "auto"), "tools": tools}}
    return choice


def _read_input(given: Any, chat: Chat) -> None:
    """Turns of the input. Reasoning, text and calls that follow each other are one turn of the assistant's."""
    if isinstance(given, str):
        chat.say({"role": "user", "content": given}, "input")
        return
    if not isinstance(given, list) or not given:
        refuse("`input` must be a string or a list of items", "input")
    turn: dict[str, Any] | None = None  # of the assistant's, still growing
    for i, item in enumerate(given):
        param = f"input[{i}]"
        if not isinstance(item, dict):
            refuse(f"`{param}` must be an object", param)
        kind = item.get("type", "message" if "role" in item else None)
        said = _assistant_said(item, kind, param)
        if said is None:
            turn = None
            chat.say(_other_turn(item, kind, param), param)
            continue
        if turn is None or _begins_turn(said, turn):
            turn = {"role": "assistant"}
            chat.say(turn, param)
        calls = [*turn.get("tool_calls", ()), *said.pop("tool_calls", ())]
        turn.update(said, **({"tool_calls": calls} if calls else {}))


def _begins_turn(said: dict[str, Any], turn: dict[str, Any]) -> bool:
    """Whether this does not go on with the turn: reasoning comes first, then text, then calls."""
    if "tool_calls" in said:
        return False
    return len(turn) > 1 if "reasoning_content" in said else "content" in turn or "tool_calls" in turn


def _assistant_said(item: dict[str, Any], kind: Any, param: str) -> dict[str, Any] | None:
    """What an item adds to a turn of the assistant's; None if it is no part of one."""
    if kind == "message" and item.get("role") == "assistant":
        return {"content": text_parts(item.get("content"), f"{param}.content", _TEXTS)}
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        texts = text_parts(parts, f"{param}.content", ("reasoning_text", "summary_text"))
        return {"reasoning_content": "".join(part["text"] for part in texts)}
    if kind == "function_call":
        function = {name: item.get(name) for name in ("name", "arguments")}
        for name, value in (*function.items(), ("call_id", item.get("call_id"))):
            if not isinstance(value, str):
                refuse(f"`{param}.{name}` must be a string", f"{param}.{name}")
        return {"tool_calls": [{"type": "function", "id": item["call_id"], "function": function}]}
    return None


def _other_turn(item: dict[str, Any], kind: Any, param: str) -> dict[str, Any]:
    """The message of an item that is not the assistant's."""
    if kind == "function_call_output":
        call_id, output = item.get("call_id"), item.get("output")
        if not isinstance(call_id, str):
            refuse(f"`{param}.call_id` must be a string", f"{param}.call_id")
        return {"role": "tool", "tool_call_id": call_id, "content": text_parts(output, f"{param}.output", _TEXTS)}
    if kind != "message":
        unsupported(kind, param, "a message, `reasoning`, `function_call` or `function_call_output`")
    role = item.get("role")
    if role not in ("user", "system", "developer"):
        refuse(f"`{param}.role` must be `user`, `assistant`, `system` or `developer`", f"{param}.role")
    # OpenAI's developer turn is a system turn; this model's own is a user turn that later ones make it forget.
    said = "user" if role == "user" else "system"
    return {"role": said, "content": text_parts(item.get("content"), f"{param}.content", _TEXTS)}
