"""What a route takes and gives, for the OpenAPI document; handlers read bodies themselves, so that faults are ours."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_FAULT = {"content": {"application/json": {"schema": _ERROR}}}
FAULTS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is at fault", **_FAULT},
    "503": {"description": "Try again later", **_FAULT},
}


def route(body: type[BaseModel] | None = None, *, streams: bool = False) -> dict[str, Any]:
    """Keyword arguments of a FastAPI route that reads its own body and answers with an object, or with events."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    told: dict[str, Any] = {"responses": {200: {"description": "Done", "content": content}, **FAULTS}}
    if body is not None:
        schema = {"schema": body.model_json_schema()}
        told["openapi_extra"] = {"requestBody": {"required": True, "content": {"application/json": schema}}}
    return told
