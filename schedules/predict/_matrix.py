"""Stages of linear maps, gates and routed experts: weights once, tiles of tokens padded, rounds of blocks filled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsv4c.schedules._schedule import Config, OpNode
from dsv4c.schedules.hopper.experts import hit
from dsv4c.schedules.hopper.gate import router_product
from dsv4c.schedules.predict._stage import Card, Situation, Stage, Unit, cdiv, moved, value

Symbols = Mapping[str, int]
_WIDEN = 32  # columns whose products take as long as widening a tile of FP4 weights to bfloat16 (Hopper)
_FULL = 64  # columns with which a tcgen05 product of 128 rows takes as long as reading these rows: 128 bytes a clock


def _sizes(node: OpNode) -> tuple[int, int, int, Unit]:
    """Output channels in all, input channels of a group, groups, and the unit."""
    fp8 = node.op.endswith("fp8")
    weight = value(node, 2 if fp8 else 1)
    n, k = (int(size) for size in weight.shape)
    return n, k, int(node.attrs.get("groups", 1)), "fp8" if fp8 else "bf16"


def _product(
    kernel: str, node: OpNode, symbols: Symbols, card: Card, rows: int, columns: int, parts: int, resident: int,
    *, shared: bool = False,
) -> Stage:  # fmt: skip
    """Tiles of `rows` tokens by `columns` channels, `parts` blocks a tile, `resident` blocks a multiprocessor.

    `shared`: the blocks of the last round share its tiles.
    """
    n, k, _, unit = _sizes(node)
    tokens = max(1, symbols["T"])
    tiles = cdiv(tokens, rows) * cdiv(n, columns)
    blocks = tiles * parts
    rounds = cdiv(blocks, card.sms * resident)
    size = 1 if unit == "fp8" else 2
    weight = float(n * k * size)
    again = (cdiv(tokens, rows) - 1) * weight + (cdiv(n, columns) - 1) * float(tokens * k * size)
    return Stage(
        kernel,
        bytes=moved(node, symbols),
        flops=2.0 * tokens * n * k,
        unit=unit,
        issued=2.0 * (blocks if shared and rounds > 1 else rounds * card.sms * resident) / parts * rows * columns * k,
        cached=again,
        rounds=rounds,
        fill=min(1.0, 2.0 * blocks / card.sms),
    )


def few(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """A block (or a cluster of them) a tile; two blocks a multiprocessor. Rounds: of blocks."""
    name = "linear.few_fp8" if node.op.endswith("fp8") else "linear.few_bf16"
    c: Mapping[str, Any] = config
    return (_product(name, node, symbols, card, int(c["bt"]), int(c["bn"]), int(c["ctas"]), 2),)


def many(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Persistent blocks that take tile after tile. Rounds: tiles of one block, whose results must leave it."""
    bm, bn = int(config["bm"]), int(config["bn"])
    kind = "fp8" if node.op.endswith("fp8") else "bf16"
    resident = 2 if bm == 64 and kind == "fp8" else 1
    return (_product(f"linear.many_{kind}.{bm}x{bn}", node, symbols, card, bm, bn, 1, resident),)


