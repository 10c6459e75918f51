"""Two texts of a program side by side: lines aligned by what they say, whatever their values are numbered.

    before, after --align--> rows --by section, with context--> hunks --alike in many layers--> folds

A value's number changes when anything before it does, so numbers are followed, not compared: a line has changed if it
says something else, or reads a value that is not the one it read. What a pass does to forty layers alike is one fold:
the first of them in full, and the names of the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from dsv4c.report.irlines import REFERENCE, Line, lines_of, tokens

CONTEXT = 3  # unchanged lines shown before and after a change
_LAYER_NAMES = re.compile(r"\bL\d\d\b|(?<=layers\.)\d+")

Kind = Literal["same", "changed", "removed", "added"]
Parts = tuple[tuple[str, bool], ...]
"""Text and whether it is marked as changed."""


@dataclass(frozen=True)
class Row:
    """A line before beside one after; either may be absent."""

    kind: Kind
    before: Line | None
    after: Line | None
    stale: frozenset[int] = frozenset()
    """Of a line that says the same: which of its references read another value."""

    @property
    def section(self) -> str:
        line = self.after or self.before
        assert line is not None
        return line.section


@dataclass(frozen=True)
class Gap:
    """Unchanged lines that are not shown."""

    lines: int


@dataclass(frozen=True)
class Hunk:
    """The changes of one section, with context; `rows` may hold gaps."""

    section: str
    rows: tuple[Row | Gap, ...]


@dataclass(frozen=True)
class Fold:
    """A hunk, and the other sections in which the same happened."""

    hunk: Hunk
    alike: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """What one pass did to the text."""

    folds: tuple[Fold, ...]
    removed: int
    added: int
    changed: int
    left_out: int = 0
    """Changed lines that are not shown: more than fit a page."""


def difference(before: str, after: str, pieces: Mapping[str, str] | None = None, most_rows: int = 1500) -> Difference:
    """What changed between two texts. `pieces`: section after -> graph before that became it, where graphs differ.

    Rows beyond `most_rows` are left out, and counted.
    """
    old, new = lines_of(before), lines_of(after)
    if old.keys() == new.keys():
        rows = [row for name in new for row in align(old[name], new[name])]
    else:
        rows = list(_joined(old, new, pieces or {}))
    folds: list[Fold] = []
    shown = left_out = 0
    for fold in sorted(fold_alike(hunks(rows)), key=lambda fold: _part(fold.hunk.section)):
        count = sum(isinstance(row, Row) for row in fold.hunk.rows)
        if folds and shown + count > most_rows:
            left_out += sum(row.kind != "same" for row in fold.hunk.rows if isinstance(row, Row)) * (
                1 + len(fold.alike)
            )
            continue
        shown += count
        folds.append(fold)
    counts = {kind: sum(row.kind == kind for row in rows) for kind in ("removed", "added", "changed")}
    return Difference(tuple(folds), **counts, left_out=left_out)


def _part(section: str) -> int:
    """Calls come first, then what graphs are given, then what they return."""
    return 1 if section.endswith(" values") else 2 if section.endswith(" results") else 0


def align(old: Sequence[Line], new: Sequence[Line]) -> list[Row]:
    """Rows of one graph, in the order of the lines after."""
    pairs: list[tuple[Line | None, Line | None]] = []
    for tag, i1, i2, j1, j2 in _match([line.key for line in old], [line.key for line in new]):
        if tag == "equal":
            pairs += zip(old[i1:i2], new[j1:j2], strict=True)
        else:
            pairs += _paired(old[i1:i2], new[j1:j2])
    known = {a.defines: b.defines for a, b in pairs if a is not None and b is not None and a.defines}
    return [_row(a, b, known) for a, b in pairs]


def _paired(old: Sequence[Line], new: Sequence[Line]) -> Iterator[tuple[Line | None, Line | None]]:
    """Lines that differ: those that call the same in the same section are one changed line."""
    heads = [(line.section, line.head) for line in old], [(line.section, line.head) for line in new]
    for tag, i1, i2, j1, j2 in _match(*heads):
        if tag == "equal":
            yield from zip(old[i1:i2], new[j1:j2], strict=True)
        else:
            yield from ((line, None) for line in old[i1:i2])
            yield from ((None, line) for line in new[j1:j2])


def _match(old: Sequence[object], new: Sequence[object]) -> Sequence[tuple[str, int, int, int, int]]:
    return SequenceMatcher(None, old, new, autojunk=False).get_opcodes()


def _row(old: Line | None, new: Line | None, known: Mapping[str, str]) -> Row:
    if old is None or new is None:
        return Row("added" if old is None else "removed", old, new)
    if old.key != new.key:
        return Row("changed", old, new)
    both = enumerate(zip(old.references, new.references, strict=True))
    stale = frozenset(i for i, (a, b) in both if followed(a, known) != b)
    return Row("changed" if stale else "same", old, new, stale)


def followed(reference: str, known: Mapping[str, str]) -> str | None:
    """`%12.1` by the number that %12 has now; None if it is gone."""
    value, dot, index = reference.partition(".")
    return f"{known[value]}{dot}{index}" if value in known else None


def hunks(rows: Iterable[Row]) -> Iterator[Hunk]:
    """The changed stretches, a section at a time."""
    sections: list[tuple[str, list[Row]]] = []
    for row in rows:
        if not sections or sections[-1][0] != row.section:
            sections.append((row.section, []))
        sections[-1][1].append(row)
    for section, held in sections:
        shown = _shown(held)
        if not shown:
            continue
        out: list[Row | Gap] = []
        last = -1
        for place in shown:
            if place > last + 1:
                out.append(Gap(place - last - 1))
            out.append(held[place])
            last = place
        if last + 1 < len(held):
            out.append(Gap(len(held) - last - 1))
        yield Hunk(section, tuple(out))


def _shown(rows: Sequence[Row]) -> list[int]:
    near: set[int] = set()
    for place, row in enumerate(rows):
        if row.kind != "same":
            near.update(range(max(0, place - CONTEXT), min(len(rows), place + CONTEXT + 1)))
    return sorted(near)


def fold_alike(found: Iterable[Hunk]) -> list[Fold]:
    """Hunks that are the same but for the layer and the numbers of values, once each."""
    first: dict[object, Hunk] = {}
    alike: dict[object, list[str]] = {}
    for hunk in found:
        key = _signature(hunk)
        if key not in first:
            first[key] = hunk
            alike[key] = []
        else:
            alike[key].append(hunk.section)
    return [Fold(hunk, tuple(alike[key])) for key, hunk in first.items()]


def _signature(hunk: Hunk) -> tuple[object, ...]:
    """The hunk with layers and numbers replaced by their order of appearance; edges of gaps count, lengths do not."""
    names: tuple[dict[str, str], dict[str, str]] = ({}, {})

    def said(line: Line | None, side: int) -> str | None:
        if line is None:
            return None
        text = REFERENCE.sub(lambda m: names[side].setdefault(m[0], f"%{len(names[side])}"), line.text)
        return _LAYER_NAMES.sub("N", text)

    rows = [None if isinstance(r, Gap) else (r.kind, said(r.before, 0), said(r.after, 1)) for r in hunk.rows]
    return (_LAYER_NAMES.sub("N", hunk.section), *rows)


def _joined(old: Mapping[str, list[Line]], new: Mapping[str, list[Line]], pieces: Mapping[str, str]) -> Iterator[Row]:
    """Where graphs were joined: each section after beside the piece it is an instance of."""
    for lines in new.values():
        sections: dict[str, list[Line]] = {}
        for line in lines:
            sections.setdefault(line.section, []).append(line)
        for section, held in sections.items():
            if section in pieces:
                calls = [Line(line.text, section) for line in old[pieces[section]] if line.defines]
                yield from align(calls, held)
            else:
                yield from (Row("added", None, line) for line in held)


def marked(row: Row) -> tuple[Parts, Parts]:
    """The row's two texts, cut where they differ."""
    if row.before is None or row.after is None:
        return _plain(row.before), _plain(row.after)
    if row.kind == "same":
        return _plain(row.before), _plain(row.after)
    if row.stale:
        return _stale(row.before, row.stale), _stale(row.after, row.stale)
    return _token_marks(row.before, row.after)


def _plain(line: Line | None) -> Parts:
    return () if line is None else ((line.text, False),)


def _stale(line: Line, places: frozenset[int]) -> Parts:
    out, last = [], 0
    for number, found in enumerate(REFERENCE.finditer(line.text)):
        if number in places:
            out += [(line.text[last : found.start()], False), (found[0], True)]
            last = found.end()
    return tuple(part for part in (*out, (line.text[last:], False)) if part[0])


def _token_marks(old: Line, new: Line) -> tuple[Parts, Parts]:
    a, b = tokens(old.text), tokens(new.text)
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    for tag, i1, i2, j1, j2 in _match([REFERENCE.sub("%", t) for t in a], [REFERENCE.sub("%", t) for t in b]):
        if i2 > i1:
            left.append(("".join(a[i1:i2]), tag != "equal"))
        if j2 > j1:
            right.append(("".join(b[j1:j2]), tag != "equal"))
    return tuple(left), tuple(right)
