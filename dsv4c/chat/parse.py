"""From a completion to reasoning, content and tool calls. Takes whatever a model wrote; never raises, loses no text.

`ReasoningSplitter` works on a stream and knows `</think>` alone. `parse_completion` takes the whole text and knows
DSML too. A streaming DSML parser would take the splitter's content deltas: that is the seam.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.chat.dsml import CALLS_CLOSE, CALLS_OPEN, ToolCall, parse_calls
from dsv4c.chat.tokens import EOS, THINK_END


class ReasoningSplitter:
    """Splits a stream of text at the first `</think>`, which belongs to neither side.

    Thinking: text before it is reasoning, and all of it if it never comes. Not thinking: everything is content.
    """

    def __init__(self, thinking: bool) -> None:
        self._reasoning = thinking
        self._held = ""

    def push(self, delta: str) -> tuple[str, str]:
        """(reasoning, content) that this delta settles. Holds back the shortest text that may begin `</think>`."""
        if not self._reasoning:
            return "", delta
        text = self._held + delta
        before, tag, after = text.partition(THINK_END)
        if tag:
            self._reasoning, self._held = False, ""
            return before, after
        held = _overlap(text, THINK_END)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], ""

    def flush(self) -> tuple[str, str]:
        """What is held back when the stream ends."""
        text, self._held = self._held, ""
        return text, ""


@dataclass(frozen=True)
class ParsedCompletion:
    """An assistant turn. `leftover` is text inside or after a tool-call block that is no part of a whole call."""

    content: str
    reasoning_content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    leftover: str = ""


def parse_completion(text: str, thinking: bool) -> ParsedCompletion:
    """Parses a whole completion, with or without its EOS. `reasoning_content` is None outside of thinking mode.

    Tool calls are looked for in the content only. A block without a single whole call is left in the content.
    """
    splitter = ReasoningSplitter(thinking)
    reasoning, content = splitter.push(text.removesuffix(EOS))
    reasoning += splitter.flush()[0]
    said = reasoning if thinking else None
    before, tag, block = content.partition(CALLS_OPEN)
    inside, _, after = block.partition(CALLS_CLOSE)
    calls, stray = parse_calls(inside)
    if not tag or not calls:
        return ParsedCompletion(content, said)
    leftover = stray + (after if after.strip() else "")
    return ParsedCompletion(before.removesuffix("\n\n"), said, calls, leftover)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest proper prefix of `tag` that `text` ends with."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
