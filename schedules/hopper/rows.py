"""Row ops on Hopper: norms, rotation, activation, quantisation, packing, gathers. One pass, all bound by memory.

A config says how many rows (groups, heads, entries) a program takes and with how many warps. A single warp reduces a
row without shared memory; more warps spread few rows over more threads. Measured best on an H200: one warp and a few
kilobytes a program for prefill, one row a program for decode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from dsv4c.ops.formats import kv_group
from dsv4c.schedules._launch import LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Transforms, Value, Work, dense_rows

_MODULE = "dsv4c.schedules.triton.rows"
_GROUP = 128  # channels that share a scale of a quantised activation


def _input(node: OpNode, index: int) -> Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _pow2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _is_pow2(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _row(value: Value) -> int:
    """Elements of a row."""
    return math.prod(int(s) for s in value.shape[1:])


def _stride(value: Value) -> int:
    """Elements from row to row."""
    return value.strides[0] if value.strides else _row(value)


def _bytes(node: OpNode, symbols: Mapping[str, int]) -> float:
    """Every tensor once, of a pool only what is written."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.role != "pool"]
    return float(sum(v.bytes(symbols) for v in values))


def cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    """Bytes at the copy bandwidth."""
    return Work(_bytes(node, symbols), 0.0, "gpu")


def _typed(node: OpNode, dtypes: Mapping[int, str]) -> str | None:
    """Why these inputs do not fit: their types, or rows that are not dense or not aligned."""
    for index, dtype in dtypes.items():
        value = _input(node, index)
        if value.dtype != dtype:
            return f"input {index} is {value.dtype}, written for {dtype}"
        if not dense_rows(value):
            return f"input {index} is strided within its rows"
        if value.strides is not None and value.dtype == "bfloat16" and value.strides[0] % 8:
            return f"rows of input {index} do not start at multiples of 16 bytes"
    return None


def _group_reason(node: OpNode, row: int) -> str | None:
    group = int(node.attrs["group"])
    if group != _GROUP or row % group:
        return f"groups of {group} in rows of {row}, written for whole groups of {_GROUP}"
    return None


# quantise_rows, swiglu


def _groups_accepts(node: OpNode) -> str | None:
    x = _input(node, 0)
    row = int(x.shape[-1]) // (2 if node.op.startswith("swiglu") else 1)
    if len(x.shape) != 2:
        return "rows of more than one dimension"
    if "group" in node.attrs:
        return _typed(node, {0: "bfloat16"}) or _group_reason(node, row)
    if row % _GROUP or node.outputs[0].dtype != "bfloat16":
        return f"rows of {row} channels, written for multiples of {_GROUP} in bfloat16"
    return _typed(node, {0: "bfloat16"})


def _groups_space(node: OpNode, symbols: Mapping[str, int], sms: int) -> tuple[Config, ...]:
    """2 KB to 8 KB a program, less where that would leave multiprocessors without one."""
    groups = symbols["T"] * int(_input(node, 0).shape[-1]) // _GROUP
    wide = [(8, 2), (16, 4), (8, 1), (4, 1)]
    fits = [c for c in wide if groups >= 4 * sms * c[0]] or [(4, 1), (8, 2), (2, 1), (16, 4)]
    return tuple({"groups": n, "warps": w} for n, w in fits)


def _quantise_build(node: OpNode, config: Config) -> Build:
    x = _input(node, 0)
    dim, n = int(x.shape[1]), int(config["groups"])
    launch = TritonLaunch(
        f"{_MODULE}:quantise_rows",
        args={"x": ptr(0), "data": ptr(1), "scale": ptr(2), "tokens": i32("a0_0")},
        constants={"D": dim, "STRIDE": _stride(x), "GROUP": _GROUP, "N": n},
        grid=(f"cdiv(a0_0 * {dim // _GROUP}, {n})", 1, 1),
        num_warps=config["warps"],
        pdl=True,
    )
    return Build("gpu", launches=(launch,))


