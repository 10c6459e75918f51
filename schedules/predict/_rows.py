"""Stages of hyper-connections, compressors, sampling and all that works on rows: bytes, and what they wait for."""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.schedules._schedule import Config, OpNode
from dsv4c.schedules.hopper.hyper_few import turns
from dsv4c.schedules.predict._stage import Card, Situation, Stage, cdiv, moved, value

Symbols = Mapping[str, int]
_CLUSTERS = 7  # of 16 blocks with 226 KB that an H200 runs at once


def rows(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Reads and writes once; entries written into a pool count as the rows that make them."""
    return (Stage("rows", moved(node, symbols) + _packed(node, symbols)),)


def _packed(node: OpNode, symbols: Symbols) -> float:
    return sum(
        float(symbols["T"] * int(v.shape[1]))
        for i, v in enumerate(node.inputs)
        if v is not None and v.role == "pool" and i in node.mutates and len(v.shape) == 2 and v.dtype == "uint8"
    )


def gathered(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Rows of a table: read once, written as often as there are streams."""
    out = node.outputs[0]
    copies = int(node.attrs.get("hc_mult", 1)) if node.op == "embed_streams" else 1
    return (Stage("rows", out.bytes(symbols) * (1 + 1 / copies)),)


def tiny(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Tables of a step: kilobytes."""
    return (Stage("tiny", float(sum(v.bytes(symbols) for v in node.outputs))),)


def _streams(node: OpNode) -> tuple[int, bool]:
    """Channels, and whether the call ends a sublayer too."""
    post = node.op.startswith("hc_post")
    return int(value(node, 1 if post else 0).shape[2]), post


def _products(node: OpNode, tokens: float) -> float:
    """Operations of the mixing coefficients: 24 rows of fn (4 for the head) by four streams."""
    dim, _ = _streams(node)
    return 2.0 * (4 if "head" in node.op else 24) * 4 * dim * tokens


def split(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Partial products of tiles, then a program a token; the streams are read again, as fn is for every tile."""
    dim, post = _streams(node)
    tokens, splits, tile = symbols["T"], int(config["splits"]), int(config.get("tile", 64))
    tiles = cdiv(tokens, tile)
    head = "head" in node.op
    fn = (4 if head else 24) * 4 * dim * 4.0
    parts = 2.0 * splits * tokens * 32 * 4
    far, near = card.again(8.0 * dim * tokens)
    resident = 2 if tile >= 64 else 4
    rounds = cdiv(tiles * splits, card.sms * resident)
    kind = "tile" if "stages" not in config else "split_post" if post else "split_pre"
    issued = 2.0 * 32 * 4 * dim / splits * tile * rounds * card.sms * resident
    size = "" if tile >= 64 else ".few"
    if config.get("turned"):
        kind, size, issued = "turned", str(tile), 2 * issued  # high and low rows at once
    return (
        Stage(f"hyper.{kind}{size}", moved(node, symbols) + far, _products(node, tokens), "bf16", issued,
              cached=(tiles - 1) * fn + parts + near, rounds=rounds),
    )  # fmt: skip


def cluster(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """A cluster of 16 blocks keeps fn. Rounds: its tiles, of 4096 channels."""
    dim, post = _streams(node)
    tile, tokens = int(config["tile"]), symbols["T"]
    rounds = cdiv(cdiv(tokens, tile), _CLUSTERS) * dim / 4096
    kernel = f"hyper.cluster{tile}_{'post' if post else 'pre'}"
    return (Stage(kernel, moved(node, symbols), _products(node, tokens), "bf16", rounds=rounds),)


def few(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Clusters without matrix units, for the next input and its coefficients. Rounds: those that one place of the card
    runs after the first."""
    rounds = max(0, turns(node, symbols["T"], config, card.sms) - 1)
    kernel = "head" if "head" in node.op else "both" if int(config["warps"]) == 4 else "wide"
    return (Stage(f"hyper.few_{kernel}", moved(node, symbols), _products(node, symbols["T"]), rounds=rounds),)


def compress(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Projected rows once, rings where windows end, an entry written. Rounds: entries of one multiprocessor."""
    rows_ = value(node, 0)
    ratio, channels = int(node.attrs["ratio"]), int(rows_.shape[1])
    ended = step.ended(ratio)
    traffic = rows_.bytes(symbols) + ended * channels
    if step.each < ratio:  # windows end on what rings hold
        traffic += ended * 8 * channels + 4.0 * symbols["T"] * channels
    name = "online" if "online" in node.op else "overlap" if ratio <= 8 else "window"
    width = "wide" if channels >= 1024 else "index"
    if name == "overlap":
        return (Stage(f"compress.overlap_{width}", traffic),)
    blocks = int(config.get("ctas", 1))
    where = "decode" if step.each <= 64 else f"{blocks}x{config['warps']}"
    return (Stage(f"compress.{name}_{where}", traffic, rounds=cdiv(ended, card.sms / blocks)),)


def slices(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """Slices of entries, then entries."""
    rows_ = value(node, 0)
    ended, channels = step.ended(int(node.attrs["ratio"])), int(rows_.shape[1])
    traffic = rows_.bytes(symbols) + ended * channels
    blocks = ended * channels / 2 / int(config["slice"])
    where = "decode" if step.each <= 64 else "prefill"
    return (Stage(f"compress.slices_{where}", traffic, rounds=cdiv(blocks, 4 * card.sms)),)


def sample(node: OpNode, symbols: Symbols, config: Config, step: Situation, card: Card) -> tuple[Stage, ...]:
    """The logits by chunks (and counts), candidates in lists. What filters add depends on the logits: not counted."""
    logits = value(node, 0)
    penalised = node.op != "sample"
    passes = {"greedy": 1.0}.get(step.sampling, 2.0)
    traffic = symbols["T"] * int(logits.shape[1]) * (6.0 if penalised else 4.0)
    name = f"{node.op}.{'greedy' if passes == 1 else 'draw'}"
    return (Stage(name, traffic, cached=traffic * (passes - 1)),)
