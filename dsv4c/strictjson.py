"""JSON values -> annotated dataclasses, strictly: what does not fit is an ArtifactError that names its place."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Literal

from dsv4c.errors import ArtifactError


def _shape_error(path: str, expected: str, value: Any) -> ArtifactError:
    return ArtifactError(
        f"manifest: `{path or 'top level'}` should be {expected}, not {json.dumps(value)[:60]}",
        hint="the manifest is corrupted; compile the artifact again",
    )


def decode(kind: Any, value: Any, path: str = "") -> Any:
    """A JSON value as this annotated type. `path`: its place in the file, for errors."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return decode_object(kind, value, path)
    if origin is Literal:
        if value not in args:
            raise _shape_error(path, f"one of {', '.join(map(str, args))}", value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _shape_error(path, "a list", value)
        return tuple(decode(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _shape_error(path, "an object", value)
        return {key: decode(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if option is type(None) and value is None:
                return None
            if dataclasses.is_dataclass(option) and isinstance(value, dict):
                return decode(option, value, path)
            if isinstance(option, type) and type(value) is option:
                return value
        raise _shape_error(path, " or ".join(getattr(a, "__name__", str(a)) for a in args), value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _shape_error(path, getattr(kind, "__name__", str(kind)), value)
    return value


def decode_object(kind: type, value: Any, path: str = "") -> Any:
    """A JSON object as this dataclass: every key known, every field without a default there."""
    if not isinstance(value, dict):
        raise _shape_error(path, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "was it written by another version of dsv4c?"
            raise ArtifactError(f"manifest: unknown key `{f'{path}.{key}'.lstrip('.')}`", hint=hint)
    for name, f in fields.items():
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if name not in value and not optional:
            raise ArtifactError(
                f"manifest: `{f'{path}.{name}'.lstrip('.')}` is missing",
                hint="the manifest is corrupted; compile the artifact again",
            )
    return kind(**{k: decode(hints[k], v, f"{path}.{k}".lstrip(".")) for k, v in value.items()})
