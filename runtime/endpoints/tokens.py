"""/tokenize and /detokenize: text or messages to token ids and back, exactly as the generating endpoints see them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import JSONResponse

from dsv4c.runtime import shapes
from dsv4c.runtime.endpoints.chat import ChatBody, chat_prompt
from dsv4c.runtime.fields import INERT, Body, unknown_keys
from dsv4c.runtime.openapi import route
from dsv4c.runtime.protocol import parse_body, refuse, token_ids
from dsv4c.runtime.server import Server, offload

_CHAT = ("messages", "tools", "tool_choice", "thinking", "reasoning_effort", "chat_template_kwargs", "response_format")
_FIXED = {"add_generation_prompt": True, "continue_final_message": False}


class TokenizeBody(Body):
    """Body of /tokenize: `prompt`, or `messages` and what else shapes a chat's prompt. `model` may be left out."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Body of /detokenize. `model` may be left out."""

    model: str | None = None
    tokens: list[Any]
    skip_special_tokens: bool | None = None


def add(app: FastAPI, server: Server) -> None:
    """Adds the routes."""
    codec = server.codec
    told = shapes.tokens(codec.vocab_size)

    @app.post("/tokenize", **route(TokenizeBody, server.model_name, told))
    async def tokenize(request: Request) -> JSONResponse:
        body = parse_body(TokenizeBody, await server.read_body(request))
        server.check_model(server.model_name if body.model is None else body.model)
        if (body.prompt is None) == (body.messages is None):
            refuse("give either `prompt` or `messages`", "prompt")
        if body.add_special_tokens:
            hint = "write them into `prompt`, as for /v1/completions"
            refuse("`add_special_tokens` is not supported: text gets none", "add_special_tokens", hint=hint)
        extra = body.model_extra or {}
        if body.prompt is not None:
            ids, ignored = await offload(codec.encode, body.prompt, len(body.prompt)), body.unknown
        else:
            chat = {name: extra[name] for name in _CHAT if name in extra}
            said = parse_body(ChatBody, {"model": server.model_name, "messages": body.messages, **chat})
            (ids, _), ignored = await chat_prompt(server, said), said.ignored_fields
            ignored += unknown_keys("", extra, (*INERT, *_CHAT, *(k for k, v in _FIXED.items() if extra.get(k) == v)))
        shown = {"token_strs": [codec.token_text(i) for i in ids]} if body.return_token_strs else {}
        answer = {"count": len(ids), "max_model_len": server.engine.max_context, "tokens": ids, **shown}
        return JSONResponse(answer, headers=server.ignored_header(ignored))

    @app.post("/detokenize", **route(DetokenizeBody, server.model_name, told))
    async def detokenize(request: Request) -> JSONResponse:
        body = parse_body(DetokenizeBody, await server.read_body(request))
        server.check_model(server.model_name if body.model is None else body.model)
        ids = token_ids(body.tokens, "tokens", codec.vocab_size) if body.tokens else []
        if body.skip_special_tokens is False:
            text = b"".join(map(codec.token_bytes, ids)).decode(errors="replace")
        else:
            text = codec.decode(ids)
        return JSONResponse({"prompt": text}, headers=server.ignored_header(body.unknown))
