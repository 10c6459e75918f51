"""Reads the messages of an OpenAI-style request into checked `Turn`s; every fault names the field.

After this file nothing about a message can be wrong: rendering (`encoding.py`) has no error paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from dsv4c.chat.dsml import ToolCall, to_json
from dsv4c.chat.tokens import TASKS
from dsv4c.errors import RequestError

Role = Literal["system", "user", "assistant", "tool", "developer", "latest_reminder"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Block:
    """A piece of a user turn: text, or the result of the tool call `call_id`."""

    text: str
    call_id: str | None = None


@dataclass(frozen=True)
class Turn:
    """One message. `blocks` is the content of user and tool turns, `text` that of all others."""

    role: Role
    text: str = ""
    blocks: tuple[Block, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_ids: tuple[str, ...] = ()
    """Ids of `calls`; an empty one where the client gave none."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI `function` objects, shown as they are."""
    response_format: Any = None
    task: str | None = None
    open: bool = False
    """An assistant turn that the completion continues: it gets no end-of-sentence token."""


def read_turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """One Turn a message. Raises RequestError (400) whose `param` is like `messages[2].content`."""
    if not messages:
        _refuse("`messages` is empty", "messages", code="missing_required_parameter")
    return [_read_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]


def read_tools(tools: Any, param: str) -> tuple[Mapping[str, Any], ...]:
    """The `function` objects of OpenAI tools; None is no tools. Raises RequestError naming the tool."""
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        _refuse(f"`{param}` must be a list", param)
    functions = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            _refuse(f"`{param}[{i}]` must be a function tool", f"{param}[{i}]")
        _name(function, f"{param}[{i}].function")
        functions.append(function)
    return tuple(functions)


def _read_turn(message: Any, param: str) -> Turn:
    if not isinstance(message, Mapping):
        _refuse(f"`{param}` must be an object", param)
    role = message.get("role")
    if role not in ROLES:
        shown = "missing" if role is None else f"`{role}`"
        _refuse(f"`{param}.role` is {shown}", f"{param}.role", hint=f"roles are {', '.join(ROLES)}")
    task = message.get("task")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        _refuse(f"unknown task `{task}`", f"{param}.task", hint=f"tasks are {', '.join(TASKS)}")
    if message.get("tools") and role not in ("system", "developer"):
        _refuse(f"a {role} message cannot carry `tools`", f"{param}.tools", hint="put them beside `messages`")
    if role == "assistant":
        return _read_assistant(message, param, task)
    text = _text(message.get("content"), f"{param}.content")
    if role == "user":
        return Turn("user", blocks=(Block(text),), task=task)
    if role == "tool":
        call_id = message.get("tool_call_id", "")
        if not isinstance(call_id, str):
            _refuse(f"`{param}.tool_call_id` must be a string", f"{param}.tool_call_id")
        return Turn("tool", blocks=(Block(text, call_id),), task=task)
    if role == "developer" and not text:
        _refuse(f"`{param}.content` is empty", f"{param}.content")
    tools = read_tools(message.get("tools"), f"{param}.tools")
    return Turn(role, text, tools=tools, response_format=message.get("response_format"), task=task)


def _read_assistant(message: Mapping[str, Any], param: str, task: str | None) -> Turn:
    content, reasoning = message.get("content"), message.get("reasoning_content", message.get("reasoning"))
    if reasoning is not None and not isinstance(reasoning, str):
        _refuse(f"`{param}.reasoning_content` must be a string", f"{param}.reasoning_content")
    calls, call_ids = _read_calls(message.get("tool_calls"), f"{param}.tool_calls")
    may_be_absent = calls or reasoning is not None
    text = "" if content is None and may_be_absent else _text(content, f"{param}.content")
    left_open = message.get("prefix") is True or message.get("wo_eos") is True
    return Turn("assistant", text, reasoning=reasoning or "", calls=calls, call_ids=call_ids, task=task, open=left_open)


def _read_calls(calls: Any, param: str) -> tuple[tuple[ToolCall, ...], tuple[str, ...]]:
    if calls is None:
        return (), ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        _refuse(f"`{param}` must be a list", param)
    read, ids = [], []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            _refuse(f"`{param}[{i}].function` must be an object", f"{param}[{i}].function")
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = to_json(arguments)
        if not isinstance(arguments, str):
            _refuse(f"`{param}[{i}].function.arguments` must be a string", f"{param}[{i}].function.arguments")
        read.append(ToolCall(_name(function, f"{param}[{i}].function"), arguments))
        ids.append(str(call.get("id") or function.get("id") or ""))
    return tuple(read), tuple(ids)


def _name(function: Mapping[str, Any], param: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        _refuse(f"`{param}.name` must be a string", f"{param}.name")
    return name


def _text(content: Any, param: str) -> str:
    """Content as one string: the text parts of a list are joined by blank lines, other parts named in brackets."""
    if content is None:
        _refuse(f"`{param}` is missing", param, code="missing_required_parameter")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        _refuse(f"`{param}` must be a string or a list of parts", param)
    return "\n\n".join(_part(part, f"{param}[{i}]") for i, part in enumerate(content))


def _part(part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        _refuse(f"`{param}` must be an object with a `type`", param)
    if kind != "text":
        return f"[Unsupported {kind}]"
    text = part.get("text")
    if not isinstance(text, str):
        _refuse(f"`{param}.text` must be a string", f"{param}.text")
    return text


def _refuse(message: str, param: str, *, code: str = "invalid_value", hint: str = "") -> NoReturn:
    raise RequestError(message, param=param, code=code, hint=hint)
