"""Stages of sparse attention, the indexer and top-k: tiles of keys one after another, rounds of blocks filled."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dsv4c.ops.formats import index_sizes
from dsv4c.schedules._schedule import Config, OpNode
from dsv4c.schedules.predict._stage import Card, Situation, Stage, cdiv, value

Symbols = Mapping[str, int]
_ROWS = 64  # heads of a tile
_PAGE = 64  # keys of an index page


def _kind(node: OpNode) -> str:
    return node.op.split("_")[1]


def _ratio(node: OpNode) -> int:
    """Tokens of an entry; an op that is given its picks does not say."""
    return int(node.attrs.get("ratio", 4))


def _keys(node: OpNode, step: Situation) -> tuple[float, float]:
    """Keys of the window and entries that a token sees, on average."""
    window = step.seen(1, int(node.attrs["window"]))
    if _kind(node) == "csa":
        return window, step.seen(_ratio(node), int(value(node, 5).shape[1]))
    return window, step.seen(_ratio(node)) if _kind(node) == "hca" else 0.0


def _read(node: OpNode, step: Situation) -> float:
    """Keys that memory gives: of one request's tokens together, at most what it holds."""
    entries = 0.0
    if _kind(node) == "csa":
        picks = int(value(node, 5).shape[1])
        entries = min(step.each * step.seen(_ratio(node), picks), step.held(_ratio(node)))
    elif _kind(node) == "hca":
        entries = step.held(_ratio(node))
    return step.requests * (step.held(1, int(node.attrs["window"])) + entries)


def _attend(
    kernel: str, node: OpNode, step: Situation, card: Card, heads: int, keys: int, shares: int, resident: int
) -> Stage:
    """Tiles of `heads` heads by `keys` keys; a token's keys in `shares` shares. Rounds: shares of one block."""
    q = value(node, 0)
    count, dim = int(q.shape[1]), int(q.shape[2])
    window, entries = _keys(node, step)
    if _kind(node) == "csa":
        entries = float(value(node, 5).shape[1])  # tiles of picks that are none are gone through too
    tiles = cdiv(window, keys) + cdiv(entries, keys)
    items = step.tokens * cdiv(count, heads) * shares
    rounds = cdiv(items, card.sms * resident)
    flops = 4.0 * step.tokens * count * dim * sum(_keys(node, step))
    issued = 4.0 * heads * dim * keys * cdiv(tiles, shares) * rounds * card.sms * resident
    size = int(value(node, 1).shape[1])
    traffic = 4.0 * step.tokens * count * dim + _read(node, step) * size
    return Stage(kernel, traffic, flops, "bf16", issued, rounds=rounds)


def _combine(node: OpNode, step: Situation, shares: int) -> tuple[Stage, ...]:
    q = value(node, 0)
    if shares == 1:
        return ()
    return (Stage("attend.combine", cached=4.0 * shares * step.tokens * int(q.shape[1]) * int(q.shape[2])),)


