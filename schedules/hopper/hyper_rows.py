"""Hyper-connections on Hopper in one launch: a program keeps its tokens through all sweeps (triton/hyper_rows.py).

A token of flash moves 84 KB of memory once and another 48 KB from L2; fn comes from L2 once for every tile of tokens:
4.6 us of copying a hundred tokens against 0.3 us of L2 for a tile of 64. Fewer than 132 tiles leave part of the card
idle, so small batches are better served by kernels that split the channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dsv4c.schedules._launch import TritonLaunch, i32, ptr
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Work
from dsv4c.schedules.hopper.hyper import TOLERANCE, accepts, bytes_moved, dim_of

_OPS = ("hc_pre_norm", "hc_pre_norm_quantise", "hc_post_pre_norm", "hc_post_pre_norm_quantise")
_SMS = 132  # of an H100 or H200 SXM
_SHAPES = (  # tokens, channels of the first sweep, warps, stages
    (64, 64, 8, 2), (64, 32, 8, 3), (32, 64, 8, 3), (32, 64, 4, 2), (32, 128, 8, 2), (16, 64, 4, 3), (16, 128, 4, 2),
)  # fmt: skip


def _space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Large tiles first where they fill the card."""
    dim = dim_of(node)
    out: list[Config] = [
        {"tile": t, "width": w, "warps": warps, "stages": stages}
        for t, w, warps, stages in _SHAPES
        if dim % w == 0 and (t == 16 or symbols["T"] >= t * _SMS // 4)
    ]
    return tuple(out) or ({"tile": 16, "width": 64, "warps": 4, "stages": 2},)


def _build(node: OpNode, config: Config) -> Build:
    fused, quantise, dim = "post" in node.op, node.op.endswith("_quantise"), dim_of(node)
    first = 4 if fused else 1
    out = len(node.inputs) + (1 if fused else 0)
    launch = TritonLaunch(
        "dsv4c.schedules.triton.hyper_rows:post_pre_norm",
        args={
            "y": ptr(0), "x": ptr(1 if fused else 0), "post_in": ptr(2 if fused else out + 1),
            "comb_in": ptr(3 if fused else out + 2), "fn": ptr(first), "base": ptr(first + 1), "scale": ptr(first + 2),
            "norm_weight": ptr(first + 3), "streams": ptr(len(node.inputs) if fused else 0), "out": ptr(out),
            "post_out": ptr(out + 1), "comb_out": ptr(out + 2),
            "data": ptr(out + 3) if quantise else ptr(out, "float8_e4m3fn"),
            "data_scale": ptr(out + 4 if quantise else out + 1), "tokens": i32("a0_0"),
        },
        constants={
            "D": dim, "POST": fused, "QUANTISE": quantise, "ITERS": node.attrs["iters"],
            "NORM_EPS": node.attrs["norm_eps"], "EPS": node.attrs["eps"], "OUT_EPS": node.attrs["out_eps"],
            "BT": config["tile"], "BD": config["width"], "BW": 128, "STAGES": config["stages"],
        },
        grid=(f"cdiv(a0_0, {config['tile']})", 1, 1),
        num_warps=config["warps"],
        num_stages=config["stages"],
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _accepts(node: OpNode) -> str | None:
    if dim_of(node) % 128:
        return f"{dim_of(node)} channels are no multiple of 128"
    return accepts(node)


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    tokens, dim = max(1, symbols["T"]), dim_of(node)
    tiles = math.ceil(tokens / int(config["tile"]))
    busy = min(1.0, tiles / _SMS)
    again = 0.5 * (tokens * 12 * dim + tiles * 24 * 4 * dim * 4)  # from L2, at about twice the rate of memory
    flops = 2.0 * 2 * 32 * 4 * dim * tiles * int(config["tile"])
    return Work((bytes_moved(node, tokens) + again) / busy, flops, "gpu", 0.3 * busy, "bf16")


SCHEDULES = tuple(
    Schedule(
        f"{op}.triton_rows", op, frozenset({"sm_90a"}), _build, _cost, _accepts, space=_space,
        tolerance=TOLERANCE,
    )
    for op in _OPS
)  # fmt: skip
