"""A small model with every kind of sublayer, captured once for all tests of passes."""

from __future__ import annotations

import pytest
import torch

from dsv4c.capturing import capture
from dsv4c.config import ModelConfig, StateLayout
from dsv4c.model import Transformer
from dsv4c.passes import RAISE
from dsv4c.pipeline import Pipeline
from dsv4c.program import Program

SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, head_dim=16, qk_rope_head_dim=8,
    q_lora_rank=16, o_groups=2, o_lora_rank=8, sliding_window=8, compress_ratios=(0, 4, 16, 4, 0), index_n_heads=16,
    index_head_dim=16, index_topk=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    num_hash_layers=1, routed_scaling_factor=1.5, max_position_embeddings=512,
)  # fmt: skip
LAYOUT = StateLayout(window_page=8, block_tokens=16)


@pytest.fixture(scope="session")
def captured() -> Program:
    return capture(SMALL, LAYOUT)


@pytest.fixture(scope="session")
def stitched(captured: Program) -> Program:
    """Raised and stitched; what passes behind the stitch begin with."""
    return Pipeline(RAISE).run(captured)


@pytest.fixture(scope="session")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(SMALL, LAYOUT).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("base", "ape", "attn_sink", "bias")):
                parameter.normal_(0, 0.5)
    return model
