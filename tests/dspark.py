"""A tiny model with a DSpark drafter of three stages, for tests of every part."""

from __future__ import annotations

import dataclasses

import torch

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.model import Transformer

TINY = ModelConfig(
    vocab_size=96, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=32, o_groups=2, o_lora_rank=16, sliding_window=8, compress_ratios=(0, 4, 16, 4, 0, 0, 0),
    index_n_heads=16, index_head_dim=16, index_topk=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, num_hash_layers=1, routed_scaling_factor=1.5, swiglu_limit=1.0,
    max_position_embeddings=512, dspark_block_size=5, dspark_noise_token_id=95, dspark_target_layer_ids=(1, 2, 3),
    dspark_markov_rank=16,
)  # fmt: skip
PLAIN = dataclasses.replace(
    TINY, compress_ratios=TINY.compress_ratios[:5], dspark_block_size=None, dspark_noise_token_id=None,
    dspark_target_layer_ids=None, dspark_markov_rank=None,
)  # fmt: skip
"""The same main model with an MTP layer."""
LAYOUT = StateLayout(window_page=8, block_tokens=16)


def tiny_model(seed: int = 0) -> Transformer:
    """Random, with everything varied that a fresh model leaves constant."""
    torch.manual_seed(seed)
    model = Transformer(TINY, LAYOUT).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("base", "ape", "attn_sink", "bias")):
                parameter.normal_(0, 0.5)
            elif name.endswith("scale") or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model
