"""References of the fused compressors: pool finished windows, then norm, `rope`, pack and write, and keep the state.

Compositions of the plain model's functions and of `formats`: an entry is bfloat16 before it is normed, normed before
it is rotated, rotated before it is packed. Index keys are rotated by Hadamard before they are packed.

A pooled row costs `ratio` tokens of state. `compress_pack` keeps the tokens themselves in rings, as the model does;
`compress_online_pack` keeps the running softmax of the unfinished window, 3 rows whatever the ratio, and so suits
steps whose tokens are all final.

What a CUDA graph leaves unused: an end below 0 is no entry, and what is meant for the null page, the null slot or
nobody may be left unwritten.

Legend: T tokens, E entries completed in this step, W tokens of a window, C channels of an entry, D channels of a
projected row (2 C with overlap), R rotated channels, Z request slots, N pool rows, B entry bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from dsv4c.model.compressor import compress
from dsv4c.model.norm import rms_norm
from dsv4c.model.quant import hadamard
from dsv4c.model.rope import rope
from dsv4c.ops._op import Index, Op
from dsv4c.ops.formats import pack_index, pack_kv, write_entries

EntryFormat = Literal["kv", "fp8", "fp4"]


def pack_entries(
    entries_EC: Tensor,
    norm_weight: Tensor,
    entry_table_ER: Tensor,
    pool_NB: Tensor,
    slots: Tensor,
    *,
    eps: float,
    entries_per_page: int,
    format: EntryFormat,
) -> Tensor:
    """Pooled entries (float32), normed, rotated and packed into their rows: the pool."""
    entries = rope(rms_norm(entries_EC.to(torch.bfloat16), norm_weight, eps=eps), entry_table_ER, inverse=False)
    if format == "kv":
        data, scales = pack_kv(entries, entry_table_ER.shape[-1])
    else:
        data, scales = pack_index(hadamard(entries), format)
    return write_entries(pool_NB, slots, data, scales, entries_per_page=entries_per_page)


def compress_pack(
    k_gate: Tensor,
    ape: Tensor,
    ring_k: Tensor,
    ring_z: Tensor,
    norm_weight: Tensor,
    entry_table_ER: Tensor,
    pool_NB: Tensor,
    slots: Tensor,
    positions: Tensor,
    request_rows: Tensor,
    seq_starts: Tensor,
    seq_ends: Tensor,
    state_slots: Tensor,
    ends: Tensor,
    *,
    ratio: int,
    overlap: bool,
    eps: float,
    entries_per_page: int,
    format: EntryFormat,
) -> tuple[Tensor, Tensor, Tensor]:
    """`compress` of k and gate, the halves of k_gate [T, 2 D], then `pack_entries`: (ring_k, ring_z, pool)."""
    k_TD, gate_TD = k_gate.float().chunk(2, -1)
    real = ends >= 0
    entries, ring_k, ring_z = compress(
        k_TD, gate_TD, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, ends[real],
        ratio=ratio, overlap=overlap,
    )  # fmt: skip
    pool_NB = pack_entries(
        entries, norm_weight, entry_table_ER[real], pool_NB, slots[real], eps=eps, entries_per_page=entries_per_page,
        format=format,
    )  # fmt: skip
    return ring_k, ring_z, pool_NB


def running_softmax(
    k_TC: Tensor,
    z_TC: Tensor,
    state_Z3C: Tensor,
    rows: Tensor,
    positions: Tensor,
    request_rows: Tensor,
    seq_starts: Tensor,
    state_slots: Tensor,
    *,
    ratio: int,
) -> Tensor:
    """Maximum of z, sum of exp(z - maximum), and that sum weighted by k, [N, 3, C], over part of a window.

    From the window's first token to the token in batch row `rows`; tokens before this step come from the state.
    """
    request = request_rows[rows]
    start = seq_starts[request]
    position = positions[rows]
    window = position - position % ratio
    back = torch.arange(ratio - 1, -1, -1, device=positions.device)
    fresh_NW = position.unsqueeze(1) - back >= torch.maximum(window, start).unsqueeze(1)
    row_NW = (rows.unsqueeze(1) - back).clamp(min=0)
    z_NWC = z_TC[row_NW].masked_fill(~fresh_NW.unsqueeze(-1), float("-inf"))
    k_NWC = k_TC[row_NW].masked_fill(~fresh_NW.unsqueeze(-1), 0.0)
    begun = (window < start).view(-1, 1, 1)
    empty = torch.tensor([float("-inf"), 0.0, 0.0], device=positions.device).view(1, 3, 1)
    old_top, old_total, old_mixed = torch.where(begun, state_Z3C[state_slots[request]], empty).unbind(1)
    top = torch.maximum(old_top, z_NWC.amax(1))
    weight = torch.exp(z_NWC - top.unsqueeze(1))
    fade = torch.exp(old_top - top)
    return torch.stack((top, old_total * fade + weight.sum(1), old_mixed * fade + (weight * k_NWC).sum(1)), 1)


def compress_online_pack(
    k_gate: Tensor,
    ape: Tensor,
    state_Z3C: Tensor,
    norm_weight: Tensor,
    entry_table_ER: Tensor,
    pool_NB: Tensor,
    slots: Tensor,
    positions: Tensor,
    request_rows: Tensor,
    seq_starts: Tensor,
    seq_ends: Tensor,
    state_slots: Tensor,
    ends: Tensor,
    *,
    ratio: int,
    eps: float,
    entries_per_page: int,
) -> tuple[Tensor, Tensor]:
    """`compress_pack` without overlap in format "kv", on a running softmax [Z, 3, C]: (state, pool).

    A request whose last window is complete keeps the state it had; nobody reads it before it is replaced.
    """
    k_TC, gate_TC = k_gate.float().chunk(2, -1)
    z_TC = gate_TC + ape[positions % ratio]
    where = (positions, request_rows, seq_starts, state_slots)
    real = ends >= 0
    _, total, mixed = running_softmax(k_TC, z_TC, state_Z3C, ends[real], *where, ratio=ratio).unbind(1)
    pool_NB = pack_entries(
        mixed / total, norm_weight, entry_table_ER[real], pool_NB, slots[real], eps=eps,
        entries_per_page=entries_per_page, format="kv",
    )  # fmt: skip
    last = (positions + 1 == seq_ends[request_rows]) & ((positions + 1) % ratio != 0)
    rows = torch.nonzero(last).squeeze(1)
    after = running_softmax(k_TC, z_TC, state_Z3C, rows, *where, ratio=ratio)
    return state_Z3C.index_put((state_slots[request_rows[rows]],), after), pool_NB


_WHERE: Mapping[str | int, Index] = {
    "slots": Index("pool_NB"), "request_rows": Index("seq_starts"), "ends": Index("positions", low=-1),
}  # fmt: skip

OPS = (
    Op(
        "compress_pack", compress_pack, outputs=3, in_place={0: "ring_k", 1: "ring_z", 2: "pool_NB"},
        indices={**_WHERE, "state_slots": Index("ring_k")},
    ),
    Op(
        "compress_online_pack", compress_online_pack, outputs=2, in_place={0: "state_Z3C", 1: "pool_NB"},
        indices={**_WHERE, "state_slots": Index("state_Z3C")},
    ),
)  # fmt: skip
