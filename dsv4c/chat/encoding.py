"""From messages to the prompt string of DeepSeek-V4, which ships no template (model.md 4.2 to 4.4).

    read -> attach tools -> merge tool results -> order them -> drop old reasoning -> render

    BOS [effort] system [tools] [format] <User> text <Assistant> <think> reasoning </think> content [calls] EOS ...

A system message has no role token. Tool results are blocks of a user turn. In chat mode, and for old turns whose
reasoning is dropped, `<Assistant>` is followed by `</think>` at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsv4c.chat import prompts
from dsv4c.chat.dsml import render_calls, to_json
from dsv4c.chat.messages import Block, Turn, read_tools, read_turns
from dsv4c.chat.tokens import ASSISTANT, BOS, EOS, LATEST_REMINDER, TASKS, THINK_END, THINK_START, USER
from dsv4c.errors import RequestError


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool,
    effort: str | None = None,
    drop_thinking: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Mapping[str, Any] | None = None,
    release: prompts.Release = "preview",
) -> str:
    """The prompt string, BOS included.

    `messages`, `tools` and `response_format` are OpenAI's; a message may also have `reasoning_content`, `task`, and
    an assistant one `prefix: true` (no EOS: the completion continues it). System and developer messages may carry
    their own `tools` and `response_format`. `effort` None is the release's default level, and says nothing outside
    of thinking mode. `drop_thinking` drops the reasoning and the developer messages before the last user turn; tools
    switch it off. Raises RequestError (400) naming the parameter.
    """
    prefix = _effort_text(effort, release)
    turns = read_turns(messages)
    turns = _attach(turns, read_tools(tools, "tools"), _schema(response_format))
    turns = _order_results(_merge_results(turns))
    drop_thinking = drop_thinking and not any(turn.tools for turn in turns)
    if thinking and drop_thinking:
        turns = _drop_old(turns)
    replay_from = _last_user(turns) if drop_thinking else -1
    body = [_render(turns, i, thinking, replay_from) for i in range(len(turns))]
    return "".join([BOS, prefix if thinking else "", *body])


def awaits_completion(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the prompt ends where the model was trained to go on: after a user turn, a task or an open prefix."""
    last = read_turns(messages)[-1]
    return last.open or last.task is not None or last.role in ("user", "tool", "developer")


def _effort_text(effort: str | None, release: prompts.Release) -> str:
    levels = prompts.EFFORTS[release]
    if effort is None:
        return next(iter(levels.values()))
    level = prompts.EFFORT_ALIASES[release].get(effort, effort)
    if level not in levels:
        near = difflib.get_close_matches(effort, levels, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"levels are {', '.join(levels)}"
        raise RequestError(f"unknown effort `{effort}`", param="reasoning_effort", code="invalid_value", hint=hint)
    return levels[level]


def _schema(response_format: Mapping[str, Any] | None) -> Any:
    """What the prompt shows of OpenAI's `response_format`: the bare schema, or the object itself."""
    kind = None if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return None
    if kind != "json_schema":
        return response_format
    wrapper = response_format.get("json_schema")
    if not isinstance(wrapper, Mapping) or not isinstance(wrapper.get("schema"), Mapping):
        param = "response_format.json_schema.schema"
        raise RequestError(f"`{param}` must be an object", param=param, code="invalid_value")
    return wrapper["schema"]


def _attach(turns: list[Turn], tools: tuple[Mapping[str, Any], ...], schema: Any) -> list[Turn]:
    """Tools and schema go to the leading system turn; without one, to an empty one put in front."""
    if not tools and schema is None:
        return turns
    if turns[0].role != "system":
        turns = [Turn("system"), *turns]
    first = turns[0]
    if first.response_format and schema is not None:
        raise RequestError(
            "`response_format` is given twice", param="messages[0].response_format", code="invalid_value"
        )
    first = replace(first, tools=first.tools + tools, response_format=first.response_format or schema)
    return [first, *turns[1:]]


def _merge_results(turns: list[Turn]) -> list[Turn]:
    """Tool turns, and user turns that follow them or each other, become blocks of one user turn.

    A turn with a task takes no more text, only results; a merged turn keeps the task of its last message.
    """
    merged: list[Turn] = []
    for turn in turns:
        if turn.role not in ("user", "tool"):
            merged.append(turn)
            continue
        last = merged[-1] if merged else None
        if last is None or last.role != "user" or (turn.role == "user" and last.task is not None):
            merged.append(replace(turn, role="user"))
        else:
            merged[-1] = replace(last, blocks=last.blocks + turn.blocks, task=turn.task or last.task)
    return merged


def _order_results(turns: list[Turn]) -> list[Turn]:
    """Results take the order of the calls they answer; the text between them stays where it is."""
    order: dict[str, int] = {}
    ordered = []
    for turn in turns:
        if turn.calls:
            order = {call_id: i for i, call_id in enumerate(turn.call_ids) if call_id}
        results = [block for block in turn.blocks if block.call_id is not None]
        if len(results) > 1 and order:
            queue = iter(sorted(results, key=lambda block: order.get(block.call_id or "", 0)))
            turn = replace(turn, blocks=tuple(b if b.call_id is None else next(queue) for b in turn.blocks))
        ordered.append(turn)
    return ordered


def _last_user(turns: Sequence[Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _drop_old(turns: list[Turn]) -> list[Turn]:
    """Without the developer turns before the last user turn; old reasoning is left out by `_render`."""
    last_user = _last_user(turns)
    return [turn for i, turn in enumerate(turns) if turn.role != "developer" or i >= last_user]


def _render(turns: Sequence[Turn], index: int, thinking: bool, replay_from: int) -> str:
    """One turn and what leads to the next; reasoning is shown from the turn `replay_from` on, if at all."""
    turn = turns[index]
    if turn.role == "assistant":
        answers_task = index > 0 and turns[index - 1].task is not None
        shows_reasoning = thinking and not answers_task and index > replay_from
        text = _render_assistant(turn, shows_reasoning)
    elif turn.role == "user":
        text = USER + "\n\n".join(_render_block(block) for block in turn.blocks)
    elif turn.role == "latest_reminder":
        text = LATEST_REMINDER + turn.text
    else:
        text = (USER if turn.role == "developer" else "") + turn.text + _render_extras(turn)
    follower = turns[index + 1].role if index + 1 < len(turns) else "assistant"
    if follower not in ("assistant", "latest_reminder"):
        return text
    if turn.task == "action":
        return text + ASSISTANT + (THINK_START if thinking else THINK_END) + TASKS["action"]
    if turn.task is not None:
        return text + TASKS[turn.task]
    if turn.role not in ("user", "developer"):
        return text
    return text + ASSISTANT + (THINK_START if thinking and index >= replay_from else THINK_END)


def _render_assistant(turn: Turn, shows_reasoning: bool) -> str:
    reasoning = turn.reasoning + THINK_END if shows_reasoning else ""
    calls = "\n\n" + render_calls(turn.calls) if turn.calls else ""
    return reasoning + turn.text + calls + ("" if turn.open else EOS)


def _render_block(block: Block) -> str:
    return block.text if block.call_id is None else f"<tool_result>{block.text}</tool_result>"


def _render_extras(turn: Turn) -> str:
    text = ""
    if turn.tools:
        text += "\n\n" + prompts.TOOLS + "\n".join(to_json(tool) for tool in turn.tools) + prompts.TOOLS_END
    if turn.response_format:
        text += "\n\n" + prompts.RESPONSE_FORMAT + to_json(turn.response_format)
    return text
