"""What the model writes when it calls tools, and the tools."""

from __future__ import annotations

import json
from typing import Any

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "get_time", "description": "The time.", "parameters": SCHEMA}},
]
RESPONSES_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
ANTHROPIC_TOOLS = [
    {"name": name, "description": "Something.", "input_schema": SCHEMA} for name in ("get_weather", "get_time")
]


def call(name: str, arguments: dict[str, Any]) -> str:
    """One invoke."""
    lines = [f'<｜DSML｜invoke name="{name}">']
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value)
        is_text = str(isinstance(value, str)).lower()
        lines.append(f'<｜DSML｜parameter name="{key}" string="{is_text}">{text}</｜DSML｜parameter>')
    return "\n".join([*lines, "</｜DSML｜invoke>"])


def calls(*made: tuple[str, dict[str, Any]]) -> str:
    """A block of calls, as the model writes it after its text."""
    inner = "\n".join(call(name, arguments) for name, arguments in made)
    return f"\n\n<｜DSML｜tool_calls>\n{inner}\n</｜DSML｜tool_calls>"


def rest_of_call(arguments: dict[str, Any]) -> str:
    """What follows the head of a forced call."""
    return call("", arguments).partition("\n")[2] + "\n</｜DSML｜tool_calls>"


PARIS: tuple[str, dict[str, Any]] = ("get_weather", {"city": "Paris", "days": 3})
NOON: tuple[str, dict[str, Any]] = ("get_time", {"city": "Oslo"})
