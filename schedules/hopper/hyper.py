"""Hyper-connections on Hopper: which kernels run an op, over which tiles.

A token of flash moves 80 KB through the fused op (streams in and out, the sublayer's result, the next input) and needs
all of fn, 1.5 MB: 19 us of copying a thousand tokens against 1.6 GFLOP of products.

    triton_tiles   hc_post alone, elementwise: 94 % of the copy bandwidth at 8192 tokens (H200)
    triton_split   project (post and partial products of a tile, channels split over programs), then finish (Sinkhorn,
                   weighted sum, norm), which reads the streams again: cheap while they are in L2
    tile_split     the same in TileLang, for the fused op of the decoder layers
    gluon_cluster  a cluster of 16 blocks keeps fn and a tile of tokens on the chip and reads the streams once. 321 us
                   at 8192 tokens of flash, 49 % of the copy bandwidth: its 8 warps meet at 3 barriers a tile, so the
                   copies, the arithmetic and the matrix unit take turns. Two groups of warps on tiles of their own
                   would overlap them; their buffers do not fit beside fn
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from dsv4c.schedules._launch import TileLaunch, TritonLaunch, i32, ptr
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work, dense_rows

_HOPPER = frozenset({"sm_90a"})
_MODULE = "dsv4c.schedules.triton.hyper"
_PART = 32  # floats of partial sums a token and split
_GROUP = 128  # channels that share a scale
POST = frozenset({"hc_post", "hc_post_pre_norm", "hc_post_pre_norm_quantise"})
HEAD = frozenset({"hc_head", "hc_head_norm"})
PRE = frozenset({"hc_pre", "hc_pre_norm", "hc_pre_norm_quantise"})


def _streams(node: OpNode) -> Value:
    value = node.inputs[1 if node.op in POST else 0]
    assert value is not None
    return value


def dim_of(node: OpNode) -> int:
    return int(_streams(node).shape[2])


def accepts(node: OpNode) -> str | None:
    streams = _streams(node)
    first = node.inputs[0]
    if streams.dtype != "bfloat16" or first is None or first.dtype != "bfloat16":
        return "activations that are not bfloat16"
    if streams.shape[1] != 4:
        return f"{streams.shape[1]} streams, written for 4"
    if dim_of(node) % 64:
        return f"{dim_of(node)} channels are no multiple of 64"
    if any(value is not None and not dense_rows(value) for value in node.inputs) or any(
        value is not None and value.strides is not None for value in node.inputs
    ):
        return "a strided input"
    floats = node.inputs[2:] if node.op in POST else node.inputs[1:]
    if any(value is None or value.dtype != "float32" for value in floats):
        return "coefficients or weights that are not float32"
    if node.attrs.get("group", _GROUP) != _GROUP:
        return f"groups of {node.attrs['group']} channels, written for {_GROUP}"
    return None


def pow2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _splits(dim: int) -> list[int]:
    """Numbers of parts, ascending, into which the channels split evenly by multiples of 64."""
    return [s for s in range(1, dim // 64 + 1) if (dim // 64) % s == 0]


def _split_space(node: OpNode, symbols: Mapping[str, int], sms: int) -> tuple[Config, ...]:
    """Tiles of 16 tokens while that leaves multiprocessors idle; splits that give each of them 1 to 4 programs."""
    tokens = max(1, symbols["T"])
    tiles = [16] if tokens <= 128 else [64]  # wins with half the fn to read a token
    if 128 < tokens <= 512:
        tiles.append(32)
    out: list[Config] = []
    for tile in tiles:
        for programs in (2, 4):
            config = _split_config(node, tokens, tile, programs, sms)
            if config not in out:
                out.append(config)
    return (*out, *(_turned_space(node, symbols, sms) if tokens <= 512 else ()))


def _split_config(node: OpNode, tokens: int, tile: int, programs: int, sms: int) -> dict[str, Any]:
    """As many splits as make `programs` programs a multiprocessor."""
    tiles = math.ceil(tokens / tile)
    fits = [s for s in _splits(dim_of(node)) if s * tiles <= programs * sms * 1.1] or [1]
    return {
        "tile": tile, "width": 32, "splits": fits[-1], "warps": 4,
        "stages": 3,  # of copies under way; 2: 10 % slower at 1024 tokens (H200)
        "finish_warps": 8 if tokens <= sms else 4,
    }  # fmt: skip


def _turned_space(node: OpNode, symbols: Mapping[str, int], sms: int) -> tuple[Config, ...]:
    """Where matrix units take 64 rows, at least: up to 512 tokens are columns of tiles of 16 or 32, fn's rows the rows.

    On an H200, whose matrix units take both ways, 1 to 32 tokens of flash are as fast as with the tokens' rows, 128 of
    them 1.6 times as fast in tiles of 32; 64 in tiles of 16 with all of a split's channels at once, 12 us, not 15.
    """
    tokens = max(1, symbols["T"])
    if tokens > 512:
        return tuple(_split_config(node, tokens, 64, programs, sms) for programs in (2, 4))
    whole = _split_config(node, tokens, 16, 2, sms)
    if 32 < tokens <= 64 and whole["splits"] * 64 == dim_of(node):
        return ({**whole, "width": 64, "stages": 2, "turned": True},)
    tile, programs = (16, 1) if tokens <= 32 else (32, 1) if tokens <= 128 else (32, 3)
    return tuple({**_split_config(node, tokens, tile, n, sms), "turned": True} for n in (programs, programs + 1))


def _split_workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    return (Value((config["splits"], "T", _PART), "float32"),)


def attr(node: OpNode, name: str) -> Any:
    return node.attrs.get(name, 0)


def _split_build(node: OpNode, config: Config) -> Build:
    dim, fused, head = dim_of(node), node.op in POST, node.op in HEAD
    splits, inputs = int(config["splits"]), len(node.inputs)
    part, out = inputs, inputs + 1  # arguments: inputs, the workspace, outputs
    weights = 4 if fused else 1
    streams = out if fused else 0
    x = out + 1 if fused else out
    norm, quantise = "norm" in node.op, node.op.endswith("_quantise")
    project = TritonLaunch(
        f"{_MODULE}:project",
        args={
            "y": ptr(0), "x": ptr(1 if fused else 0), "post_in": ptr(2 if fused else part),
            "comb_in": ptr(3 if fused else part), "fn": ptr(weights), "streams": ptr(streams), "part": ptr(part),
            "tokens": i32("a0_0"),
        },
        constants={
            "D": dim, "ROWS": 4 if head else 24, "POST": fused, "BT": config["tile"], "BD": config["width"],
            "DS": dim // splits, "STAGES": config["stages"], "TURNED": bool(config.get("turned")),
        },
        grid=(f"cdiv(a0_0, {config['tile']})", splits, 1),
        num_warps=config["warps"],
        num_stages=config["stages"], pdl=True,
    )  # fmt: skip
    batch = _sinkhorn_batch(splits)
    finish = TritonLaunch(
        f"{_MODULE}:finish",
        args={
            "streams": ptr(streams), "part": ptr(part), "base": ptr(weights + 1), "scale": ptr(weights + 2),
            "norm_weight": ptr(weights + 3 if norm else part), "x": ptr(x), "post_out": ptr(part if head else x + 1),
            "comb_out": ptr(part if head else x + 2), "data": ptr(x + 3) if quantise else ptr(part, "float8_e4m3fn"),
            "data_scale": ptr(x + 4 if quantise else part), "tokens": i32("a0_0"),
        },
        constants={
            "D": dim, "BD": pow2(dim), "S": splits, "SP": pow2(splits), "BS": batch, "HEAD": head, "NORM": norm,
            "QUANTISE": quantise, "ITERS": attr(node, "iters"), "NORM_EPS": attr(node, "norm_eps"),
            "EPS": attr(node, "eps"), "OUT_EPS": attr(node, "out_eps"),
        },
        grid=("a0_0" if head else f"a0_0 + cdiv(a0_0, {batch})", 1, 1),
        num_warps=config["finish_warps"], pdl=True,
    )  # fmt: skip
    return Build("gpu", launches=(project, finish))


def _sinkhorn_batch(splits: int) -> int:
    """Tokens of a program that runs Sinkhorn: a warp's lanes if there are few partial sums to add, else fewer."""
    return max(1, 32 // max(1, pow2(splits) // 4))


def _split_cost(node: OpNode, symbols: Mapping[str, int], config: Config, sms: int) -> Work:
    dim, tokens = dim_of(node), symbols["T"]
    tiles, splits = math.ceil(tokens / int(config["tile"])), int(config["splits"])
    moved = bytes_of(node, tokens) + 2 * splits * tokens * _PART * 4
    moved += 0.3 * tokens * 8 * dim  # the streams again, mostly from L2
    moved += 0.5 * tiles * 24 * 4 * dim * 4  # fn for every tile, from L2
    flops = 2.0 * 2 * _PART * 4 * dim * tiles * int(config["tile"])
    busy = min(1.0, tiles * splits / sms)
    return Work(moved / busy if busy else moved, flops, "gpu", 0.3 * busy if busy else 1.0, "bf16", launches=2)


def bytes_of(node: OpNode, tokens: int) -> float:
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    return float(sum(v.bytes({"T": tokens}) for v in values))


_CLUSTER = 16  # blocks: the most a cluster may have, and a block's part of fn is 96 KB
_CLUSTERS = 7  # of blocks with 226 KB of shared memory that an H200 runs at once


def _accepts_cluster(node: OpNode) -> str | None:
    dim = dim_of(node)
    if dim % (_CLUSTER * 8 * 32) or pow2(dim) != dim or dim > 4096:
        return f"{dim} channels, written for 4096"
    return accepts(node)


def _cluster_space(node: OpNode, symbols: Mapping[str, int]) -> tuple[Config, ...]:
    # early: started before the kernel ahead has finished, to load fn meanwhile; 2 us less at 64 tokens (H200)
    return tuple({"tile": tile, "clusters": _CLUSTERS, "early": True} for tile in (16, 8))


def _cluster_build(node: OpNode, config: Config) -> Build:
    fused, inputs = node.op in POST, len(node.inputs)
    weights, streams = (4, inputs) if fused else (1, 0)
    x = inputs + 1 if fused else inputs
    norm, quantise = "norm" in node.op, node.op.endswith("_quantise")
    tile = int(config["tile"])
    launch = TritonLaunch(
        "dsv4c.schedules.triton.hyper_cluster:fused",
        args={
            "y": ptr(0, "int32"), "x": ptr(1 if fused else 0, "int32"), "post_in": ptr(2 if fused else x + 1),
            "comb_in": ptr(3 if fused else x + 2), "fn": ptr(weights), "base": ptr(weights + 1),
            "scale": ptr(weights + 2), "norm_weight": ptr(weights + 3 if norm else weights),
            "streams": ptr(streams, "int32"), "out": ptr(x, "int32"), "post_out": ptr(x + 1), "comb_out": ptr(x + 2),
            "data": ptr(x + 3) if quantise else ptr(x, "float8_e4m3fn"),
            "data_scale": ptr(x + 4) if quantise else ptr(x, "float32"), "tokens": i32("a0_0"),
        },
        constants={
            "D": dim_of(node), "C": _CLUSTER, "M": tile, "POST": fused, "NORM": norm, "QUANTISE": quantise,
            "ITERS": attr(node, "iters"), "NORM_EPS": attr(node, "norm_eps"), "EPS": attr(node, "eps"),
            "OUT_EPS": attr(node, "out_eps"),
        },
        grid=(f"{_CLUSTER} * min({config['clusters']}, cdiv(a0_0, {tile}))", 1, 1),
        num_warps=8,
        cluster=_CLUSTER,
        pdl=bool(config["early"]),
    )  # fmt: skip
    return Build("gpu", launches=(launch,))


def _cluster_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    tokens, tile = symbols["T"], int(config["tile"])
    tiles = math.ceil(tokens / tile)
    rounds = math.ceil(tiles / _CLUSTERS)
    full = tiles / (rounds * _CLUSTERS) if tiles else 1.0
    return Work(bytes_of(node, tokens) / full + 8e6, 0.0, "gpu")  # 8 MB: two microseconds to fill and drain


_TILE = 64  # tokens of a TileLang tile: the rows of one warpgroup's product


def _tile_space(node: OpNode, symbols: Mapping[str, int], sms: int) -> tuple[Config, ...]:
    tiles = max(1, math.ceil(symbols["T"] / _TILE))
    most = [max(s for s in _splits(dim_of(node)) if s == 1 or s * tiles <= programs * sms) for programs in (2, 4)]
    return tuple({"splits": splits} for splits in dict.fromkeys(most))


def _tile_build(node: OpNode, config: Config) -> Build:
    dim, splits = dim_of(node), int(config["splits"])
    # arguments: y, x, post, comb, fn, base, scale, weight | part | streams, x, post, comb
    project = TileLaunch(
        "dsv4c.schedules.tilelang.hyper:project",
        tensors=(0, 1, 2, 3, 4, 9, 8),
        constants={"D": dim, "DS": dim // splits},
        grid=(f"cdiv(a0_0, {_TILE})", splits, 1),
        threads=128,
        symbols={"M": "a0_0"},
    )
    finish = TileLaunch(
        "dsv4c.schedules.tilelang.hyper:finish",
        tensors=(9, 8, 5, 6, 7, 10, 11, 12),
        constants={
            "D": dim, "S": splits, "iters": attr(node, "iters"), "norm_eps": attr(node, "norm_eps"),
            "eps": attr(node, "eps"), "out_eps": attr(node, "out_eps"),
        },
        grid=("a0_0", 1, 1),
        threads=128,
        symbols={"M": "a0_0"},
    )  # fmt: skip
    return Build("gpu", launches=(project, finish))


def _tile_cost(node: OpNode, symbols: Mapping[str, int], config: Config, sms: int) -> Work:
    return _split_cost(node, symbols, {"tile": _TILE, "splits": config["splits"]}, sms)


def _post_space(node: OpNode, symbols: Mapping[str, int], sms: int) -> tuple[Config, ...]:
    tokens, dim = max(1, symbols["T"]), dim_of(node)
    wide = [{"tile": t, "width": w, "warps": 4} for t, w in ((1, 2048), (1, 1024), (2, 1024), (4, 512), (1, 512))]
    fits = [c for c in wide if dim % c["width"] == 0 and tokens * dim >= c["tile"] * c["width"] * sms]
    return tuple(fits) or (
        {"tile": 1, "width": min(512, pow2(dim)), "warps": 4},
        {"tile": 1, "width": 256, "warps": 1},
    )


def _post_build(node: OpNode, config: Config) -> Build:
    dim = dim_of(node)
    launch = TritonLaunch(
        f"{_MODULE}:post",
        args={"y": ptr(0), "x": ptr(1), "post_in": ptr(2), "comb_in": ptr(3), "out": ptr(4), "tokens": i32("a0_0")},
        constants={"D": dim, "BT": config["tile"], "BD": config["width"]},
        grid=(f"cdiv(a0_0, {config['tile']})", math.ceil(dim / int(config["width"])), 1),
        num_warps=config["warps"],
        pdl=True,
    )
    return Build("gpu", launches=(launch,))


def _post_cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    return Work(bytes_of(node, symbols["T"]), 0.0, "gpu")


# Coefficients carry the products' error, 2**-17 of their terms, which Sinkhorn multiplies where a matrix is nearly
# decomposable: 2e-4 at most over 8192 tokens. The workloads' error allows bfloat16 results one rounding more.
TOLERANCE = 5e-4


def schedules(arch: str) -> tuple[Schedule, ...]:
    """The family for a GPU architecture: the cluster and TileLang's kernel are written for Hopper."""
    targets, sms = frozenset({arch}), MACHINES[arch].multiprocessors
    space = _split_space if arch == "sm_90a" else _turned_space  # of fewer rows Triton makes the old `mma.sync` there
    every: tuple[Schedule, ...] = (
        *(
            Schedule(
                f"{op}.triton_split",
                op,
                targets,
                _split_build,
                partial(_split_cost, sms=sms),
                accepts,
                workspace=_split_workspace,
                space=partial(space, sms=sms),
                tolerance=TOLERANCE,
            )
            for op in sorted(PRE | HEAD | (POST - {"hc_post"}))
        ),
        *(
            Schedule(
                f"{op}.gluon_cluster",
                op,
                _HOPPER,
                _cluster_build,
                _cluster_cost,
                _accepts_cluster,
                space=_cluster_space,
                tolerance=TOLERANCE,
            )
            for op in sorted(PRE | (POST - {"hc_post"}))
        ),
        Schedule(
            "hc_post_pre_norm.tile_split",
            "hc_post_pre_norm",
            _HOPPER,
            _tile_build,
            partial(_tile_cost, sms=sms),
            accepts,
            workspace=_split_workspace,
            space=partial(_tile_space, sms=sms),
            tolerance=TOLERANCE,
        ),
        Schedule(
            "hc_post.triton_tiles",
            "hc_post",
            targets,
            _post_build,
            _post_cost,
            accepts,
            space=partial(_post_space, sms=sms),
            tolerance=TOLERANCE,
        ),
    )
    return tuple(schedule for schedule in every if arch in schedule.targets)


SCHEDULES = schedules("sm_90a")
