"""How far two programs' results lie apart, and where they begin to.

Results are compared bit for bit and in numbers; distributions of the next token by their divergence. `rows_apart` is
the measure in which inexact passes state their tolerance: of a row, |a - b| / |b| (Euclidean), the worst over rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Results = Mapping[str, Tensor]

_SMALL_ROW = 0.1  # of the usual size of a row: below it, rows are judged as if they were so large


@dataclass(frozen=True)
class Difference:
    """Of one result: the largest |a - b|, that over the largest |b|, and the cosine of the two as vectors."""

    name: str
    max_abs: float
    max_rel: float
    cosine: float


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else True


def difference(name: str, after: Tensor, before: Tensor) -> Difference:
    """How far one result moved; infinite for another shape or dtype, or where one of the two is no number."""
    if same_bits(after, before):
        return Difference(name, 0.0, 0.0, 1.0)
    if after.shape != before.shape or after.is_floating_point() != before.is_floating_point():
        return Difference(name, math.inf, math.inf, 0.0)
    a, b = after.double().flatten(), before.double().flatten()
    off = (a - b).masked_fill(a == b, 0.0).abs().max().item()
    if not math.isfinite(off):
        return Difference(name, math.inf, math.inf, 0.0)
    a, b = a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)
    size, norms = b.abs().max().item(), float(a.norm() * b.norm())
    return Difference(
        name, off, off / size if size else math.inf, float(a @ b) / norms if norms else float(norms == off)
    )


def differences(after: Results, before: Results) -> list[Difference]:
    """Of every result that is not the same, the largest first. A result that `after` lacks is infinitely far.

    Results that `after` has besides are no difference.
    """
    out = [
        difference(name, after[name], value) if name in after else Difference(name, math.inf, math.inf, 0.0)
        for name, value in before.items()
    ]
    return sorted((d for d in out if d.max_abs), key=lambda d: -d.max_rel)


def divergence(after: Tensor, before: Tensor) -> float:
    """Mean over rows of KL(before || after) of the distributions that logits [S, V] give, in nats."""
    total = 0.0
    for a, b in zip(after.split(256), before.split(256), strict=True):
        log_a, log_b = a.double().log_softmax(-1), b.double().log_softmax(-1)
        total += float((log_b.exp() * (log_b - log_a)).sum())
    return max(0.0, total / max(1, len(before)))


def greedy_agreement(after: Tensor, before: Tensor) -> float:
    """Share of rows of logits whose largest is the same token."""
    return float((after.argmax(-1) == before.argmax(-1)).double().mean()) if len(before) else 1.0


def rows_apart(out: Tensor, ref: Tensor) -> float:
    """The largest relative error of a row [i, ...]; infinite for another shape or where only one is a number."""
    if out.shape != ref.shape:
        return math.inf
    if not out.numel():
        return 0.0
    a, b = (t.double().reshape(t.shape[0] if t.dim() else 1, -1) for t in (out, ref))
    off = (a - b).masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    b = b.nan_to_num(0.0, 0.0, 0.0)
    sizes = b.norm(dim=1)
    least = _SMALL_ROW * float(sizes.square().mean().sqrt())
    errors = off.norm(dim=1) / sizes.clamp(min=least) if least else torch.where(off.norm(dim=1) > 0, math.inf, 0.0)
    worst = float(errors.max())
    return worst if math.isfinite(worst) else math.inf


def quantised_rows_apart(out: tuple[Tensor, Tensor], ref: tuple[Tensor, Tensor]) -> float:
    """The same for E4M3 rows [..., C] with their scales [..., C / group]; a value may fall to its neighbour."""
    (data, scale), (ref_data, ref_scale) = out, ref
    if data.shape != ref_data.shape or scale.shape != ref_scale.shape:
        return math.inf
    wide, step = _widened(data, scale)
    ref_wide, ref_step = _widened(ref_data, ref_scale)
    near = (wide - ref_wide).abs() <= torch.maximum(step, ref_step)
    return rows_apart(torch.where(near, ref_wide, wide), ref_wide)


def _widened(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Values, and the distance to the next ones."""
    factor = scale.repeat_interleave(data.shape[-1] // scale.shape[-1], -1)
    size = data.float().abs().clamp(min=2.0**-6)
    return data.float() * factor, torch.exp2(torch.floor(torch.log2(size)) - 3) * factor
