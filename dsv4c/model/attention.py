"""Attention over a sliding window, plus selected (csa) or all (hca) compressed entries; one shared head, K = V.

A learned sink logit for each head joins the softmax without a value. The output is rotated back (inverse RoPE)
before the grouped output projection. Source: model.md 2.7.

Legend: T tokens, H heads, C head_dim, W `sliding_window`, K keys a token sees, N pool rows, R requests, P pages.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.model.compressor import Compressor, kv_quantiser
from dsv4c.model.indexer import Indexer
from dsv4c.model.linear import GroupedLinear, Linear
from dsv4c.model.norm import HeadNorm, RMSNorm
from dsv4c.model.paging import PageWrite, entry_rows
from dsv4c.model.rope import Rope


def sink_softmax_attention(q_THC: Tensor, keys_TKC: Tensor, seen_TK: Tensor, sink_H: Tensor) -> Tensor:
    """softmax(q . k / sqrt(C)) over the seen keys and the sink, times the keys; float32 inside."""
    keys = keys_TKC.float()
    logits = torch.einsum("thc,tkc->thk", q_THC.float(), keys) * q_THC.shape[-1] ** -0.5
    logits = logits.masked_fill(~seen_TK.unsqueeze(1), float("-inf"))
    sink = sink_H.float().unsqueeze(-1)
    peak = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weight = torch.exp(logits - peak)
    total = weight.sum(-1, keepdim=True) + torch.exp(sink - peak)
    return (torch.einsum("thk,tkc->thc", weight, keys) / total).to(q_THC.dtype)


def window_keys(
    pool_NC: Tensor, pages_RP: Tensor, request_rows: Tensor, positions: Tensor, *, window: int, page: int
) -> tuple[Tensor, Tensor]:
    """The last `window` entries up to each token's own, [T, W, C], and which of them exist, [T, W]."""
    at = positions.unsqueeze(1) - torch.arange(window - 1, -1, -1, device=positions.device)
    rows = entry_rows(pages_RP, request_rows.unsqueeze(1), at.clamp(min=0), page)
    return pool_NC[rows], at >= 0


def attend_window(
    q_THC: Tensor,
    pool_NC: Tensor,
    pages_RP: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    sink_H: Tensor,
    *,
    window: int,
    page: int,
) -> Tensor:
    """Attention over the window alone: [T, H, C]."""
    keys, seen = window_keys(pool_NC, pages_RP, request_rows, positions, window=window, page=page)
    return sink_softmax_attention(q_THC, keys, seen, sink_H)


def attend_csa(
    q_THC: Tensor,
    pool_NC: Tensor,
    pages_RP: Tensor,
    entry_pool_NC: Tensor,
    entry_pages_RP: Tensor,
    picks_TK: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    sink_H: Tensor,
    *,
    window: int,
    page: int,
    entries_per_page: int,
) -> Tensor:
    """Attention over the window and the picked entries (-1: none): [T, H, C]."""
    keys, seen = window_keys(pool_NC, pages_RP, request_rows, positions, window=window, page=page)
    rows = entry_rows(entry_pages_RP, request_rows.unsqueeze(1), picks_TK.clamp(min=0), entries_per_page)
    keys = torch.cat((keys, entry_pool_NC[rows]), 1)
    return sink_softmax_attention(q_THC, keys, torch.cat((seen, picks_TK >= 0), 1), sink_H)


