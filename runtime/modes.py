"""Whether a chat request thinks, and how hard: the spellings in use, made one.

thinking: {type}                            DeepSeek's API
reasoning_effort                            OpenAI's; `none` is no thinking, all others think
chat_template_kwargs: {thinking,            vLLM's and SGLang's; `enable_thinking` is the same as `thinking`
    enable_thinking, reasoning_effort, drop_thinking}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv4c.runtime.protocol import refuse

TEMPLATE_KEYS = frozenset(("thinking", "enable_thinking", "reasoning_effort", "drop_thinking"))
"""What is read of `chat_template_kwargs`."""


@dataclass(frozen=True)
class Mode:
    """How a chat answer comes about."""

    thinking: bool
    effort: str | None = None
    """A level of the model's or of OpenAI's; None: the model's default. The chat format knows which there are."""
    drop_thinking: bool = True
    """The prompt shows no reasoning of turns before the last user's, unless there are tools."""


def read_mode(
    *,
    default_thinking: bool,
    thinking: Mapping[str, Any] | None = None,
    effort: str | None = None,
    template: Mapping[str, Any] | None = None,
) -> Mode:
    """The mode that a request asks for. Raises RequestError for bad values and for two that contradict each other."""
    template, said = template or {}, {}
    if thinking is not None:
        kind = thinking.get("type")
        if kind not in ("enabled", "disabled"):
            refuse("`thinking.type` must be `enabled` or `disabled`", "thinking.type")
        said["thinking"] = kind == "enabled"
    for key in ("thinking", "enable_thinking"):
        value = _flag(template, key)
        if value is not None:
            said[f"chat_template_kwargs.{key}"] = value
    other = template.get("reasoning_effort")
    if other is not None:
        param = "chat_template_kwargs.reasoning_effort"
        if not isinstance(other, str):
            refuse(f"`{param}` must be a string", param)
        if effort not in (None, other):
            refuse(f"`reasoning_effort` and `{param}` contradict", "reasoning_effort")
        if effort is None:
            said[param] = other != "none"
            effort = other
    if effort is not None and other is None:
        said["reasoning_effort"] = effort != "none"
    thinks = next(iter(said.values()), default_thinking)
    for name, value in said.items():
        if value != thinks:
            first = next(iter(said))
            refuse(f"`{first}` and `{name}` contradict", first)
    drop = _flag(template, "drop_thinking")
    return Mode(thinks, None if effort == "none" else effort, drop is not False)


def _flag(template: Mapping[str, Any], key: str) -> bool | None:
    value = template.get(key)
    if value is not None and not isinstance(value, bool):
        refuse(f"`chat_template_kwargs.{key}` must be true or false", f"chat_template_kwargs.{key}")
    return value
