"""One layer: an attention sublayer and an MoE sublayer, each between `hc_pre` + norm and `hc_post`.

The two halves are methods of their own because the compiler captures them apart (model.md 2.2).
Legend: T tokens, N streams, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.model.attention import Attention
from dsv4c.model.hyper import HyperPost, HyperPre
from dsv4c.model.moe import MoE
from dsv4c.model.norm import RMSNorm


class Block(nn.Module):
    """Layer `layer` of the main model, or an MTP block (the layer after the last: window only, bias gate)."""

    def __init__(self, config: ModelConfig, layout: StateLayout, layer: int, *, fake_quant: bool) -> None:
        super().__init__()
        n = config.hc_mult
        for part in ("attn", "ffn"):
            self.register_parameter(f"hc_{part}_fn", nn.Parameter(_small(n * (2 + n), n * config.hidden_size)))
            self.register_parameter(f"hc_{part}_base", nn.Parameter(torch.zeros(n * (2 + n))))
            self.register_parameter(f"hc_{part}_scale", nn.Parameter(torch.ones(3)))
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, layout, layer, fake_quant=fake_quant)
        self.ffn = MoE(config, config.gate_kind(layer))
        mix = (config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters)
        self.attn_hc_pre, self.attn_hc_post = HyperPre(*mix), HyperPost()
        self.ffn_hc_pre, self.ffn_hc_post = HyperPre(*mix), HyperPost()

    def attention(
        self, x_TND: Tensor, state: dict[str, Tensor], step: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The streams after the attention sublayer, and this layer's state."""
        x, post, comb = self.attn_hc_pre(x_TND, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)
        y, state = self.attn(self.attn_norm(x), state, step)
        return self.attn_hc_post(y, x_TND, post, comb), state

    def feed_forward(self, x_TND: Tensor, token_ids: Tensor) -> Tensor:
        """The streams after the MoE sublayer."""
        x, post, comb = self.ffn_hc_pre(x_TND, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale)
        y = self.ffn(self.ffn_norm(x), token_ids)
        out: Tensor = self.ffn_hc_post(y, x_TND, post, comb)
        return out

    def forward(
        self, x_TND: Tensor, state: dict[str, Tensor], step: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_TND, state = self.attention(x_TND, state, step)
        return self.feed_forward(x_TND, step["token_ids"]), state


def _small(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns).normal_(0, columns**-0.5)
