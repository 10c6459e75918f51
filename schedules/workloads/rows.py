"""Workloads of the row ops: flash, pro and nano, from one token to 16 K.

Rows have very different sizes, positions go up to a million, pool rows are drawn at random; the pools hold random
bytes, so that what must stay shows if it does not.

Legend: T tokens, H heads, C head_dim, R rotated channels, Q channels of the query latent, N pool rows, B entry bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4c.config import ModelConfig
from dsv4c.model.rope import rope_frequencies, rope_table
from dsv4c.ops.formats import from_e8m0, index_sizes, kv_group, kv_sizes, read_entries, unpack_e2m1
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload, config_of

GROUP = 128  # channels that share a scale of a quantised activation
_WINDOW = 64  # entries of a window page
_PAGES = 3  # of a test pool beside those its tokens need, so that some rows stay as they were
_CONTEXT = 1 << 20


# errors: the share of quantised bytes that differ, infinite if one is further off than its neighbour


def e4m3_apart(data: Tensor, scale: Tensor, ref_data: Tensor, ref_scale: Tensor, slack: Tensor | float = 0.0) -> float:
    """How many E4M3 bytes [..., C] differ from the reference; scales [..., C / group] may move with them.

    `slack`: what a value may be off besides its own step.
    """
    steps = []
    for values, factors in ((data, scale), (ref_data, ref_scale)):
        wide = factors.repeat_interleave(values.shape[-1] // factors.shape[-1], -1)
        size = values.float().abs().clamp(min=2.0**-6)
        steps.append((values.float() * wide, torch.exp2(torch.floor(torch.log2(size)) - 3) * wide))
    (out, step), (ref, ref_step) = steps
    near = (out - ref).abs() <= torch.maximum(step, ref_step) + slack
    return _count(near, data.view(torch.uint8) != ref_data.view(torch.uint8))


def e2m1_apart(data: Tensor, scale: Tensor, ref_data: Tensor, ref_scale: Tensor) -> float:
    """How many bytes of packed E2M1 [..., C / 2] differ from the reference."""
    steps = []
    for values, factors in ((data, scale), (ref_data, ref_scale)):
        codes = unpack_e2m1(values)
        wide = factors.repeat_interleave(codes.shape[-1] // factors.shape[-1], -1)
        size = codes.abs()
        steps.append((codes * wide, torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)) * wide))
    (out, step), (ref, ref_step) = steps
    return _count((out - ref).abs() <= torch.maximum(step, ref_step), data != ref_data)


def _count(near: Tensor, differs: Tensor) -> float:
    return float(differs.sum().item()) if bool(near.all()) else math.inf


def quantised_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of (data, scale): the share of bytes that differ."""
    (data, scale), (ref_data, ref_scale) = outputs, expected
    if data.shape != ref_data.shape or scale.shape != ref_scale.shape:
        return math.inf
    return e4m3_apart(data, scale, ref_data, ref_scale) / max(1, data.numel())


def kv_error(out: Tensor, ref: Tensor, *, head_dim: int, rope_dim: int, entries_per_page: int, written: int) -> float:
    """Of packed pools of which `written` rows are new: the share of their bytes that differ. The null page is free."""
    sizes = kv_sizes(head_dim, rope_dim)
    found = _changed_rows(out, ref, sizes, entries_per_page)
    if found is None:
        return math.inf
    (data, scales), (ref_data, ref_scales) = found
    plain, groups = head_dim - rope_dim, (head_dim - rope_dim) // kv_group(head_dim, rope_dim)
    if not torch.equal(scales[:, groups:], ref_scales[:, groups:]):
        return math.inf
    fp8 = torch.float8_e4m3fn
    count = e4m3_apart(
        data[:, :plain].contiguous().view(fp8), from_e8m0(scales[:, :groups]),
        ref_data[:, :plain].contiguous().view(fp8), from_e8m0(ref_scales[:, :groups]),
    )  # fmt: skip
    turned, ref_turned = (d[:, plain:].contiguous().view(torch.bfloat16).float() for d in (data, ref_data))
    # a normed channel that fell to its neighbour moves both channels of its pair
    near = (turned - ref_turned).abs() <= 2.0**-7 * ref_turned.abs().amax(-1, keepdim=True)
    count += _count(near, turned != ref_turned)
    return count / max(1, written * sum(sizes))


