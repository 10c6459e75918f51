"""Compressors on Hopper: one launch pools, norms, rotates, packs, writes, and keeps the rings. Bound by memory.

A step reads every projected row once: 8 KB a token for csa's entries in float32, 2 KB for its index keys, 4 KB for
hca's. With overlap a program holds the 8 rows of an entry in registers. Without it an entry has 128 rows, 512 KB, and
a chunk of 8,192 tokens only 64 entries, so a cluster shares an entry: each block takes some channels, and only the sum
of squares crosses blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

from dsv4c.ops.formats import kv_group
from dsv4c.schedules._launch import LaunchArg, TritonLaunch, i32, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work, dense_rows

_MODULE = "dsv4c.schedules.triton.compress"
_DECODE = 1024  # tokens up to which most are kept by a ring: programs of few tokens
_PACK = ("k_gate", "ape", "ring_k", "ring_z", "norm_weight", "table", "pool", "slots", "positions", "request_rows",
         "seq_starts", "seq_ends", "state_slots", "ends")  # fmt: skip
_ONLINE = ("k_gate", "ape", "state", *_PACK[4:])


def _names(node: OpNode) -> tuple[str, ...]:
    return _PACK if node.op == "compress_pack" else _ONLINE


def _input(node: OpNode, name: str) -> Value:
    value = node.inputs[_names(node).index(name)]
    assert value is not None
    return value


def _channels(node: OpNode) -> int:
    """Channels of an entry."""
    return int(_input(node, "norm_weight").shape[0])


def _accepts(node: OpNode) -> str | None:
    channels, rotated = _channels(node), int(_input(node, "table").shape[1])
    overlap = bool(node.attrs.get("overlap", False))
    k_gate = _input(node, "k_gate")
    if channels & (channels - 1) or not 32 <= channels <= 512:
        return f"entries of {channels} channels, written for powers of two up to 512"
    if rotated % 2 or rotated > channels:
        return f"{rotated} rotated of {channels} channels"
    if int(k_gate.shape[1]) != channels * (4 if overlap else 2):
        return f"projected rows of {k_gate.shape[1]} for entries of {channels} channels"
    if k_gate.dtype not in ("float32", "bfloat16") or not dense_rows(k_gate):
        return "projected rows that are neither float32 nor bfloat16, or strided"
    if k_gate.strides is not None and k_gate.strides[0] % 8:
        return "projected rows that do not start at multiples of 16 bytes"
    if any(_input(node, name).dtype != "float32" for name in _names(node)[1:6] if name != "pool"):
        return "rings, state, ape or norm weight that are not float32"
    if node.attrs.get("format", "kv") == "kv":
        group = kv_group(channels, rotated)
        if group & (group - 1) or channels // group > 8 or (channels - rotated) % 8:
            return f"groups of {group} channels"
    elif channels > 128:
        return f"index keys of {channels} channels"
    return None


def _overlap_accepts(node: OpNode) -> str | None:
    if not node.attrs["overlap"] or int(node.attrs["ratio"]) > 8:  # 16 rows of keys and scores fill the registers
        return "written for overlapping windows of up to 8 tokens"
    return _accepts(node)


def _window_accepts(node: OpNode) -> str | None:
    ratio = int(node.attrs["ratio"])
    if node.attrs.get("overlap") or ratio & (ratio - 1) or not 16 <= ratio <= 128:
        return "written for windows of 16 to 128 tokens, a power of two, without overlap"
    return _accepts(node)


def _launch(node: OpNode, kernel: str, config: Config, **constants: object) -> Build:
    """Programs of tokens, then of entries."""
    names = _names(node)
    ends, positions = names.index("ends"), names.index("positions")
    k_gate, channels, rotated = _input(node, "k_gate"), _channels(node), int(_input(node, "table").shape[1])
    args: dict[str, LaunchArg] = {name: ptr(i) for i, name in enumerate(names)}
    args.update(tokens=i32(f"a{positions}_0"), count=i32(f"a{ends}_0"))
    launch = TritonLaunch(
        f"{_MODULE}_online:{kernel}" if kernel == "compress_online" else f"{_MODULE}:{kernel}",
        args=args,
        constants={
            "RATIO": node.attrs["ratio"], "C": channels, "R": rotated,
            "STRIDE": k_gate.strides[0] if k_gate.strides else int(k_gate.shape[1]), "EPS": float(node.attrs["eps"]),
            "ENTRIES": node.attrs["entries_per_page"], "GROUP": kv_group(channels, rotated), "BT": config["tokens"],
            **constants,
        },
        grid=(f"cdiv(a{positions}_0, {config['tokens']}) + a{ends}_0", 1, 1),
        num_warps=config["warps"],
        num_ctas=config.get("ctas", 1),
        maxnreg=config.get("registers"), pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _token_tiles(symbols: Mapping[str, int], few: int, many: int, tile: int) -> dict[str, int]:
    """Tokens of a program, and of one tile of it. In prefill few tokens are kept, and a look at two finds none."""
    return {"tokens": few, "tile": few} if symbols["T"] <= _DECODE else {"tokens": many, "tile": tile}


def _part(node: OpNode, config: Config) -> int:
    """Channels of a tile of kept tokens: 8 or fewer a thread, so that entries alone decide the registers."""
    threads = 32 * int(config["warps"]) * int(config.get("ctas", 1))
    return min(_channels(node), max(32, 8 * threads // int(config["tile"])))


def _overlap_space(node: OpNode, symbols: Mapping[str, int], *, cap: int = 96) -> tuple[Config, ...]:
    """Four warps an entry of 512 channels, one or two an index key; 96 registers let one more block in.

    `cap`: of registers. On Hopper 96 pay although some of them spill, as measured."""
    if _channels(node) == 512:
        looks, tile, shapes = [64, 16], 8, [(4, cap), (4, None), (8, None)]
    else:
        looks, tile, shapes = [16], 4, [(2, None), (1, None), (1, 96)]
    few = max(1, 512 // _channels(node))
    tiles = [_token_tiles(symbols, few, many, tile) for many in looks]
    out: list[Config] = [
        {"warps": w, **t, **({"registers": r} if r else {})} for t in tiles for w, r in shapes
    ]  # fmt: skip
    return tuple(c for i, c in enumerate(out) if c not in out[:i])


def _overlap_build(node: OpNode, config: Config) -> Build:
    return _launch(
        node, "compress_overlap", config, RING=int(_input(node, "ring_k").shape[1]), FORMAT=node.attrs["format"],
        SUB=config["tile"], PART=_part(node, config),
    )  # fmt: skip


def _window_space(node: OpNode, symbols: Mapping[str, int], *, cap: int = 80) -> tuple[Config, ...]:
    ratio = int(node.attrs["ratio"])
    tiles = _token_tiles(symbols, 8, 128, 32)  # a window's worth is kept: 4 tiles; in decode a token a block
    if _channels(node) < 512:
        return ({"ctas": 1, "warps": 8, "rows": 16, **tiles},)
    shapes = [(8, 8, 16, cap), (8, 4, 8, 96), (8, 8, 16, 112)] if cap == 80 else [(8, 8, 16, cap), (8, 8, 16, 112)]
    return tuple(
        {"ctas": c, "warps": w, "rows": min(r, ratio), **tiles, **({"registers": n} if n else {})}
        for c, w, r, n in shapes
    )


def _window_build(node: OpNode, config: Config) -> Build:
    return _launch(
        node, "compress_window", config, RING=int(_input(node, "ring_k").shape[1]),
        FORMAT=node.attrs["format"], ROWS=config["rows"], SUB=config["tile"], PART=_part(node, config),
    )  # fmt: skip


def _slices_accepts(node: OpNode) -> str | None:
    if _channels(node) < 64:
        return "too few channels to share out"
    return _window_accepts(node)


def _slices_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    tiles = _token_tiles(symbols, 1, 32, 8)
    shapes = [(32, 4, None), (32, 4, 80), (64, 8, 80), (64, 8, None)]  # channels, warps, registers
    return tuple(
        {"slice": c, "warps": w, "rows": 16, **tiles, **({"registers": r} if r else {})}
        for c, w, r in shapes
        if c < _channels(node)
    )


def _slices_workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    return (Value((_input(node, "ends").shape[0], _channels(node)), "float32"),)


def _slices_build(node: OpNode, config: Config) -> Build:
    """Slices of entries into the workspace, then an entry a program."""
    channels = _channels(node)
    (whole,) = _launch(
        node, "pool_window", config, RING=int(_input(node, "ring_k").shape[1]), FORMAT=node.attrs["format"],
        ROWS=config["rows"], SUB=config["tile"], PART=_part(node, config), SLICE=config["slice"],
    ).launches  # fmt: skip
    assert isinstance(whole, TritonLaunch)
    pooled, ends, tokens = ptr(len(_PACK)), _PACK.index("ends"), _PACK.index("positions")
    slices = f"cdiv(a{tokens}_0, {config['tokens']}) + a{ends}_0 * {channels // int(config['slice'])}"
    pool = dataclasses.replace(whole, args={**whole.args, "pooled": pooled}, grid=(slices, 1, 1))
    finish = TritonLaunch(
        f"{_MODULE}:finish_entries",
        args={
            "pooled": pooled,
            **{name: whole.args[name] for name in ("norm_weight", "table", "pool", "slots", "ends")},
        },
        constants={name: whole.constants[name] for name in ("C", "R", "EPS", "ENTRIES", "FORMAT", "GROUP")},
        grid=(f"a{ends}_0", 1, 1),
        num_warps=4,
        pdl=True,
    )
    return Build("gpu", launches=(pool, finish))


def _online_accepts(node: OpNode) -> str | None:
    return _accepts(node)


def _online_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    if symbols["T"] <= _DECODE:
        return tuple({"tokens": 1, "warps": w, "rows": r} for w, r in ((4, 1), (4, 4), (8, 1), (2, 1)))
    if _channels(node) < 512:
        return ({"tokens": 32, "warps": 8, "rows": 32},)
    return tuple(
        {"tokens": 32, "ctas": c, "warps": w, "rows": r} for c, w, r in ((8, 8, 64), (8, 8, 32), (8, 4, 32))
    )  # fmt: skip


def _online_build(node: OpNode, config: Config) -> Build:
    return _launch(node, "compress_online", config, ROWS=config["rows"])


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    """The projected rows once; entries and rings are little beside them."""
    return Work(_input(node, "k_gate").bytes(symbols) * 1.1, 0.0, "gpu")


def _slices_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    return Work(_input(node, "k_gate").bytes(symbols) * 1.1, 0.0, "gpu", launches=2)


# The workloads' error is the share of a pool's new bytes that differ from the reference's, rings being equal: sums run
# in another order and exp differs in the last bit, so now and then a bfloat16 falls to its neighbour. Hadamard spreads
# one such channel over all of an index key.
_BYTES = 5e-3


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for a GPU architecture: plain Triton."""
    targets = frozenset({arch})
    # caps below what the kernels need were measured to pay; where nothing is measured nothing is to spill
    overlap, window = (96, 80) if MACHINES[arch].measured else (112, 96)
    return (
        Schedule(
            "compress_pack.triton_overlap",
            "compress_pack",
            targets,
            _overlap_build,
            _cost,
            _overlap_accepts,
            space=partial(_overlap_space, cap=overlap),
            tolerance=_BYTES,
        ),
        Schedule(
            "compress_pack.triton_window",
            "compress_pack",
            targets,
            _window_build,
            _cost,
            _window_accepts,
            space=partial(_window_space, cap=window),
            tolerance=_BYTES,
        ),
        Schedule(
            "compress_pack.triton_slices",
            "compress_pack",
            targets,
            _slices_build,
            _slices_cost,
            _slices_accepts,
            workspace=_slices_workspace,
            space=_slices_space,
            tolerance=_BYTES,
        ),
        Schedule(
            "compress_online_pack.triton_window",
            "compress_online_pack",
            targets,
            _online_build,
            _cost,
            _online_accepts,
            space=_online_space,
            tolerance=_BYTES,
        ),
    )


SCHEDULES = schedules("sm_90a")