def tile_ring(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """TileLang's: a block a tile. Rounds: of blocks."""
    rows, columns = int(config["BM"]), int(config["BN"])
    return (_product(f"linear.tile_{rows}", node, symbols, card, rows, columns, 1, 1),)


_PER_BYTE = 100  # operations that take as long as reading a byte from the L2 cache
_VENDOR = ((128, 256), (128, 128), (128, 64), (64, 128), (64, 64))


def vendor(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """The vendor's: the tile, and the parts of its channels, that leave least idle; its blocks share the last round."""
    kind = "fp8" if node.op.endswith("fp8") else "bf16"
    found = [
        _product(f"linear.vendor_{kind}", node, symbols, card, rows, columns, parts, 1, shared=True)
        for rows, columns in _VENDOR
        for parts in (1, 2, 4)
    ]
    return (min(found, key=lambda stage: stage.issued + _PER_BYTE * stage.cached),)


def scaled(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Blackwell's: 128 rows of the weight by `columns` tokens, `parts` of the channels apart, then their sum."""
    n, _, _, unit = _sizes(node)
    tokens, columns, parts = max(1, symbols["T"]), int(config["columns"]), int(config["parts"])
    size = "few" if tokens <= 512 else "many"
    one = _product(f"linear.{size}_{unit}.tcgen05", node, symbols, card, columns, 128, parts, 1)
    padded = max(1.0, _FULL / columns)
    stage = Stage(one.kernel, one.bytes, one.flops, unit, one.issued * padded, one.cached, one.rounds, one.fill)
    if parts == 1:
        return (stage,)
    return stage, Stage("rows", cached=4.0 * 2 * parts * tokens * n)  # parts stay in the L2 cache


def pairs(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """TileLang's on Blackwell: a cluster of two blocks a tile of 256 x 256; half of its channels for each to count."""
    return (_product(f"linear.many_{_sizes(node)[3]}.tcgen05", node, symbols, card, 256, 128, 1, 1),)


def _gate(node: OpNode, symbols: Symbols) -> Stage:
    """Scores of a row in a warp's registers, K dependent choices. The operations: about 8 an expert and choice."""
    fused = "linear" in node.op
    experts = int(value(node, 1 if fused else 0).shape[0 if fused else 1])
    topk, tokens = int(node.outputs[0].shape[1]), symbols["T"]
    flops = tokens * 8.0 * experts * (topk + 4)
    return Stage(f"gate.{'hash' if node.op.endswith('hash') else 'bias'}", tokens * (4.0 * experts + 8 * topk), flops,
                 issued=flops)  # fmt: skip


def gate(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """The choice alone."""
    return (_gate(node, symbols),)


def gate_few(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """The router's product, then the choice."""
    return (*few(router_product(node), symbols, config, step, card), _gate(node, symbols))


def gate_scaled(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """The same on Blackwell, where the choice adds the product's parts, from the L2 cache."""
    product, *_ = scaled(router_product(node), symbols, config, step, card)
    parts = 4.0 * (int(config["parts"]) - 1) * symbols["T"] * int(value(node, 1).shape[0])
    return product, replace(_gate(node, symbols), cached=parts)


def _experts(node: OpNode) -> tuple[int, int, int, int]:
    """D, I, E and K."""
    return (
        int(value(node, 0).shape[1]), int(value(node, 3).shape[1]), int(value(node, 3).shape[0]),
        int(value(node, 1).shape[1]),
    )  # fmt: skip


def experts(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Experts that even routing hits, each in tiles of the smallest of `columns` that holds its tokens."""
    dim, inner, count, topk = _experts(node)
    tokens = symbols["T"]
    pairs, some = tokens * topk, hit(count, topk, tokens)
    columns = [int(c) for c in config["columns"]]
    weights = some * 3 * dim * inner * (0.5 + 1 / 32)
    rows = 2.0 * pairs * (4 * dim + 2 * inner) + 6.0 * tokens * dim
    flops = 6.0 * pairs * dim * inner
    padded = sum(share * _padded(load, columns) for load, share in loads(tokens, topk, count))
    launches = 4 if config["sort"] else 5
    split = sum(share * cdiv(load, columns[-1]) for load, share in loads(tokens, topk, count)) * count
    return (
        Stage("experts", weights + rows, flops, "bf16", 6.0 * dim * inner * count * padded,
              cached=_again(weights, split / max(some, 1e-9), 2.0 * pairs, dim, inner), rounds=launches),
    )  # fmt: skip


def _again(weights: float, tiles: float, row: float, dim: int, inner: int) -> float:
    """Bytes from the cache: weights for every tile of an expert but its first, rows for every 128 rows of a weight.

    `row`: bytes of one channel of all pairs.
    """
    return weights * max(0.0, tiles - 1) + row * (dim * (inner / 128 - 1) + inner * (dim / 128 - 1))


def _padded(load: int, columns: list[int]) -> int:
    """Columns that tiles of an expert with so many tokens have."""
    if load == 0:
        return 0
    tiles = cdiv(load, columns[-1])
    each = cdiv(load, tiles)
    return tiles * (next(c for c in columns if c >= each) + _WIDEN)


def loads(tokens: int, topk: int, count: int) -> list[tuple[int, float]]:
    """(tokens of an expert, share of the experts that get so many): binomial, as even routing gives."""
    p, mean = topk / count, tokens * topk / count
    spread = 6 * math.sqrt(mean * (1 - p)) + 6
    low, high = max(0, math.floor(mean - spread)), min(tokens, math.ceil(mean + spread))
    logs = [
        math.lgamma(tokens + 1) - math.lgamma(i + 1) - math.lgamma(tokens - i + 1) + i * math.log(p)
        + (tokens - i) * math.log1p(-p) for i in range(low, high + 1)
    ]  # fmt: skip
    return [(low + i, math.exp(log)) for i, log in enumerate(logs)]


def experts_scaled(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Blackwell's: 128 rows of a weight by `columns` tokens; what is not full waits for the weight's rows."""
    dim, inner, count, topk = _experts(node)
    tokens, columns = symbols["T"], int(config["columns"])
    pairs, some = tokens * topk, hit(count, topk, tokens)
    nvfp4 = node.op == "experts_nvfp4"
    activations = str(node.attrs.get("activations", "nvfp4" if nvfp4 else "bf16"))
    group = 16 if nvfp4 else 32
    byte = {"bf16": 2.0, "mxfp8": 1 + 1 / 32}.get(activations, 0.5 + 1 / group)
    unit: Unit = {"bf16": "bf16", "mxfp8": "fp8"}.get(activations, "fp4")  # type: ignore[assignment]
    weights = some * 3 * dim * inner * (0.5 + 1 / group)
    rows = pairs * (dim * byte + 2 * inner * byte + 4 * dim) + tokens * (4 + 2 * byte) * dim
    wide = max(columns, _FULL)
    tiles = sum(share * cdiv(load, columns) for load, share in loads(tokens, topk, count))
    flops = 6.0 * pairs * dim * inner
    size = "few" if columns <= 32 else "many"
    launches = 4 if activations == "bf16" or config.get("sort") else 5
    return (
        Stage(
            f"experts.{size}.tcgen05", weights + rows, flops, unit, 6.0 * dim * inner * count * tiles * wide,
            cached=_again(weights, tiles * count / max(some, 1e-9), pairs * byte, dim, inner), rounds=launches,
        ),
    )  # fmt: skip
