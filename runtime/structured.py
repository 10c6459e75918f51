"""Structured output as requests ask for it: their fields, checked, to the grammar of an answer.

    response_format      {"type": "json_schema" | "json_object" | "text"}, as OpenAI has it
    structured_outputs   {"json" | "regex" | "choice" | "grammar" | "json_object": ...}, as vLLM has it
    guided_*             the same in vLLM's older spelling

What is asked for is enforced, or refused with 400; a `json_schema` with `strict: false` is only shown to the model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark
from pydantic import BaseModel

from dsv4c.runtime.grammar import MAX_SOURCE_CHARS, Grammar, GrammarCodec, Grammars, GrammarSource
from dsv4c.runtime.protocol import refuse
from dsv4c.runtime.tools import ToolPlan

MAX_CHOICES = 1024  # of `guided_choice`
MAX_PROPERTIES = 400  # of one object: the parser carries four items of each, and 2,000 are its limit
MAX_STEP = 1000  # of `multipleOf`: the automaton has that many states, and building it takes the square of that
_SPACE = (
    r"[\x20\x0A\x0D\x09]{0,20}"  # a line's end and nine levels of two; without a bound weak models fill the context
)
_PLAIN_DATA = frozenset(("const", "enum", "default", "examples", "example"))
_OLD = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_SWITCHES = ("disable_any_whitespace", "disable_additional_properties")

Content = tuple[str, Mapping[str, Any]]
"""The field that asks, and a grammar of llguidance: `lark_grammar` or `json_schema`."""


class StructuredFields(BaseModel):
    """The fields of structured output; part of every body that generates."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def shown_format(self) -> dict[str, Any] | None:
        """The response format that a chat prompt shows. Raises RequestError for one that is not understood."""
        given = self.response_format
        if given is None or given.get("type") == "text":
            return None
        if given.get("type") == "json_object":
            return given
        schema = given.get("json_schema")
        if given.get("type") != "json_schema" or not isinstance(schema, dict) or schema.get("schema") is None:
            hint = "`text`, `json_object`, or `json_schema` with `json_schema.schema`"
            refuse("`response_format` is not understood", "response_format", hint=hint)
        if not isinstance(schema.get("strict"), bool | None):
            refuse("`response_format.json_schema.strict` must be true or false", "response_format.json_schema.strict")
        return given

    def content(self) -> Content | None:
        """What the answer's content must match; None: anything. Raises RequestError naming the field at fault."""
        found = list(self._contents())
        if len(found) > 1:
            refuse(f"`{found[0][0]}` and `{found[1][0]}` contradict each other", found[1][0])
        return found[0] if found else None

    def _contents(self) -> Iterator[Content]:
        shown = self.shown_format()
        if shown is not None and shown["type"] == "json_object":
            yield "response_format", _json({"type": "object"}, "response_format")
        elif shown is not None and shown["json_schema"].get("strict") is not False:
            param = "response_format.json_schema.schema"
            yield param, _json(shown["json_schema"]["schema"], param, hint=_UNFORCED)
        yield from self._of_options()
        for name, kind in _OLD.items():
            if getattr(self, name) is not None:
                yield name, _grammar(kind, getattr(self, name), name)

    def _of_options(self) -> Iterator[Content]:
        given = {key: value for key, value in (self.structured_outputs or {}).items() if value is not None}
        if self.structured_outputs is None:
            return
        for key in given:
            if key not in (*_KINDS, *_SWITCHES):
                param = f"structured_outputs.{key}"
                refuse(f"`{param}` is not supported", param, code="unsupported", hint=f"one of {', '.join(_KINDS)}")
        compact, closed = (given.pop(name, False) for name in _SWITCHES)
        for name, value in zip(_SWITCHES, (compact, closed), strict=True):
            if not isinstance(value, bool):
                refuse(f"`structured_outputs.{name}` must be true or false", f"structured_outputs.{name}")
        if not given:
            refuse("`structured_outputs` asks for nothing", "structured_outputs", hint=f"give {', '.join(_KINDS)}")
        for key, value in given.items():
            yield f"structured_outputs.{key}", _grammar(key, value, f"structured_outputs.{key}", compact, closed)


_UNFORCED = "with `strict: false` the schema is put into the prompt and not enforced"


async def answer_grammar(
    grammars: Grammars | None,
    codec: GrammarCodec,
    body: StructuredFields,
    *,
    reasons: bool = False,
    plan: ToolPlan | None = None,
    begun: str = "",
) -> Grammar | None:
    """The grammar of a request's answers, compiled; None if nothing is asked for.

    `grammars`: None where none can be enforced. `reasons`: the completion begins with reasoning. `begun`: the text of a
    forced call that the prompt holds already. Raises RequestError: 400 naming the field, 503 if too many are compiled.
    """
    content, functions, forced = body.content(), _functions(plan), plan is not None and bool(plan.forced)
    strict = [name for name, function in functions.items() if function.get("strict") is True]
    if forced:
        content = None  # a call, and nothing else
    if content is None and not forced and not strict:
        return None
    param = content[0] if content is not None else "tools"
    if grammars is None:
        if forced and not strict:
            return None  # the prompt forces the call; its arguments are the model's
        refuse(
            f"`{param}` asks for a grammar, which this server cannot enforce",
            param, code="unsupported", hint=_UNFORCED if param.startswith("response_format") else "leave it out",
        )  # fmt: skip
    if content is not None and "ebnf" in content[1]:
        content = param, {"lark_grammar": await asyncio.to_thread(_lark, content[1]["ebnf"], param)}
    if plan is None or not functions:
        tools: list[Mapping[str, Any]] = []
    elif forced:
        tools = [functions[name] for name in plan.forced]
    else:  # tools that are not strict take any arguments
        tools = [f if name in strict else {"name": name} for name, f in functions.items()]
    text = codec.answer_grammar(
        None if content is None else content[1],
        thinking=reasons, tools=tools, forced=forced, parallel=plan is None or plan.max_calls != 1,
    )  # fmt: skip
    grammar = await grammars.compile(GrammarSource(text, param))
    return grammar.ahead(codec.encode(begun)) if begun else grammar


