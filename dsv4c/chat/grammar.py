"""What an answer may be, as a grammar for llguidance: reasoning first, then content, tool calls, or either.

    thinking    any text, then the token `</think>`
    content     free text, or what the request's own grammar matches
    calls       "\\n\\n<｜DSML｜tool_calls>\\n" call ("\\n" call)* "\\n</｜DSML｜tool_calls>", as dsml.py renders them

Markup is given by token id, so that neither reasoning nor values can hold it. Arguments follow the tool's parameters
schema, in the order of its properties: strings as raw text (of their constraints, `enum`, `const`, `minLength` and
`maxLength` are kept, `pattern` and `format` are not), all else as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4c.chat.dsml import CALLS_OPEN, to_json
from dsv4c.chat.tokens import DSML
from dsv4c.errors import RequestError

_INVOKE = 'invoke name="{name}">'
_PARAMETER = 'parameter name="{key}" string="{flag}">'
_FREE = r"/(.|\n)*/"
_SHARED = ("$defs", "definitions", "$schema")  # of a schema: what its properties may point to


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that markup is made of."""

    dsml: int
    think_end: int

    @property
    def token(self) -> str:
        """The markup token, as a grammar names it."""
        return f"<[{self.dsml}]>"


def answer_grammar(
    marks: Marks,
    content: Mapping[str, Any] | None,
    *,
    thinking: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    forced: bool = False,
    parallel: bool = True,
) -> str:
    """The JSON form of a grammar.

    `content`: `{"lark_grammar": ...}` or `{"json_schema": ...}`; None is free text. `tools`: OpenAI's `function`
    objects that may be called; `forced`: one must be, and nothing else said. Raises RequestError (400) for parameters
    that are no schema of an object.
    """
    rules = [f"start: {f'REASONING <[{marks.think_end}]> ' if thinking else ''}answer"]
    if thinking:
        rules.append(f"REASONING: {_FREE}")
    said = "@content" if content is not None else "FREE"
    calls: list[str] = []
    if tools:
        said = "calls" if forced else f"{said} | calls"
        calls = [*_calls(marks, tools, parallel, after_text=not forced and content is None)]
    rules.append(f"answer: {said}")
    if "FREE" in said:
        rules.append(f"FREE: {_FREE}")
    grammars: list[dict[str, Any]] = [{"lark_grammar": "\n".join([*rules, *calls])}]
    if "@content" in said:
        grammars.append({"name": "content", **(content or {})})
    return json.dumps({"grammars": grammars})


def _calls(marks: Marks, tools: Sequence[Mapping[str, Any]], parallel: bool, *, after_text: bool) -> Iterator[str]:
    """Rules of a block of calls. Where several texts may follow, each reaches to the next markup token."""
    d = marks.token
    before = r"/(.|\n)*\n\n</" if after_text else _quoted(f"\n\n{_before(CALLS_OPEN)}")
    more = f' ("\\n<" {d} call)*' if parallel else ""
    name = _after(CALLS_OPEN)
    yield f'calls: {before} {d} {_quoted(name)} "\\n<" {d} call{more} "\\n</" {d} {_quoted(name)}'
    yield "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))
    for i, tool in enumerate(tools):
        yield from _call(d, f"call_{i}", tool, f"tools[{i}].function")
    yield r"VALUE: /(.|\n)*<\//"  # runs into the closing tag's first characters
    yield r'KEY: /[^"<>\n]+/'


