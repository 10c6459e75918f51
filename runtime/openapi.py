"""What a route takes and gives, for the OpenAPI document; handlers read bodies themselves, so that faults are ours."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from dsv4c.runtime.params import MAX_REPETITION_PENALTY

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


_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": {"type": "string"}},
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_STRINGS = {"type": "array", "items": {"type": "string"}}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["system", "user", "assistant", "tool"]}, "content": _CONTENT},
}
_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "description": {"type": "string"}, "parameters": {"type": "object"}},
}
_SHAPES: dict[str, dict[str, Any]] = {  # of fields that are checked by code, where they may hold anything else
    "input": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _MESSAGE}]},
    "prompt": {"anyOf": [{"type": "string"}, _STRINGS, _IDS, {"type": "array", "items": _IDS}]},
    "stop": {"anyOf": [{"type": "string", "minLength": 1}, _STRINGS]},
    "system": _CONTENT,
    "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}]},
}
_RANGES: dict[str, dict[str, Any]] = {  # as params.SamplingParams has them
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "min_tokens": {"type": "integer", "minimum": 0},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "minimum": 1 / MAX_REPETITION_PENALTY, "maximum": MAX_REPETITION_PENALTY},
    "stop_sequences": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16},
    "stop_token_ids": _IDS,
    "temperature": {"type": "number", "minimum": 0},
    "top_k": {"type": "integer", "minimum": -1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
}


def route(body: type[BaseModel] | None = None, model: str | None = None, *, streams: bool = False) -> dict[str, Any]:
    """Keyword arguments of a FastAPI route that reads its own body and answers with an object, or with events.

    `model`: the name of the one that is served.
    """
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {}
    told: dict[str, Any] = {"responses": {200: {"description": "Done", "content": content}, **FAULTS}}
    if body is not None:
        schema = body.model_json_schema()
        fields = schema["properties"]
        for name, field in fields.items():
            known = _RANGES.get(name) or (None if field.keys() & {"type", "anyOf"} else _SHAPES.get(name))
            if known is not None:
                needed = name in schema.get("required", ())
                fields[name] = known if needed else {"anyOf": [known, {"type": "null"}]}
        if "messages" in fields:
            fields["messages"] = {**fields["messages"], "items": _MESSAGE}
        if model is not None:
            fields["model"] = {"enum": [model]}
        media = {"application/json": {"schema": schema}}
        told["openapi_extra"] = {"requestBody": {"required": True, "content": media}}
    return told
