"""Multi-token prediction: one more block that drafts the token after next (model.md 2.13).

Its block is window-only (base 10000, no YaRN), its gate is a bias gate, and it shares embedding and head with the
main model.

Legend: T tokens, N streams, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.model.block import Block, _small
from dsv4c.model.hyper import HyperHead
from dsv4c.model.linear import Linear
from dsv4c.model.norm import RMSNorm


def add_embedding(e_TD: Tensor, h_TND: Tensor) -> Tensor:
    """Adds the next token's projected embedding to each projected stream."""
    return e_TD.unsqueeze(1) + h_TND


class AddEmbedding(nn.Module):
    def forward(self, e_TD: Tensor, h_TND: Tensor) -> Tensor:
        return add_embedding(e_TD, h_TND)


class MultiTokenPredictor(Block):
    def __init__(self, config: ModelConfig, layout: StateLayout, *, fake_quant: bool) -> None:
        super().__init__(config, layout, config.num_hidden_layers, fake_quant=fake_quant)
        n, dim, eps = config.hc_mult, config.hidden_size, config.rms_norm_eps
        self.e_proj, self.h_proj = Linear(dim, dim), Linear(dim, dim)
        self.enorm, self.hnorm, self.norm = RMSNorm(dim, eps), RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.hc_head_fn = nn.Parameter(_small(n, n * dim))
        self.hc_head_base = nn.Parameter(torch.zeros(n))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.add = AddEmbedding()
        self.hc_head = HyperHead(eps, config.hc_eps)

    def merge(self, x_TND: Tensor, embedding_TD: Tensor) -> Tensor:
        """The block's input streams: the main model's last streams joined with the next token's embedding."""
        out: Tensor = self.add(self.e_proj(self.enorm(embedding_TD)), self.h_proj(self.hnorm(x_TND)))
        return out

    def collapse(self, x_TND: Tensor) -> Tensor:
        """[S, D] input of the shared head."""
        out: Tensor = self.norm(self.hc_head(x_TND, self.hc_head_fn, self.hc_head_base, self.hc_head_scale))
        return out
