"""What a GPU schedule launches: kernels by name, their arguments and grids, as data.

A call's arguments are `(*inputs, *workspace, *outputs)`, numbered from 0. A launch refers to them by number and to
their sizes by expressions, so one compiled kernel serves every number of tokens:

    TritonLaunch(
        "dsv4c.schedules.triton.hyper:post_pre_norm",
        args={"y": ptr(0), "x": ptr(1), "tokens": i32("a0_0"), "out": ptr(8)},
        constants={"D": 4096, "BLOCK": 1024, "EPS": 1e-6},
        grid=("cdiv(a0_0, 4)", 1, 1),
        num_warps=8,
    )

An expression is an int, or a string of `aI_D` (size D of argument I), ints, `+ - * // %`, `cdiv(x, y)`, `min(...)` and
`max(...)`. Argument tensors are dense unless the node's Value has strides, and start at multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Expr = int | str
Grid = tuple[Expr, Expr, Expr]


@dataclass(frozen=True)
class Ptr:
    """Address of an argument; `dtype` reinterprets it (a torch name), else it is the argument's own."""

    arg: int
    dtype: str | None = None


@dataclass(frozen=True)
class Scalar:
    """An `i32`, `i64` or `f32`. `multiple`: the kernel may assume that this divides the value."""

    kind: str
    value: Expr | float
    multiple: int = 1


@dataclass(frozen=True)
class Desc:
    """A tensor descriptor (tensor map) over an argument: `sizes` and element `strides` (last 1), tile `block`."""

    arg: int
    sizes: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    block: tuple[int, ...]
    dtype: str | None = None
    padding: str = "zero"


LaunchArg = Ptr | Scalar | Desc


def ptr(arg: int, dtype: str | None = None) -> Ptr:
    return Ptr(arg, dtype)


def i32(value: Expr, multiple: int = 1) -> Scalar:
    return Scalar("i32", value, multiple)


def i64(value: Expr, multiple: int = 1) -> Scalar:
    return Scalar("i64", value, multiple)


def f32(value: float) -> Scalar:
    return Scalar("f32", value)


@dataclass(frozen=True)
class TritonLaunch:
    """One Triton or Gluon kernel: `kernel` is `module:function`, `args` its run-time parameters by name.

    `constants` are its constexpr parameters (JSON values). `maxnreg` caps registers, `pdl` allows programmatic
    dependent launch. `cluster` blocks in a row run as a cluster, for a kernel that addresses them itself (`num_ctas` is
    for one whose tensors span blocks).
    """

    kernel: str
    args: Mapping[str, LaunchArg]
    constants: Mapping[str, Any]
    grid: Grid
    num_warps: int = 4
    num_stages: int = 3
    num_ctas: int = 1
    maxnreg: int | None = None
    pdl: bool = False
    cluster: int = 1


@dataclass(frozen=True)
class TileLaunch:
    """One TileLang kernel: `kernel` is `module:factory`; `factory(**constants)` gives the prim_func.

    `tensors` numbers the call's arguments in the order of the prim_func's tensor parameters; `symbols` gives its
    dynamic sizes by name.
    """

    kernel: str
    tensors: tuple[int, ...]
    constants: Mapping[str, Any]
    grid: Grid
    threads: int
    symbols: Mapping[str, Expr] = field(default_factory=dict)
    pdl: bool = False
