"""Routed experts on Blackwell: quantise the tokens, sort the pairs, two grouped GEMMs on block-scaled operands, sum.

A token of flash costs 302 MFLOP, an expert 13.4 MB of weights. At the cost model's rates of a GB300 the weights' bytes
are the limit up to 5,600 tokens a step in FP8 and 16,000 in FP4, if tiles are full: they follow the tokens that an
expert gets, 16 columns while these are few, 64 beyond.

    quantise_mx -> sort_pairs -> grouped_up (w1, w3, SwiGLU, weight, quantise) -> grouped_down (w2) -> combine_pairs
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from dsv4c.schedules._launch import Desc, LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work
from dsv4c.schedules.hopper.experts import hit

_KERNELS, _SORT = "dsv4c.schedules.triton.experts_scaled", "dsv4c.schedules.triton.moe_sort:sort_pairs"
_ROWS = 128  # of a weight tile: what the matrix unit takes, and the lanes of tensor memory
_WIDE = 1024  # channels that one program of the sum takes, at most


def _format(node: OpNode) -> str:
    """Of the activations, as the kernels call it."""
    if node.op == "experts_mx":
        return str(node.attrs["activations"])
    return "nvfp4" if node.op == "experts_nvfp4" else "bf16"


def _group(node: OpNode) -> int:
    return 16 if _format(node) == "nvfp4" else 32


def _weights(node: OpNode) -> tuple[int, int, int]:
    """Numbers of w1, w3 and w2 among the inputs; each is followed by its scales (and, in NVFP4, by its factors)."""
    return (3, 6, 9) if node.op == "experts_nvfp4" else (3, 5, 7)


def _sizes(node: OpNode) -> tuple[int, int, int, int]:
    """D, I, E and K."""
    x, chosen, w1 = node.inputs[0], node.inputs[1], node.inputs[3]
    assert x is not None and chosen is not None and w1 is not None
    return int(x.shape[1]), int(w1.shape[1]), int(w1.shape[0]), int(chosen.shape[1])


def _accepts(node: OpNode) -> str | None:
    if any(value is None or value.strides is not None for value in node.inputs):
        return "an input is absent or strided"
    if node.op == "experts_nvfp4" and node.attrs["activations"] != "nvfp4":
        return f"NVFP4 weights are multiplied with NVFP4 activations, not with {node.attrs['activations']}"
    dim, inner, experts, _ = _sizes(node)
    scale = "float8_e4m3fn" if _format(node) == "nvfp4" else "uint8"
    factors = ["float32"] if node.op == "experts_nvfp4" else []
    weight = ["uint8", scale, *factors]
    dtypes = [value.dtype for value in node.inputs if value is not None]
    if dtypes != ["bfloat16", "int32", "float32", *weight * 3, *factors * 2, "bfloat16"]:
        return f"inputs of {', '.join(dtypes)}, written for bfloat16 rows and weights of {' and '.join(weight)}"
    if dim % 128 or inner % 128:
        return f"{dim} x {inner} channels are no multiples of 128"
    for data in _weights(node):
        value, scales = node.inputs[data], node.inputs[data + 1]
        assert value is not None and scales is not None
        if 2 * int(value.shape[2]) != _group(node) * int(scales.shape[2]):
            return f"input {data + 1} has no scale for each {_group(node)} channels"
    if experts > 1024:
        return f"{experts} experts, the sort counts up to 1024"
    return None


def _space(node: OpNode, symbols: Mapping[str, int], *, sms: int) -> tuple[Config, ...]:
    """Columns around the tokens that a hit expert gets. 128 columns would spill registers where hidden is quantised."""
    _, _, experts, topk = _sizes(node)
    mean = symbols["T"] * topk / max(1.0, hit(experts, topk, symbols["T"]))
    few = {"columns": 16, "warps": 4, "stages": 3, "share": 1}
    some = {"columns": 32, "warps": 4, "stages": 3, "share": 1}
    many = {"columns": 64, "warps": 8, "stages": 3, "share": 1}
    if _format(node) == "bf16":  # widened weights take four times the shared memory
        few, some, many = ({**config, "stages": 2} for config in (few, some, many))
    return (few, some) if mean <= 12 else (some, many, few) if mean <= 40 else (many, some)


def _workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    """place, pair, row weights, tiles, count; the tokens' data and scales, hidden's, and the pairs' results."""
    dim, inner, _, topk = _sizes(node)
    if _format(node) == "bf16":
        pairs = Value(("T", topk), "int32")
        return (
            pairs, pairs, Value(("T", topk), "float32"), Value(("T", topk, 4), "int32"), Value((16,), "int32"),
            Value(("T", topk, inner), "bfloat16"), Value(("T", topk, dim), "bfloat16"),
        )  # fmt: skip
    each, group = (1, "float8_e4m3fn") if _format(node) == "mxfp8" else (2, "uint8"), _group(node)
    scale = "float8_e4m3fn" if _format(node) == "nvfp4" else "uint8"
    pairs = Value(("T", topk), "int32")
    return (
        pairs, pairs, Value(("T", topk), "float32"), Value(("T", topk, 4), "int32"), Value((16,), "int32"),
        Value(("T", dim // each[0]), each[1]), Value(("T", dim // group), scale),
        Value(("T", topk, inner // each[0]), each[1]), Value(("T", topk, inner // group), scale),
        Value(("T", topk, dim), "bfloat16"),
    )  # fmt: skip


def _build(node: OpNode, config: Config, *, sms: int) -> Build:
    dim, inner, experts, topk = _sizes(node)
    inputs, fmt, columns, warps = len(node.inputs), _format(node), int(config["columns"]), int(config["warps"])
    place, pair, row_weight, tiles, meta = range(inputs, inputs + 5)
    if fmt == "bf16":  # tokens as they are; nothing is read through what stands for scales
        data, scale, (hidden, rows, out), hidden_scale = 0, 0, range(inputs + 5, inputs + 8), 0
    else:
        data, scale, hidden, hidden_scale, rows, out = range(inputs + 5, inputs + 11)
    pairs = f"a1_0 * {topk}"
    # factors of activations: of all tokens, and for each expert of hidden; MX formats have none, nothing is read
    x_global, hidden_global = (ptr(12), ptr(13)) if node.op == "experts_nvfp4" else (ptr(2), ptr(2))
    quantise = TritonLaunch(
        f"{_KERNELS}:quantise_mx",
        {"x": ptr(0), "data": ptr(data), "scale": ptr(scale), "rows": i32("a0_0"), "factor": x_global},
        {"D": dim, "FORMAT": fmt, "BD": 128, "N": 8},
        ("cdiv(a0_0, 8)", dim // 128, 1),
        pdl=True,
    )
    sort = TritonLaunch(
        _SORT,
        {
            "chosen": ptr(1), "weight": ptr(2), "place": ptr(place), "pair": ptr(pair), "row_weight": ptr(row_weight),
            "tiles": ptr(tiles), "meta": ptr(meta), "pairs": i32(pairs),
        },
        {"EP": 1 << (experts - 1).bit_length(), "TILE": columns, "BLOCK": 1024, "MOST_TILES": 16},
        (f"min({experts}, a1_0 * {experts})", 1, 1),
        num_warps=8, pdl=True,
    )  # fmt: skip
    w1, w3, w2 = _weights(node)
    grid = (f"min({sms * int(config['share'])}, a1_0 * {sms})", 1, 1)
    work: dict[str, LaunchArg] = {"tiles": ptr(tiles), "meta": ptr(meta)}
    sizes = {"FORMAT": fmt, "D": dim, "I": inner, "M": _ROWS, "N": columns}
    up = TritonLaunch(
        f"{_KERNELS}:grouped_up",
        {
            "data": ptr(data), "scale": ptr(scale), **_weight(node, "1", w1), **_weight(node, "3", w3), **work,
            "pair": ptr(pair), "row_weight": ptr(row_weight), "out": ptr(hidden), "out_scale": ptr(hidden_scale),
            "x_global": x_global, "out_global": hidden_global,
        },
        {**sizes, "K": topk, "LIMIT": float(node.attrs["limit"]), "BK": _step(dim, fmt)},
        grid, num_warps=warps, num_stages=int(config["stages"]), pdl=True,
    )  # fmt: skip
    down = TritonLaunch(
        f"{_KERNELS}:grouped_down",
        {
            "data": ptr(hidden), "scale": ptr(hidden_scale), **_weight(node, "2", w2), **work, "out": ptr(rows),
            "x_global": hidden_global,
        },
        {**sizes, "BK": _step(inner, fmt)},
        grid, num_warps=warps, num_stages=int(config["stages"]), pdl=True,
    )  # fmt: skip
    width = min(_WIDE, 1 << (dim - 1).bit_length())
    combine = TritonLaunch(
        f"{_KERNELS}:combine_pairs",
        {"y": ptr(rows), "place": ptr(place), "shared": ptr(inputs - 1), "out": ptr(out)},
        {"K": topk, "D": dim, "BD": width},
        ("a1_0", math.ceil(dim / width), 1),
        pdl=True,
    )
    before = (sort,) if fmt == "bf16" else (quantise, sort)
    return Build("gpu", launches=(*before, up, down, combine))


def _weight(node: OpNode, name: str, data: int) -> dict[str, LaunchArg]:
    """A weight's arguments: tiles of its rows, all experts' one below the other, its scales and its factors."""
    value = node.inputs[data]
    assert value is not None
    experts, rows, width = (int(size) for size in value.shape)
    tile = Desc(data, (experts * rows, width), (width, 1), (_ROWS, _step(2 * width, _format(node)) // 2))
    whole = ptr(data + 2) if node.op == "experts_nvfp4" else ptr(2)  # MX formats have no factors, nothing is read
    return {f"w{name}": tile, f"s{name}": ptr(data + 1), f"w{name}_global": whole}


def _step(channels: int, fmt: str) -> int:
    """Channels of a step: 128 bytes of weights in a row, the widest tile of a tensor map; half of it if widened."""
    return 256 if channels % 256 == 0 and fmt != "bf16" else 128


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    dim, inner, experts, topk = _sizes(node)
    tokens, columns = symbols["T"], int(config["columns"])
    pairs, some = tokens * topk, hit(experts, topk, tokens)
    weights = some * 3 * dim * inner * (0.5 + 1 / _group(node))
    fmt = _format(node)
    byte = 2 if fmt == "bf16" else (1 if fmt == "mxfp8" else 0.5) + 1 / _group(node)
    moved = weights + pairs * (dim * byte + 2 * inner * byte + 2 * 2 * dim) + tokens * (4 + 2 * byte) * dim
    tiles = some * math.ceil(pairs / max(some, 1) / columns)
    # operations of whole tiles; a tile of fewer columns than 128 leaves the matrix unit waiting for weights
    flops = 6.0 * dim * inner * tiles * columns
    unit = {"bf16": "bf16", "mxfp8": "fp8"}.get(fmt, "fp4")
    return Work(moved / 0.85, flops, "gpu", 0.8 * min(1.0, columns / 128), unit, launches=5)  # type: ignore[arg-type]


# A value of hidden that falls to its neighbour in the narrow format moves a result by a step of it times one weight;
# of 128 channels and more the sum moves by little: seen 0.02 in a thousand cases of the interpreter
_TOLERANCE = 5e-2


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for one Blackwell architecture."""
    sms = MACHINES[arch].multiprocessors
    return tuple(
        Schedule(
            f"{op}.triton_scaled", op, frozenset({arch}), partial(_build, sms=sms), _cost, _accepts,
            workspace=_workspace, space=partial(_space, sms=sms), tolerance=_TOLERANCE,
        )
        for op in ("experts_fp4", "experts_mx", "experts_nvfp4")
    )  # fmt: skip