def _functions(plan: ToolPlan | None) -> dict[str, dict[str, Any]]:
    """The functions that a prompt shows, by name."""
    functions = [tool["function"] for tool in plan.shown or ()] if plan is not None else []
    return {function["name"]: function for function in functions}


def _grammar(kind: str, value: Any, param: str, compact: bool = False, closed: bool = False) -> Mapping[str, Any]:
    """A grammar for llguidance; `ebnf` if it is still to be translated."""
    if kind == "json_object":
        if value is not True:
            refuse(f"`{param}` must be true", param)
        return _json({"type": "object"}, param, compact)
    if kind == "json":
        return _json(value, param, compact, closed)
    if kind == "choice":
        words = value if isinstance(value, list) else []
        if not words or not all(isinstance(word, str) and word for word in words):
            refuse(f"`{param}` must be a list of strings that are not empty", param)
        if len(words) > MAX_CHOICES:
            refuse(f"`{param}` has {len(words)} strings, at most {MAX_CHOICES} are taken", param)
        return {"lark_grammar": "start: " + " | ".join(json.dumps(w, ensure_ascii=False) for w in words)}
    if not isinstance(value, str) or not value:
        refuse(f"`{param}` must be a string that is not empty", param)
    if kind == "regex":
        return {"lark_grammar": f"start: /{llguidance.regex_to_lark(value)}/".replace("\n", r"\n")}
    return {"ebnf": value}


def _lark(text: str, param: str) -> str:
    """A grammar in GBNF, as llama.cpp has it, or in Lark already. Raises RequestError if it is neither."""
    if len(text) > MAX_SOURCE_CHARS:
        refuse(f"`{param}` is larger than {MAX_SOURCE_CHARS} characters", param)
    try:
        return str(any_to_lark(text))
    except RecursionError:
        refuse(f"`{param}` is nested too deeply", param, code="invalid_grammar")
    except Exception as error:  # noqa: BLE001  a foreign parser; it raises whatever it stumbles over
        refuse(f"`{param}` is not a grammar: {str(error)[:200]}", param, code="invalid_grammar")


def _json(schema: Any, param: str, compact: bool = False, closed: bool = False, hint: str = "") -> Mapping[str, Any]:
    """A JSON schema. `compact`: without free space; `closed`: objects have no property that they do not name."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            refuse(f"`{param}` is not JSON", param, code="invalid_grammar")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        refuse(f"`{param}` must be a JSON schema that something matches", param, code="invalid_grammar")
    _check_schema(schema, param, hint)
    schema = _closed(schema) if closed else schema
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False}
    if compact:
        options |= {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    else:
        options["whitespace_pattern"] = _SPACE
    return {"json_schema": {**schema, "x-guidance": options}}


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` wherever properties are named and it says nothing else."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: value if key in _PLAIN_DATA else _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "patternProperties" not in schema:
        inner.setdefault("additionalProperties", False)
    return inner


def _check_schema(schema: dict[str, Any], param: str, hint: str) -> None:
    """Refuses what the grammar could not keep, or could not be built for in time; the compiler refuses the rest."""
    rest: list[Any] = [schema]
    while rest:
        item = rest.pop()
        if isinstance(item, list):
            rest += item
        if not isinstance(item, dict):
            continue
        rest += [value for key, value in item.items() if key not in _PLAIN_DATA]
        least, required = item.get("minProperties"), item.get("required")
        if isinstance(least, int) and least > (len(required) if isinstance(required, list) else 0):
            what = f"`{param}`: `minProperties` above the number of `required` ones cannot be enforced"
            refuse(what, param, code="invalid_grammar", hint=hint)
        named = item.get("properties")
        if isinstance(named, dict) and len(named) > MAX_PROPERTIES:
            what = f"`{param}`: an object has {len(named)} properties, at most {MAX_PROPERTIES} can be enforced"
            refuse(what, param, code="invalid_grammar", hint=hint)
        step = item.get("multipleOf")
        if isinstance(step, int | float) and not 1 / MAX_STEP <= step <= MAX_STEP:
            what = f"`{param}`: `multipleOf` must be between {1 / MAX_STEP} and {MAX_STEP}"
            refuse(what, param, code="invalid_grammar", hint=hint)
        if "x-guidance" in item:
            refuse(f"`{param}`: `x-guidance` is not taken", param, code="invalid_grammar")
