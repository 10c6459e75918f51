"""Manifold-constrained hyper-connections (mHC): n residual streams, mixed before and after every sublayer.

All coefficients are float32. `comb` is doubly stochastic (Sinkhorn) but not symmetric: it is contracted over its
FIRST index. Source: model.md 2.2-2.4.

Legend: T tokens, N streams (`hc_mult`), D hidden_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hc_pre(
    x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's input x_TD, and the coefficients post_TN and comb_TNN for `hc_post`.

    fn [(2 + N) * N, N * D], base [(2 + N) * N] and scale [3] are float32; x_TD has the dtype of x_TND.
    """
    n = x_TND.shape[1]
    flat = x_TND.flatten(1).float()
    rho = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    mix = F.linear(flat, fn) * rho
    pre = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mix[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    comb = torch.softmax(comb, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    x_TD = (pre.unsqueeze(-1) * x_TND.float()).sum(1).to(x_TND.dtype)
    return x_TD, post, comb


def hc_post(y_TD: Tensor, x_TND: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """The next streams: stream k is post[k] * y + sum over j of comb[j, k] * x[j], in float32."""
    mixed = torch.einsum("tjk,tjd->tkd", comb_TNN, x_TND.float())
    return (post_TN.unsqueeze(-1) * y_TD.float().unsqueeze(1) + mixed).to(x_TND.dtype)


def hc_head(x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float) -> Tensor:
    """Collapses the streams to x_TD before the final norm. fn [N, N * D], base [N], scale [1], float32."""
    flat = x_TND.flatten(1).float()
    rho = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    weight = torch.sigmoid(F.linear(flat, fn) * rho * scale + base) + eps
    return (weight.unsqueeze(-1) * x_TND.float()).sum(1).to(x_TND.dtype)


class HyperPre(nn.Module):
    def __init__(self, norm_eps: float, eps: float, iters: int) -> None:
        super().__init__()
        self.norm_eps, self.eps, self.iters = norm_eps, eps, iters

    def forward(self, x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hc_pre(x_TND, fn, base, scale, norm_eps=self.norm_eps, eps=self.eps, iters=self.iters)


class HyperPost(nn.Module):
    def forward(self, y_TD: Tensor, x_TND: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
        return hc_post(y_TD, x_TND, post_TN, comb_TNN)


class HyperHead(nn.Module):
    def __init__(self, norm_eps: float, eps: float) -> None:
        super().__init__()
        self.norm_eps, self.eps = norm_eps, eps

    def forward(self, x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        return hc_head(x_TND, fn, base, scale, norm_eps=self.norm_eps, eps=self.eps)
