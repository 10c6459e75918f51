"""The HTTP face of an engine as one FastAPI application: the endpoints, and every fault as one error body.

    create_app(engine, codec, model_name) -> FastAPI     no global state: two apps live in one process

The app neither starts nor stops the engine. `app.state.server` is the `Server`, which serve.py tells to drain.
Every fault of a request is one OpenAI error body (400, 404, 405, 413, 503); a fault of ours is a 500 without details,
its trace goes to the log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from dsv4c.errors import Dsv4cError, RequestError
from dsv4c.runtime.completion import TextCodec
from dsv4c.runtime.endpoints import ENDPOINTS
from dsv4c.runtime.gate import Gate
from dsv4c.runtime.grammar import Grammars
from dsv4c.runtime.keys import KeyRing
from dsv4c.runtime.operations import Operations
from dsv4c.runtime.protocol import error_body, error_kind
from dsv4c.runtime.record import record_of
from dsv4c.runtime.server import Server
from dsv4c.runtime.service import Engine


def create_app(
    engine: Engine,
    codec: TextCodec,
    model_name: str,
    *,
    default_thinking: bool = False,
    strict: bool = False,
    operations: Operations | None = None,
    fingerprint: str | None = None,
    grammars: Grammars | None = None,
) -> FastAPI:
    """The application for one engine that runs in a thread of its own; the caller starts and stops it.

    `default_thinking`: chat requests that do not say. `strict`: unknown fields are errors, not a response header.
    `operations`: keys, limits, deadlines. `fingerprint`: `system_fingerprint` of responses, to reproduce with `seed`.
    `grammars`: for structured output, if the engine can enforce it.
    """
    server = Server(
        engine,
        codec,
        model_name,
        default_thinking=default_thinking,
        strict=strict,
        operations=operations,
        fingerprint=fingerprint,
        grammars=grammars,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        server.bind_loop()
        yield
        server.unbind_loop()

    app = FastAPI(
        title="dsv4c",
        docs_url=None,  # the pages load from a CDN
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat whatever `Host` says
        lifespan=lifespan,
    )
    app.state.server = server
    _add_error_handlers(app, server)
    for add in ENDPOINTS:
        add(app, server)
    _add_middleware(app, server)
    return app


def _add_middleware(app: FastAPI, server: Server) -> None:
    """The gate, and around it CORS where it is wanted, so that a browser can read a refusal and ask beforehand."""
    operations = server.operations
    app.add_middleware(
        Gate,
        keys=KeyRing(operations.api_keys),
        max_inflight=operations.max_inflight,
        observers=operations.observers,
        shapes=server.error_shapes,
    )
    if operations.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(operations.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-ignored-fields", "retry-after"],
        )


def _add_error_handlers(app: FastAPI, server: Server) -> None:
    def count(request: Request, status: int) -> None:
        route = request.scope.get("route")
        server.metrics.responses.labels(getattr(route, "path", "other"), str(status)).inc()

    def shaped(
        request: Request, body: dict[str, Any], status: int, headers: Mapping[str, str] | None = None
    ) -> JSONResponse:
        shape = server.error_shapes.get(request.scope["path"])
        return JSONResponse(body if shape is None else shape(body, status), status, headers=headers)

    @app.exception_handler(Dsv4cError)
    async def deliberate(request: Request, error: Dsv4cError) -> JSONResponse:
        response = server.refusal(error, request.scope["path"])
        count(request, response.status_code)
        if (record := record_of(request.scope)) is not None:
            record.error = error.code if isinstance(error, RequestError) else "engine_error"
        if response.status_code in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
            response.headers["connection"] = "close"  # the rest of the body will not be read
        return response

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        count(request, error.status_code)
        path = request.url.path[:100]
        messages = {404: f"no such path `{path}`", 405: f"`{request.method}` is not allowed on `{path}`"}
        message = messages.get(error.status_code, str(error.detail).lower())
        body = error_body(message, kind=error_kind(error.status_code), code=HTTPStatus(error.status_code).name.lower())
        return shaped(request, body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, _error: Exception) -> JSONResponse:
        count(request, 500)
        record = record_of(request.scope)
        headers = None if record is None else {"x-request-id": record.request_id}
        return shaped(request, error_body("internal error", kind=error_kind(500), code="internal_error"), 500, headers)
