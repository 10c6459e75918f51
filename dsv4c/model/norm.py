"""RMSNorm, and the weightless per-head norm of the queries. float32 inside, one rounding at the end (model.md 2.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def head_norm(q: Tensor, *, num_heads: int, eps: float) -> Tensor:
    """Splits [T, H * C] into heads [T, H, C] and divides each head by its root mean square."""
    wide: Tensor = q.unflatten(-1, (num_heads, -1)).float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(q.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class HeadNorm(nn.Module):
    def __init__(self, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps

    def forward(self, q: Tensor) -> Tensor:
        return head_norm(q, num_heads=self.num_heads, eps=self.eps)
