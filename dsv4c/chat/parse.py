"""From a completion to reasoning, content and tool calls, as it streams. Takes whatever a model wrote.

    reasoning --</think>--> content --tags--> call (name), arguments (JSON text, piece by piece), call_end

What was promised, for every text and every way of cutting it into deltas:

- It never raises, and cutting changes nothing: the pieces joined are those of the whole text.
- No tag is shown: `｜DSML｜` never occurs in the content, misspelt and stray tags included.
- No text is lost. Only tags go, and white space beside them: names, values and stray text of a malformed block end up
  in a call or, where they belong to none, in the content.
- What may still become a tag is held back, and nothing more. A value that is JSON is held until its end, as only then
  it is known to be JSON.

A tag is `DSML` with or without `<` or `</` before it, and a name or a head after it. A call may lack its block, its
block's name may be misspelt, closing tags may be missing. The reasoning is shown as it is but for `</think>` and for
calls: a model that begins one, head and all, has forgotten to end its reasoning. What else it says before `</think>`
is reasoning still.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dsv4c.chat.dsml import PARAMETER_CLOSE, ToolCall, is_json, is_json_object, to_json
from dsv4c.chat.tokens import DSML, EOS, THINK_END

Kind = Literal["reasoning", "content", "call", "arguments", "call_end"]
Piece = tuple[Kind, str]
"""`call` brings the function's name, `arguments` the next part of a JSON text, `call_end` nothing."""

_TAG_START = re.compile(rf"(\n\n)?(<?)(/?){DSML}")
_MAY_START_TAG = re.compile(r"(?:\n\n?|(?:\n\n)?(?:</?|/|<?/?｜(?:D|DS|DSM|DSML)?))\Z")
_MAY_MEAN = re.compile(r"[<｜]|[\n/]\Z")
"""Text without it begins no tag and ends none, and nothing of it is held back."""
_CALL_START = re.compile(rf"(?:\n\n)?<{DSML}")
_MAY_START_CALL = re.compile(r"(?:\n\n?|(?:\n\n)?<(?:｜(?:D|DS|DSM|DSML)?)?)\Z")
_BARE = re.compile(r" ?([A-Za-z_]{1,24})>")
_CALL = re.compile(r'invoke name="([^"\n<]{0,256})">')
_PARAMETER = re.compile(r'parameter name="([^\n]{0,1024}?)">')
_FLAG = re.compile(r'(.*)" string="(true|false)', re.IGNORECASE)
_UNFINISHED = re.compile(r' ?[A-Za-z_]{0,24}|invoke name="[^"\n<]{0,256}"?|parameter name="[^\n]{0,1025}')
_HEAD_START = re.compile(r'(?:invoke|parameter) name="?')
_HEADS = ('invoke name="', 'parameter name="')
_NAMES = ("tool_calls", "invoke", "parameter")
_ANY_CLOSE = f"</{DSML}"
_BLOCK = "tool_calls>"
_CUT = 4096


