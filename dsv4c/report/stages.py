"""What each pass did, as the report shows it: gathered while the pipeline runs, so that no program is kept.

stages = Stages(captured)
for step in pipeline.steps(captured): stages.add(step, passes[step.name])
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4c.artifact import PassRecord
from dsv4c.pipeline import Pass, Step
from dsv4c.program import Program
from dsv4c.report.figures import NodeWork, figures_by_family, figures_of
from dsv4c.report.sides import Difference, difference
from dsv4c.report.sublayers import Sublayer, pieces_of, sublayers
from dsv4c.work import Work


@dataclass(frozen=True)
class Stage:
    """One pass: its contract, what it did, and the work of the program after it."""

    record: PassRecord
    summary: str
    example: str
    """The rest of what the pass says of itself: usually the IR before and after."""
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    breaks: tuple[str, ...]
    difference: Difference
    work: Mapping[str, Work]

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def changed(self) -> bool:
        return self.record.rewrites > 0


@dataclass(frozen=True)
class Frame:
    """A sublayer after a pass that changed it, and what the pass took and put there, by label."""

    stage: str
    sublayer: Sublayer
    changed: frozenset[str]
    gone: tuple[str, ...]
    came: tuple[str, ...]


class Stages:
    """Collects a stage a step, and the frames of every sublayer. `machine`: whose roofline predicts times."""

    def __init__(self, captured: Program, machine: str) -> None:
        self.machine = machine
        self.captured_nodes = captured.num_nodes()
        self.captured_work = figures_of(captured, machine)
        self.last_work: Mapping[str, Mapping[str, Work]] = {}
        self.stages: list[Stage] = []
        self.frames: dict[str, list[Frame]] = {}
        self._text = captured.dump()
        self._now: dict[str, Sublayer] = {}
        self._draw("capture", captured)

    def add(self, step: Step, one: Pass) -> None:
        """The next step, and the pass that made it."""
        text = step.after.dump()
        summary, example = described(one)
        self.stages.append(
            Stage(
                step.record, summary, example, tuple(sorted(one.needs)), tuple(sorted(one.gives)),
                tuple(sorted(one.breaks)), difference(self._text, text, pieces_of(step.after)),
                figures_of(step.after, self.machine),
            )
        )  # fmt: skip
        self._text = text
        if "step" in step.after.graphs:
            self.last_work = figures_by_family(step.after, self.machine)
        if step.changed:
            self._draw(step.name, step.after)

    def _draw(self, stage: str, program: Program) -> None:
        for name, sublayer in sublayers(program, NodeWork(program, self.machine)).items():
            before = self._now.get(name)
            if sublayer == before:
                continue
            gone, came = _exchanged(before, sublayer)
            frame = Frame(stage, sublayer, sublayer.changed(before), gone, came)
            self.frames.setdefault(name, []).append(frame)
            self._now[name] = sublayer


def _exchanged(before: Sublayer | None, after: Sublayer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels of ops that are no longer there, and of those that are new, as often as they are."""
    if before is None:
        return (), ()
    old = [box.label for box in before.boxes if box.kind != "end"]
    new = [box.label for box in after.boxes if box.kind != "end"]
    came = []
    for label in new:
        if label in old:
            old.remove(label)
        else:
            came.append(label)
    return tuple(old), tuple(came)


def described(one: Pass) -> tuple[str, str]:
    """The first paragraph of what a pass says of itself, and the rest. A pass of ours is described by its file."""
    kind = type(one)
    module = inspect.getmodule(kind)
    own = kind.__doc__ or ""
    if own.startswith(f"{kind.__name__}("):  # dataclass made it
        own = ""
    ours = kind.__module__.startswith("dsv4c.")
    text = inspect.cleandoc((module.__doc__ if ours and module else own) or own or "")
    first, _, rest = text.partition("\n\n")
    return " ".join(first.split()), rest.strip("\n")


def slug(name: str) -> str:
    """A name as an HTML id."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
