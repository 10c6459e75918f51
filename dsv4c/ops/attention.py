"""Attention over packed FP8 pools: the references, composed of the plain model's attention and the packed formats.

Each is the plain op of the same name (dsv4c.model.attention) on dequantised entries. Only what a token sees counts:
an entry outside a token's window, an incomplete one and the one behind a -1 may hold any bytes, NaN included.

Legend: T tokens, H heads, C head_dim, B bytes of an entry, W window, K picks, N pool rows, R requests, P pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4c.model.attention import sink_softmax_attention
from dsv4c.model.paging import entry_rows
from dsv4c.ops._op import Index, Op, TensorType
from dsv4c.ops.formats import kv_sizes, read_entries, unpack_kv


def packed_keys(
    pool_NB: Tensor, rows: Tensor, seen: Tensor, *, entries_per_page: int, head_dim: int, rope_dim: int
) -> Tensor:
    """float32 entries [..., C] of the pool's rows; those not seen are 0, whatever their bytes."""
    data_bytes, _ = kv_sizes(head_dim, rope_dim)
    data, scales = read_entries(pool_NB, rows, data_bytes, entries_per_page=entries_per_page)
    return unpack_kv(data, scales, rope_dim).masked_fill(~seen.unsqueeze(-1), 0.0)


def _window(
    pool_NB: Tensor, pages_RP: Tensor, request_rows: Tensor, positions: Tensor, *, window: int, page: int, **dims: int
) -> tuple[Tensor, Tensor]:
    at = positions.unsqueeze(1) - torch.arange(window - 1, -1, -1, device=positions.device)
    rows = entry_rows(pages_RP, request_rows.unsqueeze(1), at.clamp(min=0), page)
    return packed_keys(pool_NB, rows, at >= 0, entries_per_page=page, **dims), at >= 0


def attend_window_packed(
    q_THC: Tensor,
    pool_NB: Tensor,
    pages_RP: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    sink_H: Tensor,
    *,
    window: int,
    page: int,
    rope_dim: int,
) -> Tensor:
    """Attention over the window alone: [T, H, C] in q's dtype."""
    dims = {"head_dim": q_THC.shape[-1], "rope_dim": rope_dim}
    keys, seen = _window(pool_NB, pages_RP, request_rows, positions, window=window, page=page, **dims)
    return sink_softmax_attention(q_THC, keys, seen, sink_H)


def attend_csa_packed(
    q_THC: Tensor,
    pool_NB: Tensor,
    pages_RP: Tensor,
    entry_pool_NB: Tensor,
    entry_pages_RP: Tensor,
    picks_TK: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    sink_H: Tensor,
    *,
    window: int,
    page: int,
    entries_per_page: int,
    rope_dim: int,
) -> Tensor:
    """Attention over the window and the picked entries (-1: none, anywhere in the row): [T, H, C]."""
    dims = {"head_dim": q_THC.shape[-1], "rope_dim": rope_dim}
    keys, seen = _window(pool_NB, pages_RP, request_rows, positions, window=window, page=page, **dims)
    picks = picks_TK.long()
    rows = entry_rows(entry_pages_RP, request_rows.unsqueeze(1), picks.clamp(min=0), entries_per_page)
    entries = packed_keys(entry_pool_NB, rows, picks >= 0, entries_per_page=entries_per_page, **dims)
    return sink_softmax_attention(q_THC, torch.cat((keys, entries), 1), torch.cat((seen, picks >= 0), 1), sink_H)


def attend_hca_packed(
    q_THC: Tensor,
    pool_NB: Tensor,
    pages_RP: Tensor,
    entry_pool_NB: Tensor,
    entry_pages_RP: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    sink_H: Tensor,
    *,
    window: int,
    page: int,
    entries_per_page: int,
    ratio: int,
    rope_dim: int,
) -> Tensor:
    """Attention over the window and every completed entry: [T, H, C]."""
    dims = {"head_dim": q_THC.shape[-1], "rope_dim": rope_dim}
    keys, seen = _window(pool_NB, pages_RP, request_rows, positions, window=window, page=page, **dims)
    entry = torch.arange(entry_pages_RP.shape[1] * entries_per_page, device=positions.device)
    complete = entry < ((positions + 1) // ratio).unsqueeze(1)
    rows = entry_rows(entry_pages_RP, request_rows.unsqueeze(1), entry, entries_per_page)
    entries = packed_keys(entry_pool_NB, rows, complete, entries_per_page=entries_per_page, **dims)
    return sink_softmax_attention(q_THC, torch.cat((keys, entries), 1), torch.cat((seen, complete), 1), sink_H)


def _flops(keys: str) -> Any:
    """4 C operations a head, token and key: q . k and weight x k, multiply-adds counted twice."""

    def count(types: Sequence[TensorType], attrs: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
        seen = int(attrs["window"])
        if keys == "picks":
            seen += int(types[5].shape[1])
        elif keys == "context":
            seen += symbols.get("context", 0) // int(attrs["ratio"])
        return 4 * types[0].numel(symbols) * seen

    return count


_ROWS: Mapping[str | int, Index] = {"request_rows": Index("pages_RP")}
_PICKS = Index("entry_pages_RP", dims=(1,), low=-1, times="entries_per_page")

OPS: tuple[Op, ...] = (
    Op("attend_window_packed", attend_window_packed, flops=_flops("window"), indices=_ROWS),
    Op("attend_csa_packed", attend_csa_packed, flops=_flops("picks"), indices={**_ROWS, "picks_TK": _PICKS}),
    Op("attend_hca_packed", attend_hca_packed, flops=_flops("context"), indices=_ROWS),
)
