"""Linear maps on Hopper: FP8 with block scales (one weight, or one a group) and BF16 with float32 sums.

Few tokens read the weight once at the card's bandwidth: `split` programs share a weight tile's channels where its
rows alone would leave multiprocessors idle. Many tokens are bound by the matrix units. cuBLASLt is a candidate too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsv4c.schedules._launch import Desc, LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work

HOPPER = frozenset({"sm_90a"})
SMS = 132  # of an H200; more programs than multiprocessors do no harm, fewer leave some idle
_KERNELS = "dsv4c.schedules.triton.linear"
_SHARED = 227 * 1024
_ADD_BLOCK = 512  # elements of one summing program: 4 a thread


@dataclass(frozen=True)
class _Map:
    """Sizes of a node: `rows` output channels a group, `k` input channels a group."""

    fp8: bool
    n: int
    k: int
    groups: int

    @classmethod
    def of(cls, node: OpNode) -> _Map:
        weight = node.inputs[2 if node.op.endswith("fp8") else 1]
        assert weight is not None
        n, k = (int(s) for s in weight.shape)
        return cls(node.op.endswith("fp8"), n, k, int(node.attrs.get("groups", 1)))

    @property
    def rows(self) -> int:
        return self.n // self.groups

    @property
    def width(self) -> int:
        """Elements of one token's input."""
        return self.groups * self.k

    @property
    def out(self) -> int:
        """Number of the first argument behind the inputs."""
        return 4 if self.fp8 else 2


@dataclass(frozen=True)
class Few:
    """Config of the few-token kernels: weight rows and tokens of a program, parts of K, pipeline depth."""

    bn: int
    bt: int
    split: int
    stages: int
    warps: int = 4
    bk: int = 128


@dataclass(frozen=True)
class Many:
    """Config of the persistent kernels. `groups` warp groups multiply `sub` times 64 rows each of bm x bn tiles."""

    bm: int
    bn: int
    sub: int
    stages: int
    band: int = 8
    bk: int = 128

    @property
    def groups(self) -> int:
        return self.bm // (64 * self.sub)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(value: int, low: int, high: int) -> int:
    """The smallest power of two that is not below `value`, within [low, high]."""
    return max(low, min(high, 1 << max(0, value - 1).bit_length()))


def _accepts(node: OpNode) -> str | None:
    m = _Map.of(node)
    x = node.inputs[0]
    assert x is not None
    if x.strides is not None:
        return "x is strided"
    if m.k % 128:
        return f"{m.k} input channels are no multiple of 128"
    if m.groups > 1 and m.rows % 128:
        return f"{m.rows} output channels of a group are no multiple of 128"
    if m.n % (8 if m.fp8 else 4):
        return f"{m.n} output channels are no multiple of 16 bytes"
    return None


