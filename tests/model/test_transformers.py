"""The plain model against transformers' DeepseekV4ForCausalLM in float32, on random configs (model.md 7.1)."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4c.checkpoint.hf_names import plain_state
from dsv4c.config import ModelConfig, RopeScaling, StateLayout
from dsv4c.model import Transformer, init_state, make_step

S, C, H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
TOLERANCE = 5e-5
LENGTH = 300
LAYOUT = StateLayout()


def theirs(kinds: list[str], hca: int, **sizes: int) -> DeepseekV4ForCausalLM:
    """A random model of theirs, with everything randomised that its default init leaves constant."""
    config = DeepseekV4Config(
        vocab_size=512, num_hidden_layers=len(kinds), layer_types=kinds, num_key_value_heads=1, o_groups=2,
        n_shared_experts=1, num_hash_layers=2, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5,
        swiglu_limit=1.0, sliding_window=16, max_position_embeddings=4096, rope_theta=10000.0,
        compress_rope_theta=160000.0, compress_rates={C: 4, H: hca}, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6,
        rope_scaling={"type": "yarn", "factor": 16, "original_max_position_embeddings": 256, "beta_fast": 32,
                      "beta_slow": 1},
        rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1, pad_token_id=None, **sizes,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).eval().float()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("position_bias"):
                p.normal_(0, 0.5, generator=g)
            elif name.endswith("sinks"):
                p.normal_(0, 1, generator=g)
            elif name.endswith(("base", "hc_base")):
                p.normal_(0, 0.5, generator=g)
            elif name.endswith((".scale", "hc_scale")) or "norm" in name:
                p.uniform_(0.5, 1.5, generator=g)
            elif p.ndim >= 2:
                p.normal_(0, p.shape[-1] ** -0.5, generator=g)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.normal_(0, 0.1, generator=g)
            if name.endswith("tid2eid"):
                for row in b:
                    row.copy_(torch.randperm(config.n_routed_experts, generator=g)[: config.num_experts_per_tok])
    return model


def ours(model: DeepseekV4ForCausalLM, hca: int) -> Transformer:
    """The same weights in the plain model."""
    c = model.config
    ratio = {S: 0, C: 4, H: hca}
    config = ModelConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, head_dim=c.head_dim, qk_rope_head_dim=c.qk_rope_head_dim,
        q_lora_rank=c.q_lora_rank, o_groups=c.o_groups, o_lora_rank=c.o_lora_rank, sliding_window=c.sliding_window,
        compress_ratios=tuple(ratio[k] for k in c.layer_types), index_n_heads=c.index_n_heads,
        index_head_dim=c.index_head_dim, index_topk=c.index_topk, n_routed_experts=c.n_routed_experts,
        num_experts_per_tok=c.num_experts_per_tok, moe_intermediate_size=c.moe_intermediate_size, num_hash_layers=2,
        routed_scaling_factor=1.5, swiglu_limit=1.0, num_nextn_predict_layers=0,
        rope_scaling=RopeScaling(original_max_position_embeddings=256),
    )  # fmt: skip
    plain = Transformer(config, LAYOUT).eval()
    missing, unexpected = plain.load_state_dict(plain_state(model.state_dict()), strict=False)
    assert not missing, missing
    assert all("inv_freq" in name for name in unexpected), unexpected
    return plain


CASES = {
    "small": ([S, H, C, H, C, S], 16, {
        "hidden_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4, "head_dim": 64,
        "qk_rope_head_dim": 16, "q_lora_rank": 32, "o_lora_rank": 16, "num_experts_per_tok": 2,
        "n_routed_experts": 8, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 8}),
    "real-rates": ([H, C, S, C], 128, {
        "hidden_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 8, "head_dim": 32,
        "qk_rope_head_dim": 32, "q_lora_rank": 64, "o_lora_rank": 32, "num_experts_per_tok": 3,
        "n_routed_experts": 12, "index_n_heads": 32, "index_head_dim": 64, "index_topk": 16}),
    "wide-heads": ([C, C, H], 32, {
        "hidden_size": 64, "moe_intermediate_size": 96, "num_attention_heads": 2, "head_dim": 128,
        "qk_rope_head_dim": 64, "q_lora_rank": 48, "o_lora_rank": 24, "num_experts_per_tok": 6,
        "n_routed_experts": 16, "index_n_heads": 24, "index_head_dim": 64, "index_topk": 40}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    kinds, hca, sizes = CASES[case]
    torch.manual_seed(len(case))
    reference = theirs(kinds, hca, **sizes)
    plain = ours(reference, hca)
    ids = torch.randint(2, 512, (2, LENGTH))
    expected = reference(ids, use_cache=False).logits
    state = init_state(plain.config, LAYOUT, 2, LENGTH)
    whole, _ = plain(make_step(plain.config, LAYOUT, [(r, 0, ids[r]) for r in range(2)], LENGTH), state)
    assert (whole.view_as(expected) - expected).abs().max() < TOLERANCE
    parts = []
    for start, stop in ((0, 37), (37, 100), (100, 101), (101, 256), (256, 300)):
        spans = [(r, start, ids[r, start:stop]) for r in range(2)]
        logits, state = plain(make_step(plain.config, LAYOUT, spans, LENGTH), state)
        parts.append(logits.view(2, stop - start, -1))
    assert (torch.cat(parts, 1) - expected).abs().max() < TOLERANCE
