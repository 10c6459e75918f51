"""The MoE gates on Hopper: one small kernel, or two with the router's product.

A gate moves a few kilobytes a token: launches and the latency of one row's K dependent choices are what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dsv4c.schedules._launch import LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work
from dsv4c.schedules.hopper import linear

HOPPER = linear.HOPPER
_KERNELS = "dsv4c.schedules.triton.gate"


def _power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _width(node: OpNode) -> tuple[int, int]:
    """Experts, and chosen ones."""
    first, chosen = node.inputs[1 if "linear" in node.op else 0], node.outputs[0]
    assert first is not None
    return int(first.shape[0 if "linear" in node.op else 1]), int(chosen.shape[1])


def gate_launch(node: OpNode, rows: int, first: int, extra: tuple[int, ...], out: int, parts: int = 1) -> TritonLaunch:
    """The gate on the logits in argument `first`, the sum of `parts`, with `extra` arguments and outputs from `out`."""
    experts, topk = _width(node)
    by_hash = node.op.endswith("hash")
    args: dict[str, LaunchArg] = {
        "logits": ptr(first), "ids": ptr(out), "weight": ptr(out + 1), "tokens": i32(f"a{out}_0"),
    }  # fmt: skip
    args |= dict(zip(("token_ids", "table") if by_hash else ("bias",), map(ptr, extra), strict=True))
    constants = {
        "E": experts, "K": topk, "SCALING": float(node.attrs["scaling"]), "BT": rows, "BK": _power(topk),
        "PARTS": parts,
    }  # fmt: skip
    if not by_hash:
        constants["BE"] = _power(experts)
    name = f"{_KERNELS}:{'gate_hash' if by_hash else 'gate_bias'}"
    return TritonLaunch(name, args, constants, (f"cdiv(a{out}_0, {rows})", 1, 1), num_warps=min(rows, 4), pdl=True)


def gate_accepts(node: OpNode) -> str | None:
    """The reason why a gate of this node cannot run, if there is one."""
    experts, topk = _width(node)
    if topk > experts:
        return f"{topk} of {experts} experts"
    if experts > 1024:
        return f"{experts} experts do not fit a warp's registers"
    logits, ids = node.inputs[0], node.outputs[0]
    assert logits is not None
    if ids.dtype != "int32":
        return f"ids are {ids.dtype}"
    return None if logits.strides is None else "rows are strided"


def _space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Rows of a program, one a warp: 4 once they fill the card."""
    return ({"rows": 4}, {"rows": 1}, {"rows": 2}, {"rows": 8})


def _build(node: OpNode, config: Config) -> Build:
    inputs = len(node.inputs)
    return Build("gpu", launches=(gate_launch(node, config["rows"], 0, tuple(range(1, inputs)), inputs),))


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    experts, topk = _width(node)
    tokens = symbols["T"]
    # each choice passes all scores through the vector units, about 8 operations an expert
    return Work(tokens * (4.0 * experts + 8 * topk), tokens * 8.0 * experts * (topk + 4), "gpu", 0.3)


def router_product(node: OpNode) -> OpNode:
    """The router's product alone."""
    experts, _ = _width(node)
    return OpNode("linear_mixed", {}, node.inputs[:2], (Value(("T", experts), "float32"),))


def _few_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    return linear.few_space(router_product(node), symbols)


def _few_workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    return (Value(("T", _width(node)[0]), "float32"),)


def _few_build(node: OpNode, config: Config) -> Build:
    inputs = len(node.inputs)
    product = linear.few_launch(router_product(node), config, inputs)
    gate = gate_launch(node, 1, inputs, tuple(range(2, inputs)), inputs + 1)
    return Build("gpu", launches=(product, gate))


def _few_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    return replace(linear.few_cost(router_product(node), symbols, config), launches=2)


_TOLERANCE = 1e-5  # weights: float32 exp, log1p and square root, each to a few ulps
_LINEAR_TOLERANCE = 1e-4  # and float32 sums of the logits in another order


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for a GPU architecture; a router's product is written for Hopper."""
    targets = frozenset({arch})
    every: tuple[Schedule, ...] = (
        *(
            Schedule(f"{op}.triton_rows", op, targets, _build, _cost, gate_accepts, space=_space, tolerance=_TOLERANCE)
            for op in ("gate_bias", "gate_hash")
        ),
        *(
            Schedule(
                f"{op}.gluon_few",
                op,
                HOPPER,
                _few_build,
                _few_cost,
                gate_accepts,
                workspace=_few_workspace,
                space=_few_space,
                tolerance=_LINEAR_TOLERANCE,
            )
            for op in ("gate_linear_bias", "gate_linear_hash")
        ),
    )
    return tuple(schedule for schedule in every if arch in schedule.targets)


SCHEDULES = schedules("sm_90a")
