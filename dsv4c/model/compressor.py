"""KV compression: one entry for every `ratio` tokens, pooled by a softmax for each channel (model.md 2.8).

With `overlap` (csa) an entry pools two windows: the previous one through the first half of the channels, the
current one through the second. The rows an entry needs come from this step's tokens, or from a ring of the last
tokens' rows that lives in the request's slot; scores are kept with `ape` added.

Legend: T tokens, E entries completed in this step, W tokens an entry pools, C channels of one row, Z request slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4c.config import ModelConfig
from dsv4c.model.linear import Linear
from dsv4c.model.norm import RMSNorm
from dsv4c.model.paging import PageWrite
from dsv4c.model.quant import QuantiseIndex, QuantiseKV
from dsv4c.model.rope import Rope


def compress(
    k_TC: Tensor,
    gate_TC: Tensor,
    ape: Tensor,
    ring_k: Tensor,
    ring_z: Tensor,
    positions: Tensor,
    request_rows: Tensor,
    seq_starts: Tensor,
    seq_ends: Tensor,
    state_slots: Tensor,
    ends: Tensor,
    *,
    ratio: int,
    overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The completed entries [E, C or C / 2], and the rings [Z, ring, C] after this step; all float32.

    k and gate are float32 projections of the tokens, ape [ratio, C] is added to gate by position. Tokens that a
    ring is too short to keep are written to the null slot 0.
    """
    z_TC = gate_TC + ape[positions % ratio]
    width = 2 * ratio if overlap else ratio
    ring = ring_k.shape[1]
    back = torch.arange(width - 1, -1, -1, device=positions.device)
    request_E = request_rows[ends]
    position_EW = positions[ends].unsqueeze(1) - back
    fresh = (position_EW >= seq_starts[request_E].unsqueeze(1)).unsqueeze(-1)
    batch_row = (ends.unsqueeze(1) - back).clamp(min=0)
    slot = state_slots[request_E].unsqueeze(1)
    ring_row = position_EW % ring
    k_EWC = torch.where(fresh, k_TC[batch_row], ring_k[slot, ring_row])
    z_EWC = torch.where(fresh, z_TC[batch_row], ring_z[slot, ring_row])
    absent = (position_EW < 0).unsqueeze(-1)
    k_EWC = k_EWC.masked_fill(absent, 0.0)
    z_EWC = z_EWC.masked_fill(absent, float("-inf"))
    if overlap:
        half = k_TC.shape[1] // 2
        k_EWC = torch.cat((k_EWC[:, :ratio, :half], k_EWC[:, ratio:, half:]), 1)
        z_EWC = torch.cat((z_EWC[:, :ratio, :half], z_EWC[:, ratio:, half:]), 1)
    entries = (torch.softmax(z_EWC, 1) * k_EWC).sum(1)
    kept = positions >= seq_ends[request_rows] - ring
    slot_T = torch.where(kept, state_slots[request_rows], 0)
    at = (slot_T, positions % ring)
    return entries, ring_k.index_put(at, k_TC), ring_z.index_put(at, z_TC)


class Compress(nn.Module):
    def __init__(self, ratio: int, overlap: bool) -> None:
        super().__init__()
        self.ratio, self.overlap = ratio, overlap

    def forward(
        self,
        k_TC: Tensor,
        gate_TC: Tensor,
        ape: Tensor,
        ring_k: Tensor,
        ring_z: Tensor,
        positions: Tensor,
        request_rows: Tensor,
        seq_starts: Tensor,
        seq_ends: Tensor,
        state_slots: Tensor,
        ends: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return compress(
            k_TC, gate_TC, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, ends,
            ratio=self.ratio, overlap=self.overlap,
        )  # fmt: skip


class Compressor(nn.Module):
    """Projects tokens, pools them into entries, normalises, rotates and writes these into their pages."""

    def __init__(self, config: ModelConfig, ratio: int, dim: int, *, index: bool, fake_quant: bool) -> None:
        super().__init__()
        overlap = config.attention_kind(config.compress_ratios.index(ratio)) == "csa"
        channels = dim * 2 if overlap else dim
        self.wkv = Linear(config.hidden_size, channels, float32=True)
        self.wgate = Linear(config.hidden_size, channels, float32=True)
        self.ape = nn.Parameter(torch.zeros(ratio, channels))
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        self.pool = Compress(ratio, overlap)
        self.rope = Rope()
        self.quantise: nn.Module | None = None
        if fake_quant and index:
            self.quantise = QuantiseIndex(min(32, dim))
        elif fake_quant:
            self.quantise = kv_quantiser(config)
        self.write = PageWrite()
        self.ratio = ratio

    def forward(
        self, x_TD: Tensor, pool: Tensor, ring_k: Tensor, ring_z: Tensor, slots: Tensor, step: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The pool and both rings after this step."""
        entries, ring_k, ring_z = self.pool(
            self.wkv(x_TD), self.wgate(x_TD), self.ape, ring_k, ring_z, step["positions"], step["request_rows"],
            step["seq_starts"], step["seq_ends"], step["state_slots"], step[f"ends_{self.ratio}"],
        )  # fmt: skip
        entries = self.rope(self.norm(entries.to(x_TD.dtype)), step[f"entry_rope_{self.ratio}"])
        if self.quantise is not None:
            entries = self.quantise(entries)
        return self.write(pool, slots, entries), ring_k, ring_z


def kv_quantiser(config: ModelConfig) -> QuantiseKV:
    """FP8 groups of 64 channels; one group where the plain channels are fewer."""
    plain = config.head_dim - config.qk_rope_head_dim
    return QuantiseKV(config.qk_rope_head_dim, 64 if plain % 64 == 0 else plain)
