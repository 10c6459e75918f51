"""DSpark: a few window-only blocks (stages) that draft a block of tokens in one pass (model.md 1.4, 2.13).

    tap      what the main model knows of a token: the mean of its streams behind each target layer, side by side
    absorb   tokens that the main model has seen: every stage's entry of each, made from its tap, goes into its window
    draft    [accepted token, noise, noise, ...] at the positions behind them, through all stages at once: every row
             sees the last `sliding_window` absorbed entries and the whole block, later rows included. Then the Markov
             head walks the block and chooses a token a row, and the confidence head says how sure each one is.

A block's own keys are read from the batch and never written, so the windows hold absorbed tokens only, whatever was
drafted. Absorbing tokens that are rejected later does no harm either: a draft reads positions below its first row's,
and the next tokens at those positions overwrite them.

Legend: T tokens, R requests, B `dspark_block_size`, N streams, D hidden_size, F channels of the tap (D a target layer),
H heads, C head_dim, W `sliding_window`, K pool rows, P pages, V vocab_size, M `dspark_markov_rank`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4c.config import DSpark, ModelConfig, StateLayout
from dsv4c.model.attention import Attention, sink_softmax_attention
from dsv4c.model.block import Block, _small
from dsv4c.model.hyper import HyperHead
from dsv4c.model.linear import Linear
from dsv4c.model.norm import RMSNorm
from dsv4c.model.paging import entry_rows


def mean_streams(x_TND: Tensor) -> Tensor:
    """[T, D]: the mean of a token's streams, in float32 inside."""
    return x_TND.float().mean(1).to(x_TND.dtype)


def extend_tap(tap_TF: Tensor, x_TND: Tensor) -> Tensor:
    """[T, F + D]: the tap of earlier target layers, then the mean of this one's streams."""
    return torch.cat((tap_TF, mean_streams(x_TND)), -1)


def attend_block(
    q_THC: Tensor,
    pool_KC: Tensor,
    pages_RP: Tensor,
    block_TC: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    block_rows: Tensor,
    sink_H: Tensor,
    *,
    window: int,
    page: int,
    block: int,
) -> Tensor:
    """Attention over the last `window` entries before a row's block, and all `block` rows of it: [T, H, C].

    `block_rows` [R] is the first row of each request's block; `block_TC` holds the rows' own entries.
    """
    first = block_rows[request_rows]
    at = positions[first].unsqueeze(1) - torch.arange(window, 0, -1, device=positions.device)
    rows = entry_rows(pages_RP, request_rows.unsqueeze(1), at.clamp(min=0), page)
    own = first.unsqueeze(1) + torch.arange(block, device=positions.device)
    keys = torch.cat((pool_KC[rows], block_TC[own]), 1)
    return sink_softmax_attention(q_THC, keys, torch.cat((at >= 0, torch.ones_like(own, dtype=torch.bool)), 1), sink_H)


