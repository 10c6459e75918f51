"""What the fields of bodies may hold, as JSON Schema, where the body models say less: for the OpenAPI document.

The code that reads a field decides; a schema here is what it takes and means something, so that clients can be made
from the document and the server fuzzed with what it should answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.runtime.params import MAX_REPETITION_PENALTY, MAX_TEMPERATURE

Schema = dict[str, Any]
Shapes = Mapping[str, Schema]

_TEXT: Schema = {"type": "string"}
_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_OBJECT: Schema = {"type": "object"}
_ON: Schema = {"type": "boolean"}
_EFFORT: Schema = {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max"]}


def _known(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object of these properties and no others."""
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": list(required)} if required else found


def _list(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _only(*values: Any) -> Schema:
    return {"enum": list(values)}


def _content(*kinds: str) -> Schema:
    """A text, or text parts of these kinds."""
    return _any(_TEXT, _list(_known(("type", "text"), type=_only(*kinds), text=_TEXT), 1))


def _ids(vocab_size: int) -> Schema:
    return _list({"type": "integer", "minimum": 0, "maximum": vocab_size - 1}, 1)


_FUNCTION = _known(("name",), name=_NAME, description=_TEXT, parameters=_OBJECT)
_NAMED = _known(("type", "function"), type=_only("function"), function=_known(("name",), name=_NAME))
_FORMAT = _any(
    _known(("type",), type=_only("text", "json_object")),
    _known(
        ("type", "json_schema"),
        type=_only("json_schema"),
        json_schema=_known(("name", "schema"), name=_NAME, schema=_OBJECT, strict=_ON),
    ),
)
_CHOICES = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}


def sampling(vocab_size: int) -> Shapes:
    """Fields that every generating endpoint shares; ranges are those of `params.SamplingParams`."""
    return {
        "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
        "guided_choice": _CHOICES,
        "guided_grammar": {"type": "string", "minLength": 1},
        "guided_json": _OBJECT,
        "guided_regex": {"type": "string", "minLength": 1},
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,2})$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "min_p": {"type": "number", "minimum": 0, "maximum": 1},
        "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
        "priority": _only(0),
        "repetition_penalty": {
            "type": "number",
            "minimum": 1 / MAX_REPETITION_PENALTY,
            "maximum": MAX_REPETITION_PENALTY,
        },
        "response_format": _FORMAT,
        "stop": _any({"type": "string", "minLength": 1}, {**_CHOICES, "minItems": 0, "maxItems": 16}),
        "stop_token_ids": _ids(vocab_size),
        "stream_options": _known(include_usage=_ON, continuous_usage_stats=_only(False)),
        "structured_outputs": _any(
            _known(("json",), json=_OBJECT),
            _known(("choice",), choice=_CHOICES),
            _known(("regex",), regex=_TEXT),
            _known(("json_object",), json_object=_only(True)),
        ),
        "temperature": {"type": "number", "minimum": 0, "maximum": MAX_TEMPERATURE},
        "top_k": {"type": "integer", "minimum": -1, "maximum": 2**31 - 1},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    }


def completions(vocab_size: int) -> Shapes:
    """/v1/completions."""
    ids = _ids(vocab_size)
    text: Schema = {"type": "string", "minLength": 1}
    return {
        **sampling(vocab_size),
        "prompt": _any(text, _list(text, 1), ids, _list(ids, 1)),
        "suffix": _only(""),
    }


def chat(vocab_size: int) -> Shapes:
    """/v1/chat/completions."""
    return {
        **sampling(vocab_size),
        "chat_template_kwargs": _known(thinking=_ON, enable_thinking=_ON, drop_thinking=_ON),
        "messages": messages("system", "user", "tool"),
        "reasoning_effort": _EFFORT,
        "thinking": _known(("type",), type=_only("enabled", "disabled")),
        "tool_choice": _any(_only("auto", "none", "required"), _NAMED),
        "tools": _list(_known(("type", "function"), type=_only("function"), function=_FUNCTION)),
    }


def messages(*roles: str) -> Schema:
    """Turns of OpenAI's chat, of which an assistant's is not the last."""
    return _list(_known(("role", "content"), role=_only(*roles), content=_content("text")), 1)


def responses(vocab_size: int) -> Shapes:
    """/v1/responses."""
    chats = sampling(vocab_size)
    turn = _known(
        ("role", "content"), role=_only("user", "system", "developer"), content=_content("input_text", "text")
    )
    function = {**_FUNCTION, "properties": {"type": _only("function"), **_FUNCTION["properties"]}}
    return {
        **{name: chats[name] for name in ("temperature", "top_p")},
        "background": _only(False),
        "conversation": _only(None),
        "include": _list(_only("message.output_text.logprobs", "reasoning.encrypted_content")),
        "input": _any({"type": "string", "minLength": 1}, _list(turn, 1)),
        "previous_response_id": _only(None),
        "prompt": _only(None),
        "reasoning": _known(effort=_EFFORT),
        "stream_options": _known(include_obfuscation=_ON),
        "text": _known(format=_any(_known(("type",), type=_only("text", "json_object")))),
        "tool_choice": _any(
            _only("auto", "none", "required"), _known(("type", "name"), type=_only("function"), name=_NAME)
        ),
        "tools": _list({**function, "required": ["type", "name"]}),
        "truncation": _only("disabled"),
    }


def anthropic(vocab_size: int) -> Shapes:
    """/v1/messages, and what counts its tokens."""
    chats = sampling(vocab_size)
    turn = _known(("role", "content"), role=_only("user", "assistant"), content=_content("text"))
    tool = _known(("name", "input_schema"), name=_NAME, description=_TEXT, input_schema=_OBJECT)
    return {
        **{name: chats[name] for name in ("temperature", "top_p")},
        "messages": _list(turn, 1),
        "output_config": _known(effort=_EFFORT),
        "stop_sequences": {**_CHOICES, "minItems": 0, "maxItems": 16},
        "system": _content("text"),
        "thinking": _known(("type",), type=_only("enabled", "disabled", "adaptive")),
        "tool_choice": _any(
            _known(("type",), type=_only("auto", "any", "none")),
            _known(("type", "name"), type=_only("tool"), name=_NAME),
        ),
        "tools": _list(tool),
        "top_k": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    }


def tokens(vocab_size: int) -> Shapes:
    """/tokenize and /detokenize."""
    return {
        "add_special_tokens": _only(False),
        "messages": messages("system", "user", "tool"),
        "tokens": {**_ids(vocab_size), "minItems": 0},
    }
