"""The programs of an artifact, cut into segments and laid out by sublayer: which kernels a step launches, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from dsv4c.artifact import Manifest
from dsv4c.describe_calls import segment_ends
from dsv4c.irfiles import Source
from dsv4c.opened import Artifact, ArtifactProgram, PlacedCall
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
    source: Source


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

    @property
    def families(self) -> set[str]:
        """Of the calls that are drawn."""
        return {cell.family for row in self.rows for cell in row.cells}


def program_rows(artifact: Artifact, sources: Mapping[str, Sequence[Source]]) -> tuple[ProgramRow, ...]:
    """All programs of an artifact; one of each phase is drawn. `sources`: of every call of each program."""
    drawn = _drawn(artifact.manifest)
    programs = sorted(map(artifact.program, artifact.programs), key=_size)
    return tuple(_row(p, sources[p.name] if p.name in drawn else None) for p in programs)


def _size(program: ArtifactProgram) -> tuple[str, int, int]:
    """What programs are ordered by: phase, tokens, rows of logits."""
    symbols = program.program.symbols
    return program.program.phase, symbols.get("T", 0), symbols.get("S", 0)


def _drawn(manifest: Manifest) -> set[str]:
    """The largest program of each phase within SHOWN_TOKENS, or its smallest."""
    most = dict(zip(("decode", "prefill"), SHOWN_TOKENS, strict=True))
    out = set()
    for phase in sorted({p.phase for p in manifest.programs.values()}):
        held = sorted((p.symbols.get("T", 0), name) for name, p in manifest.programs.items() if p.phase == phase)
        within = [name for tokens, name in held if tokens <= most.get(phase, tokens)]
        out.add(within[-1] if within else held[0][1])
    return out


def _row(program: ArtifactProgram, sources: Sequence[Source] | None) -> ProgramRow:
    symbols = program.program.symbols
    ends = segment_ends(program)
    held = [[call for call in program.calls if call.segment == i] for i in range(len(program.segments))]
    return ProgramRow(
        program.name,
        program.program.phase,
        tuple((size, symbols[size]) for size in ("T", "R", "S") if size in symbols),
        len(program.calls),
        _launches(program.calls),
        1 + max((call.call.lane for call in program.calls), default=0),
        program.program.arena_bytes,
        tuple(
            SegmentRow(s.kind, len(c), _launches(c), c[0].scope if c else "", c[-1].scope if c else "", s.why, end)
            for s, c, end in zip(program.segments, held, ends, strict=True)
        ),
        _lanes(program, ends, sources) if sources is not None else (),
    )


def _lanes(program: ArtifactProgram, ends: Sequence[str], sources: Sequence[Source]) -> tuple[Lane, ...]:
    breaks = {}
    before = 0
    for call in program.calls:
        if call.segment != before:
            breaks[call.index], before = ends[before], call.segment
    cells = [(c.scope, _cell(c, breaks.get(c.index, ""), sources[c.index])) for c in program.calls]
    return tuple(Lane(scope, tuple(c for _, c in run)) for scope, run in groupby(cells, key=lambda item: item[0]))


def _cell(call: PlacedCall, breaks: str, source: Source) -> Cell:
    waits = tuple(wait.call for wait in call.call.waits)
    return Cell(call.index, call.kernel.name, family_of(call.op), call.call.lane, waits, breaks, source)


def _launches(calls: Iterable[PlacedCall]) -> int:
    """Launches of these calls; a kernel without a list of them is one."""
    return sum(max(1, len(call.kernel.launches)) for call in calls)
