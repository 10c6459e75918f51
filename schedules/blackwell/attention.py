"""Attention over packed FP8 pools on Blackwell: entries of 512 channels with their sums in tensor memory.

Bound by the matrix units and by what feeds them: a tile of 64 keys and 64 heads is 8.4 million operations, 1,540 cycles
of the units (scores have 64 rows, half of what a unit takes at full rate), about as long to dequantise and to write to
shared memory, and 500 to scale the sums. The products with weights run beside the next tile's dequantisation, the rest
in turn. Few tokens share out their keys as on Hopper, for 148 multiprocessors; narrow entries take the plain kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule
from dsv4c.schedules.hopper import attention as hopper
from dsv4c.schedules.hopper.attention import OPS, TOLERANCE, Call, shares_of, work_of, workspace_of

_HEADS = 64  # of a program: with 128, sums of 512 channels would take all of tensor memory
_KEYS = 64  # of a tile: 64 KB as bfloat16, beside as much of queries
# 8.4 million operations in about 2,700 cycles, by counting, are 0.43 of what is stated; 0.79 of that is reached at best
_EFFICIENCY = 0.45


def _accepts(node: OpNode) -> str | None:
    _, dim = Call(node).shape
    rope, per_page = int(node.attrs["rope_dim"]), int(node.attrs.get("entries_per_page", 1))
    if dim != 512 or rope != 64:
        return f"entries of {dim} channels, {rope} of them rotated: not 512 and 64"
    if per_page & (per_page - 1):
        return f"{per_page} entries a page are no power of two"
    return hopper.accepts(node)


def _space(node: OpNode, symbols: Mapping[str, int], *, sms: int) -> tuple[Config, ...]:
    blocks = -(-Call(node).shape[0] // _HEADS)
    # stages: picks lead to pages and pages to entries, each a tile earlier
    return tuple({"warps": 8, "stages": 4, "shares": n} for n in shares_of(node, symbols, blocks, sms))


def _build(node: OpNode, config: Config) -> Build:
    call, shares = Call(node), int(config["shares"])
    constants = call.constants(shares)
    heads = call.shape[0]
    launch = TritonLaunch(
        "dsv4c.schedules.triton.attend_wide:attend",
        args=call.args(shares),
        constants={
            **{name: constants[name] for name in ("KIND", "WINDOW", "RATIO", "TOPK", "SHARES")},
            "PAGE_SHIFT": int(constants["PAGE"]).bit_length() - 1,
            "ENTRIES_SHIFT": int(constants["ENTRIES"]).bit_length() - 1, "HEADS": heads, "K": _KEYS,
        },
        grid=(-(-heads // _HEADS), "a0_0", shares),  # the blocks of a token are neighbours, for its entries in L2
        num_warps=config["warps"], num_stages=config["stages"], pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch, call.combine(shares)) if shares > 1 else (launch,))


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for one of Blackwell's architectures."""
    sms = MACHINES[arch].multiprocessors
    wide = tuple(
        Schedule(
            f"{op}.triton_wide",
            op,
            frozenset({arch}),
            _build,
            work_of(_EFFICIENCY, sms),
            _accepts,
            workspace=workspace_of,
            space=partial(_space, sms=sms),
            tolerance=TOLERANCE,
        )
        for op in OPS
    )
    return (*wide, *hopper.schedules(arch))
