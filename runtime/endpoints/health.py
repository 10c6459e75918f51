"""/health and /metrics: for whoever watches the server."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from dsv4c.runtime.metrics import CONTENT_TYPE
from dsv4c.runtime.server import Server


def add(app: FastAPI, server: Server) -> None:
    """Adds the routes."""

    @app.get("/health")
    async def health() -> JSONResponse:
        server.check_ready()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)