def attend_hca(
    q_THC: Tensor,
    pool_NC: Tensor,
    pages_RP: Tensor,
    entry_pool_NC: Tensor,
    entry_pages_RP: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    sink_H: Tensor,
    *,
    window: int,
    page: int,
    entries_per_page: int,
    ratio: int,
) -> Tensor:
    """Attention over the window and every completed entry: [T, H, C]."""
    keys, seen = window_keys(pool_NC, pages_RP, request_rows, positions, window=window, page=page)
    entry = torch.arange(entry_pages_RP.shape[1] * entries_per_page, device=positions.device)
    rows = entry_rows(entry_pages_RP, request_rows.unsqueeze(1), entry, entries_per_page)
    complete = entry < ((positions + 1) // ratio).unsqueeze(1)
    keys = torch.cat((keys, entry_pool_NC[rows]), 1)
    return sink_softmax_attention(q_THC, keys, torch.cat((seen, complete), 1), sink_H)


class AttendWindow(nn.Module):
    def __init__(self, window: int, page: int) -> None:
        super().__init__()
        self.window, self.page = window, page

    def forward(
        self, q: Tensor, pool: Tensor, pages: Tensor, request_rows: Tensor, positions: Tensor, sink: Tensor
    ) -> Tensor:
        return attend_window(q, pool, pages, request_rows, positions, sink, window=self.window, page=self.page)


class AttendCsa(nn.Module):
    def __init__(self, window: int, page: int, entries_per_page: int) -> None:
        super().__init__()
        self.window, self.page, self.entries_per_page = window, page, entries_per_page

    def forward(
        self,
        q: Tensor,
        pool: Tensor,
        pages: Tensor,
        entry_pool: Tensor,
        entry_pages: Tensor,
        picks: Tensor,
        request_rows: Tensor,
        positions: Tensor,
        sink: Tensor,
    ) -> Tensor:
        return attend_csa(
            q, pool, pages, entry_pool, entry_pages, picks, request_rows, positions, sink,
            window=self.window, page=self.page, entries_per_page=self.entries_per_page,
        )  # fmt: skip


class AttendHca(nn.Module):
    def __init__(self, window: int, page: int, entries_per_page: int, ratio: int) -> None:
        super().__init__()
        self.window, self.page, self.entries_per_page, self.ratio = window, page, entries_per_page, ratio

    def forward(
        self,
        q: Tensor,
        pool: Tensor,
        pages: Tensor,
        entry_pool: Tensor,
        entry_pages: Tensor,
        request_rows: Tensor,
        positions: Tensor,
        sink: Tensor,
    ) -> Tensor:
        return attend_hca(
            q, pool, pages, entry_pool, entry_pages, request_rows, positions, sink,
            window=self.window, page=self.page, entries_per_page=self.entries_per_page, ratio=self.ratio,
        )  # fmt: skip


class Attention(nn.Module):
    """One attention sublayer of the kind that `ratio` says."""

    def __init__(self, config: ModelConfig, layout: StateLayout, layer: int, *, fake_quant: bool) -> None:
        super().__init__()
        heads, dim = config.num_attention_heads, config.head_dim
        ratio = config.compress_ratios[layer]
        self.kind = config.attention_kind(layer)
        self.ratio = ratio
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = Linear(config.q_lora_rank, heads * dim)
        self.wkv = Linear(config.hidden_size, dim)
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps)
        self.wo_a = GroupedLinear(heads * dim // config.o_groups, config.o_groups * config.o_lora_rank, config.o_groups)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, config.hidden_size)
        self.head_norm = HeadNorm(heads, config.rms_norm_eps)
        self.q_rope, self.kv_rope, self.o_rope = Rope(), Rope(), Rope(inverse=True)
        self.quantise = kv_quantiser(config) if fake_quant else None
        self.write = PageWrite()
        page, window = layout.entries_per_page(0), config.sliding_window
        self.attend: nn.Module
        if self.kind == "window":
            self.attend = AttendWindow(window, page)
            return
        self.compressor = Compressor(config, ratio, dim, index=False, fake_quant=fake_quant)
        if self.kind == "csa":
            self.indexer = Indexer(config, layout, ratio, fake_quant=fake_quant)
            self.attend = AttendCsa(window, page, layout.entries_per_page(ratio))
        else:
            self.attend = AttendHca(window, page, layout.entries_per_page(ratio), ratio)

    def forward(
        self, x_TD: Tensor, state: dict[str, Tensor], step: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sublayer's output [T, D], and the layer's state after this step."""
        table = step["rope_window"] if self.kind == "window" else step["rope_compressed"]
        latent, q = self.queries(x_TD, table)
        after = {"window": self.write(state["window"], step["slots_window"], self.entries(x_TD, table))}
        where = (step["request_rows"], step["positions"], self.attn_sink)
        window = (q, after["window"], step["pages_window"])
        if self.kind == "window":
            o = self.attend(*window, *where)
        else:
            group = f"c{self.ratio}"
            after[group], after["ring_k"], after["ring_z"] = self.compressor(
                x_TD, state[group], state["ring_k"], state["ring_z"], step[f"slots_{group}"], step
            )
            entries = (after[group], step[f"pages_{group}"])
            if self.kind == "csa":
                picks, index_state = self.indexer(x_TD, latent, state, step)
                after.update(index_state)
                o = self.attend(*window, *entries, picks, *where)
            else:
                o = self.attend(*window, *entries, *where)
        return self.output(o, table), after

    def queries(self, x_TD: Tensor, table_TR: Tensor) -> tuple[Tensor, Tensor]:
        """The query latent [T, `q_lora_rank`], and the rotated queries [T, H, C]."""
        latent = self.q_norm(self.wq_a(x_TD))
        return latent, self.q_rope(self.head_norm(self.wq_b(latent)), table_TR)

    def entries(self, x_TD: Tensor, table_TR: Tensor) -> Tensor:
        """[T, C]: every row's key and value in one."""
        kv: Tensor = self.kv_rope(self.kv_norm(self.wkv(x_TD)), table_TR)
        return kv if self.quantise is None else self.quantise(kv)

    def output(self, o_THC: Tensor, table_TR: Tensor) -> Tensor:
        """[T, D]: what the heads found, rotated back and projected."""
        out: Tensor = self.wo_b(self.wo_a(self.o_rope(o_THC, table_TR)))
        return out
