"""Makes a report: of a model, by running its pipeline and planning its artifact; or of an artifact, by running again
the passes that made it, whose result must be the IR that lies in the artifact. Needs no weights and builds no kernels.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from dsv4c.artifact import Manifest
from dsv4c.capturing import capture
from dsv4c.compile import Options, manifest_of_plan, plan_artifact
from dsv4c.config import ModelConfig, StateLayout, Target
from dsv4c.errors import ArtifactError, ConfigError
from dsv4c.launch import SNAPSHOTS
from dsv4c.opened import Artifact
from dsv4c.opened import load as open_artifact
from dsv4c.pipeline import Pipeline, Step
from dsv4c.program import Program
from dsv4c.report.gathering import Report, gather
from dsv4c.report.measured import Measured
from dsv4c.report.pools import MemoryPicture, memory_picture
from dsv4c.report.stages import Stages
from dsv4c.room import given_room, measured_room, plan_of
from dsv4c.runtime.memory import MemoryPlan, Room
from dsv4c.schedules._roofline import MACHINES

CARD_BYTES = {arch: machine.memory_bytes for arch, machine in MACHINES.items() if machine.memory_bytes}
"""Of the card that schedules for the target are made for."""

Watch = Callable[[Step], None]


@dataclass(frozen=True)
class Load:
    """For which the memory plan is drawn first. None: the card of the target, or this machine's memory for a CPU;
    the longest context; as many requests as fit."""

    memory_bytes: int | None = None
    context: int | None = None
    requests: int | None = None

    def room(self, target: str) -> Room:
        """The memory there is for an artifact of this target."""
        total = CARD_BYTES.get(target) if self.memory_bytes is None else self.memory_bytes
        return measured_room(target) if total is None else given_room(target, total)


def report_of_model(
    config: ModelConfig,
    name: str,
    target: Target,
    options: Options,
    load: Load | None = None,
    *,
    truncated_from: int | None = None,
    pipeline: Pipeline | None = None,
    measured: Measured | None = None,
    watch: Watch | None = None,
) -> Report:
    """The report of a model compiled for `target`: its passes, and the artifact that `options` would give.

    `truncated_from`: layers of the model if `config` is only its first ones. `pipeline`: another than the target's
    own; it must end in a program that schedules accept. `watch` is called with every step. Raises what the passes and
    the planner raise, and ConfigError for a load out of range.
    """
    captured = capture(config, StateLayout(), fake_quant=options.fake_quant)
    stages, program = _run(captured, pipeline or Pipeline.default(target), target.arch, watch)
    made = plan_artifact(program, target, options)
    manifest = replace(manifest_of_plan(program, made, target, options), truncated_from=truncated_from)
    picture = _picture(MemoryPlan.of(manifest), load)
    return gather(name, stages, Artifact(Path(), manifest), made.sources, picture, measured)


def report_of_artifact(
    folder: Path, load: Load | None = None, *, measured: Measured | None = None, watch: Watch | None = None
) -> Report:
    """The report of an artifact: its passes run again, and the segments and memory plan of its own manifest.

    Raises ArtifactError if the folder is no artifact, holds no IR, or holds another than these passes make.
    """
    artifact = open_artifact(folder)
    manifest, held = artifact.manifest, _held_ir(folder)
    sources, picture = artifact.provenance, _picture(plan_of(folder, manifest), load)
    config = ModelConfig.from_dict(manifest.model)
    fake_quant = any(record.name == "raise-quant" and record.rewrites for record in manifest.passes)
    captured = capture(config, StateLayout(), fake_quant=fake_quant)
    stages, program = _run(captured, _pipeline_of(manifest, folder), manifest.target, watch)
    if program.dump().strip() != held.strip():
        raise ArtifactError(
            f"the IR in `{folder}` is not what this dsv4c makes of its model",
            hint="it was compiled by another version, or with passes of your own; compile it again, or report on the "
            "model with `dsv4c.report.report_of_model`",
        )
    return gather(folder.resolve().name, stages, artifact, sources, picture, measured)


def _held_ir(folder: Path) -> str:
    file = folder / "ir" / "step.txt"
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"artifact `{folder}` has no IR: cannot read `{file.relative_to(folder)}`", hint="compile it again"
        ) from error


def _pipeline_of(manifest: Manifest, folder: Path) -> Pipeline:
    """The passes that the manifest names."""
    pipeline = Pipeline.default(manifest.target)
    known, ran = {one.name for one in pipeline.passes}, {record.name for record in manifest.passes}
    if ran - known:
        raise ArtifactError(
            f"artifact `{folder}` was made by passes that are none of dsv4c's: `{'`, `'.join(sorted(ran - known))}`",
            hint="report on the model with `dsv4c.report.report_of_model` and your pipeline",
        )
    for name in sorted(known - ran):
        pipeline = pipeline.without(name)
    return pipeline


def _run(captured: Program, pipeline: Pipeline, machine: str, watch: Watch | None) -> tuple[Stages, Program]:
    passes = {one.name: one for one in pipeline.passes}
    stages, program = Stages(captured, machine), captured
    for step in pipeline.steps(captured):
        stages.add(step, passes[step.name])
        program = step.after
        if watch:
            watch(step)
    return stages, program


def _picture(plan: MemoryPlan, load: Load | None) -> MemoryPicture:
    load = load or Load()
    return memory_picture(plan, load.room(plan.target), SNAPSHOTS, load.context, load.requests)


@contextmanager
def report_file(path: Path) -> Iterator[TextIO]:
    """A file that becomes `path` when the block ends well, and nothing else. Raises ConfigError if it cannot.

    Entered before the work begins, it finds a path that cannot be written in the first second.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write the report to `{path}`: it is a folder", hint="name a file, such as out.html")
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ConfigError(
            f"cannot write the report to `{path}`: {error.strerror}", hint="name a file in a folder that you may write"
        ) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)
