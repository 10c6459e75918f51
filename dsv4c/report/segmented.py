"""The programs of a manifest, cut into segments and laid out by sublayer: which kernels a step launches, in order.

A segment ends where a call of another kind follows, for the reason that the manifest gives, or with the program.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from dsv4c.artifact import Call, Manifest, Program
from dsv4c.report.families import family_of

SHOWN_TOKENS = (64, 2048)  # of the decode and the prefill program that are drawn: the steps that people ask about


@dataclass(frozen=True)
class Cell:
    """One call. `kernel` is its name in the manifest, `number` its place in the program."""

    number: int
    kernel: str
    family: str
    lane: int
    waits: tuple[int, ...]
    breaks: str
    """Why a segment ends before this call; empty within one."""


@dataclass(frozen=True)
class Lane:
    """The calls of one scope that follow each other."""

    scope: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class SegmentRow:
    """One segment: what it holds, where, and why it ends."""

    kind: str
    calls: int
    launches: int
    first: str
    last: str
    why: str
    ends: str


@dataclass(frozen=True)
class ProgramRow:
    """One program. `rows` is empty for those that are not drawn."""

    name: str
    phase: str
    sizes: tuple[tuple[str, int], ...]
    calls: int
    launches: int
    lanes: int
    arena_bytes: int
    segments: tuple[SegmentRow, ...]
    rows: tuple[Lane, ...] = ()


def program_rows(manifest: Manifest) -> tuple[ProgramRow, ...]:
    """All programs of a manifest; one of each phase is drawn."""
    drawn = _drawn(manifest)
    return tuple(_row(manifest, name, program, name in drawn) for name, program in manifest.programs.items())


def _drawn(manifest: Manifest) -> set[str]:
    """The largest program of each phase within SHOWN_TOKENS, or its smallest."""
    most = dict(zip(("decode", "prefill"), SHOWN_TOKENS, strict=True))
    out = set()
    for phase in sorted({p.phase for p in manifest.programs.values()}):
        held = sorted((p.symbols.get("T", 0), name) for name, p in manifest.programs.items() if p.phase == phase)
        within = [name for tokens, name in held if tokens <= most.get(phase, tokens)]
        out.add(within[-1] if within else held[0][1])
    return out


def _row(manifest: Manifest, name: str, program: Program, drawn: bool) -> ProgramRow:
    calls = [call for segment in program.segments for call in segment.calls]
    return ProgramRow(
        name,
        program.phase,
        tuple((size, program.symbols[size]) for size in ("T", "R", "S") if size in program.symbols),
        len(calls),
        _launches(manifest, calls),
        1 + max((call.lane for call in calls), default=0),
        program.arena_bytes,
        tuple(_segments(manifest, program)),
        _lanes(manifest, program) if drawn else (),
    )


def _segments(manifest: Manifest, program: Program) -> Iterable[SegmentRow]:
    for segment, after in zip(program.segments, [*program.segments[1:], None], strict=True):
        ends = "the program ends" if after is None else _boundary(segment.kind, after.kind, segment.why, after.why)
        scopes = [call.scope for call in segment.calls]
        yield SegmentRow(
            segment.kind, len(scopes), _launches(manifest, segment.calls), scopes[0] if scopes else "",
            scopes[-1] if scopes else "", segment.why, ends,
        )  # fmt: skip


def _boundary(kind: str, after: str, why: str, why_after: str) -> str:
    """Why a segment of this kind gives way to the next."""
    if after != "graph":
        return f"{after} follows: {why_after}"
    return f"what {why or f'runs as {kind}'} is over"


def _lanes(manifest: Manifest, program: Program) -> tuple[Lane, ...]:
    cells: list[tuple[str, Cell]] = []
    before = None
    for segment in program.segments:
        for place, call in enumerate(segment.calls):
            breaks = "" if place or before is None else _boundary(before.kind, segment.kind, before.why, segment.why)
            cells.append((call.scope, _cell(manifest, len(cells), call, breaks)))
        before = segment
    return tuple(Lane(scope, tuple(c for _, c in run)) for scope, run in groupby(cells, key=lambda item: item[0]))


def _cell(manifest: Manifest, number: int, call: Call, breaks: str) -> Cell:
    family = family_of(manifest.kernels[call.kernel].op)
    return Cell(number, call.kernel, family, call.lane, tuple(wait.call for wait in call.waits), breaks)


def _launches(manifest: Manifest, calls: Iterable[Call]) -> int:
    """Launches of these calls; a kernel without a list of them is one."""
    return sum(max(1, len(manifest.kernels[call.kernel].launches)) for call in calls)