def _few_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Tiles of 128 or 64 rows, with K split until the programs fill the card once, twice or four times."""
    m, tokens = _Map.of(node), max(1, symbols["T"])
    bt = _power(tokens, 16, 128)
    blocks = m.k // 128
    found: list[Few] = []
    for bn in (128, 64):
        tiles = _cdiv(m.n, bn) * _cdiv(tokens, bt)
        wanted = {_power(_cdiv(times * SMS, tiles), 1, 64) for times in (1, 2, 4)}
        for split in sorted(wanted, reverse=True):
            if split > 1 and (blocks < 2 * split or tokens > 512):
                continue
            bk = 128 if m.fp8 else 64
            stage = (bn + bt) * 128
            stages = max(3, min(8, 72 * 1024 // stage))  # three programs a multiprocessor
            found.append(Few(bn, bt, split, stages, 4, bk))
    return tuple(asdict(few) for few in dict.fromkeys(found)) or (asdict(Few(64, bt, 1, 4, 4, 128 if m.fp8 else 64)),)


def _few_build(node: OpNode, config: Config) -> Build:
    m, c = _Map.of(node), Few(**config)
    out = m.out + (c.split > 1)
    to = m.out if c.split > 1 else out
    constants: dict[str, Any] = {"N": m.n, "K": m.k, "BN": c.bn, "BT": c.bt, "SPLIT": c.split}
    if m.fp8:
        args: dict[str, LaunchArg] = {
            "data": Desc(0, ("a0_0", m.width), (m.width, 1), (c.bt, 128)),
            "scale": ptr(1),
            "weight": Desc(2, (m.n, m.k), (m.k, 1), (c.bn, 128)),
            "weight_scale": ptr(3),
        }
        constants["ROWS"] = m.rows
    else:
        args = {
            "x": Desc(0, ("a0_0", m.k), (m.k, 1), (c.bt, c.bk)),
            "weight": Desc(1, (m.n, m.k), (m.k, 1), (c.bn, c.bk)),
        }
        constants["BK"] = c.bk
    grid = (_cdiv(m.n, c.bn), f"cdiv(a0_0, {c.bt})", c.split)
    name = f"{_KERNELS}:few_{'fp8' if m.fp8 else 'mixed'}"
    launches = [
        TritonLaunch(
            name, {**args, "out": ptr(to), "tokens": i32("a0_0")}, constants, grid,
            num_warps=c.warps, num_stages=c.stages,
        )
    ]  # fmt: skip
    if c.split > 1:
        count = f"a0_0 * {m.n}"
        launches.append(
            TritonLaunch(
                f"{_KERNELS}:add_parts",
                {"parts": ptr(to), "out": ptr(out), "count": i32(count)},
                {"SPLIT": c.split, "BLOCK": _ADD_BLOCK},
                (f"cdiv({count}, {_ADD_BLOCK})", 1, 1),
            )
        )
    return Build("gpu", launches=tuple(launches))


def _few_workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    c = Few(**config)
    return (Value((c.split, "T", _Map.of(node).n), "float32"),) if c.split > 1 else ()


def _moved(node: OpNode, symbols: Mapping[str, int]) -> float:
    return float(sum(v.bytes(symbols) for v in (*node.inputs, *node.outputs) if v is not None))


def _few_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    """Bandwidth where the programs fill the card; each tile of tokens reads the weight again, from the L2 cache."""
    m, c, tokens = _Map.of(node), Few(**config), max(1, symbols["T"])
    tiles = _cdiv(tokens, c.bt)
    parts = 8.0 * c.split * tokens * m.n if c.split > 1 else 0.0
    idle = max(1.0, SMS / (_cdiv(m.n, c.bn) * tiles * c.split))
    flops = 2.0 * tiles * c.bt * m.n * m.k
    # 0.85 of the copy bandwidth in steady state; padded tokens are multiplied too, at half the rate of large tiles
    moved = (_moved(node, symbols) + parts) * idle / 0.85
    return Work(moved, flops, "gpu", 0.4, "fp8" if m.fp8 else "bf16", launches=2 if c.split > 1 else 1)


def _many_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    m = _Map.of(node)
    if m.fp8:
        found = [
            Many(256, 128, 2, 4), Many(128, 128, 1, 6), Many(128, 128, 2, 3), Many(64, 128, 1, 4), Many(128, 64, 1, 6),
        ]  # fmt: skip
    else:
        found = [
            Many(128, 256, 1, 4, bk=64), Many(256, 128, 2, 4, bk=64), Many(128, 128, 1, 6, bk=64),
            Many(128, 128, 2, 3, bk=64), Many(64, 128, 1, 4, bk=64),
        ]  # fmt: skip
    return tuple(asdict(c) for c in found)


def _many_shared(m: _Map, c: Many) -> int:
    """Bytes of the operand ring and the output tiles."""
    size = 1 if m.fp8 else 2
    tile = 64 * c.bn * 2 if m.fp8 else 0
    return c.stages * (c.bm + c.bn) * c.bk * size + c.groups * tile


def _many_programs(m: _Map, c: Many) -> int:
    """Programs that fit the card: two a multiprocessor where shared memory and registers allow."""
    return SMS * (2 if c.groups == 1 and 2 * (_many_shared(m, c) + 2048) <= _SHARED + 1024 else 1)


def _many_build(node: OpNode, config: Config) -> Build:
    m, c = _Map.of(node), Many(**config)
    x = Desc(0, ("a0_0", m.width), (m.width, 1), (c.bm, c.bk))
    out = Desc(m.out, ("a0_0", m.n), (m.n, 1), (64, c.bn)) if m.fp8 else ptr(m.out)
    constants: dict[str, Any] = {
        "N": m.n, "K": m.k, "BM": c.bm, "BN": c.bn, "BAND": c.band, "SUB": c.sub, "STAGES": c.stages,
        "REGISTERS": 232,
    }  # fmt: skip
    weight = Desc(2 if m.fp8 else 1, (m.n, m.k), (m.k, 1), (c.bn, c.bk))
    args: dict[str, LaunchArg] = {"weight": weight, "out": out, "tokens": i32("a0_0")}
    if m.fp8:
        args |= {"data": x, "scale": ptr(1), "weight_scale": ptr(3)}
        constants["ROWS"] = m.rows
    else:
        args["x"] = x
        constants["BK"] = c.bk
    tiles = f"cdiv(a0_0, {c.bm}) * {_cdiv(m.n, c.bn)}"
    launch = TritonLaunch(
        f"{_KERNELS}:many_{'fp8' if m.fp8 else 'mixed'}", args, constants,
        (f"min({_many_programs(m, c)}, {tiles})", 1, 1),
        num_warps=4,
        maxnreg=168 if c.groups == 2 else 128,  # an even share of the registers; warp groups trade theirs
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _many_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    m, c, tokens = _Map.of(node), Many(**config), max(1, symbols["T"])
    tiles = _cdiv(tokens, c.bm) * _cdiv(m.n, c.bn)
    programs = _many_programs(m, c)
    waves = _cdiv(tiles, programs) * programs  # tiles as if the last wave were full
    efficiency = {256: 0.8, 128: 0.7, 64: 0.5}[c.bm] * (1.0 if c.bn >= 128 else 0.7)
    return Work(
        _moved(node, symbols), 2.0 * waves * c.bm * c.bn * m.k, "gpu", efficiency, "fp8" if m.fp8 else "bf16"
    )  # fmt: skip


def _vendor_accepts(node: OpNode) -> str | None:
    m = _Map.of(node)
    if m.groups > 1:
        return "the vendor's product has no groups"
    if m.fp8 and (m.k % 512 or m.n % 16):
        return f"{m.n} x {m.k} is no multiple of 16 x 512, which its block scales need"
    return None


def _vendor_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    m, tokens = _Map.of(node), max(1, symbols["T"])
    flops = 2.0 * _cdiv(tokens, 128) * 128 * m.n * m.k
    unit = "fp8" if m.fp8 else "bf16"
    return Work(_moved(node, symbols) / 0.8, flops, "aten", 0.7, unit, launches=2 if m.fp8 else 1)  # type: ignore[arg-type]


def _vendor_workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    """4 padded rows and their scales by column, all scales by column, and 4 results."""
    m = _Map.of(node)
    groups = m.k // 128
    return (
        Value((4, m.k), "float8_e4m3fn"),
        Value((groups, 4), "float32"),
        Value((groups, "T"), "float32"),
        Value((4, m.n), "bfloat16"),
    )


# bfloat16 results round by up to 2^-9 of themselves, and one rounding may fall the other way: 2^-8; the tensor cores
# keep about 13 bits of an FP8 sum
_FP8_TOLERANCE = 8e-3
_MIXED_TOLERANCE = 2e-5  # float32 sums in another order

SCHEDULES = (
    *(
        schedule
        for op, tolerance in (
            ("linear_fp8", _FP8_TOLERANCE), ("grouped_linear_fp8", _FP8_TOLERANCE), ("linear_mixed", _MIXED_TOLERANCE)
        )
        for schedule in (
            Schedule(
                f"{op}.triton_few", op, HOPPER, _few_build, _few_cost, _accepts,
                workspace=_few_workspace, space=_few_space, tolerance=tolerance,
            ),
            Schedule(
                f"{op}.gluon_many", op, HOPPER, _many_build, _many_cost, _accepts,
                space=_many_space, tolerance=tolerance,
            ),
        )
    ),
    Schedule(
        "linear_fp8.aten", "linear_fp8", HOPPER, lambda node, config: Build("aten", "aten.linear_fp8"), _vendor_cost,
        _vendor_accepts, workspace=_vendor_workspace, tolerance=_FP8_TOLERANCE,
    ),
    Schedule(
        "linear_mixed.aten", "linear_mixed", HOPPER, lambda node, config: Build("aten", "aten.linear_mixed"),
        _vendor_cost, _vendor_accepts, tolerance=_MIXED_TOLERANCE,
    ),
)  # fmt: skip
