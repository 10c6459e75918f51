"""An artifact opened to be looked at: programs, segments, calls, and where each call comes from. Loads no kernel.

artifact = load("build/nano-cpu")
for call in artifact.program("decode").in_scope("L02"):
    print(call.op, call.kernel.schedule, call.origin)
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dsv4c import artifact, irfiles
from dsv4c.artifact import Call, Kernel, Manifest, Segment
from dsv4c.errors import ConfigError
from dsv4c.irfiles import Source, Stage, StagesFile

__all__ = ["Artifact", "ArtifactProgram", "PlacedCall", "load"]


@dataclass(frozen=True)
class PlacedCall:
    """One call of a `program`, number `index` there, of segment number `segment`; `call` and `kernel` as the manifest
    says them; and where it comes from."""

    program: ArtifactProgram
    index: int
    segment: int
    call: Call
    kernel: Kernel

    @property
    def op(self) -> str:
        """The logical op that it computes, such as `hc_post_pre_norm`."""
        return self.kernel.op

    @property
    def scope(self) -> str:
        """Where in the model it is, such as `L07.attn`."""
        return self.call.scope

    @property
    def origin(self) -> tuple[str, ...]:
        """Lines of the model that it computes, sorted. Raises ArtifactError for an artifact without provenance."""
        return self._source.origin

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that made or changed it, in order. Raises ArtifactError for an artifact without provenance."""
        return self._source.passes

    @property
    def _source(self) -> Source:
        return self.program.of.provenance[self.program.name][self.index]

    @property
    def reads(self) -> tuple[str, ...]:
        """Values that it reads: inputs, weights, state and buffers, by name."""
        given = self.call.args[: len(self.call.args) - self.call.outputs]
        return tuple(arg for arg in given if isinstance(arg, str))

    @property
    def writes(self) -> tuple[str, ...]:
        """Buffers that it writes, by name. State that it updates in place is among `reads`."""
        return tuple(str(arg) for arg in self.call.args[len(self.call.args) - self.call.outputs :])


@dataclass(frozen=True)
class ArtifactProgram:
    """One executable program `of` an artifact: `name` is its key in the manifest, `program` what the manifest says."""

    of: Artifact
    name: str
    program: artifact.Program

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of calls; every kind but `graph` says why it is no graph."""
        return self.program.segments

    @cached_property
    def calls(self) -> tuple[PlacedCall, ...]:
        """All calls, in order."""
        return tuple(self._calls())

    def _calls(self) -> Iterator[PlacedCall]:
        index = 0
        for number, segment in enumerate(self.segments):
            for call in segment.calls:
                yield PlacedCall(self, index, number, call, self.of.manifest.kernels[call.kernel])
                index += 1

    @cached_property
    def scopes(self) -> tuple[str, ...]:
        """Places in the model that have calls, in order: `prelude`, `embed`, `L00.attn`, `L00.ffn`, ..., `head`."""
        return tuple(dict.fromkeys(call.scope for call in self.calls))

    def in_scope(self, scope: str) -> tuple[PlacedCall, ...]:
        """The calls of a layer (`L07`), a sublayer (`L07.attn`), another place (`head`) or a pattern (`L0?.ffn`).

        Raises ConfigError with the nearest name if nothing is there.
        """
        found = tuple(c for c in self.calls if c.scope.split(".")[0] == scope or fnmatch.fnmatchcase(c.scope, scope))
        if not found:
            layers = dict.fromkeys(part for name in self.scopes for part in (name.split(".")[0], name))
            small = {name.lower(): name for name in layers}
            near = [small[name] for name in difflib.get_close_matches(scope.lower(), small, n=1)]
            known = _shortened([name for name in layers if "." not in name])
            raise ConfigError(
                f"program `{self.name}` has no calls in `{scope}`",
                hint=f"did you mean `{near[0]}`? there are {known}" if near else f"there are {known}",
            )
        return found


def _shortened(names: list[str]) -> str:
    """`prelude, embed, L00 to L42, head`."""
    layers = [name for name in names if name[0] == "L" and name[1:].isdigit()]
    if len(layers) < 3:
        return ", ".join(names)
    place = names.index(layers[0])
    rest = [name for name in names if name not in layers]
    return ", ".join([*rest[:place], f"{layers[0]} to {layers[-1]}", *rest[place:]])


@dataclass(frozen=True)
class Artifact:
    """A compiled artifact in `directory`: its `manifest`, its programs, and what `ir/` says of them."""

    directory: Path
    manifest: Manifest

    @property
    def programs(self) -> tuple[str, ...]:
        """The names of its programs: `step` on a CPU, `decode.64`, `prefill.8192.16`, ... on a GPU."""
        return tuple(self.manifest.programs)

    def program(self, name: str) -> ArtifactProgram:
        """The program of this name; or, for `decode` or `prefill`, the largest of that phase.

        On a CPU one program takes every step, so it is both. Raises ConfigError with the nearest name.
        """
        programs = self.manifest.programs
        if name not in programs:
            phases = (name, "mixed") if name in ("decode", "prefill") else (name,)
            found = [key for key, one in programs.items() if one.phase in phases]
            if not found:
                near = difflib.get_close_matches(name, programs, n=1)
                raise ConfigError(
                    f"`{self.directory}` has no program `{name}`",
                    hint=f"did you mean `{near[0]}`?" if near else f"programs: {', '.join(programs)}",
                )
            name = max(found, key=lambda key: (programs[key].symbols["T"], programs[key].symbols.get("S", 0)))
        return ArtifactProgram(self, name, programs[name])

    @cached_property
    def weights(self) -> frozenset[str]:
        """Names of the weights that its kernels read."""
        return frozenset(weight.name for weight in self.manifest.weights)

    @cached_property
    def provenance(self) -> dict[str, tuple[Source, ...]]:
        """Of each program, where every call comes from. Raises ArtifactError for an artifact without it."""
        return irfiles.read_provenance(self.directory, self.manifest)

    @cached_property
    def stages(self) -> StagesFile:
        """The program as captured and after each pass: facts and figures. Raises ArtifactError if it has none."""
        return irfiles.read_stages(self.directory)

    def text(self, stage: Stage) -> str:
        """The program's text at one of its stages."""
        return (self.directory / stage.file).read_text(encoding="utf-8").rstrip("\n")


def load(directory: str | Path) -> Artifact:
    """Opens the artifact in `directory`: reads and checks its manifest and the hash of every kernel file.

    Loads no weight and no kernel. Raises ArtifactError for a directory that is none, of another format version, or
    damaged.
    """
    return Artifact(Path(directory), artifact.load_manifest(directory))
