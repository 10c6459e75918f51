"""What a schedule is: one way to run one logical op on one target, and the values the planner exchanges with it.

The planner describes every op of a lowered program as an `OpNode`, asks for a choice, lays weights and buffers out
as the choice says, and has all kernels built at the end:

    node   = OpNode("dsv4::linear", {}, (Value(("T", 256), "float32"), Value((512, 256), "float32", "weight")),
                    (Value(("T", 512), "float32"),))
    choice = select(node, "cpu", symbols={"T": 2048})    # schedules/select.py; ScheduleError if none accepts
    choice.kernel       key of its kernel in the manifest; equal ops of one program share it
    choice.layouts      {input index: transforms} to append to that weight's `artifact.Weight.transforms`
    choice.inputs       the inputs as the kernel takes them (shape and dtype after those transforms)
    choice.workspace    temporaries to plan, passed between inputs and outputs
    kernels = emit(choices, out_dir, cache_dir, progress)  # schedules/emit.py -> {choice.kernel: artifact.Kernel}

A call's arguments are `(*inputs, *workspace, *outputs)`: no attributes (they are baked in), no symbols (a kernel
reads shapes), `None` stays `None`. `op` is a name of dsv4c.ops.OPS. Outputs are dense and never overlap inputs; an
activation may be strided in dimension 0 (a view of some columns: give `strides`). What an op updates in place (pools,
rings) is listed in `mutates` and is no output. Weights are float32 or int64; `exact="bfloat16"` says that the values a
checkpoint can hold fit bfloat16 (FP4, FP8 with power-of-two scales, BF16), which a schedule may use through the
layout `("narrow", "bfloat16")`: a cast that must not change a value.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from dsv4c.artifact import Shape
from dsv4c.ops import DTYPE_BYTES
from dsv4c.schedules._launch import TileLaunch, TritonLaunch

Transforms = tuple[tuple[Any, ...], ...]
Role = Literal["activation", "weight", "pool", "input"]
Config = Mapping[str, Any]
"""One point of a schedule's tuning space: names and JSON values (tile sizes, warps, splits)."""
Progress = Callable[[int, int, str], None]
"""(kernels done, kernels in all, name of the one just built)."""