def markov_draft(
    logits_TV: Tensor,
    x_TD: Tensor,
    token_ids: Tensor,
    block_rows: Tensor,
    w1_VM: Tensor,
    w2_VM: Tensor,
    proj_1E: Tensor,
    *,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Drafts int64 [R, B] and their confidences float32 [R, B] (logits of being accepted, if those before are).

    Row i of a block chooses the token after it: the likeliest by its own logits and those that the Markov head gives
    the token before, which is the accepted one (`token_ids` of the block's first row) for row 0. The earlier token wins
    a tie.
    """
    token, drafts, confidences = token_ids[block_rows], [], []
    for i in range(block):
        row, before = block_rows + i, w1_VM[token].float()
        confidences.append(torch.cat((x_TD[row].float(), before), -1) @ proj_1E[0].float())
        token = (logits_TV[row] + before @ w2_VM.float().T).argmax(-1)
        drafts.append(token)
    return torch.stack(drafts, 1), torch.stack(confidences, 1)


class StreamMean(nn.Module):
    def forward(self, x_TND: Tensor) -> Tensor:
        return mean_streams(x_TND)


class ExtendTap(nn.Module):
    def forward(self, tap_TF: Tensor, x_TND: Tensor) -> Tensor:
        return extend_tap(tap_TF, x_TND)


class AttendBlock(nn.Module):
    def __init__(self, window: int, page: int, block: int) -> None:
        super().__init__()
        self.window, self.page, self.block = window, page, block

    def forward(
        self,
        q: Tensor,
        pool: Tensor,
        pages: Tensor,
        block_TC: Tensor,
        request_rows: Tensor,
        positions: Tensor,
        block_rows: Tensor,
        sink: Tensor,
    ) -> Tensor:
        return attend_block(
            q, pool, pages, block_TC, request_rows, positions, block_rows, sink,
            window=self.window, page=self.page, block=self.block,
        )  # fmt: skip


class MarkovDraft(nn.Module):
    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        logits: Tensor,
        x: Tensor,
        token_ids: Tensor,
        block_rows: Tensor,
        w1: Tensor,
        w2: Tensor,
        proj: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return markov_draft(logits, x, token_ids, block_rows, w1, w2, proj, block=self.block)


class MarkovHead(nn.Module):
    """Logits of the next token from the one before it alone: w2 (w1 of the token), of low rank."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = Linear(rank, vocab_size)


class ConfidenceHead(nn.Module):
    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.proj = Linear(in_features, 1)


class DSparkAttention(Attention):
    """A window of absorbed tokens and a block of drafted ones."""

    def __init__(self, config: ModelConfig, layout: StateLayout, layer: int, block: int, *, fake_quant: bool) -> None:
        super().__init__(config, layout, layer, fake_quant=fake_quant)
        self.attend = AttendBlock(config.sliding_window, layout.entries_per_page(0), block)

    def absorb(self, main_x_TD: Tensor, pool_KC: Tensor, step: dict[str, Tensor]) -> Tensor:
        """The window's pool with the entries of these tokens."""
        out: Tensor = self.write(pool_KC, step["slots_window"], self.entries(main_x_TD, step["rope_window"]))
        return out

    def forward(
        self, x_TD: Tensor, state: dict[str, Tensor], step: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sublayer's output [T, D], and the layer's state, unchanged."""
        table = step["rope_window"]
        _, q = self.queries(x_TD, table)
        o = self.attend(
            q, state["window"], step["pages_window"], self.entries(x_TD, table), step["request_rows"],
            step["positions"], step["block_rows"], self.attn_sink,
        )  # fmt: skip
        return self.output(o, table), state


class DSparkStage(Block):
    """Stage `stage` of the drafter: the first one reads the tap, the last one chooses the drafts."""

    attn: DSparkAttention

    def __init__(
        self, config: ModelConfig, layout: StateLayout, spark: DSpark, stage: int, *, fake_quant: bool
    ) -> None:
        layer = config.num_hidden_layers + stage
        super().__init__(config, layout, layer, fake_quant=fake_quant)
        n, dim, eps = config.hc_mult, config.hidden_size, config.rms_norm_eps
        self.attn = DSparkAttention(config, layout, layer, spark.block_size, fake_quant=fake_quant)
        if stage == 0:
            self.main_proj = Linear(len(spark.target_layer_ids) * dim, dim)
            self.main_norm = RMSNorm(dim, eps)
        if stage == spark.num_stages - 1:
            self.hc_head_fn = nn.Parameter(_small(n, n * dim))
            self.hc_head_base = nn.Parameter(torch.zeros(n))
            self.hc_head_scale = nn.Parameter(torch.ones(1))
            self.hc_head = HyperHead(eps, config.hc_eps)
            self.norm = RMSNorm(dim, eps)
            self.markov_head = MarkovHead(config.vocab_size, spark.markov_rank)
            self.confidence_head = ConfidenceHead(dim + spark.markov_rank)
            self.markov_draft = MarkovDraft(spark.block_size)

    def main(self, tap_TF: Tensor) -> Tensor:
        """[T, D] of the first stage: what every stage's entries are made from."""
        out: Tensor = self.main_norm(self.main_proj(tap_TF))
        return out

    def choose(self, x_TND: Tensor, head: nn.Module, step: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Drafts int64 [R, B] and confidences float32 [R, B] of the last stage, with the main model's head."""
        x = self.hc_head(x_TND, self.hc_head_fn, self.hc_head_base, self.hc_head_scale)
        drafts, confidences = self.markov_draft(
            head(self.norm(x)), x, step["token_ids"], step["block_rows"], self.markov_head.markov_w1.weight,
            self.markov_head.markov_w2.weight, self.confidence_head.proj.weight,
        )  # fmt: skip
        return drafts, confidences
