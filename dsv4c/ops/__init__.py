"""The logical dialect `dsv4.*`: what the passes raise the plain model to, fuse, and hand to the schedules.

The plain model's own functions are the references. `OPS` maps a name to its op; `LEAVES` maps a leaf module class
of the plain model to the op that replaces its region; `VIEWS` are ops that a plan turns into strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv4c.model import attention as plain_attention
from dsv4c.model import compressor, indexer, linear, moe, mtp, norm, paging, quant, rope, transformer
from dsv4c.model import dspark as plain_dspark
from dsv4c.model import hyper as plain_hyper
from dsv4c.ops import (
    attention,
    compress,
    dspark,
    entries,
    experts,
    fused,
    hyper,
    index,
    linears,
    mx,
    rows,
    sampling,
    speculation,
)
from dsv4c.ops._op import DTYPE_BYTES, Index, Op, TensorType

__all__ = ["DTYPE_BYTES", "LEAVES", "OPS", "VIEWS", "Index", "Op", "TensorType"]

Types = Sequence[TensorType]
Symbols = Mapping[str, int]


def _linear_flops(types: Types, attrs: Mapping[str, Any], symbols: Symbols) -> int:
    x, weight = types[0], types[-1]
    return 2 * x.numel(symbols) * int(weight.shape[0])


def _grouped_flops(types: Types, attrs: Mapping[str, Any], symbols: Symbols) -> int:
    return 2 * types[0].numel(symbols) * int(types[-1].shape[0]) // int(attrs["groups"])


def _hc_flops(types: Types, attrs: Mapping[str, Any], symbols: Symbols) -> int:
    streams = next(t for t in types if len(t.shape) == 3 and not isinstance(t.shape[2], str) and t.shape[2] > 8)
    n = int(streams.shape[1])
    return streams.numel(symbols) * (2 * n * (n + 2) + 2 + 2 * n)


def _attention_flops(types: Types, attrs: Mapping[str, Any], symbols: Symbols) -> int:
    keys = int(attrs["window"])
    if len(types) > 6:
        picked = types[5] if types[5].shape[-1] != types[0].shape[0] and len(types[5].shape) == 2 else None
        entries = symbols.get("context", 0) // int(attrs.get("ratio", 4))
        keys += int(picked.shape[1]) if picked is not None else entries
    return 4 * types[0].numel(symbols) * keys


def _experts_flops(types: Types, attrs: Mapping[str, Any], symbols: Symbols) -> int:
    chosen, w1 = types[1], types[3]
    return 6 * chosen.numel(symbols) * int(w1.shape[1]) * int(w1.shape[2])


def _index_flops(types: Types, attrs: Mapping[str, Any], symbols: Symbols) -> int:
    return 2 * types[0].numel(symbols) * (symbols.get("context", 0) // int(attrs["ratio"]))


_ROWS: Mapping[str | int, Index] = {"request_rows": Index("pages_RP")}
_ENDS: Mapping[str | int, Index] = {"ends": Index("positions", low=-1)}
_SLOTS: Mapping[str | int, Index] = {"slots": Index("pool")}

_ALL = (
    Op("embed", transformer.embed, indices={"token_ids": Index("weight")}),
    Op("embed_streams", transformer.embed_streams, indices={"token_ids": Index("weight")}),
    Op("take_rows", paging.take_rows, indices={"rows": Index("x")}),
    Op("rope_table", rope.rope_table),
    Op("entry_rope_table", entries.entry_rope_table, indices=_ENDS, module=rope.entry_rope_table),
    Op("token_slots", paging.token_slots, indices=_ROWS),
    Op("entry_slots", entries.entry_slots, indices={**_ROWS, **_ENDS}, module=paging.entry_slots),
    Op("hc_pre", plain_hyper.hc_pre, outputs=3, flops=_hc_flops),
    Op("hc_post", plain_hyper.hc_post, flops=_hc_flops),
    Op("hc_head", plain_hyper.hc_head, flops=_hc_flops),
    Op("rms_norm", norm.rms_norm),
    Op("head_norm", norm.head_norm),
    Op("rope", rope.rope),
    Op("linear", linear.linear, flops=_linear_flops),
    Op("grouped_linear", linear.grouped_linear, flops=_grouped_flops),
    Op("page_write", paging.page_write, in_place={0: "pool"}, indices=_SLOTS),
    Op("quantise_kv", quant.quantise_kv),
    Op("quantise_index", quant.quantise_index),
    Op(
        "compress",
        compressor.compress,
        outputs=3,
        in_place={1: "ring_k", 2: "ring_z"},
        indices={**_ENDS, "request_rows": Index("seq_starts"), "state_slots": Index("ring_k")},
    ),
    Op("split_heads", fused.split_heads),
    Op(
        "index_topk",
        indexer.index_topk,
        flops=_index_flops,
        indices={**_ROWS, 0: Index("pages_RP", dims=(1,), low=-1, times="entries_per_page")},
    ),
    Op("attend_window", plain_attention.attend_window, flops=_attention_flops, indices=_ROWS),
    Op(
        "attend_csa",
        plain_attention.attend_csa,
        flops=_attention_flops,
        indices={**_ROWS, "picks_TK": Index("entry_pages_RP", dims=(1,), low=-1, times="entries_per_page")},
    ),
    Op("attend_hca", plain_attention.attend_hca, flops=_attention_flops, indices=_ROWS),
    Op("gate_bias", moe.gate_bias, outputs=2, indices={0: Index("bias_E")}),
    Op(
        "gate_hash",
        moe.gate_hash,
        outputs=2,
        indices={0: Index("logits_TE", dims=(1,)), "token_ids": Index("tid2eid_VK")},
    ),
    Op("swiglu", moe.swiglu),
    Op("experts", moe.experts, flops=_experts_flops, indices={"experts_TK": Index("w1_EID")}),
    Op("add_embedding", mtp.add_embedding),
    *dspark.OPS,
    # fused
    Op("hc_pre_norm", fused.hc_pre_norm, outputs=3, flops=_hc_flops),
    Op("hc_post_pre_norm", fused.hc_post_pre_norm, outputs=4, flops=_hc_flops),
    Op("hc_head_norm", fused.hc_head_norm, flops=_hc_flops),
    Op("head_norm_rope", fused.head_norm_rope),
    Op("split_heads_rope", fused.split_heads_rope),
    Op("norm_rope_write", fused.norm_rope_write, in_place={0: "pool"}, indices=_SLOTS),
    Op("swiglu_pair", fused.swiglu_pair),
    Op("columns", fused.columns),
    Op("stream_rows", fused.stream_rows),
    Op("row_streams", fused.row_streams),
    # of stored formats
    *hyper.OPS,
    *rows.OPS,
    *compress.OPS,
    *index.OPS,
    *attention.OPS,
    *experts.OPS,
    *mx.OPS,
    *linears.OPS,
    *sampling.OPS,
    *speculation.OPS,
)

OPS: Mapping[str, Op] = {op.name: op for op in _ALL}

VIEWS: frozenset[str] = frozenset({"columns", "row_streams", "split_heads", "stream_rows"})

LEAVES: Mapping[str, str] = {
    f"{cls.__module__}.{cls.__qualname__}": name
    for cls, name in (
        (transformer.Embed, "embed"),
        (transformer.EmbedStreams, "embed_streams"),
        (paging.TakeRows, "take_rows"),
        (rope.RopeTable, "rope_table"),
        (rope.EntryRopeTable, "entry_rope_table"),
        (paging.TokenSlots, "token_slots"),
        (paging.EntrySlots, "entry_slots"),
        (plain_hyper.HyperPre, "hc_pre"),
        (plain_hyper.HyperPost, "hc_post"),
        (plain_hyper.HyperHead, "hc_head"),
        (norm.RMSNorm, "rms_norm"),
        (norm.HeadNorm, "head_norm"),
        (rope.Rope, "rope"),
        (linear.Linear, "linear"),
        (moe.Gate, "linear"),
        (linear.GroupedLinear, "grouped_linear"),
        (paging.PageWrite, "page_write"),
        (quant.QuantiseKV, "quantise_kv"),
        (quant.QuantiseIndex, "quantise_index"),
        (compressor.Compress, "compress"),
        (indexer.SplitHeads, "split_heads"),
        (indexer.IndexTopk, "index_topk"),
        (plain_attention.AttendWindow, "attend_window"),
        (plain_attention.AttendCsa, "attend_csa"),
        (plain_attention.AttendHca, "attend_hca"),
        (moe.GateBias, "gate_bias"),
        (moe.GateHash, "gate_hash"),
        (moe.Swiglu, "swiglu"),
        (moe.Experts, "experts"),
        (mtp.AddEmbedding, "add_embedding"),
        (plain_dspark.StreamMean, "mean_streams"),
        (plain_dspark.ExtendTap, "extend_tap"),
        (plain_dspark.AttendBlock, "attend_block"),
        (plain_dspark.MarkovDraft, "markov_draft"),
    )
}