def _call(d: str, rule: str, tool: Mapping[str, Any], param: str) -> Iterator[str]:
    schema = tool.get("parameters") or {}
    properties = schema.get("properties", {}) if isinstance(schema, Mapping) else None
    required = schema.get("required", []) if isinstance(schema, Mapping) else None
    if not (isinstance(properties, Mapping) and isinstance(required, list)) or schema.get("type", "object") != "object":
        raise RequestError(
            f"`{param}.parameters` is not the schema of an object",
            param=f"{param}.parameters",
            code="invalid_value",
            hint='give `{"type": "object", "properties": {...}}`',
        )
    shared = {key: schema[key] for key in _SHARED if key in schema}
    wanted = [*properties, *(key for key in dict.fromkeys(map(str, required)) if key not in properties)]
    names = [f"{rule}_{j}" for j in range(len(wanted))]
    none = _quoted("\n\n</")
    body = none if not any(key in required for key in wanted) else ""
    if wanted:
        body = " | ".join(filter(None, [f'"\\n<" {d} {rule}_from_0 "\\n</"', body]))
    elif schema.get("additionalProperties", True) is not False:
        yield f"{rule}_any: {_any_parameter(d)}"
        body = f'"\\n<" {d} {rule}_any ("\\n<" {d} {rule}_any)* "\\n</" | {none}'
    opened = _quoted(_INVOKE.format(name=tool["name"]))
    yield f'{rule}: {opened} ({body}) {d} "invoke>"'
    for name, key in zip(names, wanted, strict=True):
        yield f"{name}: {_parameter(d, key, properties.get(key, {}), shared)}"
    for j, name in enumerate(names):  # j is the first parameter that comes
        rest = [f'("\\n<" {d} {n}){"" if key in required else "?"}' for n, key in zip(names[j + 1 :], wanted[j + 1 :])]
        skipped = wanted[j] not in required and j + 1 < len(names)
        yield f"{rule}_from_{j}: {' '.join([name, *rest])}{f' | {rule}_from_{j + 1}' if skipped else ''}"
        if not skipped:
            return


def _parameter(d: str, key: str, schema: Any, shared: Mapping[str, Any]) -> str:
    forms = []
    kinds = _kinds(schema)
    if "string" in kinds:
        opened = _quoted(_PARAMETER.format(key=key, flag="true"))
        forms.append(f"{opened} {_text(schema)}")
    if "other" in kinds:
        value = {**shared, **schema} if isinstance(schema, Mapping) else {}
        opened = _quoted(_PARAMETER.format(key=key, flag="false"))
        forms.append(f'{opened} %json {to_json(_compact(value))} "</"')
    return f'({" | ".join(forms)}) {d} "parameter>"'


def _any_parameter(d: str) -> str:
    raw, parsed = _quoted('" string="true">'), _quoted('" string="false">')
    value = f'{raw} VALUE | {parsed} %json {to_json(_compact({}))} "</"'
    opened = _quoted(_PARAMETER.partition("{")[0])
    return f'{opened} KEY ({value}) {d} "parameter>"'


def _text(schema: Any) -> str:
    """The value of a string parameter, raw, up to the tag that closes it."""
    given = schema if isinstance(schema, Mapping) else {}
    words = [given["const"]] if "const" in given else given.get("enum")
    if words is not None:
        return f"({' | '.join(_quoted(f'{word}</') for word in words if isinstance(word, str))})"
    low, high = given.get("minLength"), given.get("maxLength")
    if low is None and high is None:
        return "VALUE"
    return rf"/(.|\n){{{low or 0},{'' if high is None else high}}}<\//"


def _kinds(schema: Any) -> set[str]:
    """`string`, `other`, or both: what the values of a parameter can be."""
    if not isinstance(schema, Mapping):
        return {"string", "other"}
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return {"string" if isinstance(v, str) else "other" for v in values} or {"other"}
    said = schema.get("type")
    types = [said] if isinstance(said, str) else said
    if isinstance(types, list) and types:
        return {"string" if t == "string" else "other" for t in types}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            return set().union(*(_kinds(s) for s in schema[key]))
    return {"string", "other"}


def _compact(schema: Mapping[str, Any]) -> dict[str, Any]:
    """With JSON written as the model was trained to write it."""
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**schema, "x-guidance": options}


def _before(tag: str) -> str:
    """What of a tag comes before its markup token."""
    return tag.partition(DSML)[0]


def _after(tag: str) -> str:
    """What of a tag comes behind its markup token."""
    return tag.partition(DSML)[2]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
