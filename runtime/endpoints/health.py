"""/health, /ready and /metrics: for whoever watches the server.

`/health` fails when only a restart helps; `/ready` also while the server stops or its queue is full.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from dsv4c.runtime.metrics import CONTENT_TYPE
from dsv4c.runtime.openapi import route
from dsv4c.runtime.server import Server


def add(app: FastAPI, server: Server) -> None:
    """Adds the routes."""

    @app.get("/health", **route())
    async def health() -> JSONResponse:
        server.check_healthy()
        return JSONResponse({"status": "ok"})

    @app.get("/ready", **route())
    async def ready() -> JSONResponse:
        server.check_ready()
        stats = server.engine.stats()
        return JSONResponse({"status": "ready", "running": stats.running, "waiting": stats.waiting})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)
