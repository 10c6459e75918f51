"""linear and grouped_linear: packed weights times rows, or the vendor's GEMM.

`cpp_packed` keeps each weight once, in panels of 32 (or 16) output channels, as bfloat16 where that is exact: at
batch 1 it streams half the bytes of float32 (53 GB/s a core), for many rows it is a register-blocked GEMM (190 GFLOPS
a core, AVX-512). Every result is one sum in a fixed order, so it does not depend on the batch. ATen serves shapes
that panels do not divide.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.schedules._cpp import CPU, LANES, flops, moved
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Transforms, Value, Work, apply_layout, dense_rows


def panel(channels: int) -> int:
    """Output channels of one panel: 32 gives two vectors a row; 0 if no panel divides."""
    return next((p for p in (2 * LANES, LANES) if channels % p == 0), 0)


def packed(weight: Value, channels: int | None = None) -> Transforms:
    """[..., N, K] to [..., N / P, K, P], and to bfloat16 where that is exact. `channels`: N of one group."""
    *lead, n, k = (int(s) for s in weight.shape)
    p = panel(channels or n)
    narrow: Transforms = (("narrow", weight.exact),) if weight.exact else ()
    return (("reshape", (*lead, n // p, p, k)), ("transpose",), *narrow)


def _groups(node: OpNode) -> int:
    return int(node.attrs.get("groups", 1))


def _weight(node: OpNode) -> Value:
    weight = node.inputs[-1]
    assert weight is not None
    return weight


def _packed_layouts(node: OpNode) -> dict[int, Transforms]:
    weight = _weight(node)
    return {len(node.inputs) - 1: packed(weight, int(weight.shape[0]) // _groups(node))}


def _accepts_packed(node: OpNode) -> str | None:
    x, weight = node.inputs[0], _weight(node)
    assert x is not None
    if x.dtype != "float32" or weight.dtype != "float32":
        return f"{x.dtype} times {weight.dtype}"
    if not panel(int(weight.shape[0]) // _groups(node)):
        return f"{weight.shape[0]} output channels in {_groups(node)} groups are no multiple of {LANES}"
    if not dense_rows(x) or (len(x.shape) > 2 and x.strides is not None):
        return "x is strided within its rows"
    return None


def _build_packed(node: OpNode, config: Config) -> Build:
    weight, x = _weight(node), node.inputs[0]
    assert x is not None
    dense = node.op == "linear" and len(x.shape) > 2
    defines = {
        "BF16": int(weight.exact == "bfloat16"),
        "PANEL": panel(int(weight.shape[0]) // _groups(node)),
        "GROUPS": _groups(node),
        "DENSE": int(dense),
    }
    return Build("cpp", "linear.cc", defines)


def _packed_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    weight = _weight(node)
    laid = apply_layout(weight, packed(weight, int(weight.shape[0]) // _groups(node)))
    return Work(moved((*node.inputs[:-1], laid, *node.outputs), symbols), flops(node, symbols), "cpp", 0.85)


def _aten_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    return Work(moved((*node.inputs, *node.outputs), symbols), flops(node, symbols), "aten", 0.5)


def _accepts_aten(node: OpNode) -> str | None:
    x, weight = node.inputs[0], _weight(node)
    assert x is not None
    if x.dtype != weight.dtype:
        return f"{x.dtype} times {weight.dtype}"
    return None if dense_rows(x) else "x is strided within its rows"


def _packed_schedule(op: str) -> Schedule:
    return Schedule(
        f"{op}.cpp_packed", op, CPU, _build_packed, _packed_cost, _accepts_packed, _packed_layouts,
        tolerance=5e-6,
    )  # fmt: skip


def _aten_schedule(op: str) -> Schedule:
    return Schedule(
        f"{op}.aten", op, CPU, lambda node, config: Build("aten", f"aten.{op}", {"groups": _groups(node)}), _aten_cost,
        _accepts_aten, tolerance=5e-6,
    )  # fmt: skip


SCHEDULES = (
    _packed_schedule("linear"),
    _packed_schedule("grouped_linear"),
    _aten_schedule("linear"),
    _aten_schedule("grouped_linear"),
)
