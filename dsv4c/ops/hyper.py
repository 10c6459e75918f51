"""Hyper-connections before a quantised linear: the fused ops with the normed rows in E4M3 beside them.

Compositions of the fused references and of `formats`: what is quantised is the normed x after its rounding.

Legend: T tokens, N streams, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dsv4c.ops._op import Op, TensorType
from dsv4c.ops.formats import quantise_rows
from dsv4c.ops.fused import hc_post_pre_norm, hc_pre_norm


def hc_pre_norm_quantise(
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
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`hc_pre_norm`, then `quantise_rows`: (normed x_TD, post_TN, comb_TNN, data_TD, scales [T, D / group])."""
    x, post, comb = hc_pre_norm(
        x_TND, fn, base, scale, norm_weight, norm_eps=norm_eps, eps=eps, iters=iters, out_eps=out_eps
    )
    return x, post, comb, *quantise_rows(x, group=group)


def hc_post_pre_norm_quantise(
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
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`hc_post_pre_norm`, then `quantise_rows`: (streams, normed x_TD, post_TN, comb_TNN, data_TD, scales)."""
    streams, x, post, comb = hc_post_pre_norm(
        y_TD, x_TND, post_TN, comb_TNN, fn, base, scale, norm_weight,
        norm_eps=norm_eps, eps=eps, iters=iters, out_eps=out_eps,
    )  # fmt: skip
    return streams, x, post, comb, *quantise_rows(x, group=group)


def _flops(types: Sequence[TensorType], attrs: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
    streams = next(t for t in types if len(t.shape) == 3 and t.shape[2] != t.shape[1])
    n = int(streams.shape[1])
    return streams.numel(symbols) * (2 * n * (n + 2) + 2 + 2 * n)


OPS: tuple[Op, ...] = (
    Op("hc_pre_norm_quantise", hc_pre_norm_quantise, outputs=5, flops=_flops),
    Op("hc_post_pre_norm_quantise", hc_post_pre_norm_quantise, outputs=6, flops=_flops),
)
