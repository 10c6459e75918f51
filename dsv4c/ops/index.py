"""References of the lightning indexer on packed keys: queries, scores, and the entries with the highest ones.

Queries are E4M3 in both formats. An FP4 query is E2M1 values times one power of two for each 32 channels; E4M3 holds
them times 2 ** (6 - the head's largest exponent): exactly where a head's groups differ by 2 ** 14 at most, and beyond
that with an error under 2 ** -17 of the head's largest value. Relu commutes with positive factors, so the query's
scale is folded into the weight of its head.

Legend: T tokens, I `index_n_heads`, C `index_head_dim`, R rotated channels, K `index_topk`, N pool rows, B bytes of a
key, S requests, P pages of a request, E entries of a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4c.model.paging import entry_rows
from dsv4c.model.quant import hadamard
from dsv4c.model.rope import rope
from dsv4c.ops._op import Index, Op, TensorType
from dsv4c.ops.formats import IndexFormat, from_e8m0, index_sizes, pack_index, read_entries, unpack_e2m1, unpack_index

FP4_LIFT = 6  # 6 x 2^6 = 384 is the largest E2M1 value times a power of two that E4M3 holds


def index_query(
    q: Tensor, table_TR: Tensor, weight_TI: Tensor, *, num_heads: int, format: IndexFormat
) -> tuple[Tensor, Tensor]:
    """Queries as the scores want them: (E4M3 bytes [T, I, C], float32 weights [T, I]).

    RoPE, the Hadamard transform, then `pack_index` as for keys. The weights carry (C * I)^-1/2 and the query's scale.
    """
    rotated = rope(q.unflatten(-1, (num_heads, -1)), table_TR, inverse=False)
    x_TIC = hadamard(rotated.float())
    weight = weight_TI.float() * (x_TIC.shape[1] * x_TIC.shape[2]) ** -0.5
    data, scales = pack_index(x_TIC.flatten(0, 1), format)
    if format == "fp8":
        scale = scales.view(torch.float32).view_as(weight)
        return data.view(x_TIC.shape), weight * scale
    groups = from_e8m0(scales[:, : max(1, x_TIC.shape[2] // 32)])
    largest = groups.amax(-1, keepdim=True)
    wide = unpack_e2m1(data).unflatten(-1, (groups.shape[1], -1)) * (groups / largest * 2.0**FP4_LIFT).unsqueeze(-1)
    lifted = wide.to(torch.float8_e4m3fn).view(torch.uint8).view(x_TIC.shape)
    return lifted, weight * (largest * 2.0**-FP4_LIFT).view_as(weight)


def seen_entries(positions: Tensor, pages_SP: Tensor, *, ratio: int, entries_per_page: int) -> Tensor:
    """[T] entries that a token sees: those complete at its position, and never more than its page table holds."""
    return ((positions + 1) // ratio).clamp(min=0, max=pages_SP.shape[1] * entries_per_page)


def index_scores(
    data_TIC: Tensor,
    weight_TI: Tensor,
    pool_NB: Tensor,
    pages_SP: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    *,
    ratio: int,
    entries_per_page: int,
    format: IndexFormat,
) -> Tensor:
    """float32 [T, P, E]: the sum over heads of weight * relu(q . key); -inf where not seen, and in place of NaN.

    Only pages with entries that a token sees are looked up in its page table.
    """
    seen = seen_entries(positions, pages_SP, ratio=ratio, entries_per_page=entries_per_page)
    entry = torch.arange(pages_SP.shape[1] * entries_per_page, device=positions.device)
    hidden = entry >= seen.unsqueeze(1)
    rows = entry_rows(pages_SP, request_rows.unsqueeze(1), entry, entries_per_page).masked_fill(hidden, 0)
    bytes_of_data, _ = index_sizes(data_TIC.shape[2], format)
    keys_TEC = unpack_index(*read_entries(pool_NB, rows, bytes_of_data, entries_per_page=entries_per_page), format)
    keys_TEC = keys_TEC.masked_fill(hidden.unsqueeze(-1), 0.0)
    dots = torch.einsum("tic,tec->tie", data_TIC.view(torch.float8_e4m3fn).float(), keys_TEC).relu()
    scores = torch.einsum("tie,ti->te", dots, weight_TI)
    scores = scores.masked_fill(hidden | scores.isnan(), float("-inf"))
    return scores.view(scores.shape[0], pages_SP.shape[1], entries_per_page)


def topk_rows(scores_TPE: Tensor, positions: Tensor, *, ratio: int, topk: int) -> Tensor:
    """int32 [T, K]: the entries with the highest scores of those a token sees, ascending, then -1.

    Of equal scores the earlier entry is taken; NaN and -inf are never taken. A token that sees at most K entries gets
    them all, whatever their scores.
    """
    scores = scores_TPE.flatten(1)
    entry = torch.arange(scores.shape[1], device=scores.device)
    seen = ((positions + 1) // ratio).clamp(min=0, max=scores.shape[1]).unsqueeze(1)
    worst = float("-inf")
    best, picks = scores.masked_fill((entry >= seen) | scores.isnan(), worst).sort(dim=1, descending=True, stable=True)
    none = scores.shape[1]  # sorts behind every entry
    picks = torch.where(best == worst, none, picks)[:, :topk]
    missing = picks.new_full((picks.shape[0], max(0, topk - picks.shape[1])), none)
    picks = torch.cat((picks, missing), 1).sort(dim=1).values
    place = torch.arange(topk, device=scores.device)
    picks = torch.where(seen <= topk, torch.where(place < seen, place, none), picks)
    return torch.where(picks == none, -1, picks).to(torch.int32)


def index_topk_packed(
    data_TIC: Tensor,
    weight_TI: Tensor,
    pool_NB: Tensor,
    pages_SP: Tensor,
    request_rows: Tensor,
    positions: Tensor,
    *,
    ratio: int,
    entries_per_page: int,
    topk: int,
    format: IndexFormat,
) -> Tensor:
    """`index_scores`, then `topk_rows`: int32 [T, K]. The scores of a token that sees at most K entries are unused."""
    scores = index_scores(
        data_TIC, weight_TI, pool_NB, pages_SP, request_rows, positions,
        ratio=ratio, entries_per_page=entries_per_page, format=format,
    )  # fmt: skip
    return topk_rows(scores, positions, ratio=ratio, topk=topk)


def _flops(types: Sequence[TensorType], attrs: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
    return 2 * types[0].numel(symbols) * (symbols.get("context", 0) // int(attrs["ratio"]))


OPS: tuple[Op, ...] = (
    Op("index_query", index_query, outputs=2),
    Op("index_scores", index_scores, flops=_flops, indices={"request_rows": Index("pages_SP")}),
    Op("topk_rows", topk_rows, indices={0: Index("scores_TPE", dims=(1, 2), low=-1)}),
    Op(
        "index_topk_packed",
        index_topk_packed,
        flops=_flops,
        indices={
            0: Index("pages_SP", dims=(1,), low=-1, times="entries_per_page"),
            "request_rows": Index("pages_SP"),
        },
    ),
)
