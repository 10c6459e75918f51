"""What the passes did, in words: a row a pass, one pass in detail, its diff. The same for a model and an artifact."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv4c.artifact import PassRecord
from dsv4c.describe import new_table
from dsv4c.irdiff import unified
from dsv4c.irfiles import Stage
from dsv4c.opened import Artifact
from dsv4c.pipeline import Pass, Step
from dsv4c.program import Program
from dsv4c.work import Sizes, work_of


@dataclass(frozen=True)
class Shown:
    """One pass as it is shown: what it did, figures before and after, and the texts if they are asked for."""

    record: PassRecord
    before: Stage
    after: Stage
    text_before: Callable[[], str]
    text_after: Callable[[], str]

    @cached_property
    def texts(self) -> tuple[str, str]:
        """The program before and after."""
        return self.text_before(), self.text_after()


def stage_of(program: Program, name: str, machine: str, sizes: Sizes) -> Stage:
    """The figures of a program behind a pass, with no file."""
    work = work_of(program, sizes, machine)
    figures = (work.kernels, work.bytes_moved, work.flops, work.microseconds)
    return Stage(name, "", tuple(sorted(program.facts)), program.num_nodes(), *figures)


def shown_steps(steps: Iterable[Step], sizes: Sizes) -> Iterator[Shown]:
    """Steps of a pipeline as they run."""
    last: Stage | None = None
    for step in steps:
        before = last or stage_of(step.before, "capture", step.machine, sizes)
        last = stage_of(step.after, step.name, step.machine, sizes)
        yield Shown(step.record, before, last, step.before.dump, step.after.dump)


def shown_artifact(artifact: Artifact) -> Iterator[Shown]:
    """The passes that made an artifact. Raises ArtifactError for one without its IR."""
    stages = artifact.stages.stages
    for record, before, after in zip(artifact.manifest.passes, stages, stages[1:], strict=True):
        yield Shown(record, before, after, partial(artifact.text, before), partial(artifact.text, after))


class PassRows:
    """A table with a row a pass, filled as they run; keeps no program. `sizes` says what its figures are for."""

    def __init__(self, sizes: str) -> None:
        self._sizes = sizes
        self._table = new_table(
            "pass", "rewrites", "nodes", "kernels", "GB", "GFLOP", "predicted us", "exact", text=(0, 7)
        )  # fmt: skip

    def add(self, one: Shown) -> None:
        """Adds a pass; before the first one, what it began with."""
        if not self._table.row_count:
            self._table.add_row("capture", "", *_figures(one.before), "")
        record = one.record
        exact = "yes" if record.exact else f"no: {record.why}"
        self._table.add_row(record.name, f"{record.rewrites:,}", *_figures(one.after), exact)

    def table(self) -> RenderableType:
        """The rows so far."""
        return Group(self._table, Text(f"\n{self._sizes}", style="dim"))


def _figures(stage: Stage) -> tuple[str, ...]:
    return (
        f"{stage.nodes:,}", f"{stage.kernels:,}", f"{stage.bytes_moved / 1e9:,.3f}", f"{stage.flops / 1e9:,.1f}",
        f"{stage.microseconds:,.0f}",
    )  # fmt: skip


def sizes_text(tokens: int, requests: int, context: int, machine: str) -> str:
    """What figures are for, in words."""
    on = {"cpu": "one core of a server CPU", "sm_90a": "one H200", "sm_100a": "one B200", "sm_103a": "one GB300"}.get(
        machine, machine
    )
    return (
        f"kernels, bytes and operations are the least for one step of {tokens:,} tokens of {requests:,} requests with "
        f"{context:,} tokens each; microseconds by the roofline of {on}"
    )


def pass_detail(one: Shown, made: Pass | None, summary: str) -> RenderableType:
    """One pass: its contract, what it did, and which ops it replaced by which. `made`: the pass itself, if known."""
    record, before, after = one.record, one.before, one.after
    lines = [Text.assemble((record.name, "bold"), f"  {summary}" if summary else "")]
    if made is not None:
        contract = [(word, getattr(made, word)) for word in ("needs", "gives", "breaks")]
        lines.append(Text("  " + "; ".join(f"{word} {', '.join(sorted(facts))}" for word, facts in contract if facts)))
    lines.append(Text("  exact: no bit of any result changes" if record.exact else f"  inexact: {record.why}"))
    lines.append(Text(f"  {record.rewrites:,} rewrites, {record.nodes_before:,} to {record.nodes_after:,} nodes"))
    gained, lost = set(after.facts) - set(before.facts), set(before.facts) - set(after.facts)
    for word, facts in (("holds from here", gained), ("holds no more", lost)):
        if facts:
            lines.append(Text(f"  {word}: {', '.join(sorted(facts))}"))
    return Group(*lines, Text(), _work_table(before, after), *_op_table(one))


def _work_table(before: Stage, after: Stage) -> Table:
    table = new_table("", "before", "after", text=(0,))
    for label, *values in zip(
        ("nodes", "kernels", "GB", "GFLOP", "predicted us"), _figures(before), _figures(after), strict=True
    ):
        table.add_row(label, *values)
    return table


def _op_table(one: Shown) -> Iterator[RenderableType]:
    counts = [Counter(re.findall(r"^  %\d+ = ([\w.<> -]+)\(", text, flags=re.MULTILINE)) for text in one.texts]
    changed = [op for op in sorted({*counts[0], *counts[1]}) if counts[0][op] != counts[1][op]]
    if changed:
        table = new_table("op", "before", "after", text=(0,))
        for op in changed:
            table.add_row(op, f"{counts[0][op]:,}", f"{counts[1][op]:,}")
        yield from (Text(), table)


def pass_diff(one: Shown) -> Iterator[Text]:
    """The lines that a pass changed, as `diff -u` shows them; nothing if it changed none."""
    colours = {"-": "red", "+": "green", "@": "cyan"}
    for line in unified(*one.texts).splitlines():
        yield Text(line, style=colours.get(line[:1], ""))
