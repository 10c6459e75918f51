"""Attention over packed FP8 pools on Hopper.

Bound by the matrix units: 131,072 operations for each key of 584 bytes and 64 heads, 224 a byte. One token and 64 heads
are a tile of 64 rows, so few tokens leave multiprocessors idle: then their keys are shared out, and a second kernel
combines the shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from dsv4c.schedules._launch import LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work

HOPPER = frozenset({"sm_90a"})
OPS = ("attend_window_packed", "attend_csa_packed", "attend_hca_packed")
_TILE = 64  # keys of a tile
_PIECE = 8192  # elements that one program of the combine holds, at most: 64 a thread


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _round(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class Call:
    """Sizes and argument numbers of an attention node, on any architecture."""

    node: OpNode

    @property
    def kind(self) -> str:
        return self.node.op.split("_")[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Heads and channels."""
        q = self.node.inputs[0]
        assert q is not None
        return int(q.shape[1]), int(q.shape[2])

    @property
    def topk(self) -> int:
        picks = self.node.inputs[5] if self.kind == "csa" else None
        return int(picks.shape[1]) if picks is not None else 1

    def keys(self, symbols: Mapping[str, int]) -> int:
        """Keys of a token, at most."""
        window = int(self.node.attrs["window"])
        if self.kind == "window":
            return window
        if self.kind == "csa":
            return window + self.topk
        table = self.node.inputs[4]
        assert table is not None
        return window + table.sizes(symbols)[1] * int(self.node.attrs["entries_per_page"])

    def workspace(self, shares: int) -> tuple[Value, ...]:
        heads, dim = self.shape
        if shares == 1:
            return ()
        return Value(("T", shares, heads, dim), "bfloat16"), Value(("T", shares, heads), "float32")

    def args(self, shares: int) -> dict[str, LaunchArg]:
        """What both kernels take."""
        last = len(self.node.inputs)
        entries = 3 if self.kind != "window" else 1  # a window has no entries: these pointers are not read
        out = last + 2 if shares > 1 else last
        return {
            "q": ptr(0), "pool": ptr(1), "pages": ptr(2), "entry_pool": ptr(entries), "entry_pages": ptr(entries + 1),
            "picks": ptr(5 if self.kind == "csa" else 1, "int32"), "request_rows": ptr(last - 3),
            "positions": ptr(last - 2), "sink": ptr(last - 1), "out": ptr(last if shares > 1 else out),
            "lse": ptr(last + 1 if shares > 1 else last - 1), "columns": i32("a2_1"),
            "entry_columns": i32(f"a{entries + 1}_1"),
        }  # fmt: skip

    def constants(self, shares: int) -> dict[str, Any]:
        attrs = self.node.attrs
        return {
            "KIND": self.kind, "WINDOW": attrs["window"], "PAGE": attrs["page"],
            "ENTRIES": attrs.get("entries_per_page", 1), "RATIO": attrs.get("ratio", 1), "TOPK": self.topk,
            "SHARES": shares,
        }  # fmt: skip

    def combine(self, shares: int) -> TritonLaunch:
        heads, dim = self.shape
        last, rounded = len(self.node.inputs), _round(shares)
        piece = min(_round(dim), _PIECE // rounded)
        return TritonLaunch(
            "dsv4c.schedules.triton.attend:combine",
            args={"part": ptr(last), "lse": ptr(last + 1), "out": ptr(last + 2)},
            constants={"C": dim, "HEADS": heads, "SHARES": shares, "ROUND": rounded, "PIECE": piece},
            grid=(f"a0_0 * {heads}", _cdiv(dim, piece), 1),
            num_warps=max(1, min(4, rounded * piece // 1024)),
            pdl=True,
        )


def accepts(node: OpNode) -> str | None:
    q, page = node.inputs[0], int(node.attrs["page"])
    assert q is not None
    if q.dtype != "bfloat16":
        return f"q is {q.dtype}"
    if q.strides is not None:
        return "q is strided"
    if page & (page - 1):
        return f"{page} entries a page are no power of two"
    return None


def _accepts_narrow(node: OpNode) -> str | None:
    dim = Call(node).shape[1]
    if dim > 256:
        return f"sums of {dim} channels leave tensor memory for more registers than a thread has"
    return accepts(node)


def _accepts_groups(node: OpNode) -> str | None:
    call = Call(node)
    heads, dim = call.shape
    if heads % 64 or dim != 512 or node.attrs["rope_dim"] != 64:
        return f"{heads} heads of {dim} channels, {node.attrs['rope_dim']} of them rotated: not 64 of 512 and 64"
    if call.kind == "csa" and (call.topk & (call.topk - 1) or call.topk < 128):
        return f"{call.topk} picks are no power of two from 128 up"
    per_page = int(node.attrs.get("entries_per_page", 1))
    if per_page & (per_page - 1):
        return f"{per_page} entries a page are no power of two"
    return accepts(node)


def shares_of(node: OpNode, symbols: Mapping[str, int], per_token: int, sms: int) -> tuple[int, ...]:
    """Shares that fill the card about once, best guess first; one if the tokens alone do."""
    tiles = _cdiv(Call(node).keys(symbols), _TILE)
    items = max(1, symbols["T"]) * per_token
    if items >= 2 * sms:
        return (1,)
    full = max(1, min(sms // items, tiles))
    return tuple(dict.fromkeys((full, max(1, full // 2), 1)))


def _groups_space(node: OpNode, symbols: Mapping[str, int], sms: int) -> tuple[Config, ...]:
    return tuple({"shares": shares} for shares in shares_of(node, symbols, Call(node).shape[0] // 64, sms))


def _build_groups(node: OpNode, config: Config, sms: int) -> Build:
    call, shares = Call(node), int(config["shares"])
    blocks = call.shape[0] // 64
    launch = TritonLaunch(
        "dsv4c.schedules.triton.attend_gluon:attend",
        args={**call.args(shares), "tokens": i32("a0_0")},
        constants={**call.constants(shares), "BLOCKS": blocks},
        grid=(f"min({sms}, a0_0 * {blocks * shares})", 1, 1),
        num_warps=4,
        pdl=True,  # and 12 of its specialised groups
    )
    return Build("gpu", launches=(launch, call.combine(shares)) if shares > 1 else (launch,))


def _plain_space(node: OpNode, symbols: Mapping[str, int], sms: int, least: int) -> tuple[Config, ...]:
    """`least`: the fewest rows that the matrix units of this architecture take."""
    heads, dim = Call(node).shape
    block_h = max(least, min(64, _round(heads)))
    block_k = 32 if dim > 256 else 64  # [64, 512] sums and [32, 512] keys are as much as the registers hold
    shares = shares_of(node, symbols, _cdiv(heads, block_h), sms)
    if dim > 256:
        shares = shares[:1]  # the groups are faster wherever they accept
    return tuple(
        {"block_h": block_h, "block_k": block_k, "warps": 8 if dim > 256 else 4, "shares": count} for count in shares
    )


def _build_plain(node: OpNode, config: Config) -> Build:
    call, shares = Call(node), int(config["shares"])
    heads, dim = call.shape
    args = call.args(shares)
    launch = TritonLaunch(
        "dsv4c.schedules.triton.attend:attend",
        args=args,
        constants={
            **call.constants(shares), "HEADS": heads, "C": dim, "ROPE": node.attrs["rope_dim"], "CHANNELS": _round(dim),
            "BLOCK_H": config["block_h"], "BLOCK_K": config["block_k"],
        },
        grid=("a0_0", _cdiv(heads, config["block_h"]), shares),
        num_warps=config["warps"],
        num_stages=2, pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch, call.combine(shares)) if shares > 1 else (launch,))


def workspace_of(node: OpNode, config: Config) -> tuple[Value, ...]:
    return Call(node).workspace(int(config["shares"]))


def work_of(efficiency: float, sms: int) -> Any:
    """Keys that tokens share are counted for each: they come from L2."""

    def cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
        call, shares, tokens = Call(node), int(config["shares"]), symbols["T"]
        heads, dim = call.shape
        pool = node.inputs[1]
        assert pool is not None
        keys = call.keys(symbols)
        parts = sum(prod(v.sizes(symbols)) * (2 if v.dtype == "bfloat16" else 4) for v in call.workspace(shares))
        filled = min(1.0, max(1, tokens) * _cdiv(heads, 64) * shares / sms)
        return Work(
            bytes_moved=tokens * (4 * heads * dim + keys * int(pool.shape[1])) + 2 * parts,
            flops=4.0 * tokens * heads * dim * keys,
            launch="gpu",
            efficiency=efficiency * filled,
            unit="bf16",
            launches=2 if shares > 1 else 1,
        )

    return cost


# Weights, the result and the results of shares are bfloat16. One unit in the last place of the largest value is up to
# 2**-7 of it: this allows two.
TOLERANCE = 1.6e-2


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for a GPU architecture: the groups are written for Hopper; Blackwell has wide entries of its own."""
    targets, sms = frozenset({arch}), MACHINES[arch].multiprocessors
    least = 16 if arch == "sm_90a" else 64  # tcgen05 takes 64 rows; of fewer Triton makes the old `mma.sync`
    every: tuple[Schedule, ...] = (
        *(
            Schedule(
                f"{op}.gluon_groups",
                op,
                HOPPER,
                partial(_build_groups, sms=sms),
                work_of(0.6, sms),
                _accepts_groups,
                workspace=workspace_of,
                space=partial(_groups_space, sms=sms),
                tolerance=TOLERANCE,
            )
            for op in OPS
        ),
        *(
            Schedule(
                f"{op}.triton_gather",
                op,
                targets,
                _build_plain,
                work_of(0.2, sms),
                accepts if arch == "sm_90a" else _accepts_narrow,
                workspace=workspace_of,
                space=partial(_plain_space, sms=sms, least=least),
                tolerance=TOLERANCE,
            )
            for op in OPS
        ),
    )
    return tuple(schedule for schedule in every if arch in schedule.targets)


SCHEDULES = schedules("sm_90a")
