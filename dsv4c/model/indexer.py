"""The lightning indexer of csa layers: which compressed entries a token attends to (model.md 2.9).

Legend: T tokens, I `index_n_heads`, C `index_head_dim`, K `index_topk`, N pool rows, R requests, P pages.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.model.compressor import Compressor
from dsv4c.model.linear import Linear
from dsv4c.model.paging import entry_rows
from dsv4c.model.quant import QuantiseIndex
from dsv4c.model.rope import Rope


def index_topk(
    q_TIC: Tensor,
    weight_TI: Tensor,
    pool_NC: Tensor,
    pages_RP: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    *,
    ratio: int,
    entries_per_page: int,
    topk: int,
) -> Tensor:
    """[T, K] entries with the highest scores among those a token sees, best first; -1 where it sees fewer.

    The score of entry e is the sum over heads of weight * relu(q . key_e), float32, scaled by (C * I)^-1/2. NaN
    counts as -inf and the earlier entry wins a tie. Needs P * entries_per_page > K.
    """
    entry = torch.arange(pages_RP.shape[1] * entries_per_page, device=positions.device)
    rows = entry_rows(pages_RP, torch.arange(pages_RP.shape[0], device=positions.device).unsqueeze(1), entry,
                      entries_per_page)  # fmt: skip
    keys = pool_NC[rows][request_rows].float()
    scores = torch.einsum("tic,tec->tie", q_TIC.float(), keys).relu()
    scale = (q_TIC.shape[1] * q_TIC.shape[2]) ** -0.5
    scores = torch.einsum("tie,ti->te", scores, weight_TI.float() * scale)
    hidden = entry >= ((positions + 1) // ratio).unsqueeze(1)
    scores = scores.masked_fill(hidden | scores.isnan(), float("-inf"))
    best, picks = scores.sort(dim=-1, descending=True, stable=True)
    best, picks = best[:, :topk], picks[:, :topk]
    return torch.where(best == float("-inf"), -1, picks)


class IndexTopk(nn.Module):
    def __init__(self, ratio: int, entries_per_page: int, topk: int) -> None:
        super().__init__()
        self.ratio, self.entries_per_page, self.topk = ratio, entries_per_page, topk

    def forward(
        self,
        q_TIC: Tensor,
        weight_TI: Tensor,
        pool_NC: Tensor,
        pages_RP: Tensor,
        request_rows: Tensor,
        positions: Tensor,
    ) -> Tensor:
        return index_topk(
            q_TIC, weight_TI, pool_NC, pages_RP, request_rows, positions,
            ratio=self.ratio, entries_per_page=self.entries_per_page, topk=self.topk,
        )  # fmt: skip


class SplitHeads(nn.Module):
    """[T, I * C] to [T, I, C]: no arithmetic."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, q: Tensor) -> Tensor:
        heads: Tensor = q.unflatten(-1, (self.num_heads, -1))
        return heads


class Indexer(nn.Module):
    def __init__(self, config: ModelConfig, layout: StateLayout, ratio: int, *, fake_quant: bool) -> None:
        super().__init__()
        self.wq_b = Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim)
        self.weights_proj = Linear(config.hidden_size, config.index_n_heads)
        self.compressor = Compressor(config, ratio, config.index_head_dim, index=True, fake_quant=fake_quant)
        self.heads = SplitHeads(config.index_n_heads)
        self.rope = Rope()
        self.quantise = QuantiseIndex(min(32, config.index_head_dim)) if fake_quant else None
        self.topk = IndexTopk(ratio, layout.entries_per_page(ratio), config.index_topk)

    def forward(
        self, x_TD: Tensor, latent: Tensor, state: dict[str, Tensor], step: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The picks [T, K], and the index pool and rings after this step. `latent` is the normed q latent."""
        pool, ring_k, ring_z = self.compressor(
            x_TD, state["index"], state["index_ring_k"], state["index_ring_z"], step["slots_index"], step
        )
        q_TIC = self.rope(self.heads(self.wq_b(latent)), step["rope_compressed"])
        if self.quantise is not None:
            q_TIC = self.quantise(q_TIC)
        picks = self.topk(
            q_TIC, self.weights_proj(x_TD), pool, step["pages_index"], step["request_rows"], step["positions"]
        )
        return picks, {"index": pool, "index_ring_k": ring_k, "index_ring_z": ring_z}
