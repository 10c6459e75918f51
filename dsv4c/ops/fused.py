"""References of the fused ops: compositions of the plain model's functions, so equal to the unfused ones by reading.

Legend: T tokens, N streams, D hidden_size, E entries completed in a step.
"""

from __future__ import annotations

from torch import Tensor

from dsv4c.model.hyper import hc_head, hc_post, hc_pre
from dsv4c.model.moe import swiglu
from dsv4c.model.norm import head_norm, rms_norm
from dsv4c.model.paging import page_write
from dsv4c.model.rope import rope


def hc_pre_norm(
    x_TND: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iters: int,
    out_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_pre`, then the sublayer's RMSNorm: (normed x_TD, post_TN, comb_TNN)."""
    x, post, comb = hc_pre(x_TND, fn, base, scale, norm_eps=norm_eps, eps=eps, iters=iters)
    return rms_norm(x, norm_weight, eps=out_eps), post, comb


def hc_post_pre_norm(
    y_TD: Tensor,
    x_TND: Tensor,
    post_TN: Tensor,
    comb_TNN: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iters: int,
    out_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hc_post` of one sublayer, then `hc_pre_norm` of the next: (streams, normed x_TD, post_TN, comb_TNN)."""
    streams = hc_post(y_TD, x_TND, post_TN, comb_TNN)
    x, post, comb = hc_pre_norm(
        streams, fn, base, scale, norm_weight, norm_eps=norm_eps, eps=eps, iters=iters, out_eps=out_eps
    )
    return streams, x, post, comb


def hc_head_norm(
    x_TND: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    *,
    norm_eps: float,
    eps: float,
    out_eps: float,
) -> Tensor:
    """`hc_head`, then the final RMSNorm."""
    return rms_norm(hc_head(x_TND, fn, base, scale, norm_eps=norm_eps, eps=eps), norm_weight, eps=out_eps)


def head_norm_rope(q: Tensor, table_TR: Tensor, *, num_heads: int, eps: float) -> Tensor:
    """`head_norm`, then `rope`: [T, H, C]."""
    return rope(head_norm(q, num_heads=num_heads, eps=eps), table_TR, inverse=False)


def split_heads_rope(q: Tensor, table_TR: Tensor, *, num_heads: int) -> Tensor:
    """[T, H * C] split into heads, then `rope`: [T, H, C]."""
    return rope(q.unflatten(-1, (num_heads, -1)), table_TR, inverse=False)


def norm_rope_write(pool: Tensor, slots: Tensor, x: Tensor, weight: Tensor, table_TR: Tensor, *, eps: float) -> Tensor:
    """RMSNorm, `rope`, and the write of the rows into their pages: the pool."""
    return page_write(pool, slots, rope(rms_norm(x, weight, eps=eps), table_TR, inverse=False))


def swiglu_pair(gate_up: Tensor, *, limit: float) -> Tensor:
    """`swiglu` of the two halves of the last dim."""
    gate, up = gate_up.chunk(2, -1)
    return swiglu(gate, up, limit=limit)


def columns(x: Tensor, *, start: int, length: int) -> Tensor:
    """Columns [start, start + length) of the last dim: a view, never a kernel."""
    return x.narrow(-1, start, length)


def stream_rows(x_TNC: Tensor) -> Tensor:
    """[T, N, C] as [T * N, C]: a view, never a kernel."""
    return x_TNC.flatten(0, 1)


def row_streams(x_RC: Tensor, *, streams: int) -> Tensor:
    """[T * N, C] as [T, N, C]: a view, never a kernel."""
    out: Tensor = x_RC.unflatten(0, (-1, streams))
    return out


def split_heads(q: Tensor, *, num_heads: int) -> Tensor:
    """[T, H * C] as [T, H, C]: a view, never a kernel."""
    heads: Tensor = q.unflatten(-1, (num_heads, -1))
    return heads
