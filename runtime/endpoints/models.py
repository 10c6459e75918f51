"""/v1/models: the one model served."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import JSONResponse

from dsv4c.runtime.openapi import route
from dsv4c.runtime.server import Server


def add(app: FastAPI, server: Server) -> None:
    """Adds the routes."""
    model = {"id": server.model_name, "object": "model", "created": server.created, "owned_by": "dsv4c"}
    model |= {"max_model_len": server.engine.max_context}

    @app.get("/v1/models", **route())
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}", **route())
    async def get_model(model_id: str) -> JSONResponse:
        server.check_model(model_id)
        return JSONResponse(model)
