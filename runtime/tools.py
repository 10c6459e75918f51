"""What a request says of tools: which the prompt shows, whether one must be called, and how many calls are wanted.

The shapes are OpenAI's; endpoints with others translate theirs into these. `auto` leaves it to the model. `none` shows
it no tools. `required` and a name make it begin with a call: the call's head becomes the end of the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv4c.runtime.protocol import refuse

_MARKUP = frozenset('"<>｜')  # what tokens of the chat format are made of: a call of such a name could not be read
_KINDS = "`auto`, `none`, `required`, a function or `allowed_tools`"


@dataclass(frozen=True)
class ToolPlan:
    """How tools are used in one request."""

    shown: list[dict[str, Any]] | None = None
    """Tools for the prompt, as the client sent them; None: no tools."""
    forced: tuple[str, ...] = ()
    """One of these must be called; empty: the model chooses whether."""
    max_calls: int | None = None
    """The answer ends with this many calls; None: as many as the model makes."""
    forbidden: bool = False
    """No call may be made, whatever earlier turns suggest: the token that begins one is kept out."""


def read_tools(tools: Sequence[Any] | None, choice: Any = None, parallel: bool | None = None) -> ToolPlan:
    """The plan of OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`. Raises RequestError naming the field."""
    names = [_name(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]
    for i, name in enumerate(names):
        if name in names[:i]:
            refuse(f"`tools[{i}]` has the name of another, `{name[:64]}`", f"tools[{i}].function.name")
    most = 1 if parallel is False else None
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
            refuse("`tool_choice.allowed_tools` must have a list of `tools`", "tool_choice.allowed_tools")
        if allowed.get("mode", "auto") not in ("auto", "required"):
            refuse("`tool_choice.allowed_tools.mode` must be `auto` or `required`", "tool_choice.allowed_tools.mode")
        param = "tool_choice.allowed_tools.tools"
        wanted = [_name(tool, f"{param}[{i}]") for i, tool in enumerate(allowed["tools"])]
        for i, name in enumerate(wanted):
            _check_known(name, names, f"{param}[{i}]")
        tools = [tool for tool, name in zip(tools or (), names, strict=True) if name in wanted]
        names = [name for name in names if name in wanted]
        choice = allowed.get("mode", "auto")
    if choice == "none":
        return ToolPlan(forbidden=True)
    if choice in (None, "auto") and not names:
        return ToolPlan()
    shown = list(tools or ())
    if choice in (None, "auto"):
        return ToolPlan(shown, max_calls=most)
    if choice == "required":
        if not names:
            refuse("`tool_choice` is `required` and there are no `tools`", "tool_choice")
        return ToolPlan(shown, tuple(names), most)
    if not isinstance(choice, dict) or choice.get("type") != "function":
        refuse(f"`tool_choice` must be {_KINDS}, not {json.dumps(choice)[:60]}", "tool_choice")
    name = _name(choice, "tool_choice")
    _check_known(name, names, "tool_choice")
    return ToolPlan(shown, (name,), 1)


def _name(tool: Any, param: str) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        refuse(f"`{param}` must be a function tool", param)
    name = function.get("name")
    if not isinstance(name, str) or not name or not name.isprintable() or _MARKUP.intersection(name):
        what = f"`{param}.function.name` must be a string without quotes, `<`, `>`, `｜` or control characters"
        refuse(what, f"{param}.function.name")
    return name


def _check_known(name: str, names: Sequence[str], param: str) -> None:
    if name not in names:
        refuse(f"`{param}` names `{name[:64]}`, which is not among `tools`", param)
