"""A workload: one op at one real shape, with random inputs, a reference and the least work it takes.

Tests, `dsv4c tune` and the GPU benchmark all run the same workloads. `schedules/workloads/<family>.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dsv4c.config import ModelConfig, preset
from dsv4c.schedules._schedule import OpNode

Args = list[Tensor | None]
Make = Callable[[torch.Generator], Args]
"""Fresh random inputs in the order of the op's reference, on the generator's device; weights as the op takes them."""


@dataclass(frozen=True)
class Workload:
    """`node` has symbolic shapes (`"T"`), `symbols` their values here. `make` gives tensors of those shapes.

    `bytes_moved` counts each input read once and each output written once, weights that are used included; `flops`
    the arithmetic on `unit`. `reference` takes and gives what the op's own reference does (float32 inside), where
    that one would not fit the card. `error` maps (outputs, expected) to one number, compared with the schedule's
    tolerance; by default the largest, over outputs, of max|out - ref| / max|ref|.
    """

    label: str
    """`<model> <phase> <size>`, e.g. `flash decode 64 @8K`."""
    node: OpNode
    symbols: Mapping[str, int]
    make: Make
    bytes_moved: float
    flops: float = 0.0
    unit: Literal["fp32", "bf16", "fp8"] = "bf16"
    reference: Callable[..., Any] | None = None
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] | None = None
    baselines: Mapping[str, Callable[[Args], Callable[[], object]]] = field(default_factory=dict)
    """Other implementations to time beside ours: name -> (inputs -> a callable without arguments)."""
    purpose: frozenset[Literal["check", "bench"]] = frozenset({"check", "bench"})

    @property
    def op(self) -> str:
        return self.node.op


def config_of(model: str | ModelConfig) -> ModelConfig:
    """The preset of this name, or a config as it is: tests draw shapes of their own."""
    return preset(model) if isinstance(model, str) else model
