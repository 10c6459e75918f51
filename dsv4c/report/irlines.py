"""The text of a program, line by line: what each line defines, calls and reads, and where in the model it is.

%12.1 and %weight.norm.weight are references; numbers of values are no part of what a line says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

REFERENCE = re.compile(r"%\d+(?:\.\d+)?")
TOKEN = re.compile(r"%[\w.#-]+|[A-Za-z_][\w.]*|-?\d[\w.+-]*|\s+|.")
_CALL = re.compile(r"(%\d+) = ([^(]+)\(")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True)
class Line:
    """One line. `section`: the sublayer it belongs to (`L07.attn`), `L07 values` for what a layer is given."""

    text: str
    """Without indent and scope."""
    section: str

    @cached_property
    def defines(self) -> str:
        """`%12`, or nothing."""
        found = _CALL.match(self.text)
        return found[1] if found else ""

    @cached_property
    def head(self) -> str:
        """What is called, or which value is declared or returned."""
        found = _CALL.match(self.text)
        return found[2] if found else self.text.split(" : ")[0].split(" = ")[0]

    @cached_property
    def key(self) -> tuple[str, str]:
        """What the line says but for the numbers of values."""
        return self.section, REFERENCE.sub("%", self.text)

    @cached_property
    def references(self) -> tuple[str, ...]:
        """The numbered values on the line in order, its own first."""
        return tuple(REFERENCE.findall(self.text))


def lines_of(dump: str) -> dict[str, list[Line]]:
    """Graph (or other part of the text, such as `constants`) -> its lines.

    `return a=%1, b=%2` becomes a line for each value.
    """
    out: dict[str, list[Line]] = {}
    graph = ""
    for raw in dump.splitlines():
        if raw.endswith(" {") and not raw.startswith(" "):
            graph = raw.removeprefix("graph ").removesuffix(" {")
            out[graph] = []
            continue
        if raw == "}":
            continue
        text = raw.removeprefix("  ")
        if text.startswith("return "):
            parts = text.removeprefix("return ").split(", ")
            out[graph] += [Line(f"return {' = '.join(part.split('=', 1))}", f"{graph} results") for part in parts]
            continue
        text, _, scope = text.partition("  # ")
        out[graph].append(Line(text, scope or _declared(text, graph)))
    return out


def _declared(text: str, graph: str) -> str:
    found = _LAYER.search(text)
    return f"L{int(found[1]):02d} values" if found else f"{graph} values"


def tokens(text: str) -> list[str]:
    """The line cut at names, numbers and signs; joined they give it back."""
    return TOKEN.findall(text)
