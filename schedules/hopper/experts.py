"""Routed experts on Hopper: sort the pairs, gather their rows, two grouped GEMMs on FP4 weights, sum.

A token of flash costs 302 MFLOP, an expert 13.4 MB of weights: up to about 1,600 tokens (10 an expert and then some)
the weights' bytes are the limit, beyond it the matrix units. So tiles follow the tokens an expert gets: few columns
and many loads in flight (two blocks a multiprocessor) for decode, 128 weight rows by up to 224 tokens for prefill.

    sort_pairs -> gather_rows -> grouped_gemm (w1, w3, SwiGLU, weight) -> grouped_gemm (w2) -> combine_rows

Weights stay 4.25 bits wide until registers; layouts only permute them (schedules/triton/experts.py says how).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dsv4c.schedules._launch import LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Transforms, Value, Work

_HOPPER = frozenset({"sm_90a"})
_GEMM, _SORT = "dsv4c.schedules.triton.experts:grouped_gemm", "dsv4c.schedules.triton.moe_sort"
_SMS = 132  # of an H100 or H200 SXM
_GROUP = 32  # channels of a weight that share a scale
_BLOCK = 128  # channels of a weight block: one scale group for each of four threads


def _sizes(node: OpNode) -> tuple[int, int, int, int]:
    """D, I, E and K."""
    x, chosen, w1 = node.inputs[0], node.inputs[1], node.inputs[3]
    assert x is not None and chosen is not None and w1 is not None
    return int(x.shape[1]), int(w1.shape[1]), int(w1.shape[0]), int(chosen.shape[1])


def _accepts(node: OpNode) -> str | None:
    dim, inner, experts, _ = _sizes(node)
    if any(value is None or value.strides is not None for value in node.inputs):
        return "an input is absent or strided"
    dtypes = tuple(value.dtype for value in node.inputs if value is not None)
    if dtypes != ("bfloat16", "int32", "float32", *["uint8"] * 6, "bfloat16"):
        return f"inputs of {', '.join(dtypes)}"
    if dim % _BLOCK or inner % _BLOCK:
        return f"{dim} x {inner} channels are no multiples of {_BLOCK}"
    if experts > 1024:
        return f"{experts} experts, the sort counts up to 1024"
    return None


def _layouts(node: OpNode) -> dict[int, Transforms]:
    """Rows in blocks of 32, channels in blocks of 128, each 2048 bytes in the order in which a warp group reads them.

    w1 and w3: the row at position 32 q + 16 j + 8 h + 2 t + c of 128 is channel 32 t + 8 q + 4 c + 2 j + h of hidden,
    so that hidden comes out permuted as the next product wants it. w2: rows 8 apart are the halves of a fragment.
    """
    dim, inner, experts, _ = _sizes(node)
    up, down = (experts, inner // _BLOCK, 4, 4, 2, 2, 2), (experts, dim // 64, 4, 2, 8)
    out: dict[int, Transforms] = {}
    for data in (3, 5):
        order: tuple[int, ...] = (0, 1, 3, 7, 5, 6, 2, 4, 8)
        out[data] = _layout((*up, dim // _BLOCK, 4, 16), (*order, 9), (experts, inner, dim // 2))
        out[data + 1] = _layout((*up, dim // _BLOCK, 4), order, (experts, inner, dim // _GROUP))
    order = (0, 1, 3, 5, 2, 4, 6)
    out[7] = _layout((*down, inner // _BLOCK, 4, 16), (*order, 7), (experts, dim, inner // 2))
    out[8] = _layout((*down, inner // _BLOCK, 4), order, (experts, dim, inner // _GROUP))
    return {i: ((*_BOUNDED, *transforms) if i in (4, 6, 8) else transforms) for i, transforms in out.items()}


# A scale is added to an exponent of four bits' value in bfloat16; above 2.0 (E8M0 byte 128) the sum could overflow
_BOUNDED: Transforms = (("at_most", 128),)


def _layout(split: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]) -> Transforms:
    return (("reshape", list(split)), ("permute", list(order)), ("reshape", list(shape)))


def _space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    """Columns around the tokens an expert gets; deep rings of small stages while the weights' bytes are the limit.

    First what won on an H200 at this mean number of rows of an expert that is hit.
    """
    dim, inner, experts, topk = _sizes(node)
    pairs = symbols["T"] * topk
    mean = pairs / max(1.0, hit(experts, topk, symbols["T"]))
    sort = 64 if pairs <= 64 else 512 if pairs <= 512 else 0
    if dim % 512 or inner % 512:
        return (_config(1, 1, 4, (8, 32, 64), 2, sort), _config(2, 1, 3, (32, 64, 128), 1, sort))
    if mean <= 2.5:
        return (
            _config(1, 4, 2, (8,), 3, sort), _config(1, 4, 3, (8, 16), 2, sort), _config(1, 8, 2, (8,), 2, sort),
            _config(2, 4, 2, (16,), 2, sort),
        )  # fmt: skip
    if mean <= 20:
        return (
            _config(1, 4, 3, (8, 16), 2, sort), _config(4, 2, 4, (16, 32), 1, sort),
            _config(2, 2, 3, (16, 32), 2, sort), _config(1, 4, 2, (16,), 3, sort), _config(2, 4, 3, (16, 32), 1, sort),
        )  # fmt: skip
    if mean <= 72:
        return (
            _config(4, 2, 3, (32, 48), 1, sort), _config(4, 1, 4, (48, 64), 1, sort),
            _config(2, 2, 4, (32, 48, 64), 1, sort), _config(4, 1, 5, (32, 64), 1, sort),
        )  # fmt: skip
    if mean <= 144:
        return (
            _config(2, 1, 3, (80, 96, 112, 128), 1, sort), _config(2, 1, 4, (64, 96, 112, 128), 1, sort),
            _config(2, 1, 3, (112, 128, 144, 160), 1, sort), _config(2, 1, 4, (64, 80, 96, 112), 1, sort),
        )  # fmt: skip
    return (
        _config(2, 1, 3, (160, 192, 208, 224), 1, sort), _config(2, 1, 3, (176, 192, 208, 224), 1, sort),
        _config(2, 1, 3, (128, 160, 192, 208, 224), 1, sort), _config(2, 1, 3, (64, 128, 192, 224), 1, sort),
    )  # fmt: skip


def _config(tiles: int, blocks: int, stages: int, columns: tuple[int, ...], share: int, sort: int) -> Config:
    """`tiles` of 64 rows a block, `blocks` of 128 channels a stage, `share` blocks a multiprocessor; `sort`: pairs that
    one launch sorts at once and gathers, 0 for a launch each."""
    return {"tiles": tiles, "blocks": blocks, "stages": stages, "columns": list(columns), "share": share, "sort": sort}


def _workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    """place, pair, row weights, tiles, counts; the pairs' rows (then their results), and hidden."""
    dim, inner, _, topk = _sizes(node)
    pairs = Value(("T", topk), "int32")
    return (
        pairs, pairs, Value(("T", topk), "float32"), Value(("T", topk, 4), "int32"), Value((16,), "int32"),
        Value(("T", topk * dim), "bfloat16"), Value(("T", topk * inner), "bfloat16"),
    )  # fmt: skip


