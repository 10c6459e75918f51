"""Programs by the references of their ops: the meaning of an artifact, on any device, without its kernels.

    GraphExecutor(programs, References(kernels, weights), weights, ...)     every call in its op's own words

A reference knows no padding, so a call is made on the live part of its tensors (runtime/live.py). What it gives is
copied to where the kernel would have written it; padding stays as it is. Weights are those before kernels' layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4c.artifact import Call, Kernel, Manifest, Program, Shape
from dsv4c.errors import ArtifactError
from dsv4c.ops import OPS, Op
from dsv4c.runtime import layouts
from dsv4c.runtime.kernels import Run
from dsv4c.runtime.live import declared_shapes, live_part, live_sizes


@dataclass(frozen=True)
class Reference:
    """One call as its op says it: which values go in, and where each output belongs."""

    op: Op
    attrs: Mapping[str, Any]
    operands: tuple[str | None, ...]
    targets: tuple[str, ...]

    @classmethod
    def of(cls, call: Call, kernel: Kernel) -> Reference:
        """Raises ArtifactError for an op that this version lacks, or calls otherwise."""
        op = OPS.get(kernel.op)
        written = call.args[len(call.args) - call.outputs :]
        if op is None or call.outputs + len(op.in_place) != op.outputs or set(kernel.op_attrs) != set(op.attributes):
            raise ArtifactError(
                f"kernel `{kernel.name}` says that it is `{kernel.op}`, which has no such reference here",
                hint="compile the artifact again with this version",
            )
        operands = tuple(None if arg is None else str(arg) for arg in call.args[: len(op.parameters)])
        fresh = iter(written)
        targets = []
        for i in range(op.outputs):
            place = operands[op.parameters.index(op.in_place[i])] if i in op.in_place else next(fresh)
            targets.append(str(place))
        return cls(op, kernel.op_attrs, operands, tuple(targets))

    def results(
        self, values: Mapping[str, Tensor], shapes: Mapping[str, Shape], live: Mapping[str, int]
    ) -> Iterator[tuple[str, Tensor]]:
        """(value, what belongs in its live part) for every output. No value changes."""
        args = [None if n is None else live_part(values[n], shapes.get(n, ()), live) for n in self.operands]
        given = self.op.reference(*args, **self.attrs)
        for target, result in zip(self.targets, given if isinstance(given, tuple) else (given,), strict=True):
            place = live_part(values[target], shapes.get(target, ()), live)
            if result.shape != place.shape or result.dtype != place.dtype:
                raise ArtifactError(
                    f"the reference of `{self.op.name}` gives {result.dtype} {list(result.shape)} for `{target}`, "
                    f"planned as {place.dtype} {list(place.shape)}",
                    hint="compile the artifact again with this version",
                )
            yield target, result


class References:
    """A Binder that makes every call with its op's reference. `weights`: those that a kernel's layout changed."""

    def __init__(self, kernels: Mapping[str, Kernel], weights: Mapping[str, Tensor]) -> None:
        self._kernels = dict(kernels)
        self._weights = dict(weights)

    def bind_calls(self, program: Program, calls: Sequence[Call], values: Mapping[str, Tensor]) -> list[Run]:
        """See Binder. What is live is read once, before the first of these calls."""
        shapes, live, values = declared_shapes(program), dict[str, int](), {**values, **self._weights}
        runs: list[Run] = [partial(_read_live, program, values, live)]
        for call in calls:
            runs.append(partial(_run, self.reference(call), values, shapes, live))
        return runs

    def reference(self, call: Call) -> Reference:
        """What a call means."""
        return Reference.of(call, self._kernels[call.kernel])


def _read_live(program: Program, values: Mapping[str, Tensor], live: dict[str, int]) -> None:
    live.update(live_sizes(program, values))


@torch.no_grad()
def _run(
    reference: Reference, values: Mapping[str, Tensor], shapes: Mapping[str, Shape], live: Mapping[str, int]
) -> None:
    for target, result in reference.results(values, shapes, live):
        live_part(values[target], shapes.get(target, ()), live).copy_(result)


def plain_weights(manifest: Manifest, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those weights whose layout is a kernel's, as references take them."""
    out = {}
    for weight in manifest.weights:
        if weight.plain is not None:
            layout, dtype = weight.transforms[weight.plain.transforms :], getattr(torch, weight.plain.dtype)
            out[weight.name] = layouts.undo(weights[weight.name], layout, weight.plain.shape, dtype)
    return out