def groups(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Hopper's warp groups: persistent blocks; gathered keys are another rate than pages in order."""
    shares = int(config["shares"])
    where = "decode" if step.each <= 4 else _kind(node)
    return _attend(f"attend.groups.{where}", node, step, card, _ROWS, 64, shares, 1), *_combine(node, step, shares)


def wide(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Blackwell's, with sums in tensor memory: a block a token, 64 heads and share."""
    shares = int(config["shares"])
    where = "decode" if step.each <= 4 else _kind(node)
    return _attend(f"attend.wide.{where}", node, step, card, _ROWS, 64, shares, 1), *_combine(node, step, shares)


def pair(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """TileLang's: a cluster of `splits` blocks a token."""
    splits = int(config["splits"])
    return (_attend(f"attend.pair.{_kind(node)}", node, step, card, _ROWS, 64, splits, 1),)


def gather(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Plain Triton: a block a token, tile of heads and share."""
    shares, heads = int(config["shares"]), int(config["block_h"])
    kernel = f"attend.gather.{_kind(node)}" if heads == _ROWS else "attend.gather.small"
    return _attend(kernel, node, step, card, heads, int(config["block_k"]), shares, 1), *_combine(node, step, shares)


def _index(node: OpNode) -> tuple[int, int, int]:
    """Heads, channels and bytes of a key."""
    data = value(node, 0)
    heads, dim = int(data.shape[1]), int(data.shape[2])
    data_bytes, scale_bytes = index_sizes(dim, node.attrs["format"])
    return heads, dim, data_bytes + scale_bytes


def _scores(
    node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card, rows: float, whole: bool
) -> Stage:
    """Scores of `rows` of the step's tokens. `whole`: what no token sees is filled in too."""
    heads, dim, size = _index(node)
    form, way = str(node.attrs["format"]), str(config["way"])
    seen = step.seen(_ratio(node))
    flops = 2.0 * rows * seen * heads * dim
    written = 4.0 * rows * (symbols["P_index"] * _PAGE if whole else seen)
    share = rows / step.tokens
    if way in ("keys", "runs"):
        return _streamed(node, config, step, card, rows, written)
    name = f"index.{way}_{form}" + (f".{'few' if rows <= 16 else 'more'}" if way == "tokens" else "")
    own = rows * seen * size  # each token reads its keys; those of one request share a cache
    once = min(own, step.requests * share * step.held(_ratio(node)) * size)
    pages = rows * cdiv(seen, _PAGE)
    blocks = card.sms * int(config["blocks"])
    return Stage(name, once + written, flops, "fp8", flops, cached=own - once, rounds=cdiv(pages, blocks))


def _streamed(node: OpNode, config: Config, step: Situation, card: Card, rows: float, written: float) -> Stage:
    """Blocks that hold keys and let tokens pass, two a multiprocessor. Rounds: requests that one block serves in turn,
    each with keys of its own; the last round of blocks is as long as a full one."""
    heads, dim, size = _index(node)
    way, tokens = str(config["way"]), int(config["tokens"])
    keys = 16 * int(config["warps"]) * int(config["tiles"]) if way == "keys" else int(config["keys"])
    seen, each = step.seen(_ratio(node)), max(1.0, step.each)
    passing = min(tokens, rows)
    served = max(1.0, passing / each)
    blocks, slots = cdiv(rows, tokens) * cdiv(seen, keys), 2 * card.sms
    work = 2.0 * passing * keys * heads * dim
    issued = max(2.0 * rows * seen * heads * dim, work * blocks) + work * min(slots, blocks)
    requests = max(1.0, rows / each)
    traffic = requests * step.held(_ratio(node)) * size + written
    return Stage(f"index.{way}_{node.attrs['format']}", traffic, 2.0 * rows * seen * heads * dim, "fp8", issued,
                 cached=cdiv(rows, tokens) * seen * size, rounds=served * cdiv(blocks, slots))  # fmt: skip


def scores(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Scores alone, and a second launch for what nobody sees."""
    entries = symbols["P_index"] * _PAGE
    unseen = 4.0 * step.tokens * (entries - step.seen(_ratio(node)))
    programs = cdiv(step.tokens * cdiv(entries, 16384), 16 * card.sms)
    return _scores(node, symbols, config, step, card, step.tokens, True), Stage("index.hidden", unseen, rounds=programs)


def _select(rows: float, entries: float, topk: int, config: Config, card: Card) -> Stage:
    """A block a row; it passes over the maxima of groups, then over groups that may hold a pick. Rounds: such passes
    of one block."""
    threads = 32 * int(config["select_warps"])
    registers = int(config["select_registers"]) or (128 if threads <= 256 else 64)
    resident = max(1, min(2048 // threads, 65536 // (threads * registers)))
    turns = cdiv(rows, card.sms * resident)
    kernel = f"topk.{'long' if config['long'] else 'short'}{topk}"
    traffic = 4.0 * rows * (entries / 16 + min(entries, 16 * topk) + topk)
    return Stage(kernel, traffic, rounds=turns * (0.2 + 0.8 * entries / 32768))


def rows(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Top-k of scores that are there: maxima of groups first."""
    entries = symbols["P_index"] * int(value(node, 0).shape[2])
    count = symbols["T"]
    maxima = Stage("topk.maxima", 4.0 * count * entries * 17 / 16)
    return maxima, _select(count, entries, int(node.attrs["topk"]), config, card)


def picks(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Scores and top-k, in `chunks` pieces of the batch."""
    chunks, topk = int(config["chunks"]), int(node.attrs["topk"])
    count = step.tokens / chunks
    seen = step.seen(_ratio(node))
    each = (
        _scores(node, symbols, config, step, card, count, False),
        _select(count, seen, topk, config, card),
    )
    return each * chunks


def query(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Hadamard by products, rounding. Rounds: tiles of 64 heads of one block."""
    q = value(node, 0)
    tokens, width = symbols["T"], int(q.shape[1])
    heads = int(node.attrs["num_heads"])
    flops = 2.0 * tokens * width * (width // heads)
    size = 3.0 * tokens * width + 8.0 * tokens * heads
    turns = math.ceil(tokens * heads / 64 / (card.sms * int(config["blocks"])))
    return (Stage(f"index.query_{node.attrs['format']}", size, flops, "bf16", flops, rounds=turns),)