def index_error(out: Tensor, ref: Tensor, *, dim: int, fmt: Any, entries_per_page: int, written: int) -> float:
    """The same for packed index keys."""
    sizes = index_sizes(dim, fmt)
    found = _changed_rows(out, ref, sizes, entries_per_page)
    if found is None:
        return math.inf
    (data, scales), (ref_data, ref_scales) = found
    if fmt == "fp8":
        fp8, f32 = torch.float8_e4m3fn, torch.float32
        values = ref_data.view(fp8).float() * ref_scales.view(f32)
        # Hadamard spreads a channel that fell to its neighbour over all of the key
        slack = 2.0**-8 * values.abs().amax(-1, keepdim=True)
        count = e4m3_apart(data.view(fp8), scales.view(f32), ref_data.view(fp8), ref_scales.view(f32), slack)
    else:
        groups = max(1, dim // 32)
        if not torch.equal(scales[:, groups:], ref_scales[:, groups:]):
            return math.inf
        count = e2m1_apart(data, from_e8m0(scales[:, :groups]), ref_data, from_e8m0(ref_scales[:, :groups]))
    return count / max(1, written * sum(sizes))


def _changed_rows(
    out: Tensor, ref: Tensor, sizes: tuple[int, int], entries_per_page: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """(data, scales) of both pools in the rows that differ, the null page left out."""
    if out.shape != ref.shape:
        return None
    rows = torch.arange(entries_per_page, out.shape[0], device=out.device)
    data, scales = read_entries(out, rows, sizes[0], entries_per_page=entries_per_page)
    ref_data, ref_scales = read_entries(ref, rows, sizes[0], entries_per_page=entries_per_page)
    differs = (data != ref_data).any(1) | (scales != ref_scales).any(1)
    return (data[differs].contiguous(), scales[differs].contiguous()), (
        ref_data[differs].contiguous(), ref_scales[differs].contiguous(),
    )  # fmt: skip


# inputs


class Draw:
    """Random tensors on a generator's device."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.device = generator, generator.device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator, device=self.device)

    def rows(self, tokens: int, *rest: int) -> Tensor:
        """bfloat16 rows of sizes from 1/16 to 16, some channels larger than others."""
        size = torch.exp2(8 * torch.rand(tokens, *(1 for _ in rest), generator=self.generator, device=self.device) - 4)
        channel = 0.5 + torch.rand(rest[-1], generator=self.generator, device=self.device)
        return (self.normal(tokens, *rest) * size * channel).to(torch.bfloat16)

    def weight(self, dim: int) -> Tensor:
        return (1 + 0.2 * self.normal(dim)).to(torch.bfloat16).float()

    def table(self, tokens: int, config: ModelConfig) -> Tensor:
        frequency = rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, config.rope_scaling)
        return rope_table(self.below(_CONTEXT, tokens), frequency.to(self.device))

    def pool(self, rows: int, entry_bytes: int) -> Tensor:
        return self.below(256, rows, entry_bytes).to(torch.uint8)

    def slots(self, count: int, pool_rows: int, entries_per_page: int) -> Tensor:
        """Distinct rows of a pool, outside the null page."""
        order = torch.randperm(pool_rows - entries_per_page, generator=self.generator, device=self.device)
        return entries_per_page + order[:count]


def pool_rows(count: int, entries_per_page: int) -> int:
    """Rows of a pool with room for `count` entries, the null page and a little more."""
    return (math.ceil(count / entries_per_page) + 1 + _PAGES) * entries_per_page


def _activation(*shape: int | str) -> Value:
    return Value(shape, "bfloat16")


def _weight(dim: int) -> Value:
    return Value((dim,), "float32", "weight", exact="bfloat16")


_INT = Value(("T",), "int64", "input")
Make = Callable[[Draw], Args]
Error = Callable[[Sequence[Tensor], Sequence[Tensor]], float]


def _quantised(*shape: int | str) -> tuple[Value, Value]:
    return Value(shape, "float8_e4m3fn"), Value((*shape[:-1], int(shape[-1]) // GROUP), "float32")


def _describe(op: str, config: ModelConfig, tokens: int) -> tuple[OpNode, Make, Error | None]:
    """Node, inputs and error of an op as the GPU program of a preset has it."""
    hidden, latent, inner = config.hidden_size, config.q_lora_rank, config.moe_intermediate_size
    heads, dim, rope = config.num_attention_heads, config.head_dim, config.qk_rope_head_dim
    eps, wide = config.rms_norm_eps, heads * dim
    table = Value(("T", rope), "float32")
    if op == "quantise_rows":
        mid = config.o_groups * config.o_lora_rank  # the output projection's inner rows; others are quantised when made
        node = OpNode(op, {"group": GROUP}, (_activation("T", mid),), _quantised("T", mid))
        return node, lambda d: [d.rows(tokens, mid)], quantised_error
    if op == "rms_norm":
        node = OpNode(op, {"eps": eps}, (_activation("T", hidden), _weight(hidden)), (_activation("T", hidden),))
        return node, lambda d: [d.rows(tokens, hidden), d.weight(hidden)], None
    if op == "rms_norm_quantise":
        # a view of the joint projection's columns
        x = Value(("T", latent), "bfloat16", strides=(latent + dim, 1))
        node = OpNode(op, {"eps": eps, "group": GROUP}, (x, _weight(latent)), _quantised("T", latent))
        return node, lambda d: [d.rows(tokens, latent + dim)[:, :latent], d.weight(latent)], quantised_error
    if op == "head_norm_rope":
        attrs = {"num_heads": heads, "eps": eps}
        node = OpNode(op, attrs, (_activation("T", wide), table), (_activation("T", heads, dim),))
        return node, lambda d: [d.rows(tokens, wide), d.table(tokens, config)], None
    if op == "rope_quantise":
        attrs = {"groups": config.o_groups, "group": GROUP}
        out = _quantised("T", config.o_groups, wide // config.o_groups)
        node = OpNode(op, attrs, (_activation("T", heads, dim), table), out)
        return node, lambda d: [d.rows(tokens, heads, dim), d.table(tokens, config)], quantised_error
    if op in ("swiglu_quantise", "swiglu_pair"):
        limit = {"limit": config.swiglu_limit}
        pair = (_activation("T", 2 * inner),)
        if op == "swiglu_pair":
            return OpNode(op, limit, pair, (_activation("T", inner),)), lambda d: [d.rows(tokens, 2 * inner)], None
        node = OpNode(op, {**limit, "group": GROUP}, pair, _quantised("T", inner))
        return node, lambda d: [d.rows(tokens, 2 * inner)], quantised_error
    rows, size = pool_rows(tokens, _WINDOW), sum(kv_sizes(dim, rope))
    pool = Value(("N_window", size), "uint8", "pool")
    near = functools.partial(kv_error, head_dim=dim, rope_dim=rope, entries_per_page=_WINDOW, written=tokens)
    attrs = {"eps": eps, "entries_per_page": _WINDOW}
    if op == "norm_rope_pack":
        node = OpNode(op, attrs, (pool, _INT, _activation("T", dim), _weight(dim), table), (), (0,))
        return (
            node,
            lambda d: [
                d.pool(rows, size), d.slots(tokens, rows, _WINDOW), d.rows(tokens, dim), d.weight(dim),
                d.table(tokens, config),
            ],
            lambda out, ref: near(out[0], ref[0]),
        )  # fmt: skip
    assert op == "qkv_norm_rope_pack"
    inputs = (pool, _INT, _activation("T", latent + dim), _weight(latent), _weight(dim), table)
    node = OpNode(op, {**attrs, "group": GROUP}, inputs, _quantised("T", latent), (0,))
    return (
        node,
        lambda d: [
            d.pool(rows, size), d.slots(tokens, rows, _WINDOW), d.rows(tokens, latent + dim), d.weight(latent),
            d.weight(dim), d.table(tokens, config),
        ],
        lambda out, ref: max(near(out[0], ref[0]), quantised_error(out[1:], ref[1:])),
    )  # fmt: skip


def _step_op(op: str, config: ModelConfig, tokens: int) -> tuple[OpNode, Make]:
    """The gathers, and what a step prepares once."""
    vocab, hidden, half = config.vocab_size, config.hidden_size, config.qk_rope_head_dim // 2
    ends = max(1, tokens // 4)
    requests, columns, per_page = 5, 7, 64
    if op.startswith("embed"):
        copies = config.hc_mult if op == "embed_streams" else 1
        out = _activation("T", copies, hidden) if copies > 1 else _activation("T", hidden)
        weight = Value((vocab, hidden), "bfloat16", "weight")
        node = OpNode(op, {"hc_mult": copies} if copies > 1 else {}, (_INT, weight), (out,))
        return node, lambda d: [d.below(vocab, tokens), d.normal(vocab, hidden).to(torch.bfloat16)]
    if op == "take_rows":
        streams = _activation("T", config.hc_mult, hidden)
        few = Value(("S",), "int64", "input")
        node = OpNode(op, {}, (streams, few), (_activation("S", config.hc_mult, hidden),))
        return node, lambda d: [d.rows(tokens, config.hc_mult, hidden), d.below(max(1, tokens), ends)]
    frequency = Value((half,), "float32", "weight")
    frequencies = rope_frequencies(2 * half, config.compress_rope_theta, config.rope_scaling)
    entries = Value(("E_4",), "int64", "input")
    if op == "rope_table":
        node = OpNode(op, {}, (_INT, frequency), (Value(("T", 2 * half), "float32"),))
        return node, lambda d: [d.below(_CONTEXT, tokens), frequencies.to(d.device)]
    if op == "entry_rope_table":
        node = OpNode(op, {"ratio": 4}, (_INT, entries, frequency), (Value(("E_4", 2 * half), "float32"),))
        return node, lambda d: [4 * d.below(_CONTEXT // 4, tokens) + 3, d.below(tokens, ends), frequencies.to(d.device)]
    pages = Value(("R", "P_c4" if op == "entry_slots" else "P_window"), "int64", "input")
    limit = columns * per_page

    def where(d: Draw, ratio: int) -> list[Tensor]:
        return [d.below(1000, requests, columns), d.below(requests, tokens), d.below(limit * ratio, tokens)]

    if op == "token_slots":
        node = OpNode(op, {"entries_per_page": per_page}, (pages, _INT, _INT), (_INT,))
        return node, lambda d: [*where(d, 1)]
    attrs = {"ratio": 4, "entries_per_page": per_page}
    node = OpNode("entry_slots", attrs, (pages, _INT, _INT, entries), (Value(("E_4",), "int64"),))
    return node, lambda d: [*where(d, 4), d.below(tokens, ends)]


_STEP = ("embed", "embed_streams", "take_rows", "rope_table", "entry_rope_table", "token_slots", "entry_slots")


def workload(op: str, model: str | ModelConfig, tokens: int, *, bench: bool = True) -> Workload:
    """One op of a preset at a number of tokens."""
    config = config_of(model)
    error: Error | None = None
    if op in _STEP:
        node, make = _step_op(op, config, tokens)
    else:
        node, make, error = _describe(op, config, tokens)
    few = max(1, tokens // 4)
    symbols = {
        "T": tokens, "E_4": few, "S": few, "R": 5, "P_window": 7, "P_c4": 7, "N_window": pool_rows(tokens, _WINDOW),
    }  # fmt: skip
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.role != "pool"]
    moved = float(sum(v.bytes(symbols) for v in values))
    if op.startswith("embed"):
        moved = float(tokens * (8 + config.hidden_size * 2 * (1 + int(node.attrs.get("hc_mult", 1)))))
    elif op == "take_rows":
        moved = float(symbols["S"] * (8 + config.hidden_size * config.hc_mult * 4))
    elif node.mutates:
        moved += tokens * sum(kv_sizes(config.head_dim, config.qk_rope_head_dim))
    used = {s for v in (*node.inputs, *node.outputs) if v is not None for s in v.shape if isinstance(s, str)}
    return Workload(
        label=f"{model} {'decode' if tokens <= 512 else 'prefill'} {tokens}",
        node=node,
        symbols={name: symbols[name] for name in sorted(used)},
        make=lambda generator: make(Draw(generator)),
        bytes_moved=moved,
        error=error,
        purpose=frozenset({"check", "bench"}) if bench else frozenset({"check"}),
    )


_PACKED = ("norm_rope_pack", "qkv_norm_rope_pack", "rms_norm_quantise")
_WIDE = ("head_norm_rope", "rope_quantise")
_PLAIN = ("quantise_rows", "rms_norm", "swiglu_quantise", "swiglu_pair")


def workloads() -> tuple[Workload, ...]:
    """Decode and prefill sizes; edges are checked only."""
    out = [workload(op, "flash", t) for op in (*_PACKED, *_WIDE, *_PLAIN) for t in (1, 64, 256, 1024, 4096, 8192)]
    out += [workload(op, "pro", t) for op in (*_PACKED, *_WIDE, *_PLAIN) for t in (64, 4096)]
    out += [workload(op, "flash", t) for op in _STEP for t in (64, 8192)]
    edges = [(op, model, t) for op in (*_PACKED, *_WIDE, *_PLAIN) for model in ("flash", "pro") for t in (0, 3, 513)]
    edges += [(op, "nano", t) for op in (*_PACKED, *_WIDE, *_PLAIN) for t in (0, 1, 65, 513)]
    edges += [(op, model, t) for op in _STEP for model in ("nano", "pro") for t in (1, 65)]
    out += [workload(op, model, t, bench=False) for op, model, t in edges]
    return tuple(out)
