"""Tables of what was verified, for people. Returns rich renderables, prints nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table

from dsv4c.bisecting import Bisection
from dsv4c.verifying import Row, ScheduleRow, Verification

COLUMNS = (
    "pass",
    "claims",
    "on equal inputs",
    "streams",
    "logits",
    "KL, nats",
    "greedy",
    "KL of plain",
    "greedy of plain",
)
"""`streams` and `logits`: the largest error over the largest value; then against the plain model."""


def cells(row: Row) -> tuple[str, ...]:
    """A row as texts, in the order of COLUMNS, then bits per byte."""
    check = row.check
    far = (number(row.kl), percent(row.greedy), "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}")
    if not row.changed:
        return row.name, row.claim, "unchanged", "", "", "", "", *far
    if check.equal:
        return row.name, row.claim, "bit-equal", "0", "0", "0", "100 %", *far
    errors = {d.name: d.max_rel for d in check.results}
    own = "" if check.equal_inputs is None else number(check.equal_inputs)
    rel = (number(errors.get("streams", 0.0)), number(errors.get("logits", 0.0)))
    return row.name, row.claim, own, *rel, number(check.kl), percent(check.greedy), *far


def number(value: float) -> str:
    """Two figures; `inf` where results are not comparable."""
    return "0" if value == 0 else "inf" if math.isinf(value) else f"{value:.1e}" if value < 1e-2 else f"{value:.3f}"


def percent(share: float) -> str:
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def verification_table(found: Verification) -> RenderableType:
    """Every pass and schedule with what was measured, and the verdict."""
    parts: list[RenderableType] = [f"{found.model} for {found.target}; " + "; ".join(found.inputs), _Stages(found)]
    if found.schedules:
        parts.append(_schedules(found.schedules))
    parts += [f"note: {note}" for note in found.notes]
    parts.append(verdict(found))
    return Group(*parts)


class _Stages:
    """One table; on a narrow terminal two, of which the second compares with the plain model."""

    def __init__(self, found: Verification) -> None:
        self.found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = any(row.bits_per_byte is not None for row in self.found.rows)
        columns = (*COLUMNS[:2], "holds", *COLUMNS[2:], *(("bits a byte",) if text else ()))
        one = self._table(columns, range(len(columns)))
        if console.measure(one, options=options.update(max_width=1000)).maximum <= options.max_width:
            yield one
            return
        last = columns.index("KL of plain")
        yield self._table(columns, range(last))
        yield ""
        yield self._table(columns, (0, *range(last, len(columns))))

    def _table(self, columns: Sequence[str], chosen: Sequence[int]) -> Table:
        table = _table([columns[i] for i in chosen], left=(0, 1, 2) if 1 in chosen else (0,))
        for row in self.found.rows:
            name, claim, *shown = cells(row)
            all_cells = (name, claim, "no" if row.broken else "yes", *shown)
            table.add_row(
                *(all_cells[i] for i in chosen), style="red" if row.broken else "dim" if not row.changed else ""
            )
        return table


def markdown_tables(found: Verification) -> str:
    """The same tables as Markdown, without a verdict."""
    rows = [(f"`{row.name}`", *cells(row)[1:], "no" if row.broken else "yes") for row in found.rows]
    said = f"`{found.model}` for `{found.target}`; {'; '.join(found.inputs)}."
    parts = [said, _markdown((*COLUMNS, "bits a byte", "holds"), rows)]
    if found.schedules:
        kernels = [(f"`{s.op}`", f"`{s.schedule}`", f"{s.tolerance:g}", number(s.error)) for s in found.schedules]
        parts.append(_markdown(("op", "schedule", "tolerance", "largest error"), kernels))
    return "\n\n".join([*parts, *(f"Note: {note}." for note in found.notes)]) + "\n"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(found: Verification) -> str:
    """One sentence."""
    if found.ok:
        many = sum(row.changed for row in found.rows)
        return f"every claim holds: {many} stages" + (f", {len(found.schedules)} schedules" if found.schedules else "")
    first = found.broken[0]
    name = f"pass `{first.name}`" if isinstance(first, Row) else f"schedule `{first.schedule}`"
    more = len(found.broken) - 1
    return f"broken: {name} {first.broken}" + (f"; and {more} more" if more else "")


def bisection_text(found: Bisection) -> str:
    """What was observed, what is to blame, and how many runs it took."""
    runs = f"{found.runs} runs"
    lines = [f"{found.subject}: {found.observed}"]
    if found.kept:
        lines.append(f"differs as claimed: {', '.join(found.kept)}")
    if found.kind == "nothing":
        lines.append(f"nothing to blame ({runs})")
        return "\n".join(lines)
    lines.append(f"first {found.kind}: {found.cause}" + (f": {found.said}" if found.said else ""))
    if found.op is not None:
        lines.append(f"first op: {found.op}")
    if found.schedule is not None and found.kind != "schedule":
        lines.append(f"schedule of that op: {found.schedule}")
    lines.append(f"({runs})")
    return "\n".join(lines)


def _schedules(rows: Sequence[ScheduleRow]) -> Table:
    table = _table(("op", "schedule", "tolerance", "largest error", "holds"), left=(0, 1))
    for row in rows:
        holds = "no" if row.broken else "yes"
        table.add_row(
            row.op, row.schedule, f"{row.tolerance:g}", number(row.error), holds, style="red" if row.broken else ""
        )
    return table


def _table(columns: Sequence[str], left: Sequence[int]) -> Table:
    """A word of a header a line, so that a row fits into a narrow terminal."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        header = column.replace(" ", "\n")
        table.add_column(header, justify="left" if i in left else "right", no_wrap=True, vertical="bottom")
    return table
