"""A conversation in a terminal: answers stream, reasoning is dimmed, tool calls are shown as they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import aiohttp

from dsv4c.client.wire import Server, events
from dsv4c.errors import InputError

DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
HELP = """/new       forget the conversation
/system T  begin anew with this system prompt
/think     think before answering, or no more
/set K V   a field of requests, such as `/set temperature 0.2`
/help      this
/quit      leave; so does the end of input"""


@dataclass
class Talk:
    """One conversation. `fields`: of every request, such as temperature."""

    server: Server
    model: str
    out: TextIO
    colour: bool = True
    system: str | None = None
    thinking: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)

    async def answer(self, text: str) -> None:
        """Asks, prints what comes, and keeps both turns. Raises InputError; a turn without an answer is not kept."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = {"role": "user", "content": text}
        body = {
            "model": self.model, "messages": [*system, *self.turns, asked], "stream": True,
            "stream_options": {"include_usage": True}, "chat_template_kwargs": {"thinking": self.thinking},
            **self.fields,
        }  # fmt: skip
        printer = _Printer(self.out, self.colour)
        began = time.perf_counter()
        async with self.server.session() as session:
            content = await self._print(session, body, printer, began)
        self.turns += [asked, {"role": "assistant", "content": content}]

    async def _print(
        self, session: aiohttp.ClientSession, body: dict[str, Any], printer: _Printer, began: float
    ) -> str:
        content, tokens, finish, first = "", 0, None, 0.0
        try:
            async for event in events(session, f"{self.server.url}/v1/chat/completions", body):
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event["choices"]:
                    delta = choice["delta"]
                    first = first or time.perf_counter()
                    content += delta.get("content") or ""
                    finish = choice.get("finish_reason") or finish
                    for style, piece in _pieces(delta):
                        printer.write(piece, style)
        finally:
            printer.close()
        took = time.perf_counter() - first
        rate = f", {(tokens - 1) / took:.1f} tokens/s" if tokens > 1 and took > 0.05 else ""
        end = "" if finish in ("stop", None) else f", ended by {finish}"
        printer.note(f"{tokens} tokens, first after {first - began:.2f} s{rate}{end}")
        return content


def _pieces(delta: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(style, text) of one delta."""
    if delta.get("reasoning_content"):
        yield DIM, delta["reasoning_content"]
    if delta.get("content"):
        yield "", delta["content"]
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        if function.get("name"):
            yield BOLD, f"\n{function['name']} "
        if function.get("arguments"):
            yield "", function["arguments"]


class _Printer:
    """Writes pieces in their style; a change of style between paragraphs makes a line."""

    def __init__(self, out: TextIO, colour: bool) -> None:
        self._out = out
        self._colour = colour
        self._style = ""
        self._begun = False

    def write(self, text: str, style: str) -> None:
        if style != self._style:
            self._end_style()
            if self._begun and DIM in (style, self._style):
                self._out.write("\n\n")
            self._style = style
            self._out.write(style if self._colour else "")
        self._begun = True
        self._out.write(printable(text))
        self._out.flush()

    def note(self, text: str) -> None:
        self._out.write(f"{DIM}[{text}]{PLAIN}\n\n" if self._colour else f"[{text}]\n\n")
        self._out.flush()

    def close(self) -> None:
        self._end_style()
        self._style = ""
        self._out.write("\n")
        self._out.flush()

    def _end_style(self) -> None:
        if self._style and self._colour:
            self._out.write(PLAIN)


def printable(text: str) -> str:
    """Without characters that move the cursor or change the terminal: a model's text is not to be trusted."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or (c.isspace() and c >= "\xa0"))


def converse(talk: Talk, read: Callable[[str], str]) -> None:
    """Reads lines and answers them until the end of input or `/quit`. Ctrl-C stops an answer."""
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:  # meant for an answer that has just ended, or for the line
            talk.out.write("\n[/quit or the end of input leaves]\n")
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            talk.out.write(f"{command(talk, line)}\n")
        elif line:
            try:
                asyncio.run(talk.answer(line))
            except KeyboardInterrupt:
                talk.out.write("\n[stopped]\n\n")
            except InputError as error:
                talk.out.write(f"error: {error.message}\n")


def command(talk: Talk, line: str) -> str:
    """Does what a line with a slash says, and says what it did."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/new":
        talk.turns.clear()
        return "a new conversation"
    if word == "/system":
        talk.turns.clear()
        talk.system = rest or None
        return "a new conversation, with this system prompt" if rest else "a new conversation, without a system prompt"
    if word == "/think":
        talk.thinking = not talk.thinking
        return "thinking" if talk.thinking else "not thinking"
    if word == "/set":
        name, _, value = rest.partition(" ")
        if not name or not value:
            return "such as `/set temperature 0.2`"
        talk.fields[name] = _value(value)
        return f"{name} is {talk.fields[name]!r}"
    return HELP


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)
