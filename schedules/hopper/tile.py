"""TileLang's kernels on Hopper: linear maps, and sparse attention over packed pools."""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.schedules._launch import Expr, TileLaunch
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Work

HOPPER = frozenset({"sm_90a"})
SMS = 132  # of an H200
_LINEAR = "dsv4c.schedules.tilelang.linear:mixed"
_ATTEND = "dsv4c.schedules.tilelang.attend:attend"


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _moved(node: OpNode, symbols: Mapping[str, int]) -> float:
    return float(sum(v.bytes(symbols) for v in (*node.inputs, *node.outputs) if v is not None))


# Linear maps ------------------------------------------------------------------------------------------------------


def _weight(node: OpNode) -> tuple[int, int]:
    """Output and input channels."""
    weight = node.inputs[1]
    assert weight is not None
    return int(weight.shape[0]), int(weight.shape[1])


def _linear_accepts(node: OpNode) -> str | None:
    n, k = _weight(node)
    if any(value is None or value.strides is not None for value in node.inputs):
        return "an input is absent or strided"
    if k % 64 or n % 64:
        return f"{n} x {k} is no multiple of 64 x 64"
    return None


def _linear_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Large tiles for many tokens; narrow ones for few, so that enough blocks stream the weight."""
    n, _ = _weight(node)
    tokens = max(1, symbols["T"])
    if tokens > 512:
        shapes = [(128, columns, stages, 8) for columns, stages in ((256, 4), (128, 6), (64, 6)) if n % columns == 0][
            :2
        ]
    else:
        fit = [
            columns for columns in (128, 64, 32) if n % columns == 0 and n // columns * _cdiv(tokens, 64) >= SMS // 2
        ]
        shapes = [(64, columns, 6, 0) for columns in fit[:2]] or [(64, 32, 6, 0)]
    return tuple(
        {"BM": rows, "BN": columns, "stages": stages, "panel": panel} for rows, columns, stages, panel in shapes
    )


def _linear_build(node: OpNode, config: Config) -> Build:
    n, k = _weight(node)
    rows = int(config["BM"])
    launch = TileLaunch(
        _LINEAR,
        tensors=(0, 1, 2),
        constants={"N": n, "K": k, **config},
        grid=(_cdiv(n, int(config["BN"])), f"cdiv(a0_0, {rows})", 1),
        threads=2 * rows + 128,
        symbols={"M": "a0_0"},
    )
    return Build("gpu", launches=(launch,))


def _linear_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    n, k = _weight(node)
    rows, columns, tokens = int(config["BM"]), int(config["BN"]), max(1, symbols["T"])
    blocks = _cdiv(tokens, rows) * _cdiv(n, columns)
    waves = max(blocks, _cdiv(blocks, SMS) * SMS if rows > 64 else SMS)  # as if the last wave were full
    flops = 2.0 * waves * rows * columns * k
    return Work(_moved(node, symbols) / 0.8, flops, "gpu", 0.85 if rows > 64 else 0.4, "bf16")


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
        threads=384,
        symbols=symbols,
    )
    return Build("gpu", launches=(launch,))


def _attend_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Clusters that fill the card once, then half as large; each block has two tiles at least."""
    q = node.inputs[0]
    assert q is not None
    tokens, heads, _ = q.sizes(symbols)
    most = min(_CLUSTER, max(1, _attend_keys(node, symbols) // (2 * _KEYS)))
    fill = 1
    while fill * 2 <= most and tokens * heads // _HEADS * fill * 2 <= SMS:
        fill *= 2
    return tuple({"splits": splits} for splits in (fill, fill // 2) if 1 <= splits <= most)


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


_MIXED_TOLERANCE = 2e-5  # float32 sums in another order
# bfloat16 results round by up to 2^-9 of themselves, and one rounding may fall the other way; weights of keys and the
# parts of a cluster are rounded to 11 bits
_ATTEND_TOLERANCE = 8e-3

SCHEDULES = (
    Schedule(
        "linear_mixed.tile_ring", "linear_mixed", HOPPER, _linear_build, _linear_cost, _linear_accepts,
        space=_linear_space, tolerance=_MIXED_TOLERANCE,
    ),
    *(
        Schedule(
            f"{op}.tile_pair", op, HOPPER, _attend_build, _attend_cost, _attend_accepts,
            space=_attend_space, tolerance=_ATTEND_TOLERANCE,
        )
        for op in _KINDS
    ),
)  # fmt: skip
