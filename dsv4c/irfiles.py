"""DIR/ir: what the passes did to a program, and where each call of an artifact comes from. For people and tools.

    ir/00-capture.txt       the program as captured
    ir/07-raise-norm.txt    and after every pass that changed it, numbered in the order in which they ran
    ir/step.txt             as it was planned
    ir/passes.json          of each stage: its file, the facts that hold, its work at one step's sizes
    ir/provenance.json      of each call: places in the model, and passes

The runtime reads none of it; `dsv4c inspect` and `dsv4c explain` do. Importing this file imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4c.artifact import Manifest
from dsv4c.errors import ArtifactError
from dsv4c.strictjson import decode

if TYPE_CHECKING:
    from dsv4c.pipeline import Step
    from dsv4c.program import Program

PASSES, PROVENANCE = "ir/passes.json", "ir/provenance.json"


@dataclass(frozen=True)
class Source:
    """Where a call comes from: places in the model (sorted), and the passes that made or changed it, in order."""

    origin: tuple[str, ...]
    passes: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A program after one pass (or as captured): the file of its text, and its figures for one step.

    `file` is that of the last stage with another text, if the pass changed nothing. Bytes, operations and
    microseconds are those of `dsv4c.work_of` at `StagesFile.sizes`.
    """

    name: str
    file: str
    facts: tuple[str, ...]
    nodes: int
    kernels: int
    bytes_moved: float
    flops: float
    microseconds: float


@dataclass(frozen=True)
class StagesFile:
    """ir/passes.json. The first stage is `capture`; `machine` and `sizes` are what the figures are for."""

    machine: str
    sizes: dict[str, int]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class ProvenanceFile:
    """ir/provenance.json: of each program, the number in `sources` of every call, in order."""

    sources: tuple[Source, ...]
    programs: dict[str, tuple[int, ...]]


class StageWriter:
    """Writes the files of stages as a pipeline runs: `StageWriter(directory).watch(step)` for every step."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stages: list[Stage] = []
        self._machine, self._sizes = "", dict[str, int]()
        self._program: Program | None = None
        (directory / "ir").mkdir(parents=True)

    def watch(self, step: Step) -> None:
        """Writes the program after this step, and before the first one the captured program."""
        if not self._stages:
            self._add("capture", step.before, step.machine, changed=True)
        self._add(step.name, step.after, step.machine, changed=step.changed)

    def _add(self, name: str, program: Program, machine: str, *, changed: bool) -> None:
        from dsv4c.work import Sizes, work_of  # pulls torch in, which readers of these files do without

        sizes = Sizes.usual(program.config)
        work = work_of(program, sizes, machine)
        file = f"ir/{len(self._stages):02d}-{name}.txt"
        if changed:
            (self._directory / file).write_text(program.dump() + "\n", encoding="utf-8")
        figures = (work.kernels, work.bytes_moved, work.flops, work.microseconds)
        of = file if changed else self._stages[-1].file
        self._stages.append(Stage(name, of, tuple(sorted(program.facts)), program.num_nodes(), *figures))
        self._machine, self._program = machine, program
        self._sizes = {"tokens": sizes.tokens, "requests": sizes.requests, "context": sizes.context}

    def finish(self, sources: Mapping[str, Sequence[Source]]) -> None:
        """Writes the last program and the two JSON files. `sources`: of every call of every program, in order."""
        assert self._program is not None, "a pipeline has at least one pass"
        (self._directory / "ir" / "step.txt").write_text(self._program.dump() + "\n", encoding="utf-8")
        _write(self._directory / PASSES, StagesFile(self._machine, self._sizes, tuple(self._stages)))
        table: dict[Source, int] = {}
        programs = {
            name: tuple(table.setdefault(one, len(table)) for one in found) for name, found in sorted(sources.items())
        }
        _write(self._directory / PROVENANCE, ProvenanceFile(tuple(table), programs))


def _write(file: Path, value: Any) -> None:
    """JSON with one line for each entry of a list or mapping on its second level."""
    fields = []
    for key, found in dataclasses.asdict(value).items():
        if isinstance(found, (list, tuple)):
            text = "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in found) + "\n]"
        elif isinstance(found, dict):
            rows = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in found.items())
            text = "{\n" + ",\n".join(rows) + "\n}"
        else:
            text = json.dumps(found)
        fields.append(f"{json.dumps(key)}: {text}")
    file.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")


def read_stages(directory: Path) -> StagesFile:
    """The stages of an artifact. Raises ArtifactError for one without them, or with others than this version writes."""
    found: StagesFile = _read(directory, PASSES, StagesFile)
    for stage in found.stages:
        if not (directory / stage.file).is_file():
            raise ArtifactError(f"`{directory}` has no `{stage.file}`", hint="compile the artifact again")
    return found


def read_provenance(directory: Path, manifest: Manifest) -> dict[str, tuple[Source, ...]]:
    """Of each program: the source of every call, in order. Raises ArtifactError as `read_stages` does."""
    found: ProvenanceFile = _read(directory, PROVENANCE, ProvenanceFile)
    for name, program in manifest.programs.items():
        calls = sum(len(segment.calls) for segment in program.segments)
        given = found.programs.get(name, ())
        if len(given) != calls or any(not 0 <= i < len(found.sources) for i in given):
            raise ArtifactError(
                f"`{directory / PROVENANCE}` does not fit the {calls} calls of `{name}`",
                hint="compile the artifact again",
            )
    return {name: tuple(found.sources[i] for i in calls) for name, calls in found.programs.items()}


def _read(directory: Path, name: str, kind: type) -> Any:
    file = directory / name
    if not file.is_file():
        raise ArtifactError(
            f"`{directory}` has no `{name}`: it was compiled by an earlier dsv4c, or its IR was removed",
            hint="compile the artifact again",
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read `{file}`: {error}", hint="compile the artifact again") from error
    try:
        return decode(kind, value)
    except ArtifactError as error:
        raise ArtifactError(f"`{file}`: {error.message}", hint="compile the artifact again") from error


def texts(directory: Path, stages: StagesFile) -> Iterator[tuple[Stage, str]]:
    """Every stage with the program's text after it."""
    for stage in stages.stages:
        yield stage, (directory / stage.file).read_text(encoding="utf-8").rstrip("\n")
