"""Routed experts on Blackwell: quantise the tokens, sort the pairs, two grouped GEMMs on block-scaled operands, sum.

A token of flash costs 302 MFLOP, an expert 13.4 MB of weights. At the cost model's rates of a GB300 the weights' bytes
are the limit up to 5,600 tokens a step in FP8 and 16,000 in FP4, if tiles are full: they follow the tokens that an
expert gets, 16 columns while these are few, 64 beyond.

    sort_gather (or sort_slots -> gather_rows) -> grouped_up (w1, w3, SwiGLU, weight, quantise) -> grouped_down (w2)
        -> combine_pairs
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from dsv4c.schedules._gpu import SHARED_LIMIT
from dsv4c.schedules._launch import Desc, Grid, LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Transforms, Value, Work
from dsv4c.schedules.hopper.experts import hit

_KERNELS, _ROWS_OF = "dsv4c.schedules.triton.experts_scaled", "dsv4c.schedules.triton.mx_rows"
_ROWS = 128  # of a weight tile: what the matrix unit takes, and the lanes of tensor memory
_WIDE = 1024  # channels that one program of the sum, or of the sort, takes at most
_FINISHING = {1: 16 << 10, 2: 4 << 10}  # bytes of shared memory that results pass through, by blocks that share it
_AT_ONCE = 512  # pairs that one launch sorts and gathers; each of its programs counts them all


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


def _layouts(node: OpNode) -> dict[int, Transforms]:
    """Weights' scales as tensor memory takes them: 128 rows by 4 groups in 512 bytes, [32][4][4]."""
    out: dict[int, Transforms] = {}
    for data in _weights(node):
        scale = node.inputs[data + 1]
        assert scale is not None
        experts, rows, groups = (int(size) for size in scale.shape)
        split, order = [experts * rows // 128, 4, 32, groups // 4, 4], [0, 3, 2, 1, 4]
        out[data + 1] = (
            ("reshape", split), ("permute", order), ("reshape", [experts, rows // 128, groups // 4, 512]),
        )  # fmt: skip
    return out


def _space(node: OpNode, symbols: Mapping[str, int], *, sms: int) -> tuple[Config, ...]:
    """Columns around the tokens that a hit expert gets. Two blocks of up to 32 columns share a multiprocessor."""
    _, _, experts, topk = _sizes(node)
    tokens = symbols["T"]
    mean = tokens * topk / max(1.0, hit(experts, topk, tokens))
    few, some, many, most = (_config(node, columns, tokens) for columns in (16, 32, 64, 128))
    return (few, some) if mean <= 12 else (some, many, few) if mean <= 40 else (many, most, some)


def _config(node: OpNode, columns: int, tokens: int) -> Config:
    """`tiles` bounds the tiles of so many tokens, `sort`: pairs that one launch sorts and gathers, 0 for a launch each;
    `up` and `down`: which roles warps have (schedules/triton/experts_scaled.py)."""
    _, _, experts, topk = _sizes(node)
    pairs = tokens * topk
    fmt, share = _format(node), 2 if columns <= 32 else 1
    dim, inner, _, _ = _sizes(node)
    wide = fmt == "bf16"  # weights are widened by all warps
    return {
        "columns": columns, "warps": 8 if columns == 128 else 4, "share": share,
        "stages": _stages(fmt, columns, _step(dim, fmt), 2, share),
        "down_stages": _stages(fmt, columns, _step(inner, fmt), 1, share),
        "sort": _power(max(64, pairs)) if pairs <= _AT_ONCE else 0,
        "tiles": max(1, min(experts, pairs) + pairs // columns),
        # of a few steps nothing is left to overlap; 128 columns leave no registers to roles
        "up": "none" if columns == 128 or wide or dim < 4 * _step(dim, fmt) else "loop",
        "down": "none" if wide else "tiles",
    }  # fmt: skip


def _stages(fmt: str, columns: int, step: int, weights: int, share: int) -> int:
    """Steps in flight: as many as fit in the share of shared memory that a block has, beside what it finishes with."""
    if fmt == "bf16":
        return 2
    group = 16 if fmt == "nvfp4" else 32
    # FP4 beside FP8 takes a byte a value
    each = weights * _ROWS * (step if fmt == "mxfp8" else step // 2) + columns * (step if fmt == "mxfp8" else step // 2)
    each += (weights * _ROWS + 2 * columns) * step // group
    room = (SHARED_LIMIT + 1024) // share - 1024 - _FINISHING[share]  # each block keeps 1 KB to itself
    return max(2, min(6, room // each))


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()


WORKSPACE = (
    "place",
    "pair",
    "slots",
    "slot_weight",
    "tiles",
    "meta",
    "data",
    "hidden",
    "rows",
    "scale",
    "hidden_scale",
)
"""Names of the temporaries; the last two are absent where activations stay bfloat16."""


def _workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    """What the names say: the sort's results, the rows of pairs and of hidden, the pairs' results, and scales."""
    dim, inner, _, topk = _sizes(node)
    fmt, group, columns, tiles = _format(node), _group(node), int(config["columns"]), int(config["tiles"])
    each, element = {"bf16": (1, "bfloat16"), "mxfp8": (1, "float8_e4m3fn")}.get(fmt, (2, "uint8"))
    pairs = Value(("T", topk), "int32")
    out = (
        pairs, pairs, pairs, Value((tiles, columns), "float32"), Value(("T", topk, 4), "int32"), Value((16,), "int32"),
        Value(("T", topk, dim // each), element), Value(("T", topk, inner // each), element),
        Value(("T", topk, dim), "bfloat16"),
    )  # fmt: skip
    if fmt == "bf16":
        return out
    scale = "float8_e4m3fn" if fmt == "nvfp4" else "uint8"
    return (*out, *(Value((tiles, columns * channels // group), scale) for channels in (dim, inner)))


def _build(node: OpNode, config: Config, *, sms: int, native: bool) -> Build:
    """`native`: with Blackwell's own instructions and roles; else what Hopper and the interpreter run."""
    dim, inner, _, topk = _sizes(node)
    fmt, columns, stages = _format(node), int(config["columns"]), int(config["stages"])
    inputs = len(node.inputs)
    at = {name: inputs + i for i, name in enumerate(WORKSPACE)}
    quantised = fmt != "bf16"
    out = inputs + len(WORKSPACE) - (0 if quantised else 2)
    share = int(config["share"])
    grid = (f"min({sms * share}, a1_0 * {sms * share})", 1, 1)
    work: dict[str, LaunchArg] = {"tiles": ptr(at["tiles"]), "meta": ptr(at["meta"])}
    up_step, down_step = _step(dim, fmt), _step(inner, fmt)
    # factors of activations: of all tokens, and for each expert of hidden; MX formats have none
    x_global, hidden_global = (ptr(12), ptr(13)) if node.op == "experts_nvfp4" else (None, None)
    sizes = {"FORMAT": fmt, "D": dim, "I": inner, "M": _ROWS, "N": columns}
    scale = _row_scales(node, config, at["scale"], up_step, "x_scale", "x_scale_again")
    up_constants = {
        **sizes, "NATIVE": native, "LIMIT": float(node.attrs["limit"]), "PIECE": min(columns, 32), "BK": up_step,
        "S": down_step, "STAGES": stages, "ROLES": config["up"] if native else "none",
    }  # fmt: skip
    arguments = {
        **scale, **_weight(node, "1"), **_weight(node, "3"), **work,
        "x": _rows(node, at["data"], columns, up_step), "slot_weight": ptr(at["slot_weight"]),
        "out": ptr(at["hidden"]), "out_scale": ptr(at["hidden_scale"]) if quantised else None,
        "x_global": x_global, "out_global": hidden_global,
    }  # fmt: skip
    up = _launch(
        f"{_KERNELS}:grouped_up", arguments, up_constants, grid, num_stages=stages,
        **_options(config, up_constants["ROLES"]),
    )  # fmt: skip
    arguments = {
        **_row_scales(node, config, at["hidden_scale"], down_step, "x_scale"), **_weight(node, "2"), **work,
        "x": _rows(node, at["hidden"], columns, down_step), "out": ptr(at["rows"]), "x_global": hidden_global,
    }  # fmt: skip
    stages = int(config["down_stages"])
    down_constants = {**sizes, "BK": down_step, "STAGES": stages, "ROLES": config["down"] if native else "none"}
    down = _launch(
        f"{_KERNELS}:grouped_down", arguments, down_constants, grid, num_stages=stages,
        **_options(config, down_constants["ROLES"]),
    )  # fmt: skip
    width = min(_WIDE, _power(dim))
    combine = TritonLaunch(
        f"{_KERNELS}:combine_pairs",
        {"y": ptr(at["rows"]), "place": ptr(at["place"]), "shared": ptr(inputs - 1), "out": ptr(out)},
        {"K": topk, "D": dim, "BD": width},
        ("a1_0", math.ceil(dim / width), 1),
        pdl=True,
    )
    return Build("gpu", launches=(*_sort(node, config, at, x_global, native), up, down, combine))


def _options(config: Config, roles: Any) -> dict[str, Any]:
    """Warps, and the registers of a thread that let two blocks of 12 warps share a multiprocessor."""
    two = roles != "none" and config["share"] == 2
    return {"num_warps": int(config["warps"]), "maxnreg": 80 if two else None, "pdl": True}


def _sort(
    node: OpNode, config: Config, at: Mapping[str, int], factor: LaunchArg | None, native: bool
) -> tuple[TritonLaunch, ...]:
    """Tokens' rows quantised, in the order of the experts: in one launch for few pairs, else in two."""
    dim, _, experts, topk = _sizes(node)
    fmt, columns, pairs = _format(node), int(config["columns"]), f"a1_0 * {topk}"
    wide = min(_WIDE, dim & -dim)
    rows: dict[str, LaunchArg | None] = {
        "x": ptr(0), "data": ptr(at["data"]), "scale": ptr(at["scale"]) if fmt != "bf16" else None,
        "factor": factor,
    }  # fmt: skip
    rounding = {
        "K": topk, "D": dim, "FORMAT": fmt, "NATIVE": native, "R": 4, "BD": wide, "N": columns, "S": _step(dim, fmt),
    }  # fmt: skip
    sort: dict[str, LaunchArg | None] = {
        "chosen": ptr(1), "weight": ptr(2), "pairs": i32(pairs),
        **{name: ptr(at[name]) for name in ("place", "pair", "slots", "slot_weight", "tiles", "meta")},
    }  # fmt: skip
    counting = {"EP": _power(experts), "BLOCK": int(config["sort"]) or 1024, "MOST_TILES": 16, "N": columns}
    if config["sort"]:
        grid = (f"min({experts}, {pairs})", dim // wide, 1)
        return (_launch(f"{_ROWS_OF}:sort_gather", {**sort, **rows}, {**counting, **rounding}, grid, pdl=True),)
    gather = {**rows, "pair": ptr(at["pair"]), "slots": ptr(at["slots"]), "rows": i32(pairs)}
    return (
        _launch(
            f"{_ROWS_OF}:sort_slots", sort, counting, (f"min({experts}, a1_0 * {experts})", 1, 1),
            num_warps=8, pdl=True,
        ),
        _launch(f"{_ROWS_OF}:gather_rows", gather, rounding, (f"cdiv({pairs}, 4)", dim // wide, 1), pdl=True),
    )  # fmt: skip


def _launch(
    kernel: str, args: Mapping[str, LaunchArg | None], constants: Mapping[str, Any], grid: Grid, **options: Any
) -> TritonLaunch:
    """A launch; arguments that are None are constants: the kernel is compiled without them."""
    absent = {name: None for name, arg in args.items() if arg is None}
    given = {name: arg for name, arg in args.items() if arg is not None}
    return TritonLaunch(kernel, given, {**constants, **absent}, grid, **options)


def _rows(node: OpNode, arg: int, columns: int, step: int) -> Desc:
    """Tiles of rows in the order of the pairs; `a1_0` is T."""
    _, _, _, topk = _sizes(node)
    each = 1 if _format(node) in ("bf16", "mxfp8") else 2
    width = f"a{arg}_2"
    return Desc(arg, (f"a1_0 * {topk}", width), (width, 1), (columns, step // each))


def _row_scales(node: OpNode, config: Config, arg: int, step: int, *names: str) -> dict[str, LaunchArg | None]:
    """The scales of a tile's rows, a step of its channels at a time."""
    if _format(node) == "bf16":
        return dict.fromkeys(names)
    columns, whole = int(config["columns"]), f"a{arg}_1"
    piece = columns * step // _group(node)
    if columns == 128:
        tile = Desc(
            arg, (f"a{arg}_0", f"{whole} // 512", 2, 256), (whole, 512, 256, 1), (1, piece // 512, 2, 256)
        )  # fmt: skip
    else:
        wide = min(64, piece)
        tile = Desc(
            arg, (f"a{arg}_0", f"{whole} // {piece}", piece // wide, wide), (whole, piece, wide, 1),
            (1, 1, piece // wide, wide),
        )  # fmt: skip
    return dict.fromkeys(names, tile)


def _weight(node: OpNode, name: str) -> dict[str, LaunchArg | None]:
    """A weight's arguments: tiles of its rows, all experts' one below the other, its scales and its factors."""
    data = _weights(node)["132".index(name)]
    value = node.inputs[data]
    assert value is not None
    experts, rows, width = (int(size) for size in value.shape)
    step, blocks = _step(2 * width, _format(node)), 2 * width // _group(node) // 4
    tile = Desc(data, (experts * rows, width), (width, 1), (_ROWS, step // 2))
    scale = Desc(
        data + 1, (experts * rows // 128, blocks, 2, 256), (blocks * 512, 512, 256, 1),
        (1, step // _group(node) // 4, 2, 256),
    )  # fmt: skip
    whole = ptr(data + 2) if node.op == "experts_nvfp4" else None
    return {f"w{name}": tile, f"s{name}": scale, f"w{name}_global": whole}


def _step(channels: int, fmt: str) -> int:
    """Channels of a step: 128 bytes of a weight's row in shared memory, the widest tile of a tensor map."""
    return 256 if channels % 256 == 0 and fmt in ("mxfp4", "nvfp4") else 128


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    dim, inner, experts, topk = _sizes(node)
    tokens, columns = symbols["T"], int(config["columns"])
    pairs, some = tokens * topk, hit(experts, topk, tokens)
    weights = some * 3 * dim * inner * (0.5 + 1 / _group(node))
    fmt = _format(node)
    byte = 2 if fmt == "bf16" else (1 if fmt == "mxfp8" else 0.5) + 1 / _group(node)
    moved = weights + pairs * (2 * dim * byte + 2 * inner * byte + 2 * 2 * dim) + tokens * 6 * dim
    tiles = some * math.ceil(pairs / max(some, 1) / columns)
    # operations of whole tiles; a tile of fewer columns than 128 leaves the matrix unit waiting for weights
    flops = 6.0 * dim * inner * tiles * columns
    unit = {"bf16": "bf16", "mxfp8": "fp8"}.get(fmt, "fp4")
    launches = 4 if config["sort"] else 5
    return Work(moved / 0.85, flops, "gpu", 0.8 * min(1.0, columns / 128), unit, launches=launches)  # type: ignore[arg-type]


# A value of hidden that falls to its neighbour in the narrow format moves a result by a step of it times one weight;
# of 128 channels and more the sum moves by little: seen 0.02 in a thousand cases of the interpreter
_TOLERANCE = 5e-2


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for one Blackwell architecture, or for `sm_90a`: the same kernels, their products emulated, to check
    numbers on a card."""
    sms = MACHINES[arch].multiprocessors
    return tuple(
        Schedule(
            f"{op}.triton_scaled", op, frozenset({arch}), partial(_build, sms=sms, native=arch != "sm_90a"), _cost,
            _accepts, layouts=_layouts, workspace=_workspace, space=partial(_space, sms=sms), tolerance=_TOLERANCE,
        )
        for op in ("experts_fp4", "experts_mx", "experts_nvfp4")
    )  # fmt: skip
