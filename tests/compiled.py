"""Programs of a plan, built and run without an engine: every output by its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.artifact import Program
from dsv4c.checkpoint.source import WeightSource
from dsv4c.plan import Plan
from dsv4c.runtime.buffers import Arena
from dsv4c.runtime.kernels import Kernels
from dsv4c.runtime.weights import load_weights
from dsv4c.schedules.emit import emit


class Compiled:
    """The programs of a CPU plan over the same weights and state (used in place)."""

    def __init__(self, made: Plan, source: WeightSource, state: Mapping[str, Tensor], out: Path, cache: Path) -> None:
        self.programs = made.programs
        self.state = {name: state[name] for name in made.states}
        self.kernels = Kernels(emit(made.choices, out, cache), out)
        self.weights, _ = load_weights(tuple(made.weights.values()), source)
        self.arenas = {name: Arena(program) for name, program in made.programs.items()}

    def run(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One call of a program; copies of its outputs."""
        program: Program = self.programs[name]
        sizes: dict[str, int] = {}
        for item in program.inputs:
            assert inputs[item.name].dtype == getattr(torch, item.dtype), item.name
            given = zip(item.shape, inputs[item.name].shape, strict=True)
            sizes.update({size: n for size, n in given if isinstance(size, str)})
        own = {item.name: inputs[item.name].contiguous() for item in program.inputs}
        values = {**self.arenas[name].views(sizes), **self.weights, **self.state, **own}
        calls = [call for segment in program.segments for call in segment.calls]
        for run in self.kernels.bind_calls(program, calls, values):
            run()
        return {meaning: values[value].clone() for meaning, value in program.outputs.items()}
