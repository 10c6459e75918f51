"""Linear maps on Hopper: FP8 with block scales (one weight, or one a group) and BF16 with float32 sums.

Few tokens read the weight once at the card's bandwidth: the blocks of a cluster share a tile's channels where the
weight has too few rows to fill the card. Many tokens are bound by the matrix units. cuBLASLt is a candidate too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsv4c.schedules._launch import Desc, LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work

HOPPER = frozenset({"sm_90a"})
SMS = 132  # of an H200
_FEW, _MANY = "dsv4c.schedules.triton.linear", "dsv4c.schedules.triton.linear_many"
_SHARED = 227 * 1024  # of a multiprocessor, for its blocks together
_BLOCK_SHARED = 1024  # what the card keeps of it for each block
_MOST_FEW = 512  # tokens; beyond, tiles of tokens would read the weight more often than the other kernels do


@dataclass(frozen=True)
class _Map:
    """Sizes of a node: `n` output channels in all, `k` input channels of one group."""

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
        """Output channels of one group."""
        return self.n // self.groups

    @property
    def width(self) -> int:
        """Elements of one token's input."""
        return self.groups * self.k

    @property
    def step(self) -> int:
        """Input channels of one ring slot: 128 bytes."""
        return 128 if self.fp8 else 64

    @property
    def out(self) -> int:
        """Number of the first argument behind the inputs."""
        return 4 if self.fp8 else 2


@dataclass(frozen=True)
class Few:
    """Config of the few-token kernels: weight rows and tokens of a tile, blocks that share its K, ring slots."""

    bn: int
    bt: int
    ctas: int
    stages: int


@dataclass(frozen=True)
class Many:
    """Config of the persistent kernels: tiles of bm tokens x bn channels, `sub` times 64 rows a warp group."""

    bm: int
    bn: int
    stages: int
    sub: int = 1
    band: int = 8

    @property
    def groups(self) -> int:
        return self.bm // (64 * self.sub)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(value: int, low: int, high: int) -> int:
    """The smallest power of two that is not below `value`, within [low, high]."""
    return max(low, min(high, 1 << max(0, value - 1).bit_length()))


def _moved(node: OpNode, symbols: Mapping[str, int]) -> float:
    return float(sum(v.bytes(symbols) for v in (*node.inputs, *node.outputs) if v is not None))


def _accepts_few(node: OpNode) -> str | None:
    m = _Map.of(node)
    x = node.inputs[0]
    assert x is not None
    if x.strides is not None:
        return "x is strided"
    if m.k % 128:
        return f"{m.k} input channels are no multiple of 128"
    if m.groups > 1 and m.rows % 128:
        return f"{m.rows} output channels of a group are no multiple of 128"
    return None


