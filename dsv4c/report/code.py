"""A line of IR as HTML: what is called in bold, types and scope muted, changed parts marked."""

from __future__ import annotations

import re
from collections.abc import Iterator

from markupsafe import Markup, escape

from dsv4c.report.sides import Parts

_CALLED = re.compile(r"^%\d+ = ([^(]+)")
_TYPES = re.compile(r" : [^:]*$")


def code(parts: Parts) -> Markup:
    """The line's HTML."""
    text = "".join(part for part, _ in parts)
    out = []
    for start, end, tag in _zones(text):
        inner = "".join(
            f"<mark>{escape(piece)}</mark>" if marked else str(escape(piece))
            for piece, marked in _within(parts, start, end)
        )
        out.append(f"<{tag}>{inner}</{tag}>" if tag else inner)
    return Markup("".join(out))  # every piece is escaped above


def _zones(text: str) -> Iterator[tuple[int, int, str]]:
    called, types = _CALLED.match(text), _TYPES.search(text)
    cuts = [0]
    tags = []
    for found, tag in ((called.span(1) if called else None, "b"), (types.span() if types else None, "i")):
        if found:
            cuts += found
            tags += ["", tag]
    cuts.append(len(text))
    tags.append("")
    for start, end, tag in zip(cuts, cuts[1:], tags, strict=False):
        if start < end:
            yield start, end, tag


def _within(parts: Parts, start: int, end: int) -> Iterator[tuple[str, bool]]:
    at = 0
    for text, marked in parts:
        low, high = max(start, at), min(end, at + len(text))
        if low < high:
            yield text[low - at : high - at], marked
        at += len(text)
