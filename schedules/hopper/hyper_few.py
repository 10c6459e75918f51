"""Hyper-connections of few tokens, on Hopper and Blackwell: one launch, clusters that share channels, no matrix units.

What bounds it is latency: a cluster waits for its token, exchanges sums once, or twice for the norm, and runs Sinkhorn;
fn comes before the kernel ahead has finished. Two clusters serve a token (hc_head: one). As many clusters as the card
holds run at once, more take turns: an H200 takes 4.9 us for a token of flash and 8.8 for 8, as Hopper's cluster that
keeps fn (8.2, 8.6), and 26 for 32 (9.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from dsv4c.schedules._launch import TritonLaunch, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Work
from dsv4c.schedules.hopper.hyper import HEAD, POST, PRE, TOLERANCE, accepts, attr, bytes_of, dim_of, pow2

_BLOCKS = 16  # of a cluster: the most there may be
_REACH = 64  # channels of a warp: two a thread keep 104 floats of fn in registers


def _warps(node: OpNode) -> int:
    return max(4, pow2(dim_of(node)) // (_BLOCKS * _REACH))


def _blocks(node: OpNode) -> int:
    return max(1, pow2(dim_of(node)) // (_warps(node) * _REACH))


def _accepts(node: OpNode) -> str | None:
    if _warps(node) > 8:
        return f"{dim_of(node)} channels, of which a cluster holds {_BLOCKS * 8 * _REACH}"
    return accepts(node)


def turns(node: OpNode, tokens: int, config: Config, sms: int) -> int:
    """Clusters that one place of the card runs one after another: an H200 has 14 for 16 blocks of 4 warps."""
    places = max(1, 14 * sms // 132) * _BLOCKS // int(config["blocks"]) * 4 // int(config["warps"])
    return math.ceil((1 if node.op in HEAD else 2) * tokens / places)


def _space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    return ({"blocks": _blocks(node), "warps": _warps(node)},)


def _build(node: OpNode, config: Config) -> Build:
    dim, inputs = dim_of(node), len(node.inputs)
    post, head, norm, quantise = node.op in POST, node.op in HEAD, "norm" in node.op, node.op.endswith("_quantise")
    weights, streams = (4, inputs) if post else (1, 0)
    x = inputs + 1 if post else inputs
    some = ptr(weights)  # stands for what the op does not have
    launch = TritonLaunch(
        "dsv4c.schedules.triton.hyper_few:fused",
        args={
            "y": ptr(0), "x": ptr(1 if post else 0), "post_in": ptr(2) if post else some,
            "comb_in": ptr(3) if post else some, "fn": ptr(weights), "base": ptr(weights + 1),
            "scale": ptr(weights + 2), "norm_weight": ptr(weights + 3) if norm else some, "streams": ptr(streams),
            "out": ptr(x), "post_out": some if head else ptr(x + 1), "comb_out": some if head else ptr(x + 2),
            "data": ptr(x + 3) if quantise else ptr(x, "float8_e4m3fn"),
            "data_scale": ptr(x + 4) if quantise else some,
        },
        constants={
            "D": dim, "P": pow2(dim), "POST": post, "HEAD": head, "NORM": norm, "QUANTISE": quantise,
            "ITERS": attr(node, "iters"), "NORM_EPS": attr(node, "norm_eps"), "EPS": attr(node, "eps"),
            "OUT_EPS": attr(node, "out_eps"),
        },
        grid=("a0_0" if head else "2 * a0_0", 1, 1),
        num_warps=int(config["warps"]),
        num_ctas=int(config["blocks"]),
        pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config, arch: str) -> Work:
    # a third of what an H200 takes: 4.9 us a turn of 4 warps, 7 of 8; costs of tiles leave as much out
    machine = MACHINES[arch]
    again = (turns(node, symbols["T"], config, machine.multiprocessors) - 1) * int(config["warps"]) / 4
    moved = (0.3e-6 + 1.6e-6 * max(0.0, again)) * machine.bytes_per_s
    return Work(max(moved, bytes_of(node, symbols["T"])), 0.0, "gpu")


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for a GPU architecture."""
    return tuple(
        Schedule(
            f"{op}.triton_cluster",
            op,
            frozenset({arch}),
            _build,
            partial(_cost, arch=arch),
            _accepts,
            space=_space,
            tolerance=TOLERANCE,
        )
        for op in sorted(PRE | HEAD | (POST - {"hc_post"}))
    )


SCHEDULES = schedules("sm_90a")
