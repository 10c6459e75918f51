"""DSML, the markup in which DeepSeek-V4 writes tool calls: its tags, and rendering. Parsing is in `parse.py`.

    \\n\\n<｜DSML｜tool_calls>
    <｜DSML｜invoke name="F">
    <｜DSML｜parameter name="k" string="true|false">v</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

`string="true"` means raw text, `"false"` a JSON literal. Values are not escaped in any way, so a value that contains
its own closing tag cannot be written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4c.chat.tokens import DSML

CALLS_OPEN = f"<{DSML}tool_calls>"
CALLS_CLOSE = f"</{DSML}tool_calls>"
PARAMETER_CLOSE = f"</{DSML}parameter>"
_INVOKE_OPEN = f'<{DSML}invoke name="'
_INVOKE_CLOSE = f"</{DSML}invoke>"
_PARAMETER_OPEN = f'<{DSML}parameter name="'


@dataclass(frozen=True)
class ToolCall:
    """One call: the function's name and its arguments as the text of a JSON object."""

    name: str
    arguments: str


def to_json(value: Any) -> str:
    """JSON as the model was trained to see it: ", " and ": ", non-ASCII characters as they are, keys in order."""
    return json.dumps(value, ensure_ascii=False)


def render_calls(calls: Sequence[ToolCall]) -> str:
    """The tool-call block without the blank line before it. Arguments that are no JSON object go in as one string."""
    invokes = [f'{_INVOKE_OPEN}{call.name}">\n{_render_arguments(call.arguments)}\n{_INVOKE_CLOSE}' for call in calls]
    return "\n".join([CALLS_OPEN, *invokes, CALLS_CLOSE])


def call_start(name: str | None) -> str:
    """What precedes the first parameter of the first call; without a name, what precedes that."""
    return f"\n\n{CALLS_OPEN}\n{_INVOKE_OPEN}" + ("" if name is None else f'{name}">\n')


def is_json(text: str) -> bool:
    """Whether this is JSON; text that is nested too deeply for the parser is not."""
    return _load_json(text) is not _INVALID


def is_json_object(text: str) -> bool:
    """Whether this is the JSON of an object."""
    return isinstance(_load_json(text), Mapping)


def _render_arguments(arguments: str) -> str:
    values = _load_json(arguments)
    if not isinstance(values, Mapping):
        values = {"arguments": arguments}
    return "\n".join(_render_parameter(key, value) for key, value in values.items())


def _render_parameter(key: str, value: Any) -> str:
    if isinstance(value, str):
        return f'{_PARAMETER_OPEN}{key}" string="true">{value}{PARAMETER_CLOSE}'
    return f'{_PARAMETER_OPEN}{key}" string="false">{to_json(value)}{PARAMETER_CLOSE}'


_INVALID = object()


def _load_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # deep nesting overflows the parser's stack; the text is then kept as text
        return _INVALID


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"`{name}` is not JSON")
