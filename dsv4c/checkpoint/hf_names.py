"""Names of transformers' converted checkpoints, in terms of the original ones (model.md 3.2)."""

from __future__ import annotations

from torch import Tensor

_RENAMED = (
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("attn_hc.", "hc_attn_"),
    ("ffn_hc.", "hc_ffn_"),
    ("self_attn.compressor.indexer.scorer.weights_proj", "attn.indexer.weights_proj"),
    ("self_attn.compressor.indexer.q_b_proj", "attn.indexer.wq_b"),
    ("self_attn.compressor.indexer.", "attn.indexer.compressor."),
    ("self_attn.compressor.", "attn.compressor."),
    ("compressor.kv_proj", "compressor.wkv"),
    ("gate_proj.weight", "wgate.weight"),
    ("position_bias", "ape"),
    ("compressor.kv_norm", "compressor.norm"),
    ("self_attn.sinks", "attn.attn_sink"),
    ("self_attn.q_a_proj", "attn.wq_a"),
    ("self_attn.q_a_norm", "attn.q_norm"),
    ("self_attn.q_b_proj", "attn.wq_b"),
    ("self_attn.kv_proj", "attn.wkv"),
    ("self_attn.kv_norm", "attn.kv_norm"),
    ("self_attn.o_a_proj", "attn.wo_a"),
    ("self_attn.o_b_proj", "attn.wo_b"),
    ("mlp.gate.e_score_correction_bias", "ffn.gate.bias"),
    ("mlp.shared_experts.wgate", "ffn.shared_experts.w1"),
    ("mlp.shared_experts.up_proj", "ffn.shared_experts.w3"),
    ("mlp.shared_experts.down_proj", "ffn.shared_experts.w2"),
    ("mlp.experts.down_proj", "ffn.experts.w2"),
    ("mlp.", "ffn."),
    ("model.embed_tokens", "embed"),
    ("lm_head", "head"),
    ("model.hc_head.hc_", "hc_head_"),
    ("model.norm", "norm"),
    ("model.", ""),
)
"""Substring replacements, applied in this order."""

GATE_UP = "mlp.experts.gate_up_proj"
"""[E, 2I, D]: rows of w1, then of w3, of every expert."""


def plain_names(hf_name: str) -> tuple[str, ...]:
    """The plain model's parameters that a tensor of transformers holds: two for the fused gate and up projection."""
    if hf_name.endswith(GATE_UP):
        prefix = hf_name.removeprefix("model.").replace(GATE_UP, "ffn.experts.")
        return prefix + "w1", prefix + "w3"
    for old, new in _RENAMED:
        hf_name = hf_name.replace(old, new)
    return (hf_name,)


def plain_state(hf_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state dict -> the plain model's. Rotary tables keep their (unused) names."""
    out: dict[str, Tensor] = {}
    for name, value in hf_state.items():
        names = plain_names(name)
        out.update(zip(names, value.chunk(len(names), 1) if len(names) > 1 else (value,), strict=True))
    return out
