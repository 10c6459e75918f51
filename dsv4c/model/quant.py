"""Fake quantisation of what engines store in 8 or 4 bits, as the model saw it in training (model.md 2.10).

Scales are powers of two, rounded up; values round to nearest even. Gradients pass straight through. The sum
`x + (q - x)` is exactly q: q lies within a factor of two of x or is 0. A group that holds a NaN or an infinity is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def power_of_two_ceil(x: Tensor) -> Tensor:
    """The smallest power of two that is not below x (x > 0, float32), exactly; NaN if x is NaN or infinite."""
    mantissa, exponent = torch.frexp(x)
    power = torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))
    return torch.where(x.isfinite(), power, torch.nan)


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 (ties to even mantissa) with x's sign; |x| <= 6."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(torch.round(size / step) * step, x)


def fake_quant_fp8(x: Tensor, *, group: int) -> Tensor:
    """E4M3 with one power-of-two scale for each `group` channels of the last dim."""
    wide = x.float().unflatten(-1, (-1, group))
    scale = power_of_two_ceil(wide.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)
    rounded = (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    out: Tensor = (wide + (rounded - wide).detach()).flatten(-2).to(x.dtype)
    return out


def fake_quant_fp4(x: Tensor, *, group: int) -> Tensor:
    """E2M1 with one power-of-two scale for each `group` channels of the last dim."""
    wide = x.float().unflatten(-1, (-1, group))
    scale = power_of_two_ceil(wide.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126) / 6)
    rounded = round_e2m1((wide / scale).clamp(-6, 6)) * scale
    out: Tensor = (wide + (rounded - wide).detach()).flatten(-2).to(x.dtype)
    return out


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform (natural order) of the last dim, a power of two."""
    size = x.shape[-1]
    out = x.float()
    half = 1
    while half < size:
        left, right = out.unflatten(-1, (-1, 2, half)).unbind(-2)
        out = torch.stack((left + right, left - right), -2).flatten(-3)
        half *= 2
    scaled: Tensor = (out * size**-0.5).to(x.dtype)
    return scaled


def quantise_kv(x: Tensor, *, rope_dim: int, group: int) -> Tensor:
    """FP8 fake quantisation of all but the last `rope_dim` channels of a KV entry."""
    plain, rotated = x.split([x.shape[-1] - rope_dim, rope_dim], -1)
    return torch.cat((fake_quant_fp8(plain, group=group), rotated), -1)


def quantise_index(x: Tensor, *, group: int) -> Tensor:
    """Hadamard rotation, then FP4 fake quantisation, of indexer queries and keys."""
    return fake_quant_fp4(hadamard(x), group=group)


class QuantiseKV(nn.Module):
    def __init__(self, rope_dim: int, group: int) -> None:
        super().__init__()
        self.rope_dim, self.group = rope_dim, group

    def forward(self, x: Tensor) -> Tensor:
        return quantise_kv(x, rope_dim=self.rope_dim, group=self.group)


class QuantiseIndex(nn.Module):
    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return quantise_index(x, group=self.group)
