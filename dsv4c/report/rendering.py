"""A report as one HTML file: templates, style and script of this folder, all inlined; nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dsv4c import __version__
from dsv4c.irfiles import Source
from dsv4c.report.charts import HEIGHT, LEFT, RIGHT, WIDTH
from dsv4c.report.code import code
from dsv4c.report.drawing import BOX_HEIGHT, Drawing, draw
from dsv4c.report.families import FAMILIES
from dsv4c.report.gathering import Report
from dsv4c.report.pools import MemoryPicture
from dsv4c.report.sides import Gap, Hunk, Row, marked
from dsv4c.report.stages import Frame, slug
from dsv4c.report.tables import kernel_facts, overview, program_groups, schedule_rows, work_tables
from dsv4c.report.wording import (
    bytes_text,
    count_text,
    counted_text,
    layers_text,
    origin_text,
    pairs_json,
    script_json,
    span_text,
)

FIRST_SUBLAYER = "attention.csa"  # the busiest; another if the model has none


def render(report: Report) -> str:
    """The whole page."""
    env = Environment(
        loader=PackageLoader("dsv4c.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        bytes=bytes_text, code=code, count=count_text, counted=counted_text, json=script_json, layers=layers_text,
        pairs=pairs_json, slug=slug, span=span_text,
    )  # fmt: skip
    pictures = _pictures(report)
    return env.get_template("report.html.j2").render(
        report=report,
        version=__version__,
        style=_asset(env, "report.css"),
        script=_asset(env, "report.js"),
        overview=overview(report),
        blocks=blocks,
        marked=marked,
        drawn=_drawn(report),
        families=FAMILIES,
        pictures=pictures,
        first=FIRST_SUBLAYER if FIRST_SUBLAYER in pictures else next(iter(pictures), ""),
        box_height=BOX_HEIGHT,
        summaries={stage.name: stage.summary for stage in report.stages},
        work=work_tables(report),
        chart_box=(WIDTH, HEIGHT, LEFT, WIDTH - RIGHT),
        groups=program_groups(report.programs),
        segment_kinds=list(dict.fromkeys(s.kind for p in report.programs for s in p.segments)),
        source_numbers=(sources := _sources(report)),
        source_facts=[_source_facts(source) for source in sources],
        kernel_facts={kernel.name: kernel_facts(kernel) for kernel in report.kernels},
        memory_data=_memory_data(report.memory),
        schedules=schedule_rows(report),
    )


def _asset(env: Environment, name: str) -> Markup:
    """A file of ours, as it is."""
    assert env.loader is not None
    return Markup(env.loader.get_source(env, name)[0])


@dataclass(frozen=True)
class Picture:
    """A frame, drawn."""

    frame: Frame
    drawing: Drawing


def _pictures(report: Report) -> dict[str, list[Picture]]:
    return {
        name: [Picture(frame, draw(frame.sublayer, frame.changed)) for frame in frames]
        for name, frames in report.frames.items()
    }


def _drawn(report: Report) -> dict[str, list[str]]:
    """Pass -> the sublayers that it changes in the graph."""
    out: dict[str, list[str]] = {}
    for name, frames in report.frames.items():
        for frame in frames:
            out.setdefault(frame.stage, []).append(name)
    return out


@dataclass(frozen=True)
class Block:
    """Rows that stand together: one line beside one, or removed lines beside added ones; or `lines` left out.

    `kind` is `same`, `changed`, `rewired` (it reads another value), `moved` or `gap`.
    """

    kind: str
    before: tuple[Row, ...] = ()
    after: tuple[Row, ...] = ()
    lines: int = 0


def blocks(hunk: Hunk) -> Iterable[Block]:
    """A hunk cut so that each block's two sides can be set beside each other, or under each other."""
    for kind, found in groupby(hunk.rows, key=_block_kind):
        if kind == "gap":
            yield from (Block("gap", lines=gap.lines) for gap in found if isinstance(gap, Gap))
            continue
        held = [row for row in found if isinstance(row, Row)]
        if kind == "moved":
            before, after = (tuple(row for row in held if row.kind == side) for side in ("removed", "added"))
            yield Block("moved", before, after)
        else:
            yield from (Block(kind, (row,), (row,)) for row in held)


def _block_kind(row: Row | Gap) -> str:
    if isinstance(row, Gap):
        return "gap"
    if row.kind in ("removed", "added"):
        return "moved"
    return "rewired" if row.stale else row.kind


def _sources(report: Report) -> dict[Source, int]:
    """Every source of a call that is drawn -> its number."""
    numbers: dict[Source, int] = {}
    for cell in (cell for p in report.programs for row in p.rows for cell in row.cells):
        numbers.setdefault(cell.source, len(numbers))
    return numbers


def _source_facts(source: Source) -> list[tuple[str, str]]:
    return [("from", origin_text(source.origin)), ("passes", ", ".join(source.passes))]


def _memory_data(memory: MemoryPicture) -> dict[str, Any]:
    """What the script needs to draw any load; sizes in bytes."""
    return {
        "total": memory.room.total_bytes,
        "limit": memory.room.limit_bytes,
        "fixed": [[item.name, item.size_bytes] for item in memory.fixed],
        "pools": memory.pools,
        "loads": [
            [{"context": o.context, "requests": o.requests, "pools": o.pools, "fits": o.fits} for o in row]
            for row in memory.loads
        ],
        "chosen": next([i, j] for i, row in enumerate(memory.loads) for j, o in enumerate(row) if o == memory.chosen),
    }
