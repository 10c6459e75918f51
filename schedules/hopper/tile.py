"""TileLang's kernels on Hopper: linear maps, and sparse attention over packed pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.schedules._launch import Expr, Grid, TileLaunch
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Work

HOPPER = frozenset({"sm_90a"})
SMS = 132  # of an H200
_SHARED = 227 * 1024 - 1024  # of a block, less barriers
_GROUP = 128  # input channels that share a scale
_ALL = 1 << 20  # blocks that take tiles in turn: no limit, every tile has its own
_FEW_SCALES = 32  # groups whose scales a block of the few-token kernel holds
_LINEAR, _ATTEND = "dsv4c.schedules.tilelang.linear", "dsv4c.schedules.tilelang.attend:attend"


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _moved(node: OpNode, symbols: Mapping[str, int]) -> float:
    return float(sum(v.bytes(symbols) for v in (*node.inputs, *node.outputs) if v is not None))


# Linear maps ------------------------------------------------------------------------------------------------------


def _fp8(node: OpNode) -> bool:
    return node.op.endswith("fp8")


def _weight(node: OpNode) -> tuple[int, int, int]:
    """Output channels, input channels and groups."""
    weight = node.inputs[2 if _fp8(node) else 1]
    assert weight is not None
    n, k = (int(size) for size in weight.shape)
    return n, k, int(node.attrs.get("groups", 1))


def _linear_accepts(node: OpNode) -> str | None:
    n, k, groups = _weight(node)
    if any(value is None or value.strides is not None for value in node.inputs):
        return "an input is absent or strided"
    if _fp8(node) and k % 512:
        return f"{k} input channels are no multiple of 512: a row of scales must fill 16 bytes"
    if k % 64 or n % 64:
        return f"{n} x {k} is no multiple of 64 x 64"
    if (n // groups) % _GROUP and groups > 1:
        return f"{n // groups} output channels of a group are no multiple of {_GROUP}"
    return None


def _linear_shared(node: OpNode, config: Config) -> int:
    """Bytes of a block: the ring of tiles, the scales of a tile or two, and the output tile."""
    _, k, _ = _weight(node)
    rows, columns = int(config["BM"]), int(config["BN"])
    ring = int(config["stages"]) * (rows + columns) * 128
    scales = 4 * rows * (k // _GROUP)
    return ring + (scales * (2 if scales <= 16384 else 1) + 2 * rows * columns if _fp8(node) else 0)


def _linear_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Large tiles for many tokens; narrow ones for few, so that enough blocks stream the weight."""
    n, _, _ = _weight(node)
    tokens = max(1, symbols["T"])
    if tokens > 512:
        shapes = [(128, 128, 8, 2), (128, 128, 8, 1)] if _fp8(node) else [(128, 256, 8, 1), (128, 128, 8, 1)]
    else:
        fit = [columns for columns in (128, 64, 32, 16) if n // columns * _cdiv(tokens, 64) >= SMS // 2]
        shapes = [(64, columns, 1, 1) for columns in fit[:3]] or [(64, 32, 1, 1), (64, 16, 1, 1)]
        if tokens > 64:
            shapes.append((128, 128, 1, 1))
    out = []
    for rows, columns, panel, cluster in shapes:
        for stages in (6, 4, 3):
            config: dict[str, Any] = {"BM": rows, "BN": columns, "stages": stages, "panel": panel}
            if _fp8(node):
                config |= {"cluster": cluster, "blocks": SMS if rows > 64 else _ALL}
            if _linear_shared(node, config) <= _SHARED:
                out.append(config)
                break
    return tuple(out)


def _linear_build(node: OpNode, config: Config) -> Build:
    n, k, groups = _weight(node)
    constants: dict[str, Any] = {"N": n, "K": k, **config}
    rows, columns = int(config["BM"]), _cdiv(n, int(config["BN"]))
    grid: Grid = (columns, f"cdiv(a0_0, {rows})", 1)
    if _fp8(node):
        constants["G"] = groups
        cluster = int(config["cluster"])
        tiles = f"cdiv(a0_0, {rows * cluster}) * {columns}"
        grid = (f"min({int(config['blocks']) // cluster}, {tiles}) * {cluster}", 1, 1)
    launch = TileLaunch(
        f"{_LINEAR}:{'fp8' if _fp8(node) else 'mixed'}",
        tensors=tuple(range(5 if _fp8(node) else 3)),
        constants=constants,
        grid=grid,
        threads=2 * rows + 128,
        symbols={"M": "a0_0"},
    )
    return Build("gpu", launches=(launch,))


def _few_accepts(node: OpNode) -> str | None:
    _, k, _ = _weight(node)
    refused = _linear_accepts(node)
    if refused is None and _fp8(node) and k // _GROUP > 8 * _FEW_SCALES:
        return f"{k} input channels are more than {8 * _FEW_SCALES * _GROUP}"
    return refused


def _few_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Shares of K such that the blocks fill the card once or twice, two on a multiprocessor."""
    n, k, _ = _weight(node)
    tiles = _cdiv(max(1, symbols["T"]), 64)
    steps = k // (_GROUP if _fp8(node) else 64)
    found = []
    for columns, stages in ((64, 4), (128, 3)):
        for splits in (1, 2, 4, 8):
            blocks = _cdiv(n, columns) * tiles * splits
            if n % columns or steps % splits or (_fp8(node) and steps // splits > _FEW_SCALES):
                continue
            waste = abs(1.0 - blocks / (1.5 * SMS))
            found += [(waste, {"BN": columns, "stages": stages, "splits": splits, "early": e}) for e in (True, False)]
    return tuple(config for _, config in sorted(found, key=lambda pair: pair[0])[:8])


def _few_build(node: OpNode, config: Config) -> Build:
    n, k, groups = _weight(node)
    launch = TileLaunch(
        f"{_LINEAR}_few:few",
        tensors=tuple(range(5 if _fp8(node) else 3)),
        constants={"kind": "fp8" if _fp8(node) else "mixed", "N": n, "K": k, "G": groups, **config},
        grid=(_cdiv(n, int(config["BN"])) * int(config["splits"]), "cdiv(a0_0, 64)", 1),
        threads=256,
        symbols={"M": "a0_0"},
        pdl=bool(config["early"]),
    )
    return Build("gpu", launches=(launch,))


def _few_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    """Every tile of 64 tokens reads the weight; where there are fewer blocks than SMs, bandwidth is left over."""
    n, k, _ = _weight(node)
    tiles, columns = _cdiv(max(1, symbols["T"]), 64), int(config["BN"])
    blocks = _cdiv(n, columns) * tiles * int(config["splits"])
    moved = _moved(node, symbols) * tiles / 0.8 * max(1.0, SMS / blocks)
    late = 0.0 if config["early"] else 1e-6 * 4.3e12  # a launch's latency, in bytes
    return Work(moved + late, 2.0 * tiles * 64 * n * k, "gpu", 0.4, "fp8" if _fp8(node) else "bf16")


def _linear_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    n, k, _ = _weight(node)
    rows, columns, tokens = int(config["BM"]), int(config["BN"]), max(1, symbols["T"])
    blocks = _cdiv(tokens, rows) * _cdiv(n, columns)
    waves = max(blocks, _cdiv(blocks, SMS) * SMS if rows > 64 else SMS)  # as if the last wave were full
    efficiency = 0.7 if rows > 64 else 0.4
    return Work(
        _moved(node, symbols) / 0.8,
        2.0 * waves * rows * columns * k,
        "gpu",
        efficiency,
        "fp8" if _fp8(node) else "bf16",
    )


# Attention --------------------------------------------------------------------------------------------------------

_KINDS = {"attend_window_packed": "window", "attend_csa_packed": "csa", "attend_hca_packed": "hca"}
_HEADS, _KEYS = 64, 64  # of one block, of one tile
_CLUSTER = 8  # blocks that every card gives a cluster


def _attend_accepts(node: OpNode) -> str | None:
    q, pool = node.inputs[0], node.inputs[1]
    assert q is not None and pool is not None
    heads, channels = (int(size) for size in q.shape[1:])
    if channels != 512 or node.attrs["rope_dim"] != 64:
        return f"heads of {channels} channels, {node.attrs['rope_dim']} of them rotated; expected 512 and 64"
    if heads % _HEADS:
        return f"{heads} heads are no multiple of {_HEADS}"
    if q.strides is not None:
        return "q is strided"
    if int(node.attrs["window"]) % _KEYS or int(node.attrs["page"]) % _KEYS:
        return f"a window of {node.attrs['window']} in pages of {node.attrs['page']} is no multiple of {_KEYS}"
    per_page = int(node.attrs.get("entries_per_page", 1))
    if per_page & (per_page - 1) or int(node.attrs["page"]) & (int(node.attrs["page"]) - 1):
        return f"pages of {node.attrs['page']} and {per_page} entries are no powers of two"
    if node.op == "attend_csa_packed":
        picks = node.inputs[5]
        assert picks is not None
        if int(picks.shape[1]) % _KEYS:
            return f"{picks.shape[1]} picks are no multiple of {_KEYS}"
    return None


def _attend_build(node: OpNode, config: Config) -> Build:
    kind = _KINDS[node.op]
    q, picks = node.inputs[0], node.inputs[5]
    assert q is not None and picks is not None
    heads, splits = int(q.shape[1]), int(config["splits"])
    symbols: dict[str, Expr] = {"tokens": "a0_0", "rows": "a1_0", "requests": "a2_0", "columns": "a2_1"}
    if kind != "window":
        symbols |= {"entry_rows": "a3_0", "entry_columns": "a4_1"}
    launch = TileLaunch(
        _ATTEND,
        tensors=tuple(range(len(node.inputs) + 1)),
        constants={
            "kind": kind,
            "H": heads,
            "window": int(node.attrs["window"]),
            "page": int(node.attrs["page"]),
            "picks": int(picks.shape[1]) if kind == "csa" else 0,
            "per_page": int(node.attrs.get("entries_per_page", 0)),
            "ratio": int(node.attrs.get("ratio", 0)),
            "splits": splits,
        },
        grid=(heads // _HEADS * splits, "a0_0", 1),
        threads=512,
        symbols=symbols,
    )
    return Build("gpu", launches=(launch,))


def _attend_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Clusters that fill the card once, then half as large and twice as large; each block has two tiles at least."""
    q = node.inputs[0]
    assert q is not None
    tokens, heads, _ = q.sizes(symbols)
    most = min(_CLUSTER, max(1, _attend_keys(node, symbols) // (2 * _KEYS)))
    fill = 1
    while fill * 2 <= most and tokens * heads // _HEADS * fill * 2 <= SMS:
        fill *= 2
    return tuple({"splits": splits} for splits in (fill, fill * 2, fill // 2) if 1 <= splits <= most)


def _attend_keys(node: OpNode, symbols: Mapping[str, int]) -> int:
    """Keys of a token: exact but for hca, where the page table's width stands for the context."""
    keys = int(node.attrs["window"])
    if node.op == "attend_csa_packed":
        picks = node.inputs[5]
        assert picks is not None
        keys += int(picks.shape[1])
    if node.op == "attend_hca_packed":
        table = node.inputs[4]
        assert table is not None
        keys += table.sizes(symbols)[1] * int(node.attrs["entries_per_page"])
    return keys


def _attend_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    q, pool = node.inputs[0], node.inputs[1]
    assert q is not None and pool is not None
    tokens, heads, channels = q.sizes(symbols)
    keys, splits = _attend_keys(node, symbols), int(config["splits"])
    blocks = max(1, tokens * heads // _HEADS * splits)
    flops = 4.0 * channels * _HEADS * _cdiv(keys, splits) * _cdiv(blocks, SMS) * SMS
    moved = 2.0 * q.bytes(symbols) + tokens * keys * int(pool.shape[1])
    return Work(moved, flops, "gpu", 0.6, "bf16")


# bfloat16 results round by up to 2^-9 of themselves, and one rounding may fall the other way; the tensor cores keep
# about 13 bits of an FP8 sum; weights of keys are rounded to 11 bits
_TOLERANCES = {"linear_fp8": 8e-3, "grouped_linear_fp8": 8e-3, "linear_mixed": 2e-5}
_ATTEND_TOLERANCE = 8e-3

SCHEDULES = (
    *(
        Schedule(
            f"{op}.tile_few", op, HOPPER, _few_build, _few_cost, _few_accepts,
            space=_few_space, tolerance=tolerance,
        )
        for op, tolerance in _TOLERANCES.items()
    ),
    *(
        Schedule(
            f"{op}.tile_ring", op, HOPPER, _linear_build, _linear_cost, _linear_accepts,
            space=_linear_space, tolerance=tolerance,
        )
        for op, tolerance in _TOLERANCES.items()
    ),
    *(
        Schedule(
            f"{op}.tile_pair", op, HOPPER, _attend_build, _attend_cost, _attend_accepts,
            space=_attend_space, tolerance=_ATTEND_TOLERANCE,
        )
        for op in _KINDS
    ),
)  # fmt: skip
