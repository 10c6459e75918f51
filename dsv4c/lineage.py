"""A program from capture to lowered, stage by stage: made by a pipeline, or read from an artifact's `ir/`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from dsv4c.artifact import PassRecord
from dsv4c.config import ModelConfig
from dsv4c.errors import ArtifactError
from dsv4c.irread import read_program
from dsv4c.opened import Artifact
from dsv4c.pipeline import Pipeline, Step
from dsv4c.program import Program

CAPTURE = "capture"


@dataclass(frozen=True)
class Staged:
    """The program behind the pass `name` (`record` is None: as captured). `changed`: whether it rewrote anything.

    `make` gives the program.
    """

    name: str
    record: PassRecord | None
    changed: bool
    make: Callable[[], Program]

    @cached_property
    def program(self) -> Program:
        """Read when it is first asked for."""
        return self.make()

    @property
    def exact(self) -> bool:
        """Whether nothing may differ from the stage before."""
        return self.record is None or self.record.exact

    @property
    def claim(self) -> str:
        """`exact`, or `to 0.25`: see `Pass.tolerance`."""
        return "exact" if self.exact or self.record is None else f"to {self.record.tolerance:.2g}"


Lineage = tuple[Staged, ...]
"""Stages in order; the first is the captured program."""


def of_steps(steps: Iterable[Step]) -> Lineage:
    """What a pipeline made: `of_steps(pipeline.steps(program))`. Holds every stage."""
    out: list[Staged] = []
    for step in steps:
        if not out:
            out.append(Staged(CAPTURE, None, True, lambda before=step.before: before))  # type: ignore[misc]
        make: Callable[[], Program] = lambda after=step.after: after  # type: ignore[misc]  # noqa: E731
        out.append(Staged(step.name, step.record, step.changed, make))
    return tuple(out)


def of_pipeline(pipeline: Pipeline, program: Program, watch: Callable[[str], object] | None = None) -> Lineage:
    """The captured `program` and what every pass of `pipeline` makes of it; `watch` is told which one begins.

    Raises PassError as `Pipeline.steps` does.
    """
    return of_steps(pipeline.steps(program, watch))


def of_artifact(artifact: Artifact) -> Lineage:
    """What the passes that made an `artifact` did; each stage is read when it is run.

    Raises ArtifactError for an artifact without IR, or whose IR is that of other passes than its manifest lists.
    """
    config = ModelConfig.from_dict(artifact.manifest.model)
    records = {record.name: record for record in artifact.manifest.passes}
    stages = artifact.stages.stages
    if [stage.name for stage in stages] != [CAPTURE, *records]:
        raise ArtifactError(
            f"`{artifact.directory}/ir` holds other passes than the manifest lists", hint="compile the artifact again"
        )
    out: list[Staged] = []
    last = ""
    for stage in stages:

        def make(file: str = stage.file) -> Program:
            text = (artifact.directory / file).read_text(encoding="utf-8")
            return read_program(text, config)

        changed = stage.file != last
        out.append(Staged(stage.name, records.get(stage.name), changed, make if changed else _same(out[-1])))
        last = stage.file
    return tuple(out)


def _same(stage: Staged) -> Callable[[], Program]:
    return lambda: stage.program