class AnswerParser:
    """Parses one completion. `thinking`: it begins inside the reasoning, whose start tag is in the prompt."""

    def __init__(self, thinking: bool) -> None:
        self.in_reasoning = thinking
        self._verbatim = thinking  # in reasoning without a call so far
        self._text = ""  # not understood yet
        self._kept: list[str] = []  # of a value: what is not shown yet, without its end in `_text`
        self._state: Literal["text", "string", "doubt", "literal"] = "text"
        self._in_call = False
        self._arguments: Literal["none", "open", "whole"] = "none"
        self._loose = ""  # text of a call before its first parameter, if it may be the arguments themselves
        self._gap: str | None = None  # white space since the last tag; None: text has followed it
        self._said = ""  # the end of the content
        self._seam = 0  # how much of `DSML` the content ended with as a tag was taken out
        self._pieces: list[Piece] = []

    @property
    def num_held(self) -> int:
        """Characters held back."""
        return len(self._text) + len(self._loose) + len(self._gap or "") + sum(map(len, self._kept))

    def push(self, delta: str) -> list[Piece]:
        """The pieces that this delta settles."""
        if not self._text and self._state == "text" and delta and not _MAY_MEAN.search(delta):  # nearly all
            if self._verbatim:
                return [("reasoning", delta)]
            if self._gap is None and not (self.in_reasoning or self._loose or self._seam):
                self._said = (self._said + delta)[-len(DSML) :]
                return [("content", delta)]
        self._pieces = []
        self._text += delta
        while self._text and self._step():
            pass
        return self._pieces

    def flush(self, *, truncated: bool = False) -> list[Piece]:
        """The rest, when nothing follows.

        A call without its end is completed, unless the completion was `truncated`: its arguments then stay the
        unfinished JSON that they are, so that nobody acts on half a value.
        """
        self._pieces = []
        if self._verbatim:
            self._show("reasoning", self._text)
            self._text = ""
            return self._pieces
        while self._state != "text":
            if not self._flush_value(truncated):
                return self._pieces
            while self._text and self._step():
                pass
        self._flush_text()
        self._text = ""
        self._flush_loose(truncated)
        if self._in_call and not truncated:
            self._end_call()
        return self._pieces

    def _step(self) -> bool:
        """Takes what it can from the front of the text; False if more must come first."""
        if self._verbatim:
            return self._step_reasoning()
        if self._state == "text":
            return self._step_text()
        return self._step_value()

    def _step_reasoning(self) -> bool:
        text = self._text
        end, call = text.find(THINK_END), _CALL_START.search(text) if DSML in text else None
        if end >= 0 and (call is None or end < call.start()):
            self._show("reasoning", text[:end])
            self._end_reasoning(text[end + len(THINK_END) :])
            return True
        if call is None:
            held = _MAY_START_CALL.search(text)
            shown = len(text) if held is None else held.start()
            shown = min(shown, len(text) - _overlap(text, THINK_END))
            self._show("reasoning", text[:shown])
            self._text = text[shown:]
            return False
        self._show("reasoning", text[: call.start()])
        self._text = text[call.start() :]
        is_call = _begins_call(text[call.end() :])
        if is_call:
            self._verbatim = False
        elif is_call is False:
            self._show("reasoning", call.group())
            self._text = text[call.end() :]
        return is_call is not None

    def _end_reasoning(self, rest: str) -> None:
        self._flush_loose()
        self.in_reasoning = self._verbatim = False
        self._gap, self._text = None, rest

    # --- text between tags -------------------------------------------------------------------------------------

    def _step_text(self) -> bool:
        text = self._text
        start = _TAG_START.search(text) if DSML in text else None
        end = text.find(THINK_END) if self.in_reasoning else -1
        if end >= 0 and (start is None or end < start.start()):
            self._say(text[:end])
            self._end_reasoning(text[end + len(THINK_END) :])
            return True
        if start is None:
            held = _MAY_START_TAG.search(text)
            shown = len(text) if held is None else held.start()
            if self.in_reasoning:
                shown = min(shown, len(text) - _overlap(text, THINK_END))
            self._say(text[:shown])
            self._text = text[shown:]
            return False
        self._say(text[: start.start()])
        self._text = text[start.start() :]
        return self._step_tag(start)

    def _step_tag(self, start: re.Match[str]) -> bool:
        """A tag at the front of the text."""
        rest = self._text[len(start.group()) :]
        newlines, bracket, closing = start.group(1) or "", start.group(2), start.group(3)
        if (found := _BARE.match(rest)) and (bracket or found.group(1) in _NAMES):
            if closing:
                self._say(newlines)
            self._tag_ends_text()
            if self._in_call and found.group(1) != "parameter":
                self._end_call()
        elif not closing and (found := _CALL.match(rest)) and DSML not in found.group(1):
            self._tag_ends_text()
            if found.group(1):
                self._begin_call(found.group(1))
        elif not closing and (found := _PARAMETER.match(rest)) and DSML not in found.group(1):
            self._say(newlines)
            self._tag_ends_text()
            self._begin_parameter(found.group(1))
        elif any(head.startswith(rest) for head in _HEADS) or (_UNFINISHED.fullmatch(rest) and DSML not in rest):
            return False
        else:  # no tag of ours: its mark goes, what it says stays
            self._say(newlines)
            self._tag_ends_text()
            head = _HEAD_START.match(rest)
            self._text = rest[head.end() :] if head else rest
            return True
        self._text = rest[found.end() :]
        return True

    def _flush_text(self) -> None:
        """What is held back outside of a value: text, or a tag without its end, of which only the payload stays."""
        start = _TAG_START.match(self._text)
        if start is None:
            self._say(self._text)
            return
        self._tag_ends_text()
        rest = self._text[start.end() :]
        if head := _HEAD_START.match(rest):
            rest = rest[head.end() :].removesuffix('"')
        if not any(name.startswith(rest) for name in (*_NAMES, *_HEADS)):
            self._say((start.group(1) or "") + rest)

    def _say(self, text: str) -> None:
        """Content, or the arguments of a call as bare JSON; white space alone between two tags is neither."""
        if self._gap is not None and text:
            self._gap += text
            if not (text := self._gap).strip():
                return
            self._gap = None
            if self._in_call and self._arguments == "none" and text.lstrip().startswith("{"):
                self._loose = text
                return
        if self._loose:
            self._loose += text
        elif text:
            self._say_content(text)

    def _say_content(self, text: str) -> None:
        if self.in_reasoning:
            self._show("reasoning", text)
            return
        if self._seam and text[0] == DSML[self._seam]:
            text = " " + text  # the text before and after a tag must not make a new one
        self._seam = 0
        self._said = (self._said + text)[-len(DSML) :]
        self._show("content", text)

    def _tag_ends_text(self) -> None:
        self._flush_loose()
        self._gap = ""
        self._seam = _overlap(self._said, DSML)

    def _flush_loose(self, truncated: bool = False) -> None:
        loose, self._loose = self._loose, ""
        if loose and (truncated or is_json_object(loose)):
            self._arguments = "whole"
            self._show("arguments", loose.strip())
        elif loose:
            self._say_content(loose)

    # --- calls -------------------------------------------------------------------------------------------------

    def _begin_call(self, name: str) -> None:
        if self._in_call:
            self._end_call()
        self._in_call, self._arguments = True, "none"
        self._show("call", name)

    def _end_call(self) -> None:
        self._in_call = False
        if self._arguments != "whole":
            self._show("arguments", "}" if self._arguments == "open" else "{}")
        self._pieces.append(("call_end", ""))

    def _begin_parameter(self, head: str) -> None:
        flag = _FLAG.fullmatch(head)
        key = head if flag is None else flag.group(1)
        if not self._in_call or self._arguments == "whole":
            self._say(f"{key}: ")
            return
        self._show("arguments", ("{" if self._arguments == "none" else ", ") + to_json(key) + ": ")
        self._arguments = "open"
        if flag is not None and flag.group(2).lower() == "false":
            self._state = "literal"
        else:
            self._state = "string"
            self._show("arguments", '"')

    def _step_value(self) -> bool:
        if self._state == "string":
            return self._step_string()
        before, tag, after = self._text.partition(PARAMETER_CLOSE)
        if tag:
            self._kept.append(before)
            self._end_value("".join(self._kept), after)
            return True
        kept = len(before) - _overlap(before, PARAMETER_CLOSE)
        self._kept.append(before[:kept])
        self._text = before[kept:]
        return False

    def _step_string(self) -> bool:
        """Shows a string as it comes. A closing tag other than its own leaves in doubt whether it is part of it."""
        text = self._text
        at = text.find(_ANY_CLOSE)
        if at < 0:
            at = len(text) - _overlap(text, _ANY_CLOSE)
        self._show("arguments", _escaped(text[:at]))
        self._text = text = text[at:]
        if text.startswith(PARAMETER_CLOSE):
            self._end_value("", text[len(PARAMETER_CLOSE) :])
            return True
        if PARAMETER_CLOSE.startswith(text):
            return False
        self._state = "doubt"
        return True

    def _end_value(self, kept: str, rest: str) -> None:
        if self._state == "literal":
            self._show("arguments", kept if is_json(kept) else to_json(kept))
        else:
            self._show("arguments", _escaped(kept) + '"')
        self._state, self._text, self._gap = "text", rest, ""
        self._kept.clear()

    def _flush_value(self, truncated: bool) -> bool:
        """Ends a value at the first closing tag in it, of whatever name, or at the end; False if it was cut off."""
        value, tag, rest = ("".join(self._kept) + self._text).partition(_ANY_CLOSE)
        if truncated and not tag:
            self._show("arguments", value if self._state == "literal" else _escaped(value))
            return False
        self._end_value(value, tag + rest)
        return True

    def _show(self, kind: Kind, text: str) -> None:
        if text:
            self._pieces.append((kind, text))


