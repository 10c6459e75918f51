"""Everything that a report says, as plain values: gathered from a pipeline as it runs and from a planned manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv4c.artifact import Manifest
from dsv4c.irfiles import Source
from dsv4c.opened import Artifact
from dsv4c.report.measured import Measured
from dsv4c.report.pools import MemoryPicture
from dsv4c.report.segmented import ProgramRow, program_rows
from dsv4c.report.stages import Frame, Stage, Stages
from dsv4c.work import Work


@dataclass(frozen=True)
class KernelRow:
    """One kernel of the manifest, and how often all programs call it."""

    name: str
    op: str
    kind: str
    schedule: str
    reason: str
    tolerance: float
    launches: int
    calls: int


@dataclass(frozen=True)
class Report:
    """What is rendered. Work is of one run of `step`."""

    name: str
    target: str
    model: Mapping[str, object]
    max_context: int
    truncated_from: int | None
    tools: Mapping[str, str]
    captured_nodes: int
    captured_work: Mapping[str, Work]
    last_work: Mapping[str, Mapping[str, Work]]
    """Step -> family of ops -> their work after the last pass."""
    stages: tuple[Stage, ...]
    frames: Mapping[str, tuple[Frame, ...]]
    programs: tuple[ProgramRow, ...]
    kernels: tuple[KernelRow, ...]
    memory: MemoryPicture
    numerics: tuple[str, ...]
    measured: Measured | None = None


def gather(
    name: str,
    stages: Stages,
    artifact: Artifact,
    sources: Mapping[str, Sequence[Source]],
    memory: MemoryPicture,
    measured: Measured | None = None,
) -> Report:
    """The report of a pipeline that ran, and of the artifact made, or planned, from its result.

    `sources`: program -> where each of its calls comes from.
    """
    manifest = artifact.manifest
    return Report(
        name=name,
        target=manifest.target,
        model=manifest.model,
        max_context=manifest.max_context,
        truncated_from=manifest.truncated_from,
        tools=manifest.tools,
        captured_nodes=stages.captured_nodes,
        captured_work=stages.captured_work,
        last_work=stages.last_work,
        stages=tuple(stages.stages),
        frames={name: tuple(frames) for name, frames in stages.frames.items()},
        programs=program_rows(artifact, sources),
        kernels=tuple(_kernels(manifest)),
        memory=memory,
        numerics=manifest.numerics,
        measured=measured,
    )


def _kernels(manifest: Manifest) -> Sequence[KernelRow]:
    calls = Counter(c.kernel for p in manifest.programs.values() for s in p.segments for c in s.calls)
    return [
        KernelRow(name, k.op, k.kind, k.schedule, k.reason, k.tolerance, max(1, len(k.launches)), calls[name])
        for name, k in sorted(manifest.kernels.items(), key=lambda item: (item[1].op, item[0]))
    ]
