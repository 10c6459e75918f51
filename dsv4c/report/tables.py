"""Rows of the report's tables, and its charts: figures put in words, nothing gathered and nothing rendered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dsv4c.report.charts import Chart, chart
from dsv4c.report.families import FAMILIES
from dsv4c.report.gathering import KernelRow, Report
from dsv4c.report.segmented import ProgramRow
from dsv4c.report.wording import (
    between_text,
    bytes_text,
    change_text,
    count_text,
    flops_text,
    time_text,
)
from dsv4c.work import Work


@dataclass(frozen=True)
class Column:
    """One figure of work: its name, its value, how it is written, and the unit of its chart."""

    label: str
    value: Callable[[Work], float]
    text: Callable[[float], str]
    unit: float
    unit_name: str


COLUMNS = (
    Column("kernels", lambda f: f.kernels, count_text, 1.0, ""),
    Column("bytes moved", lambda f: f.bytes_moved, bytes_text, 1e9, "GB"),
    Column("arithmetic", lambda f: f.flops, flops_text, 1e9, "GFLOP"),
    Column("predicted time", lambda f: f.microseconds, time_text, 1e3, "ms"),
)


@dataclass(frozen=True)
class Cell:
    """A figure, the share of its column's bar (1 and `cut` if it is longer), and the change by the pass."""

    text: str
    share: float
    cut: bool
    change: str


@dataclass(frozen=True)
class FamilyRow:
    """One family's part of the lowered program: where its stretch of the bar begins, and how long it is, of 100."""

    family: str
    label: str
    start: float
    share: float
    cells: tuple[str, ...]


@dataclass(frozen=True)
class WorkTable:
    """One step's work after every pass, and by family after the last."""

    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    charts: tuple[Chart, ...]
    families: tuple[FamilyRow, ...]


def work_tables(report: Report) -> Mapping[str, WorkTable]:
    """Step -> its table. Bars are as long as the largest value since the pieces were joined; longer ones are cut."""
    names = ["capture", *(stage.name for stage in report.stages)]
    joined = names.index("stitch") if "stitch" in names else 0
    out = {}
    for step, captured in report.captured_work.items():
        figures = [captured, *(stage.work[step] for stage in report.stages)]
        columns = [_cells(column, figures, joined) for column in COLUMNS]
        charts = tuple(
            chart(
                f"{c.label}{f', {c.unit_name}' if c.unit_name else ''}",
                names,
                [c.value(f) for f in figures],
                c.text,
                c.unit,
            )
            for c in COLUMNS
        )
        rows = tuple(zip(names, zip(*columns, strict=True), strict=True))
        out[step] = WorkTable(rows, charts, tuple(_family_rows(report.last_work.get(step, {}))))
    return out


def _family_rows(work: Mapping[str, Work]) -> Iterable[FamilyRow]:
    """The longest first, by predicted time."""
    total = sum(found.microseconds for found in work.values()) or 1.0
    start = 0.0
    for family, found in sorted(work.items(), key=lambda item: -item[1].microseconds):
        share = 100 * found.microseconds / total
        cells = tuple(column.text(column.value(found)) for column in COLUMNS)
        yield FamilyRow(family, FAMILIES[family], start, share, cells)
        start += share


def _cells(column: Column, figures: Iterable[Work], joined: int) -> list[Cell]:
    values = [column.value(f) for f in figures]
    top = max(values[joined:]) or 1.0
    return [
        Cell(column.text(value), min(1.0, value / top), value > top, change_text(before, value))
        for before, value in zip([values[0], *values], values, strict=False)
    ]


@dataclass(frozen=True)
class Group:
    """Programs that make as many calls, cut into the same segments."""

    programs: tuple[ProgramRow, ...]

    @property
    def arena(self) -> str:
        return between_text((p.arena_bytes for p in self.programs), bytes_text)

    def size(self, name: str) -> str:
        """`64`, or `1 to 64`."""
        return between_text(dict(p.sizes).get(name, 0) for p in self.programs)


def program_groups(programs: Iterable[ProgramRow]) -> list[Group]:
    """Programs alike, together, in the order of the first."""
    held: dict[object, list[ProgramRow]] = {}
    for p in programs:
        cut = tuple((s.kind, s.calls, s.why) for s in p.segments)
        held.setdefault((p.phase, p.calls, p.launches, p.lanes, cut), []).append(p)
    return [Group(tuple(found)) for found in held.values()]


def overview(report: Report) -> list[tuple[str, str]]:
    """The figures that a reader asks for first."""
    model = report.model
    last = report.stages[-1] if report.stages else None
    layers = str(model["num_hidden_layers"])
    if report.truncated_from is not None:
        layers = f"the first {layers} of {report.truncated_from}"
    inexact = [s.name for s in report.stages if s.changed and not s.record.exact]
    out = [
        ("model", f"{layers} layers, hidden size {model['hidden_size']:,}, {model['n_routed_experts']} experts"),
        ("longest context", f"{report.max_context:,} tokens"),
        ("passes", f"{len(report.stages)}, {sum(s.changed for s in report.stages)} rewrote something"),
        ("numerics", f"changed by {', '.join(inexact)}" if inexact else "exact"),
    ]
    for step, figures in (last.work if last else report.captured_work).items():
        out.append((step, f"{time_text(figures.microseconds)} predicted, {bytes_text(figures.bytes_moved)} moved"))
    for p in report.programs:
        if p.rows:
            count = len(p.segments)
            out.append((p.name, f"{p.launches:,} launches in {count} segment{'s' * (count != 1)}"))
    out.append(("memory before any request", bytes_text(report.memory.fixed_bytes)))
    return out


def schedule_rows(report: Report) -> list[tuple[str, str, int, int, float]]:
    """(op, schedule, kernels, calls of all programs, tolerance)"""
    held: dict[tuple[str, str], list[KernelRow]] = {}
    for kernel in report.kernels:
        held.setdefault((kernel.op, kernel.schedule), []).append(kernel)
    return [
        (op, schedule, len(found), sum(k.calls for k in found), found[0].tolerance)
        for (op, schedule), found in sorted(held.items())
    ]


def kernel_facts(kernel: KernelRow) -> list[tuple[str, str]]:
    """What the map says of a kernel."""
    return [
        ("op", kernel.op),
        ("schedule", kernel.schedule),
        ("why", kernel.reason),
        ("launches", str(kernel.launches)),
        ("tolerance", f"{kernel.tolerance:g}"),
    ]
