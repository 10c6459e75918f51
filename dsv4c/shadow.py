"""`--shadow`: every call by its kernel and, on the same inputs, by its reference; the first difference is named.

The step goes on with what the kernels gave, so its tokens are those of the eager executor bit for bit. Each call is
judged alone, on the kernels' own inputs: errors do not add up from call to call. What counts as the same is the
schedule's tolerance in the measure of `agreement`; shares of quantised bytes are summed over all steps so far, for one
row has too few bytes to tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4c.agreement import Apart, Seen, measure
from dsv4c.artifact import Call, Manifest, Program
from dsv4c.reference import Reference
from dsv4c.runtime.contracts import null_rows
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.kernels import Binder
from dsv4c.runtime.live import declared_shapes, live_part, live_sizes


@dataclass(frozen=True)
class Difference:
    """A result that is not its reference's. `step` counts from 1."""

    step: int
    scope: str
    op: str
    kernel: str
    schedule: str
    buffer: str
    error: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"step {self.step}: `{self.buffer}` of `{self.op}` in `{self.scope}` is {self.error:.3g} off its "
            f"reference, tolerance {self.tolerance:.3g} (`{self.schedule}`, kernel `{self.kernel}`)"
        )


@dataclass
class Tally:
    """Of one place's result over all steps: the worst error, or quantised bytes that differ and all."""

    worst: float = 0.0
    differing: float = 0.0
    bytes: int = 0
    together: int = 0

    def add(self, apart: Apart) -> None:
        self.worst = max(self.worst, apart.error)
        self.differing += apart.error * apart.bytes
        self.bytes += apart.bytes
        self.together = max(self.together, apart.together)

    def beyond(self, tolerance: float) -> bool:
        """Whether this is more than the tolerance allows, and more than chance explains.

        Bytes that share a scale fall together, so a share has the spread of a sum of so many at once.
        """
        if not self.bytes or math.isinf(self.worst):
            return self.worst > tolerance
        mean = tolerance * self.bytes
        return self.differing > (mean + 3 * math.sqrt(mean * self.together) + self.together if tolerance else 0)

    @property
    def error(self) -> float:
        return self.differing / self.bytes if self.bytes and not math.isinf(self.worst) else self.worst


@dataclass
class Shadow:
    """Runs calls beside their references and keeps what differs, once for each place.

    `weights`: those that a kernel's layout changed, as references take them. `report` is called with every difference.
    """

    manifest: Manifest
    weights: Mapping[str, Tensor]
    report: Callable[[Difference], object] | None = None
    differences: list[Difference] = field(default_factory=list)
    tallies: dict[tuple[str, str, int], Tally] = field(default_factory=dict)
    """By scope, kernel and output."""
    steps: int = 0

    def __post_init__(self) -> None:
        self._null = null_rows(self.manifest)
        self._known: set[tuple[str, str, int]] = set()

    @torch.no_grad()
    def step(
        self, program: Program, calls: Sequence[tuple[Call, Callable[[], object]]], values: Mapping[str, Tensor]
    ) -> None:
        """Makes these calls in order."""
        self.steps += 1
        shapes, live = declared_shapes(program), live_sizes(program, values)
        plain = {**values, **self.weights}
        for call, run in calls:
            reference = Reference.of(call, self.manifest.kernels[call.kernel])
            args = [None if n is None else live_part(plain[n], shapes.get(n, ()), live) for n in reference.operands]
            if reference.op.name == "sample_penalised":  # what was drawn from is needed to judge a draw
                args[reference.op.parameters.index("counts_ZV")] = values[reference.targets[1]].clone()
            expected = [result for _, result in reference.results(plain, shapes, live)]
            run()
            outputs = [live_part(values[name], shapes.get(name, ()), live) for name in reference.targets]
            null = [self._null.get(name, 0) for name in reference.targets]
            self._judge(call, reference, Seen(reference.op, reference.attrs, args, outputs, expected, null))

    def _judge(self, call: Call, reference: Reference, seen: Seen) -> None:
        kernel = self.manifest.kernels[call.kernel]
        for apart in measure(seen):
            place = call.scope, call.kernel, apart.output
            tally = self.tallies.setdefault(place, Tally())
            tally.add(apart)
            if not tally.beyond(kernel.tolerance) or place in self._known:
                continue
            self._known.add(place)
            found = Difference(
                self.steps, call.scope, kernel.op, kernel.name, kernel.schedule, reference.targets[apart.output],
                tally.error, kernel.tolerance,
            )  # fmt: skip
            self.differences.append(found)
            if self.report:
                self.report(found)

    def summary(self) -> list[tuple[str, str, float, float]]:
        """(op, schedule, error, tolerance) of every kernel that ran, the nearest to its tolerance first."""
        worst: dict[str, float] = {}
        for (_, name, _), tally in self.tallies.items():
            worst[name] = max(worst.get(name, 0.0), tally.error)
        out = [
            (k.op, k.schedule, worst[k.name], k.tolerance) for k in self.manifest.kernels.values() if k.name in worst
        ]
        return sorted(out, key=lambda row: -(row[2] / row[3] if row[3] else math.inf if row[2] else 0.0))


class ShadowExecutor(GraphExecutor):
    """A GraphExecutor that captures nothing and checks every call: see Shadow."""

    def __init__(
        self,
        programs: Mapping[str, Program],
        kernels: Binder,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        device: torch.device,
        *,
        rows: Mapping[str, int],
        breaks: Sequence[str] = (),
        shadow: Shadow,
    ) -> None:
        super().__init__(programs, kernels, weights, states, device, rows=rows, breaks=breaks)
        self.shadow = shadow
        self._singly = {name: self.calls(name) for name in programs}

    def launch(self, name: str) -> dict[str, Tensor]:
        """Runs one step whole."""
        return self.finish(name)

    def begin(self, name: str) -> None:
        """Nothing: a step runs whole, once its masks are there."""

    def finish(self, name: str) -> dict[str, Tensor]:
        """Runs one step and waits for it."""
        bound = self._bound[name]
        self.shadow.step(self.programs[name], self._singly[name], bound.values)
        return bound.outputs


class HostShadowExecutor(ArtifactExecutor):
    """The same for an artifact of the CPU."""

    def __init__(
        self,
        program: Program,
        kernels: Binder,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        *,
        shadow: Shadow,
    ) -> None:
        super().__init__(program, kernels, weights, states)
        self.shadow = shadow

    def beside(self, program: Program) -> HostShadowExecutor:
        """See ArtifactExecutor."""
        return HostShadowExecutor(program, self._kernels, self.weights, self.states, shadow=self.shadow)

    def outputs(
        self, inputs: Mapping[str, Tensor], on_mark: Callable[[int], None] | None = None
    ) -> Mapping[str, Tensor]:  # fmt: skip
        """What one step gives, as ArtifactExecutor's. It is at no mark: all that it writes is final at its end."""
        torch.get_num_threads()
        binding = self._binding(self._sizes(inputs))
        for name, to in binding.inputs.items():
            to.copy_(inputs[name])
        self.shadow.step(self.program, self.bound_calls(inputs), binding.values)
        self._last = binding.outputs
        return binding.outputs