@dataclass(frozen=True)
class Value:
    """Shape (ints and symbol names), dtype (torch's name without the prefix) and origin of one tensor."""

    shape: Shape
    dtype: str
    role: Role = "activation"
    strides: tuple[int, ...] | None = None
    """In elements; None where dense."""
    exact: str | None = None
    """Of a weight: a narrower dtype that holds its checkpoint values exactly, if there is one."""

    def bytes(self, symbols: Mapping[str, int]) -> int:
        return math.prod(self.sizes(symbols)) * DTYPE_BYTES[self.dtype]

    def sizes(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(symbols[s] if isinstance(s, str) else s for s in self.shape)


@dataclass(frozen=True)
class OpNode:
    """One op of a lowered program. `attrs` holds JSON values only; an optional tensor left out is None."""

    op: str
    attrs: Mapping[str, Any]
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    mutates: tuple[int, ...] = ()

    def describe(self) -> str:
        """`op(float32[T, 256], ...)`, for messages."""
        shown = (f"{v.dtype}[{', '.join(map(str, v.shape))}]" if v else "None" for v in self.inputs)
        return f"{self.op}({', '.join(shown)})"


@dataclass(frozen=True)
class Work:
    """What one call costs: bytes moved, floating point operations, launches, and the share of peak it can reach."""

    bytes_moved: float = 0.0
    flops: float = 0.0
    launch: Literal["cpp", "aten", "gpu"] = "cpp"
    efficiency: float = 1.0
    """Of the flops; bytes always count at the copy bandwidth."""
    unit: Literal["fp32", "bf16", "fp8", "fp4"] = "fp32"
    """Which arithmetic does the flops: the vector units, or the matrix units at that operand width."""
    launches: int = 1


@dataclass(frozen=True)
class Build:
    """What a schedule emits for a node.

    `cpp`: `source` is a file of schedules/cpp, or `text` the C++ itself, `defines` the constants baked into it.
    `inductor`: the op's reference is given to Inductor for the shapes in `signature`, and its C++ joins the library.
    `aten`: `source` is a name in the runtime's vendor table. `gpu`: `launches` run one after another on the call's
    arguments.
    """

    kind: Literal["cpp", "inductor", "aten", "gpu"]
    source: str = ""
    defines: Mapping[str, int | float] = field(default_factory=dict)
    signature: tuple[Any, ...] = ()
    launches: tuple[TritonLaunch | TileLaunch, ...] = ()
    text: str = ""


def _accept(node: OpNode) -> str | None:
    return None


def _no_layouts(node: OpNode) -> dict[int, Transforms]:
    return {}


def _no_workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    return ()


def _one_config(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    return ({},)


@dataclass(frozen=True)
class Schedule:
    """One way to run one op. Frozen data and pure functions of the node.

    `accepts` returns None or the reason for refusing, from shapes, dtypes and attributes alone. `space` lists the
    configs worth measuring for a node at these symbol values, best guess first; without a tuned row the cost model
    picks among them. `layouts` must not depend on the config: all programs share one copy of a weight. `tolerance` is
    the largest error against the float32 reference, relative to the largest magnitude of the result; 0 is exact.
    """

    name: str
    """`<op>.<dsl>_<idea>`."""
    op: str
    """Logical op, or `*` for any."""
    targets: frozenset[str]
    build: Callable[[OpNode, Config], Build]
    cost: Callable[[OpNode, Mapping[str, int], Config], Work]
    accepts: Callable[[OpNode], str | None] = _accept
    layouts: Callable[[OpNode], dict[int, Transforms]] = _no_layouts
    workspace: Callable[[OpNode, Config], tuple[Value, ...]] = _no_workspace
    space: Callable[[OpNode, Mapping[str, int]], tuple[Config, ...]] = _one_config
    tolerance: float = 1e-5
    capturable: bool = True


@dataclass(frozen=True)
class Choice:
    """The schedule chosen for a node, why, and what the planner must arrange for it."""

    node: OpNode
    schedule: str
    reason: str
    seconds: float
    """By roofline, at the largest symbol values."""
    layouts: Mapping[int, Transforms]
    inputs: tuple[Value | None, ...]
    workspace: tuple[Value, ...]
    build: Build
    tolerance: float
    capturable: bool
    config: Config = field(default_factory=dict)
    busy: float = 0.0
    """Of `seconds`: how long the call keeps the whole machine busy."""
    measured: float | None = None
    """Seconds of the tuned row that chose it."""

    @cached_property
    def kernel(self) -> str:
        """`<op>_<hash>`: equal for nodes that one kernel serves."""
        build = self.build
        text = json.dumps(
            [
                self.schedule,
                build.kind,
                build.source,
                dict(build.defines),
                build.signature,
                *map(asdict, build.launches),
                *([build.text] if build.text else []),
                *([self._dtypes()] if build.launches else []),  # a launch takes its arguments' dtypes
                dict(self.node.attrs),  # the manifest says them once a kernel
            ],
            sort_keys=True,
        )
        return f"{self.node.op}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def _dtypes(self) -> list[str | None]:
        values = (*self.inputs, *self.workspace, *self.node.outputs)
        return [None if value is None else value.dtype for value in values]


def apply_layout(value: Value, transforms: Transforms) -> Value:
    """Shape and dtype of a weight after `transforms` (the last three kinds of artifact.Weight)."""
    shape, dtype = tuple(value.shape), value.dtype
    for name, *args in transforms:
        if name in ("cast", "narrow"):
            dtype = args[0]
        elif name == "reshape":
            shape = tuple(args[0])
        elif name == "transpose":
            shape = (*shape[:-2], shape[-1], shape[-2])
        elif name == "permute":
            shape = tuple(shape[d] for d in args[0])
        elif name == "at_most":
            continue
        else:
            raise ValueError(f"a layout cannot use `{name}`")
    return Value(shape, dtype, value.role, None if transforms else value.strides, value.exact)


def dense_rows(value: Value | None) -> bool:
    """True if everything behind dimension 0 is dense."""
    if value is None or value.strides is None:
        return True
    step = 1
    for size, stride in zip(reversed(value.shape[1:]), reversed(value.strides[1:]), strict=True):
        if stride != step:
            return False
        step *= int(size)
    return True