def _swiglu_build(node: OpNode, config: Config) -> Build:
    x = _input(node, 0)
    inner, n, quantise = int(x.shape[1]) // 2, int(config["groups"]), node.op == "swiglu_quantise"
    launch = TritonLaunch(
        f"{_MODULE}:swiglu",
        args={
            "gate_up": ptr(0), "out": ptr(1), "scale": ptr(2) if quantise else ptr(1, "float32"),
            "tokens": i32("a0_0"),
        },
        constants={
            "INNER": inner, "STRIDE": _stride(x), "GROUP": _GROUP, "N": n, "LIMIT": float(node.attrs["limit"]),
            "QUANTISE": quantise,
        },
        grid=(f"cdiv(a0_0 * {inner // _GROUP}, {n})", 1, 1),
        num_warps=config["warps"], pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _narrow(node: OpNode, *weights: int) -> dict[int, Transforms]:
    """Norm weights as bfloat16 where that is exact: a thread then loads them as it loads the rows."""
    return {i: (("narrow", "bfloat16"),) for i in weights if _input(node, i).exact == "bfloat16"}


# rms_norm


def _norm_accepts(node: OpNode) -> str | None:
    x = _input(node, 0)
    row = int(x.shape[-1])
    if len(x.shape) != 2:
        return "rows of more than one dimension"
    if row % 8 or not 64 <= row <= 16384:  # a row fits the registers of 16 warps
        return f"rows of {row} channels"
    return _typed(node, {0: "bfloat16"}) or (_group_reason(node, row) if "group" in node.attrs else None)


def _norm_layouts(node: OpNode) -> dict[int, Transforms]:
    return _narrow(node, 1)


def _norm_space(node: OpNode, symbols: Mapping[str, int], sms: int) -> tuple[Config, ...]:
    width = _pow2(int(_input(node, 0).shape[1]))
    if width > 2048:
        shapes = [(1, 8), (1, 4), (1, 16), (2, 8)]
    elif symbols["T"] <= 4 * sms:
        shapes = [(1, 4), (1, 2), (1, 1), (2, 4)]
    else:
        shapes = [(1, 1), (2, 2), (1, 4), (4, 4)]
    return tuple({"rows": n, "warps": w} for n, w in shapes)


def _norm_build(node: OpNode, config: Config) -> Build:
    x = _input(node, 0)
    dim, n, group = int(x.shape[1]), int(config["rows"]), int(node.attrs.get("group", 0))
    launch = TritonLaunch(
        f"{_MODULE}:rms_norm",
        args={
            "x": ptr(0), "weight": ptr(1), "out": ptr(2), "scale": ptr(3) if group else ptr(2, "float32"),
            "tokens": i32("a0_0"),
        },
        constants={
            "D": dim, "STRIDE": _stride(x), "W": _pow2(dim), "N": n, "EPS": float(node.attrs["eps"]), "GROUP": group,
        },
        grid=(f"cdiv(a0_0, {n})", 1, 1),
        num_warps=config["warps"], pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


# head_norm_rope, rope_quantise


def _heads(node: OpNode) -> tuple[int, int]:
    """Heads and channels of one."""
    x = _input(node, 0)
    heads = int(node.attrs.get("num_heads", x.shape[1]))
    return heads, _row(x) // heads


def _run(node: OpNode) -> int:
    """Channels that a program's row holds: a head, or the heads that share a scale."""
    channels = _heads(node)[1]
    return max(channels, _GROUP) if node.op == "rope_quantise" else channels


def _heads_accepts(node: OpNode) -> str | None:
    heads, channels = _heads(node)
    table = _input(node, 1)
    if not _is_pow2(channels) or not 32 <= channels <= 1024:
        return f"heads of {channels} channels, written for powers of two"
    if node.op == "rope_quantise":
        inner = heads * channels // int(node.attrs["groups"])
        if node.outputs[0].shape[-1] != inner or (reason := _group_reason(node, inner)):
            return reason if node.outputs[0].shape[-1] == inner else "outputs of another shape than the groups give"
    if int(table.shape[1]) > channels or table.strides is not None:
        return "a table wider than a head, or strided"
    return _typed(node, {0: "bfloat16", 1: "float32"})


def _heads_space(node: OpNode, symbols: Mapping[str, int], sms: int) -> tuple[Config, ...]:
    heads, channels = _heads(node)
    runs = heads * channels // _run(node)
    few = symbols["T"] * runs < 16 * sms
    shapes = [(1, 1), (2, 1), (4, 4), (4, 1)] if few else [(2, 1), (4, 1), (8, 4), (8, 2)]
    fits = [(n, w) for n, w in shapes if runs % n == 0] or [(1, 1)]
    return tuple({"heads": n, "warps": w} for n, w in fits)


def _heads_build(node: OpNode, config: Config) -> Build:
    heads, channels = _heads(node)
    x, rotated, n, run = _input(node, 0), int(_input(node, 1).shape[1]), int(config["heads"]), _run(node)
    shape = {"H": heads, "C": channels, "R": rotated, "STRIDE": _stride(x), "N": n}
    if node.op == "rope_quantise":
        kernel = "rope_quantise"
        args = {"o": ptr(0), "table": ptr(1), "data": ptr(2), "scale": ptr(3)}
        shape.update(GROUP=_GROUP, W=run)
    else:
        kernel = "head_norm_rope"
        args = {"q": ptr(0), "table": ptr(1), "out": ptr(2)}
        shape.update(EPS=node.attrs["eps"])
    launch = TritonLaunch(
        f"{_MODULE}:{kernel}", args=args, constants=shape,
        grid=(f"a0_0 * {heads * channels // run // n}", 1, 1), num_warps=config["warps"], pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


# norm_rope_pack, qkv_norm_rope_pack


def _pack_accepts(node: OpNode) -> str | None:
    fused = node.op.startswith("qkv")
    kv_weight, table = _input(node, 4 if fused else 3), _input(node, 5 if fused else 4)
    channels, rotated = int(kv_weight.shape[0]), int(table.shape[1])
    group = kv_group(channels, rotated)
    if not _is_pow2(channels) or not _is_pow2(group) or (channels - rotated) % 8 or channels // group > 8:
        return f"entries of {channels} channels, {rotated} of them rotated"
    if fused:
        latent = int(_input(node, 3).shape[0])
        if latent + channels != int(_input(node, 2).shape[1]):
            return "other columns than the latent's and the entry's"
        if reason := _group_reason(node, latent):
            return reason
    return _typed(node, {0: "uint8", 1: "int64", 2: "bfloat16", 5 if fused else 4: "float32"})


def _pack_layouts(node: OpNode) -> dict[int, Transforms]:
    return _narrow(node, 3, 4) if node.op.startswith("qkv") else _narrow(node, 3)


def _pack_space(node: OpNode, symbols: Mapping[str, int], sms: int) -> tuple[Config, ...]:
    few = symbols["T"] <= 4 * sms
    if not node.op.startswith("qkv"):
        shapes = [(1, 2), (1, 1), (1, 4)] if few else [(2, 1), (2, 2), (1, 1), (4, 4)]
        return tuple({"entries": n, "warps": w} for n, w in shapes)
    joint = [(1, 1, 4), (1, 1, 2), (1, 1, 1)] if few else [(1, 2, 1), (1, 1, 1), (2, 4, 2), (1, 2, 2)]
    return tuple({"rows": q, "entries": n, "warps": w} for q, n, w in joint)


def _pack_build(node: OpNode, config: Config) -> Build:
    fused = node.op.startswith("qkv")
    x, kv_weight, table = _input(node, 2), _input(node, 4 if fused else 3), _input(node, 5 if fused else 4)
    channels, rotated, n = int(kv_weight.shape[0]), int(table.shape[1]), int(config["entries"])
    args: dict[str, LaunchArg] = {"pool": ptr(0), "slots": ptr(1), "x": ptr(2), "tokens": i32("a1_0")}
    constants = {
        "C": channels, "R": rotated, "STRIDE": _stride(x), "GROUP": kv_group(channels, rotated),
        "ENTRIES": node.attrs["entries_per_page"], "EPS": float(node.attrs["eps"]),
    }  # fmt: skip
    if not fused:
        args.update(weight=ptr(3), table=ptr(4))
        constants.update(N=n)
        grid = f"cdiv(a1_0, {n})"
    else:
        latent, rows = int(_input(node, 3).shape[0]), int(config["rows"])
        args.update(q_weight=ptr(3), kv_weight=ptr(4), table=ptr(5), data=ptr(6), scale=ptr(7))
        constants.update(Q=latent, QGROUP=_GROUP, W=_pow2(latent), NQ=rows, NK=n)
        grid = f"cdiv(a1_0, {rows}) + cdiv(a1_0, {n})"
    launch = TritonLaunch(
        f"{_MODULE}:{node.op}", args=args, constants=constants, grid=(grid, 1, 1), num_warps=config["warps"], pdl=True
    )
    return Build("gpu", launches=(launch,))


# embed, embed_streams, take_rows


def _gather(node: OpNode) -> tuple[int, int]:
    """Which input is gathered, and which names the rows."""
    return (0, 1) if node.op == "take_rows" else (1, 0)


def _gather_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    """Rows are read once and written once; the rest of the source is never touched."""
    index = _input(node, _gather(node)[1])
    return Work(2.0 * node.outputs[0].bytes(symbols) + index.bytes(symbols), launch="gpu")


def _gather_accepts(node: OpNode) -> str | None:
    x = _input(node, _gather(node)[0])
    if x.strides is not None:
        return "a strided source"
    if node.outputs[0].dtype != x.dtype and x.exact != node.outputs[0].dtype:
        return f"{node.outputs[0].dtype} rows of a {x.dtype} source"
    if _row(x) * {"bfloat16": 2, "float32": 4}.get(node.outputs[0].dtype, 0) % 16:
        return f"rows of {_row(x)} {node.outputs[0].dtype}"
    return None


def _gather_layouts(node: OpNode) -> dict[int, Transforms]:
    source = _gather(node)[0]
    x = _input(node, source)
    return {source: (("narrow", node.outputs[0].dtype),)} if x.dtype != node.outputs[0].dtype else {}


def _gather_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    row = _pow2(_row(_input(node, _gather(node)[0])))
    shapes = [(2048, 4), (1024, 4), (4096, 4), (512, 2)]
    return tuple({"width": w, "warps": n} for w, n in shapes if w <= row) or ({"width": row, "warps": 1},)


def _gather_build(node: OpNode, config: Config) -> Build:
    source, index = _gather(node)
    row, width = _row(_input(node, source)), int(config["width"])
    launch = TritonLaunch(
        f"{_MODULE}:take_rows",
        args={"x": ptr(source), "index": ptr(index), "out": ptr(2)},
        constants={"D": row, "COPIES": int(node.attrs.get("hc_mult", 1)), "W": width},
        grid=(f"a{index}_0", math.ceil(row / width), 1),
        num_warps=config["warps"],
        pdl=True,
    )
    return Build("gpu", launches=(launch,))


# token_slots, entry_slots, rope_table, entry_rope_table: once a step, tiny


def _slots_build(node: OpNode, config: Config) -> Build:
    ends = node.op == "entry_slots"
    count = "a3_0" if ends else "a2_0"
    launch = TritonLaunch(
        f"{_MODULE}:slots",
        args={
            "pages": ptr(0), "request_rows": ptr(1), "positions": ptr(2), "ends": ptr(3 if ends else 2),
            "out": ptr(4 if ends else 3), "count": i32(count), "columns": i32("a0_1"),
        },
        constants={
            "RATIO": int(node.attrs.get("ratio", 1)), "ENTRIES": node.attrs["entries_per_page"], "FROM_ENDS": ends,
            "N": 128,
        },
        grid=(f"cdiv({count}, 128)", 1, 1),
        num_warps=4, pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _table_build(node: OpNode, config: Config) -> Build:
    ends = node.op == "entry_rope_table"
    count, half = "a1_0" if ends else "a0_0", int(_input(node, 2 if ends else 1).shape[0])
    n = max(1, 128 // _pow2(half))  # an angle a thread
    launch = TritonLaunch(
        f"{_MODULE}:rope_table",
        args={
            "positions": ptr(0), "ends": ptr(1 if ends else 0), "frequency": ptr(2 if ends else 1),
            "out": ptr(3 if ends else 2), "count": i32(count),
        },
        constants={"R": 2 * half, "RATIO": int(node.attrs.get("ratio", 1)), "FROM_ENDS": ends, "N": n},
        grid=(f"cdiv({count}, {n})", 1, 1),
        num_warps=4, pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _table_accepts(node: OpNode) -> str | None:
    half = int(_input(node, 2 if node.op == "entry_rope_table" else 1).shape[0])
    return None if _is_pow2(half) else f"{half} frequencies, written for powers of two"


# Values are those of the reference, rounding for rounding, but sums run in another order and exp and rsqrt differ in
# the last bit: now and then a bfloat16, and rarer a byte, falls to its neighbour. The workloads' error of quantised
# rows is the share of bytes that do; of bfloat16 rows, an ulp of the largest is up to 2**-7 of it.
_BYTES = 2e-3
_BF16 = 8e-3


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for a GPU architecture: plain Triton, with configs for its number of multiprocessors."""
    targets, sms = frozenset({arch}), MACHINES[arch].multiprocessors
    groups, norm, heads, pack = (
        partial(space, sms=sms) for space in (_groups_space, _norm_space, _heads_space, _pack_space)
    )
    return (
        Schedule(
            "quantise_rows.triton_groups", "quantise_rows", targets, _quantise_build, cost, _groups_accepts,
            space=groups, tolerance=0.0,
        ),
        Schedule(
            "swiglu_quantise.triton_groups", "swiglu_quantise", targets, _swiglu_build, cost, _groups_accepts,
            space=groups, tolerance=_BYTES,
        ),
        Schedule(
            "swiglu_pair.triton_groups", "swiglu_pair", targets, _swiglu_build, cost, _groups_accepts,
            space=groups, tolerance=_BF16,
        ),
        Schedule(
            "rms_norm.triton_rows", "rms_norm", targets, _norm_build, cost, _norm_accepts, _norm_layouts,
            space=norm, tolerance=_BF16,
        ),
        Schedule(
            "rms_norm_quantise.triton_rows", "rms_norm_quantise", targets, _norm_build, cost, _norm_accepts,
            _norm_layouts, space=norm, tolerance=_BYTES,
        ),
        Schedule(
            "head_norm_rope.triton_heads", "head_norm_rope", targets, _heads_build, cost, _heads_accepts,
            space=heads, tolerance=_BF16,
        ),
        Schedule(
            "rope_quantise.triton_heads", "rope_quantise", targets, _heads_build, cost, _heads_accepts,
            space=heads, tolerance=_BYTES,
        ),
        *(
            Schedule(
                f"{op}.triton_rows", op, targets, _pack_build, cost, _pack_accepts, _pack_layouts, space=pack,
                tolerance=_BYTES,
            )
            for op in ("norm_rope_pack", "qkv_norm_rope_pack")
        ),
        *(
            Schedule(
                f"{op}.triton_rows", op, targets, _gather_build, _gather_cost, _gather_accepts, _gather_layouts,
                space=_gather_space, tolerance=0.0,
            )
            for op in ("embed", "embed_streams", "take_rows")
        ),
        *(
            Schedule(f"{op}.triton_rows", op, targets, _slots_build, cost, tolerance=0.0)
            for op in ("token_slots", "entry_slots")
        ),
        *(  # cosines of float32 angles up to a million: the range reduction is exact, the rest an ulp or two
            Schedule(f"{op}.triton_rows", op, targets, _table_build, cost, _table_accepts, tolerance=5e-7)
            for op in ("rope_table", "entry_rope_table")
        ),
    )  # fmt: skip


SCHEDULES = schedules("sm_90a")
