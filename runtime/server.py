"""The HTTP face of an engine: OpenAI's endpoints, health and metrics, as one FastAPI application.

    create_app(engine, codec, model_name) -> FastAPI     no global state: two apps live in one process

The app neither starts nor stops the engine. `app.state.server` is the `Server`, which serve.py tells to drain.
Every fault of a request is one OpenAI error body (400, 404, 405, 413, 503); a fault of ours is a 500 without details,
its trace goes to the log.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from dsv4c.errors import Dsv4cError, EngineError, RequestError
from dsv4c.runtime.answer import Answer, Job, Part, error_response
from dsv4c.runtime.completion import Choice, TextCodec
from dsv4c.runtime.metrics import CONTENT_TYPE, Metrics
from dsv4c.runtime.protocol import (
    MAX_SEQUENCES,
    ChatBody,
    CompletionBody,
    error_body,
    error_kind,
    parse_body,
    parse_json,
    refuse,
)
from dsv4c.runtime.service import Bridge, Engine, Group

MAX_BODY_BYTES = 32 * 2**20  # a million tokens as ids, or as text of any script, with room to spare
_INLINE_CHARS = 8192  # longer texts are tokenised in a thread: about 2 ms here, which other streams would notice
_FIELD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ArgumentT = TypeVar("ArgumentT")


class Server:
    """What the handlers share: engine, codec, numbers, and whether new requests are still taken."""

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        model_name: str,
        *,
        default_thinking: bool = False,
        strict: bool = False,
        max_body_bytes: int = MAX_BODY_BYTES,
        fingerprint: str | None = None,
    ) -> None:
        self.engine = engine
        self.codec = codec
        self.model_name = model_name
        self.default_thinking = default_thinking
        self.strict = strict
        self.max_body_bytes = max_body_bytes
        self.fingerprint = fingerprint
        self.metrics = Metrics(engine.stats)
        self.created = int(time.time())
        self.draining = False
        self._bridge: Bridge | None = None
        self._groups: set[Group] = set()

    def bind_loop(self) -> None:
        """Ties the server to the running event loop."""
        self._bridge = Bridge(asyncio.get_running_loop())

    def drain(self) -> None:
        """Takes no new requests; those in flight go on."""
        self.draining = True

    def abort_all(self) -> None:
        """Ends every request in flight: whole ones get a 503, streams an error event."""
        error = RequestError("the server is shutting down", status=503, code="shutting_down", hint="try again later")
        for group in list(self._groups):
            group.fail(error)

    @asynccontextmanager
    async def group(self) -> AsyncIterator[Group]:
        """The engine requests of one HTTP request, known to `abort_all` while they run."""
        if self._bridge is None:
            raise EngineError("the server has no event loop", hint="run the app with its lifespan")
        async with Group(self.engine, self._bridge) as group:
            self._groups.add(group)
            try:
                yield group
            finally:
                self._groups.discard(group)

    async def read_body(self, request: Request) -> dict[str, object]:
        """The JSON object of a request. Raises RequestError: 413 for a body over the limit, 400 for no JSON."""
        self.check_ready()
        limit = self.max_body_bytes
        declared = request.headers.get("content-length", "")
        chunks: list[bytes] = []
        size = int(declared) if declared.isdigit() else 0
        if size <= limit:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    break
                chunks.append(chunk)
        if size > limit:
            refuse(f"the request body is larger than {limit} bytes", None, status=413, code="body_too_large")
        return dict(parse_json(b"".join(chunks)))

    def check_ready(self) -> None:
        """Raises RequestError (503) when nothing can be served any more."""
        if self.draining:
            refuse("the server is shutting down", None, status=503, code="shutting_down", hint="try again later")
        if self.engine.failure is not None:
            refuse(f"the engine has stopped: {self.engine.failure.message}", None, status=503, code="engine_failed")

    def check_model(self, name: str) -> None:
        """Raises RequestError (404) unless this is the model served."""
        if name != self.model_name:
            hint = f"this server has `{self.model_name}`"
            refuse(f"no model `{name[:100]}`", "model", status=404, code="model_not_found", hint=hint)

    def extra_headers(self, request_id: str, ignored: list[str]) -> dict[str, str]:
        """The request id, and the names of fields without effect. Raises RequestError for those under `strict`."""
        headers = {"x-request-id": request_id}
        if not ignored:
            return headers
        shown = [name if _FIELD_NAME.fullmatch(name) else "?" for name in ignored[:16]]
        if self.strict:
            refuse(f"unknown field `{shown[0]}`", shown[0], code="unknown_parameter", hint="this server is strict")
        return {**headers, "x-ignored-fields": ", ".join(shown)}

    def room(self, prompt_len: int, asked: int | None, param: str) -> int:
        """How many tokens may follow a prompt. Raises RequestError when the context cannot hold what was asked."""
        context = self.engine.max_context
        if prompt_len == 0:
            refuse(f"`{param}` has no tokens", param, hint="give at least 1 token")
        if prompt_len >= context:
            text = f"the prompt has {prompt_len} tokens, the context is {context} with at least 1 to generate"
            refuse(text, param, code="context_length_exceeded", hint="shorten the prompt")
        if asked is not None and prompt_len + asked > context:
            refuse(
                f"the prompt's {prompt_len} tokens and `max_tokens` {asked} exceed the context of {context}",
                "max_tokens",
                code="context_length_exceeded",
                hint=f"`max_tokens` can be {context - prompt_len} at most",
            )
        return context - prompt_len

    async def completion_job(self, body: CompletionBody) -> Job:
        """Checks a /v1/completions body against model, context and limits."""
        codec, request_id = self.codec, f"cmpl-{uuid.uuid4().hex}"
        self.check_model(body.model)
        body.check()
        given, asked, n = body.prompts(codec.vocab_size), body.new_tokens(), body.num_choices
        if len(given) * n > MAX_SEQUENCES:
            refuse(f"{len(given)} prompts times `n` {n} is more than {MAX_SEQUENCES} sequences", "prompt")
        stops, include_usage = body.stops(), body.include_usage()
        headers = self.extra_headers(request_id, body.ignored_fields)
        prompts = [p if isinstance(p, list) else await _offload(codec.encode, p, len(p)) for p in given]
        parts: list[Part] = []
        for prompt in prompts:
            room = self.room(len(prompt), body.max_tokens, "prompt")
            for number in range(n):
                params = body.sampling(
                    choice=number,
                    max_tokens=max(1, min(asked, room)),
                    vocab_size=codec.vocab_size,
                    logprobs=body.logprobs,
                    prompt_logprobs=body.logprobs if body.echo else None,
                )
                choice = Choice(
                    codec,
                    index=len(parts),
                    stops=stops,
                    scored=body.logprobs is not None,
                    min_tokens=params.min_tokens,
                )
                parts.append(Part(prompt, params, choice))
        return Job(
            "completion",
            request_id,
            self.model_name,
            codec,
            parts,
            sum(map(len, prompts)),
            stream=bool(body.stream),
            include_usage=include_usage,
            echo=bool(body.echo),
            scored=body.logprobs is not None,
            score_only=asked == 0,
            fingerprint=self.fingerprint,
            headers=headers,
        )

    async def chat_job(self, body: ChatBody) -> Job:
        """Checks a /v1/chat/completions body against model, chat format, context and limits."""
        codec, request_id = self.codec, f"chatcmpl-{uuid.uuid4().hex}"
        self.check_model(body.model)
        body.check_content()
        asked, logprobs, stops = body.new_tokens(), body.num_logprobs(), body.stops()
        thinking, effort = body.mode(self.default_thinking)
        tools, response_format = body.prompt_tools(), body.prompt_format()
        include_usage = body.include_usage()
        headers = self.extra_headers(request_id, body.ignored_fields)

        def encode(messages: list[dict[str, object]]) -> list[int]:
            return codec.chat_prompt(
                messages, thinking=thinking, effort=effort, tools=tools, response_format=response_format
            )

        prompt = await _offload(encode, body.messages, len(json.dumps([body.messages, tools])))
        room = self.room(len(prompt), asked, "messages")
        parts = []
        for number in range(body.num_choices):
            params = body.sampling(
                choice=number,
                max_tokens=room if asked is None else asked,
                vocab_size=codec.vocab_size,
                logprobs=logprobs,
            )
            choice = Choice(
                codec,
                index=number,
                stops=stops,
                splitter=codec.splitter(thinking),
                scored=logprobs is not None,
                min_tokens=params.min_tokens,
            )
            parts.append(Part(prompt, params, choice))
        return Job(
            "chat",
            request_id,
            self.model_name,
            codec,
            parts,
            len(prompt),
            stream=bool(body.stream),
            include_usage=include_usage,
            scored=logprobs is not None,
            thinking=thinking,
            fingerprint=self.fingerprint,
            headers=headers,
        )


def create_app(
    engine: Engine,
    codec: TextCodec,
    model_name: str,
    *,
    default_thinking: bool = False,
    strict: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
    fingerprint: str | None = None,
) -> FastAPI:
    """The application for one engine that runs in a thread of its own; the caller starts and stops it.

    `default_thinking`: chat requests that do not say. `strict`: unknown fields are errors, not a response header.
    `fingerprint`: `system_fingerprint` of responses, for reproducibility with `seed`.
    """
    server = Server(
        engine,
        codec,
        model_name,
        default_thinking=default_thinking,
        strict=strict,
        max_body_bytes=max_body_bytes,
        fingerprint=fingerprint,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        server.bind_loop()
        yield
        server.abort_all()

    app = FastAPI(title="dsv4c", docs_url=None, redoc_url=None, lifespan=lifespan)  # the pages load from a CDN
    app.state.server = server
    _add_error_handlers(app, server)
    _add_routes(app, server)
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    model = {"id": server.model_name, "object": "model", "created": server.created, "owned_by": "dsv4c"}
    model |= {"max_model_len": server.engine.max_context}

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> JSONResponse:
        server.check_model(model_id)
        return JSONResponse(model)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse_body(CompletionBody, await server.read_body(request))
        return Answer(await server.completion_job(body), server.group, server.metrics)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse_body(ChatBody, await server.read_body(request))
        return Answer(await server.chat_job(body), server.group, server.metrics)

    @app.get("/health")
    async def health() -> JSONResponse:
        server.check_ready()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)


def _add_error_handlers(app: FastAPI, server: Server) -> None:
    def count(request: Request, status: int) -> None:
        route = request.scope.get("route")
        server.metrics.responses.labels(getattr(route, "path", "other"), str(status)).inc()

    @app.exception_handler(Dsv4cError)
    async def deliberate(request: Request, error: Dsv4cError) -> JSONResponse:
        response = error_response(error)
        count(request, response.status_code)
        if response.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            response.headers["connection"] = "close"  # the rest of the body will not be read
        return response

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        count(request, error.status_code)
        path = request.url.path[:100]
        messages = {404: f"no such path `{path}`", 405: f"`{request.method}` is not allowed on `{path}`"}
        message = messages.get(error.status_code, str(error.detail).lower())
        body = error_body(message, kind=error_kind(error.status_code), code=HTTPStatus(error.status_code).name.lower())
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, _error: Exception) -> JSONResponse:
        count(request, 500)
        return JSONResponse(error_body("internal error", kind=error_kind(500), code="internal_error"), 500)


async def _offload(function: Callable[[ArgumentT], list[int]], argument: ArgumentT, size: int) -> list[int]:
    """Tokenises in a thread when the text is long, so that running streams do not stall."""
    if size <= _INLINE_CHARS:
        return function(argument)
    return await asyncio.to_thread(function, argument)
