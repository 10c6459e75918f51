"""The kernels of a CPU artifact on the same inputs as the references: results by name, and every call's own error.

Each call runs by its kernel and, on what the kernels gave before it, by its op's reference (dsv4c.shadow): errors do
not add up from call to call, so each is held to the tolerance of its schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.agreement import Seen
from dsv4c.aligned import digest
from dsv4c.artifact import Call, Manifest, Program
from dsv4c.config import ModelConfig, StateLayout
from dsv4c.errors import ConfigError
from dsv4c.inputs import Inputs
from dsv4c.model.state import columns, group_ratios
from dsv4c.numerics import somebodys_state
from dsv4c.reference import Reference, plain_weights
from dsv4c.runtime.kernels import Binder, Kernels
from dsv4c.runtime.loader import check_host
from dsv4c.runtime.pools import allocate
from dsv4c.runtime.weights import load_weights
from dsv4c.shadow import HostShadowExecutor, Shadow

LAYOUT = StateLayout()  # of every artifact


class Compiled:
    """A CPU artifact's program `step` with its kernels, or those of `binder`.

    Raises ArtifactError if this machine cannot run them.
    """

    def __init__(self, directory: Path, manifest: Manifest, binder: Binder | None = None) -> None:
        check_host(manifest)
        self.manifest = manifest
        self._kernels = binder or Kernels(manifest.kernels, directory, manifest.target)

    def check_fits(self, inputs: Inputs) -> None:
        """Raises ConfigError for inputs larger than the artifact was compiled for."""
        _check_fits(self.manifest.programs["step"], self.manifest, inputs, inputs.steps(LAYOUT))

    @torch.no_grad()
    def results(self, inputs: Inputs) -> tuple[dict[str, Tensor], Watched]:
        """Logits [S, V], streams [T, N, D] and state, as `Runs.results` names them, and what each call did.

        Raises ConfigError for inputs larger than the artifact was compiled for.
        """
        self.check_fits(inputs)
        manifest, program = self.manifest, self.manifest.programs["step"]
        config = ModelConfig.from_dict(manifest.model)
        steps = inputs.steps(LAYOUT)
        weights, _ = load_weights(manifest.weights, inputs.source)
        states = allocate(manifest, _Rows.of(config, inputs))
        shadow = Watched(manifest, plain_weights(manifest, weights))
        shadow.want = _streams(program, manifest)
        executor = HostShadowExecutor(program, self._kernels, weights, states, shadow=shadow)
        logits = [executor.step(step).clone() for step in steps]
        out = {"logits": torch.cat(logits), "streams": torch.cat(shadow.seen)}
        return {**out, **somebodys_state(config, LAYOUT, states)}, shadow


@dataclass(frozen=True)
class _Rows:
    """Pools as `make_step` lays them out."""

    pages: dict[str, int]
    slots: int
    snapshots: int = 0

    @classmethod
    def of(cls, config: ModelConfig, inputs: Inputs) -> _Rows:
        requests = len(inputs.ids)
        pages = {g: 1 + requests * columns(config, LAYOUT, g, inputs.tokens) for g in group_ratios(config)}
        return cls(pages, requests + 1)


@dataclass(frozen=True)
class Called:
    """One call of one step: its op, place and schedule, and the digests of what it gave."""

    op: str
    scope: str
    schedule: str
    digests: tuple[bytes, ...]


class Watched(Shadow):
    """A shadow that keeps what the calls write to the value `want`, and what each call gave."""

    want = ""

    def step(
        self, program: Program, calls: Sequence[tuple[Call, Callable[[], object]]], values: Mapping[str, Tensor]
    ) -> None:
        """See Shadow."""
        super().step(program, [(call, partial(self._run, call, run, values)) for call, run in calls], values)

    def _run(self, call: Call, run: Callable[[], object], values: Mapping[str, Tensor]) -> None:
        run()
        if self.want in call.args[len(call.args) - call.outputs :]:
            self.seen.append(values[self.want].clone())

    def _judge(self, call: Call, reference: Reference, seen: Seen) -> None:
        super()._judge(call, reference, seen)
        kernel = self.manifest.kernels[call.kernel]
        given = tuple(digest(out[first:]) for out, first in zip(seen.outputs, seen.null, strict=True))
        self.called.append(Called(kernel.op, call.scope, kernel.schedule, given))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[Tensor] = []
        self.called: list[Called] = []


def _streams(program: Program, manifest: Manifest) -> str:
    """The value that holds the streams behind the last layer: whose rows the head takes."""
    calls = [call for segment in program.segments for call in segment.calls]
    (taken,) = [c for c in calls if manifest.kernels[c.kernel].op == "take_rows" and c.scope == "head"]
    return str(taken.args[0])


def _check_fits(program: Program, manifest: Manifest, inputs: Inputs, steps: Sequence[Mapping[str, Tensor]]) -> None:
    longest = inputs.tokens
    if longest > manifest.max_context:
        raise ConfigError(
            f"a prompt has {longest} tokens, the artifact was compiled for {manifest.max_context}",
            hint="give shorter prompts",
        )
    for name, input_ in (("T", "token_ids"), ("R", "seq_starts")):
        most = max(len(step[input_]) for step in steps)
        if most > program.symbols[name]:
            what = "tokens" if name == "T" else "requests"
            raise ConfigError(
                f"a step has {most} {what}, the artifact was compiled for {program.symbols[name]}",
                hint="give fewer prompts, or compile with a larger `--max-tokens` or `--max-requests`",
            )