def few_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Tiles of 64 or 128 rows; as many blocks share one as put one to four blocks on each multiprocessor."""
    m, tokens = _Map.of(node), max(1, symbols["T"])
    if tokens > _MOST_FEW and m.k % 512 == 0:
        return (asdict(Few(64, 128, 1, 4)),)
    bt = _power(tokens, 16, 128)
    slots = m.k // m.step
    found: list[Few] = []
    for bn in (128, 64):
        if bn * bt > 64 * 128:  # two products of a tile would take more than 128 registers of a thread
            continue
        tiles = _cdiv(m.n, bn) * _cdiv(tokens, bt)
        fitting = [c for c in (1, 2, 4, 8) if slots % c == 0]
        # one to two blocks a multiprocessor (or as near as clusters get), their rings filling half of it each
        spread = [c for c in fitting if 0.7 * SMS <= tiles * c <= 2.2 * SMS]
        stages = (_SHARED // 2 - _BLOCK_SHARED - 2048) // ((bn + bt) * 128)
        for ctas in spread or [fitting[-1] if tiles < SMS else 1]:
            found.append(Few(bn, bt, ctas, min(stages, slots // ctas, 16)))
        # or more blocks with smaller rings, where the next kernel's weights find room beside them
        ctas = (spread or fitting)[-1] if tiles < 2 * SMS else 1
        found.append(Few(bn, bt, ctas, min(2 * stages // 3, slots // ctas, 16)))
    return tuple(asdict(few) for few in dict.fromkeys(found))[:6]


def few_launch(node: OpNode, config: Config, out: int) -> TritonLaunch:
    """The kernel for few tokens, writing argument `out`."""
    m, c = _Map.of(node), Few(**config)
    constants: dict[str, Any] = {"N": m.n, "K": m.k, "BN": c.bn, "BT": c.bt, "CTAS": c.ctas, "STAGES": c.stages}
    x = Desc(0, ("a0_0", m.width), (m.width, 1), (c.bt, m.step))
    args: dict[str, LaunchArg] = {"out": ptr(out), "tokens": i32("a0_0")}
    if m.fp8:
        weight = Desc(2, (m.n, m.k), (m.k, 1), (c.bn, m.step))
        args |= {"data": x, "scale": ptr(1), "weight": weight, "weight_scale": ptr(3)}
        constants["ROWS"] = m.rows
    else:
        args |= {"x": x, "weight": Desc(1, (m.n, m.k), (m.k, 1), (c.bn, m.step))}
    return TritonLaunch(
        f"{_FEW}:few_{'fp8' if m.fp8 else 'mixed'}",
        args,
        constants,
        (f"cdiv(a0_0, {c.bt}) * {_cdiv(m.n, c.bn)}", 1, 1),
        num_warps=4,
        num_ctas=c.ctas,
        pdl=True,
    )


def _few_build(node: OpNode, config: Config) -> Build:
    return Build("gpu", launches=(few_launch(node, config, _Map.of(node).out),))


def few_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    """Bandwidth where the blocks fill the card; each tile of tokens reads the weight again, from the L2 cache."""
    m, c, tokens = _Map.of(node), Few(**config), max(1, symbols["T"])
    tiles = _cdiv(tokens, c.bt)
    blocks = _cdiv(m.n, c.bn) * tiles * c.ctas
    idle = max(1.0, SMS / blocks)
    flops = 2.0 * tiles * c.bt * m.n * m.k
    # 0.85 of the copy bandwidth in steady state; padded tokens are multiplied too, at half the rate of large tiles
    return Work(_moved(node, symbols) * idle / 0.85, flops, "gpu", 0.4, "fp8" if m.fp8 else "bf16")


def _accepts_many(node: OpNode) -> str | None:
    m = _Map.of(node)
    if m.fp8 and m.k % 512:
        return f"{m.k} input channels are no multiple of 512, the scales of 4 blocks being one copy"
    if m.n % (8 if m.fp8 else 2):
        return f"{m.n} output channels are no multiple of {8 if m.fp8 else 2}"
    return _accepts_few(node)


def _many_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    if _Map.of(node).fp8:
        found = [Many(128, 128, 5), Many(128, 64, 7), Many(64, 128, 3)]
    else:
        found = [
            Many(256, 128, 4, 2), Many(128, 128, 6), Many(128, 256, 4), Many(64, 128, 4),
        ]  # fmt: skip
    return tuple(asdict(c) for c in found)


def _many_shared(m: _Map, c: Many) -> int:
    """Bytes of the rings and the output tiles."""
    extra = c.bm * 16 * (c.stages // 4 + 2) + c.groups * 64 * c.bn * 2 if m.fp8 else 0
    return c.stages * (c.bm + c.bn) * 128 + extra


def _many_programs(m: _Map, c: Many) -> int:
    """Programs that fit the card: two a multiprocessor where shared memory and registers allow."""
    return SMS * (2 if c.groups == 1 and 2 * (_many_shared(m, c) + _BLOCK_SHARED + 256) <= _SHARED else 1)


def _many_build(node: OpNode, config: Config) -> Build:
    m, c = _Map.of(node), Many(**config)
    x = Desc(0, ("a0_0", m.width), (m.width, 1), (c.bm, m.step))
    weight = Desc(2 if m.fp8 else 1, (m.n, m.k), (m.k, 1), (c.bn, m.step))
    constants: dict[str, Any] = {
        "N": m.n, "K": m.k, "BM": c.bm, "BN": c.bn, "BAND": c.band, "STAGES": c.stages,
        "REGISTERS": 232,  # of the second warp group; 24 for the copying warp leave as many for the first
    }  # fmt: skip
    args: dict[str, LaunchArg] = {"weight": weight, "tokens": i32("a0_0")}
    if m.fp8:
        scales = m.width // 128
        args |= {
            "data": x,
            "scale": Desc(1, ("a0_0", scales), (scales, 1), (c.bm, 4)),
            "weight_scale": ptr(3),
            "out": Desc(m.out, ("a0_0", m.n), (m.n, 1), (64, c.bn)),
        }
        constants["ROWS"] = m.rows
    else:
        args |= {"x": x, "out": ptr(m.out)}
        constants["SUB"] = c.sub
    tiles = f"cdiv(a0_0, {c.bm}) * {_cdiv(m.n, c.bn)}"
    launch = TritonLaunch(
        f"{_MANY}:many_{'fp8' if m.fp8 else 'mixed'}", args, constants,
        (f"min({_many_programs(m, c)}, {tiles})", 1, 1),
        num_warps=4,
        maxnreg=168 if c.groups == 2 else 128, pdl=True,  # an even share of the registers; warp groups trade theirs
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _many_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    m, c, tokens = _Map.of(node), Many(**config), max(1, symbols["T"])
    tiles = _cdiv(tokens, c.bm) * _cdiv(m.n, c.bn)
    programs = _many_programs(m, c)
    waves = _cdiv(tiles, programs) * programs  # tiles as if the last wave were full
    efficiency = {256: 0.85, 128: 0.8, 64: 0.55}[c.bm] * (1.0 if c.bn >= 128 else 0.7)
    unit = "fp8" if m.fp8 else "bf16"
    return Work(_moved(node, symbols), 2.0 * waves * c.bm * c.bn * m.k, "gpu", efficiency, unit)  # type: ignore[arg-type]


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
                f"{op}.gluon_few", op, HOPPER, _few_build, few_cost, _accepts_few,
                space=few_space, tolerance=tolerance,
            ),
            Schedule(
                f"{op}.gluon_many", op, HOPPER, _many_build, _many_cost, _accepts_many,
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
