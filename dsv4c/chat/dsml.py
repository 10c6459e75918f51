"""DSML, the markup in which DeepSeek-V4 writes tool calls: rendering and whole-text parsing.

    \\n\\n<｜DSML｜tool_calls>
    <｜DSML｜invoke name="F">
    <｜DSML｜parameter name="k" string="true|false">v</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

`string="true"` means raw text, `"false"` a JSON literal. Values are not escaped in any way, so a value that contains
its own closing tag cannot be written. Rendering is exact; parsing takes whatever a model wrote and never raises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4c.chat.tokens import DSML

CALLS_OPEN = f"<{DSML}tool_calls>"
CALLS_CLOSE = f"</{DSML}tool_calls>"
_INVOKE_OPEN = f'<{DSML}invoke name="'
_INVOKE_CLOSE = f"</{DSML}invoke>"
_PARAMETER_OPEN = f'<{DSML}parameter name="'
_PARAMETER_CLOSE = f"</{DSML}parameter>"


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


def parse_calls(block: str) -> tuple[tuple[ToolCall, ...], str]:
    """The calls in the text between `CALLS_OPEN` and `CALLS_CLOSE`, and the text that is not part of a whole call.

    Only space between the tags is dropped. Takes time linear in the length of the block.
    """
    calls: list[ToolCall] = []
    leftover: list[str] = []
    position = 0
    while (start := block.find(_INVOKE_OPEN, position)) >= 0:
        head_end = block.find('">', start + len(_INVOKE_OPEN))
        end = -1 if head_end < 0 else block.find(_INVOKE_CLOSE, head_end)
        if end < 0:
            break
        arguments, stray = _parse_parameters(block[head_end + 2 : end])
        leftover += [block[position:start], stray]
        calls.append(ToolCall(block[start + len(_INVOKE_OPEN) : head_end], arguments))
        position = end + len(_INVOKE_CLOSE)
    leftover.append(block[position:])
    return tuple(calls), "".join(text for text in leftover if text.strip())


def _render_arguments(arguments: str) -> str:
    values = _load_json(arguments)
    if not isinstance(values, Mapping):
        values = {"arguments": arguments}
    return "\n".join(_render_parameter(key, value) for key, value in values.items())


def _render_parameter(key: str, value: Any) -> str:
    if isinstance(value, str):
        return f'{_PARAMETER_OPEN}{key}" string="true">{value}{_PARAMETER_CLOSE}'
    return f'{_PARAMETER_OPEN}{key}" string="false">{to_json(value)}{_PARAMETER_CLOSE}'


def _parse_parameters(body: str) -> tuple[str, str]:
    """(JSON object of the parameters in `body`, text outside of them). The last of equal names wins."""
    values: dict[str, str] = {}
    leftover: list[str] = []
    position = 0
    while (start := body.find(_PARAMETER_OPEN, position)) >= 0:
        head_end = body.find('">', start + len(_PARAMETER_OPEN))
        end = -1 if head_end < 0 else body.find(_PARAMETER_CLOSE, head_end)
        if end < 0:
            break
        key, _, flag = body[start + len(_PARAMETER_OPEN) : head_end].partition('" string="')
        value = body[head_end + 2 : end]
        raw = flag != "false" or _load_json(value) is _INVALID
        values[key] = to_json(value) if raw else value
        leftover.append(body[position:start])
        position = end + len(_PARAMETER_CLOSE)
    leftover.append(body[position:])
    text = "{" + ", ".join(f"{to_json(key)}: {value}" for key, value in values.items()) + "}"
    return text, "".join(part for part in leftover if part.strip())


_INVALID = object()


def _load_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # deep nesting overflows the parser's stack; the text is then kept as text
        return _INVALID


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"`{name}` is not JSON")