def _build(node: OpNode, config: Config) -> Build:
    dim, _, experts, topk = _sizes(node)
    place, pair, row_weight, tiles, meta, rows, hidden, out = range(10, 18)
    pairs = f"a1_0 * {topk}"
    at_once = int(config["sort"])
    sort_args: dict[str, LaunchArg] = {
        "chosen": ptr(1), "weight": ptr(2), "place": ptr(place), "pair": ptr(pair), "row_weight": ptr(row_weight),
        "tiles": ptr(tiles), "meta": ptr(meta), "pairs": i32(pairs),
    }  # fmt: skip
    sort_constants = {
        "EP": _power(experts), "TILE": list(config["columns"])[-1], "BLOCK": at_once or 4096, "MOST_TILES": 16,
    }  # fmt: skip
    if at_once:
        sort = TritonLaunch(
            f"{_SORT}:sort_gather",
            args={"x": ptr(0), **sort_args, "out": ptr(rows)},
            constants={**sort_constants, "K": topk, "D": dim, "ROWS": 4, "BLOCKS": 4},
            grid=(f"min({experts}, {pairs})", math.ceil(dim / _BLOCK / 4), 1),
            pdl=True,
        )
        before: tuple[TritonLaunch, ...] = (sort,)
    else:
        sort = TritonLaunch(
            f"{_SORT}:sort_pairs", args=sort_args, constants=sort_constants,
            grid=(f"min({experts}, a1_0 * {experts})", 1, 1), num_warps=16, pdl=True,
        )  # fmt: skip
        gather = TritonLaunch(
            f"{_SORT}:gather_rows",
            args={"x": ptr(0), "pair": ptr(pair), "place": ptr(place), "out": ptr(rows), "rows": i32(pairs)},
            constants={"K": topk, "D": dim, "ROWS": 8, "BLOCKS": 4},
            grid=(f"cdiv({pairs}, 8)", math.ceil(dim / _BLOCK / 4), 1),
            pdl=True,
        )
        before = (sort, gather)
    combine = TritonLaunch(
        f"{_SORT}:combine_rows",
        args={"y": ptr(rows), "place": ptr(place), "shared": ptr(9), "out": ptr(out), "rows": i32(pairs)},
        constants={"K": topk, "D": dim, "PANELS": 8 if at_once else 16},
        grid=("a1_0", math.ceil(dim / 64 / (8 if at_once else 16)), 1),
        num_warps=2 if at_once else 4,
        pdl=True,
    )
    gemms = (
        _gemm(node, config, rows, hidden, (3, 4, 5, 6), up=True),
        _gemm(node, config, hidden, rows, (7, 8, 7, 8), up=False),
    )
    return Build("gpu", launches=(*before, *gemms, combine))


