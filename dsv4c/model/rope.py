"""Rotary embedding on interleaved pairs of the last channels, with YaRN where a layer compresses (model.md 2.6).

Angles are float32(position) * float32(frequency), as in the reference: near 1 M tokens that product is off by up to
0.03 rad, and so was the training. The YaRN amplitude factor is 1.

Legend: T rows (tokens or entries), R `qk_rope_head_dim`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dsv4c.config import RopeScaling


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """float32 [dim / 2] radians a position."""
    frequency = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if scaling is None:
        return frequency

    def dimension(rotations: float) -> float:
        return (
            dim * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequency / scaling.factor * ramp + frequency * (1 - ramp)


def rope_table(positions: Tensor, frequency: Tensor) -> Tensor:
    """[T, R] float32: cosines, then sines, of every position's angles."""
    angle = positions.unsqueeze(-1).float() * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


def entry_rope_table(positions: Tensor, ends: Tensor, frequency: Tensor, *, ratio: int) -> Tensor:
    """The same for the compressed entries completed by the rows `ends`, at the first token of their window."""
    return rope_table(positions[ends] - (ratio - 1), frequency)


def rope(x: Tensor, table_TR: Tensor, *, inverse: bool) -> Tensor:
    """Rotates the last R channels of x [T, C] or [T, H, C] by the table's angles (backwards if `inverse`)."""
    rotated_dim = table_TR.shape[-1]
    plain, pairs = x.split([x.shape[-1] - rotated_dim, rotated_dim], -1)
    cos, sin = table_TR.chunk(2, -1)
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = pairs.float().unflatten(-1, (-1, 2)).unbind(-1)
    if inverse:
        turned = torch.stack((even * cos + odd * sin, odd * cos - even * sin), -1)
    else:
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return torch.cat((plain, turned.flatten(-2).to(x.dtype)), -1)


class RopeTable(nn.Module):
    frequency: Tensor

    def __init__(self, dim: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.register_buffer("frequency", rope_frequencies(dim, theta, scaling), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return rope_table(positions, self.frequency)


class EntryRopeTable(nn.Module):
    frequency: Tensor

    def __init__(self, dim: int, theta: float, scaling: RopeScaling | None, ratio: int) -> None:
        super().__init__()
        self.register_buffer("frequency", rope_frequencies(dim, theta, scaling), persistent=False)
        self.ratio = ratio

    def forward(self, positions: Tensor, ends: Tensor) -> Tensor:
        return entry_rope_table(positions, ends, self.frequency, ratio=self.ratio)


class Rope(nn.Module):
    def __init__(self, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse

    def forward(self, x: Tensor, table_TR: Tensor) -> Tensor:
        return rope(x, table_TR, inverse=self.inverse)
