"""How likely counts are to stray so far from their distribution by chance."""

from __future__ import annotations

import torch


def chance(counts: torch.Tensor, weights: torch.Tensor) -> float:
    """p of Pearson's chi-square test. Counts where a weight is 0 are impossible: p is 0.

    The rarest are counted together, so many that 5 are expected of them.
    """
    possible = weights > 0
    if int(counts[~possible].sum()):
        return 0.0
    order = weights[possible].argsort()
    counts, weights = counts[possible][order].double(), weights[possible][order].double()
    expected = weights / weights.sum() * counts.sum()
    rare = int((expected.cumsum(0) < 5).sum()) + 1
    counts, expected = (torch.cat([x[:rare].sum(0, keepdim=True), x[rare:]]) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2)) if freedom else 1.0