@dataclass(frozen=True)
class ParsedCompletion:
    """An assistant turn. `reasoning_content` is None outside of thinking mode."""

    content: str
    reasoning_content: str | None
    tool_calls: tuple[ToolCall, ...] = ()


def parse_completion(text: str, thinking: bool, *, truncated: bool = False) -> ParsedCompletion:
    """Parses a whole completion, with or without its EOS."""
    parser, text = AnswerParser(thinking), text.removesuffix(EOS)
    cuts = range(0, len(text), _CUT)  # what was parsed is cut off the front, which takes time for long texts
    pieces = [piece for at in cuts for piece in parser.push(text[at : at + _CUT])]
    pieces += parser.flush(truncated=truncated)
    names = [piece for kind, piece in pieces if kind == "call"]
    arguments = [""] * len(names)
    number = -1
    for kind, piece in pieces:
        number += kind == "call"
        if kind == "arguments":
            arguments[number] += piece
    said = {kind: "".join(piece for k, piece in pieces if k == kind) for kind in ("reasoning", "content")}
    calls = tuple(ToolCall(name, text) for name, text in zip(names, arguments, strict=True))
    return ParsedCompletion(said["content"], said["reasoning"] if thinking else None, calls)


def _begins_call(text: str) -> bool | None:
    """Whether what follows the mark of a tag is a call's whole head, perhaps after its block's; None: not yet known."""
    if text.startswith(_BLOCK):
        text = text[len(_BLOCK) :].lstrip()
        if f"<{DSML}".startswith(text):
            return None
        if not text.startswith(f"<{DSML}"):
            return False
        text = text[len(f"<{DSML}") :]
    elif _BLOCK.startswith(text):
        return None
    if _HEADS[0].startswith(text):
        return None
    if (found := _CALL.match(text)) and DSML not in found.group(1):
        return bool(found.group(1))
    return None if text.startswith(_HEADS[0]) and _UNFINISHED.fullmatch(text) and DSML not in text else False


def _escaped(text: str) -> str:
    """Text inside of a JSON string; each character for itself, so that pieces can be joined."""
    return to_json(text)[1:-1]


def _overlap(text: str, tag: str) -> int:
    """Length of the longest proper prefix of `tag` that `text` ends with."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
