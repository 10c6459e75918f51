"""The family of an op: what a picture colours and a table sums by."""

from __future__ import annotations

from typing import Any

from dsv4c.ops import Op

FAMILIES: dict[str, str] = {
    "hyper": "mHC",
    "rows": "norm, rope, quantise",
    "linear": "linear",
    "attention": "attention",
    "index": "index",
    "cache": "cache",
    "moe": "gate, experts",
    "ends": "embedding, sampling",
    "aten": "aten",
}
"""Family -> what people call it, in the order of legends; `aten`: not raised yet."""

OPS_OF: dict[str, tuple[str, ...]] = {
    "hyper": (
        "hc_pre", "hc_post", "hc_head", "hc_pre_norm", "hc_post_pre_norm", "hc_head_norm", "hc_pre_norm_quantise",
        "hc_post_pre_norm_quantise",
    ),
    "rows": (
        "rms_norm", "head_norm", "rope", "rope_table", "entry_rope_table", "head_norm_rope", "split_heads",
        "split_heads_rope", "columns", "quantise_kv", "quantise_index", "quantise_rows", "rms_norm_quantise",
        "rope_quantise",
    ),
    "linear": ("linear", "grouped_linear", "linear_fp8", "grouped_linear_fp8", "linear_mixed"),
    "attention": (
        "attend_window", "attend_csa", "attend_hca", "attend_window_packed", "attend_csa_packed", "attend_hca_packed",
        "attend_block",
    ),
    "index": ("index_topk", "index_query", "index_scores", "topk_rows", "index_topk_packed"),
    "cache": (
        "token_slots", "entry_slots", "page_write", "norm_rope_write", "norm_rope_pack", "qkv_norm_rope_pack",
        "compress", "compress_pack", "compress_online_pack",
    ),
    "moe": (
        "gate_bias", "gate_hash", "gate_linear_bias", "gate_linear_hash", "swiglu", "swiglu_pair", "swiglu_quantise",
        "experts", "experts_fp4", "experts_mx", "experts_nvfp4",
    ),
    "ends": (
        "embed", "embed_streams", "take_rows", "add_embedding", "feed_tokens", "keep_tokens", "edit_logits", "sample",
        "sample_penalised", "sample_drafted", "feed_drafts", "feed_spans", "feed_ends", "row_facts", "accept_drafts",
        "place_tokens", "advance_rows", "keep_draft", "stream_rows", "row_streams", "mean_streams", "extend_tap",
        "markov_draft",
    ),
}  # fmt: skip

_FAMILY = {name: family for family, names in OPS_OF.items() for name in names}


def family_of(target: Any) -> str:
    """The family of a call's target, an op or the name of one. A user's own op has none of ours: `ends`."""
    name = target.name if isinstance(target, Op) else target
    return _FAMILY.get(name, "ends") if isinstance(name, str) else "aten"
