"""What a pass changed, line by line: a diff of two program texts in which a value is not changed by its number.

Values are numbered in order, so a pass that removes one renumbers all behind it. Lines are aligned without numbers;
an aligned line counts as changed where it reads another value than before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_VALUE = re.compile(r"%(\d+)")


@dataclass(frozen=True)
class Line:
    """One line of a diff: ` ` in both, `-` only before, `+` only after; numbers of lines count from 1."""

    mark: str
    text: str
    before: int | None = None
    after: int | None = None


def diff_lines(before: str, after: str) -> list[Line]:
    """Every line of both texts, in order."""
    old, new = before.splitlines(), after.splitlines()
    alike = SequenceMatcher(None, [_masked(line) for line in old], [_masked(line) for line in new], autojunk=False)
    numbers = _Numbers()
    out: list[Line] = []
    for kind, i1, i2, j1, j2 in alike.get_opcodes():
        if kind != "equal":
            out += [Line("-", old[i], before=i + 1) for i in range(i1, i2)]
            out += [Line("+", new[j], after=j + 1) for j in range(j1, j2)]
            continue
        for i, j in zip(range(i1, i2), range(j1, j2), strict=True):
            if numbers.same(old[i], new[j]):
                out.append(Line(" ", new[j], i + 1, j + 1))
            else:
                out += [Line("-", old[i], before=i + 1), Line("+", new[j], after=j + 1)]
    return out


def unified(before: str, after: str, context: int = 2) -> str:
    """The changed lines with `context` lines around them, in the form of `diff -u`; empty if nothing changed."""
    lines = diff_lines(before, after)
    return "".join(f"{text}\n" for hunk in _hunks(lines, context) for text in _hunk(hunk))


def changed(before: str, after: str) -> int:
    """Lines that are in one of the texts only."""
    return sum(line.mark != " " for line in diff_lines(before, after))


def _masked(line: str) -> str:
    return _VALUE.sub("%", line)


class _Numbers:
    """Which value of the old text is which of the new."""

    def __init__(self) -> None:
        self._new: dict[str, str] = {}
        self._old: dict[str, str] = {}

    def same(self, old: str, new: str) -> bool:
        """Whether two lines that are alike but for numbers read the same values; learns what they define.

        A value whose line changed has no pair yet: the first line that reads it says which it became.
        """
        if old.startswith("graph "):
            self._new.clear()
            self._old.clear()
        pairs = list(zip(_VALUE.findall(old), _VALUE.findall(new), strict=True))
        same = all(self._new.get(a, b) == b and self._old.get(b, a) == a for a, b in pairs)
        for a, b in pairs if same else pairs[:1]:  # the first is what the line defines
            self._new[a], self._old[b] = b, a
        return same


def _hunks(lines: Sequence[Line], context: int) -> Iterator[Sequence[Line]]:
    marked = [i for i, line in enumerate(lines) if line.mark != " "]
    start = stop = None
    for i in marked:
        if start is None or stop is None or i - context > stop:
            if start is not None:
                yield lines[start:stop]
            start = max(0, i - context)
        stop = min(len(lines), i + context + 1)
    if start is not None:
        yield lines[start:stop]


def _hunk(lines: Sequence[Line]) -> Iterator[str]:
    old = [line.before for line in lines if line.before is not None]
    new = [line.after for line in lines if line.after is not None]
    yield f"@@ -{old[0] if old else 0},{len(old)} +{new[0] if new else 0},{len(new)} @@"
    yield from (f"{line.mark}{line.text}" for line in lines)
