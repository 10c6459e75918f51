"""The wire: bytes to typed bodies, whatever is wrong with them to one RequestError, and the OpenAI error body.

bytes --parse_json--> object --parse_body--> the endpoint's body model (endpoints/, fields.py)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from dsv4c.errors import RequestError

_SCALARS = (str, int, float, bool)
_REASONS = {  # pydantic's error types in our words
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "float_type": "must be a number",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be an integer",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "string_type": "must be a string",
    "too_short": "is empty",
}

_NOT_JSON = {  # the JSON parser's errors in our words
    "recursion limit exceeded": "is nested too deeply",
    "invalid unicode code point": "is not UTF-8",
}
_MAYBE_INFINITE = re.compile(rb"[0-9]{300}|[eE]\+?[0-9]{3}")  # what may exceed a double

BodyT = TypeVar("BodyT", bound=BaseModel)


@dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request; a prompt counts once, whatever `n`. `cached_tokens`: prompt tokens not computed."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int | None = None
    cached_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            body["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return body


def refuse(message: str, param: str | None, *, hint: str = "", status: int = 400, code: str | None = None) -> NoReturn:
    """Raises the RequestError of a bad value."""
    raise RequestError(message, status=status, param=param, code=code or "invalid_value", hint=hint)


def parse_json(raw: bytes) -> Mapping[str, Any]:
    """The JSON object in a request body. Raises RequestError (400) for anything else, however nasty.

    Of at most 200 levels (the parser's limit): what is let in here can be walked and written by recursion.
    """
    try:
        value = from_json(raw, allow_inf_nan=False)
        if _MAYBE_INFINITE.search(raw):
            json.dumps(value, allow_nan=False)  # the parser reads 1e999 as infinity
    except ValueError as error:
        said = str(error)
        reason = _NOT_JSON.get(said.split(" at line")[0], f"is not JSON: {said[0].lower()}{said[1:]}")
        refuse(f"the request body {reason}"[:200], None, code="invalid_json")
    if not isinstance(value, dict):
        refuse("the request body must be a JSON object", None, code="invalid_json")
    return value


def parse_body(kind: type[BodyT], data: Mapping[str, Any]) -> BodyT:
    """The typed body. Raises RequestError naming the first field at fault."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=True)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        refuse(f"`{param}` is missing", param, code="missing_required_parameter")
    given = first["input"]
    shown = f", not {json.dumps(given)[:60]}" if isinstance(given, _SCALARS) or given is None else ""
    reason = _REASONS.get(first["type"], "").format(**first.get("ctx", {}))
    if not reason:
        reason = first["msg"].replace("Input should be ", "must be ")
        reason = reason[0].lower() + reason[1:]
    refuse(f"`{param}` {reason}{shown}", param)


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The OpenAI error body."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_kind(status: int) -> str:
    """OpenAI's `type` word for an HTTP status."""
    kinds = {404: "not_found_error", 503: "service_unavailable_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def logprob_number(value: float) -> float:
    """A finite logprob, as JSON has no infinity; -9999 is OpenAI's word for minus infinity."""
    return value if math.isfinite(value) else -9999.0


def token_ids(value: list[Any], param: str, vocab_size: int) -> list[int]:
    """The list, if it holds token ids and nothing else. Raises RequestError."""
    if not value:
        refuse(f"`{param}` is empty", param)
    ids = [token if type(token) is int else whole(token) for token in value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            refuse(f"`{param}` holds {str(token)[:40]}, which is not a token id below {vocab_size}", param)
    return ids


def whole(value: Any) -> Any:
    """7.0 as 7, for JSON Schema calls it an integer; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
