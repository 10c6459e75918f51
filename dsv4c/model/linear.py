"""Linear maps without bias. Weights are [out, in], as in the checkpoint; quantised ones arrive dequantised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, *, float32: bool) -> Tensor:
    """x @ weight.T over the last dim; with `float32` both are widened first and the result stays float32."""
    return F.linear(x.float(), weight.float()) if float32 else F.linear(x, weight)


def grouped_linear(x_THC: Tensor, weight: Tensor, *, groups: int) -> Tensor:
    """Each group of neighbouring heads through its own rows of weight [groups * A, H * C / groups]: [T, groups * A]."""
    x_TGI = x_THC.flatten(1).unflatten(-1, (groups, -1))
    weight_GAI = weight.unflatten(0, (groups, -1))
    return torch.einsum("tgi,gai->tga", x_TGI, weight_GAI).flatten(1)


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int, *, float32: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(0, in_features**-0.5))
        self.float32 = float32

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, float32=self.float32)


class GroupedLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features).normal_(0, in_features**-0.5))
        self.groups = groups

    def forward(self, x_THC: Tensor) -> Tensor:
        return grouped_linear(x_THC, self.weight, groups=self.groups)
