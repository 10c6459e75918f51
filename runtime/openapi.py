"""What a route takes and gives, for the OpenAPI document; handlers read bodies themselves, so that faults are ours."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from dsv4c.runtime.shapes import Shapes

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


def route(
    body: type[BaseModel] | None = None,
    model: str | None = None,
    shapes: Shapes | None = None,
    *,
    streams: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of a FastAPI route that reads its own body and answers with an object, or with events.

    `model`: the name of the one that is served. `shapes`: of fields that the body's model says less about.
    """
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {}
    told: dict[str, Any] = {"responses": {200: {"description": "Done", "content": content}, **FAULTS}}
    if body is not None:
        schema = body.model_json_schema()
        fields = schema["properties"]
        for name in fields.keys() & (shapes or {}).keys():
            shape = (shapes or {})[name]
            fields[name] = shape if name in schema.get("required", ()) else {"anyOf": [shape, {"type": "null"}]}
        if model is not None:
            fields["model"] = {"enum": [model]}
        media = {"application/json": {"schema": schema}}
        told["openapi_extra"] = {"requestBody": {"required": True, "content": media}}
    return told
