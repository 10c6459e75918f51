"""References of the row ops: norms, rotation, activation and quantisation composed into one pass over a row.

They are compositions of the plain model's functions and of `formats`, so every rounding of the unfused program is
kept: a normed, rotated or gated row is bfloat16 before it is rotated, quantised or packed.

Legend: T tokens, H heads, C head_dim, R rotated channels, G groups of heads, Q channels of the query latent, N pool
rows, B entry bytes.
"""

from __future__ import annotations

from torch import Tensor

from dsv4c.model.norm import rms_norm
from dsv4c.model.rope import rope
from dsv4c.ops._op import Index, Op
from dsv4c.ops.formats import pack_kv, quantise_rows, write_entries
from dsv4c.ops.fused import swiglu_pair


def rms_norm_quantise(x: Tensor, weight: Tensor, *, eps: float, group: int) -> tuple[Tensor, Tensor]:
    """RMSNorm, then `quantise_rows`: (data, scale)."""
    return quantise_rows(rms_norm(x, weight, eps=eps), group=group)


def norm_rope_pack(
    pool_NB: Tensor, slots: Tensor, x: Tensor, weight: Tensor, table_TR: Tensor, *, eps: float, entries_per_page: int
) -> Tensor:
    """RMSNorm and `rope` of window entries x [T, C], written as packed entries: the pool.

    Rows of the null page are written by padding only and read by nobody; a schedule may leave them alone.
    """
    entries = rope(rms_norm(x, weight, eps=eps), table_TR, inverse=False)
    data, scales = pack_kv(entries, table_TR.shape[-1])
    return write_entries(pool_NB, slots, data, scales, entries_per_page=entries_per_page)


def qkv_norm_rope_pack(
    pool_NB: Tensor,
    slots: Tensor,
    x: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    table_TR: Tensor,
    *,
    eps: float,
    group: int,
    entries_per_page: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What follows the shared projection [T, Q + C] of query latent and window entry: (pool, latent data, scale)."""
    latent, kv = x.split([q_weight.shape[0], kv_weight.shape[0]], -1)
    pool = norm_rope_pack(pool_NB, slots, kv, kv_weight, table_TR, eps=eps, entries_per_page=entries_per_page)
    return pool, *rms_norm_quantise(latent, q_weight, eps=eps, group=group)


def rope_quantise(o_THC: Tensor, table_TR: Tensor, *, groups: int, group: int) -> tuple[Tensor, Tensor]:
    """Inverse `rope` of attention outputs, then `quantise_rows`, as the grouped projection wants them.

    data [T, G, H * C / G], scale [T, G, H * C / G / group].
    """
    rotated = rope(o_THC, table_TR, inverse=True)
    return quantise_rows(rotated.flatten(1).unflatten(-1, (groups, -1)), group=group)


def swiglu_quantise(gate_up: Tensor, *, limit: float, group: int) -> tuple[Tensor, Tensor]:
    """`swiglu_pair`, then `quantise_rows`: (data, scale)."""
    return quantise_rows(swiglu_pair(gate_up, limit=limit), group=group)


OPS = (
    Op("quantise_rows", quantise_rows, outputs=2),
    Op("rms_norm_quantise", rms_norm_quantise, outputs=2),
    Op("norm_rope_pack", norm_rope_pack, in_place={0: "pool_NB"}, indices={"slots": Index("pool_NB")}),
    Op(
        "qkv_norm_rope_pack",
        qkv_norm_rope_pack,
        outputs=3,
        in_place={0: "pool_NB"},
        indices={"slots": Index("pool_NB")},
    ),
    Op("rope_quantise", rope_quantise, outputs=2),
    Op("swiglu_quantise", swiglu_quantise, outputs=2),
)
