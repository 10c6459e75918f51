"""How the nano model is optimised: Muon for matrices, AdamW for the rest, and the rounding of shipped weights.

Muon: momentum, then an approximate orthogonalisation by five Newton-Schulz steps, scaled so that an update has the
root mean square of an AdamW step. Matrices of one shape are stacked and updated together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4c.checkpoint.names import BLOCK, GROUP, inventory
from dsv4c.config import ModelConfig
from dsv4c.model.quant import power_of_two_ceil, round_e2m1

Params = dict[str, Tensor]

_ADAM = ("embed.", "head.", "gate.", "hc_", "ape", "norm", "attn_sink", "weights_proj")


def uses_adam(name: str) -> bool:
    """Vectors, tables of embeddings, and the small matrices that decide rather than transform."""
    return any(part in name for part in _ADAM)


def adam_factor(name: str) -> float:
    """Share of AdamW's rate: a matrix with many inputs moves its outputs further for the same step."""
    if name.endswith("_fn"):
        return 0.1
    if "gate." in name or "weights_proj" in name or name.endswith(("_base", "_scale")):
        return 0.3
    return 0.6 if "norm" in name or name.startswith("head.") else 1.0


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, r, c] (r <= c) -> nearly orthonormal rows, bfloat16."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class Muon:
    def __init__(self, params: list[Tensor], momentum: float = 0.95, decay: float = 0.1) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        for param in params:
            rows, columns = param.shape[-2:]
            self.groups.setdefault((min(rows, columns), max(rows, columns)), []).append(param)
        self.buffers = {s: torch.zeros_like(self._stack(s, [p.data for p in ps])) for s, ps in self.groups.items()}

    @staticmethod
    def _stack(shape: tuple[int, int], values: list[Tensor]) -> Tensor:
        flat = [v.reshape(-1, *v.shape[-2:]) for v in values]
        return torch.cat([v if v.shape[1] == shape[0] else v.transpose(1, 2) for v in flat])

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, params in self.groups.items():
            grad = self._stack(shape, [p.grad for p in params])
            buffer = self.buffers[shape].mul_(self.momentum).add_(grad, alpha=1 - self.momentum)
            update = orthogonalise(grad.lerp(buffer, self.momentum)).float()
            sizes = [p.numel() // (shape[0] * shape[1]) for p in params]
            scale = -lr * 0.2 * shape[1] ** 0.5
            torch._foreach_mul_(params, 1 - lr * self.decay)
            for param, part in zip(params, update.split(sizes), strict=True):
                part = part if param.shape[-2] == shape[0] else part.transpose(1, 2)
                param.add_(part.reshape(param.shape), alpha=scale)


def _rounded_fp4(weight: Tensor) -> Tensor:
    groups = weight.reshape(-1, GROUP)
    scale = power_of_two_ceil(groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 6)
    return (round_e2m1(groups / scale) * scale).view(weight.shape)


def _tiles(weight: Tensor) -> Tensor:
    """[n, BLOCK, BLOCK], zero-padded at the edges."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2).flatten(0, 1)


def _untiled(tiles: Tensor, rows: int, columns: int) -> Tensor:
    across = -(-columns // BLOCK)
    return tiles.unflatten(0, (-1, across)).transpose(1, 2).flatten(2, 3).flatten(0, 1)[:rows, :columns]


def _rounded_fp8(tiles: Tensor) -> Tensor:
    scale = power_of_two_ceil(tiles.abs().amax((1, 2), keepdim=True).clamp(min=1e-30) / 448)
    return (tiles / scale).to(torch.float8_e4m3fn).float() * scale


def storage_kinds(config: ModelConfig) -> dict[str, str]:
    """Parameter -> how the checkpoint stores it."""
    kinds = {}
    for name, spec in inventory(config).items():
        if spec.role == "expert":
            prefix, _, matrix, _ = name.rsplit(".", 3)
            name = f"{prefix}.{matrix}"
        kinds[name] = spec.kind
    return kinds


class _StraightThrough(torch.autograd.Function):
    """The rounded value forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def as_stored(params: Params, kinds: dict[str, str]) -> Params:
    """The values a checkpoint would hold, float32; gradients pass straight through."""
    rounded: Params = {}
    fp4 = [name for name in params if kinds[name] == "fp4"]
    flat = _rounded_fp4(torch.cat([params[name].detach().flatten() for name in fp4]))
    for name, part in zip(fp4, flat.split([params[name].numel() for name in fp4]), strict=True):
        rounded[name] = part.view(params[name].shape)
    fp8 = [name for name in params if kinds[name] == "fp8"]
    tiles = [_tiles(params[name].detach()) for name in fp8]
    for name, part in zip(fp8, _rounded_fp8(torch.cat(tiles)).split([len(t) for t in tiles]), strict=True):
        rounded[name] = _untiled(part, *params[name].shape)
    for name, weight in params.items():
        if kinds[name] == "bf16":
            rounded[name] = weight.detach().bfloat16().float()
    return {name: _StraightThrough.apply(w, rounded.get(name, w.detach())) for name, w in params.items()}


def as_trained(params: Params) -> Params:
    """The parameters themselves, in the form `as_stored` gives them, so that compiled code serves both."""
    return {name: _StraightThrough.apply(w, w.detach()) for name, w in params.items()}
