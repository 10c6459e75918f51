"""Hyper-connections on Hopper with streams read as the tensor cores take them (triton/hyper_fragments.py).

One warp a program: 16 tokens and a share of the channels, nothing in shared memory, no barrier. Ten such warps fit a
multiprocessor's registers and keep 50 KB of loads in flight, where 26 KB would do. A token of flash moves 72 KB in the
first launch and 44 KB in the second, which finds the streams in L2 up to about a thousand tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work
from dsv4c.schedules.hopper.hyper import TOLERANCE, accepts, bytes_moved, dim_of, split_build, split_workspace

_OPS = (
    "hc_pre", "hc_head", "hc_pre_norm", "hc_head_norm", "hc_pre_norm_quantise", "hc_post_pre_norm",
    "hc_post_pre_norm_quantise",
)  # fmt: skip
_SMS = 132  # of an H100 or H200 SXM
_WARPS = 10  # whose registers fit a multiprocessor
_TILE, _WIDTH = 16, 32  # tokens of a matrix instruction; channels that two of them take


def _space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """From half a wave of warps to four."""
    parts = dim_of(node) // _WIDTH
    tiles = math.ceil(max(1, symbols["T"]) / _TILE)
    divisors = [s for s in range(1, parts + 1) if parts % s == 0]
    found: dict[int, None] = {}
    for waves in (1.0, 2.0, 0.5, 4.0):
        fits = [s for s in divisors if s * tiles >= waves * _SMS * _WARPS] or [parts]
        found[fits[0]] = None
    return tuple({"splits": s, "finish_warps": 8 if symbols["T"] <= _SMS else 4} for s in found)


def _workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    return split_workspace(node, config)


def _build(node: OpNode, config: Config) -> Build:
    whole = {"tile": _TILE, "width": _WIDTH, "warps": 1, "stages": 1, **config}
    project, finish = split_build(node, whole).launches
    assert isinstance(project, TritonLaunch)
    constants = {name: project.constants[name] for name in ("D", "ROWS", "POST", "BT", "DS", "BD")}
    project = dataclasses.replace(
        project, kernel="dsv4c.schedules.triton.hyper_fragments:project", constants=constants, num_warps=1
    )
    return Build("gpu", launches=(project, finish))


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    tokens, dim, splits = max(1, symbols["T"]), dim_of(node), int(config["splits"])
    tiles = math.ceil(tokens / _TILE)
    moved = bytes_moved(node, tokens) + 2 * splits * tokens * 32 * 4
    moved += (0.5 if tokens <= 1024 else 1.0) * tokens * 8 * dim  # the streams again, from L2 while they fit
    busy = min(1.0, tiles * splits / (_SMS * _WARPS / 2))
    return Work(moved / (0.75 * busy), 0.0, "gpu", launches=2)


SCHEDULES = tuple(
    Schedule(
        f"{op}.gluon_fragments", op, frozenset({"sm_90a"}), _build, _cost, accepts, workspace=_workspace, space=_space,
        tolerance=TOLERANCE,
    )
    for op in _OPS
)  # fmt: skip