def _gemm(node: OpNode, config: Config, x: int, out: int, weights: tuple[int, ...], *, up: bool) -> TritonLaunch:
    dim, inner, _, topk = _sizes(node)
    row_weight, tiles, meta = 12, 13, 14
    channels, tall, share = (dim if up else inner), int(config["tiles"]), int(config["share"])
    wa, sa, wb, sb = weights
    columns = tuple(config["columns"])
    return TritonLaunch(
        _GEMM,
        args={
            "x": ptr(x), "chosen": ptr(1), "wa": ptr(wa), "sa": ptr(sa), "wb": ptr(wb), "sb": ptr(sb),
            "tiles": ptr(tiles), "meta": ptr(meta), "row_weight": ptr(row_weight), "out": ptr(out),
            "rows": i32(f"a1_0 * {topk}"),
        },
        constants={
            "UP": up, "LIMIT": float(node.attrs["limit"]), "M": inner if up else dim, "K": channels, "V": tall,
            "KB": math.gcd(int(config["blocks"]), channels // _BLOCK), "STAGES": config["stages"],
            "VARIANTS": columns, "EARLY": min(64, columns[-1] * topk) if int(config["sort"]) == 64 else 0,
        },
        grid=(f"min({_SMS * share}, a1_0 * {_SMS * share})", 1, 1),
        num_warps=4 * tall,
        num_stages=1,
        maxnreg=_registers(tall, share),
        pdl=True,
    )  # fmt: skip


def _registers(tall: int, share: int) -> int | None:
    """The cap for `share` blocks of a multiprocessor's 65,536 registers; warps come in fours, two of them produce."""
    threads = 128 * (tall + 1)
    return None if share == 1 and tall > 1 else 65536 // (threads * share) // 8 * 8


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()


def hit(experts: int, topk: int, tokens: int) -> float:
    """Experts that this many tokens hit, on average, if routing is uniform."""
    return experts * (1 - (1 - topk / experts) ** tokens)


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    dim, inner, experts, topk = _sizes(node)
    tokens = symbols["T"]
    pairs, some = tokens * topk, hit(experts, topk, tokens)
    weights = some * 3 * dim * inner * (0.5 + 1 / _GROUP)
    moved = weights + 2.0 * pairs * (4 * dim + 2 * inner) + 4.0 * tokens * dim
    columns = list(config["columns"])
    mean = pairs / max(some, 1)
    split = max(1, math.ceil(mean / columns[-1]))
    padded = next((c for c in columns if c >= mean / split), columns[-1])
    flops = 6.0 * dim * inner * some * split * padded
    bound = 0.85 if int(config["share"]) > 1 or mean > 24 else 0.7
    return Work(moved / bound, flops, "gpu", 0.8, "bf16", launches=4 if config["sort"] else 5)


# a bfloat16 result may round to the neighbour of what the reference rounds to, 2**-7 of it at most; so may before,
# an expert's own result, half as much of the sum (0.0089 seen once in 265 steps of nano on an H200); sums are float32
_TOLERANCE = 1.2e-2

SCHEDULES: tuple[Schedule, ...] = (
    Schedule(
        "experts_fp4.gluon_fragments", "experts_fp4", _HOPPER, _build, _cost, _accepts, layouts=_layouts,
        workspace=_workspace, space=_space, tolerance=_TOLERANCE,
    ),
)  # fmt: skip
