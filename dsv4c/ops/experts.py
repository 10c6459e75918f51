"""The routed experts on FP4 weights as the checkpoint stores them: E2M1 pairs with an E8M0 scale for 32 channels.

Legend: T tokens, D hidden_size, K experts a token, E experts, I `moe_intermediate_size`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4c.ops._op import Index, Op, TensorType
from dsv4c.ops.formats import dequantise_fp4


def experts_fp4(
    x_TD: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    w1: Tensor,
    s1: Tensor,
    w3: Tensor,
    s3: Tensor,
    w2: Tensor,
    s2: Tensor,
    shared_TD: Tensor,
    *,
    limit: float,
) -> Tensor:
    """shared + sum over a token's experts of w2 (weight * swiglu(w1 x, w3 x)), float32 inside.

    w1, w3: uint8 [E, I, D / 2] with scale bytes [E, I, D / 32]; w2: [E, D, I / 2] with [E, D, I / 32].
    """
    out = shared_TD.to(torch.float32, copy=True)
    for expert in range(w1.shape[0]):
        token, k = (chosen_TK == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        x = x_TD[token].float()
        gate = x @ dequantise_fp4(w1[expert], s1[expert]).T
        up = x @ dequantise_fp4(w3[expert], s3[expert]).T
        hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weight_TK[token, k].unsqueeze(1)
        out.index_add_(0, token, hidden @ dequantise_fp4(w2[expert], s2[expert]).T)
    return out.to(x_TD.dtype)


def expert_flops(types: Sequence[TensorType], attrs: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
    """Operations of both products over all pairs."""
    x, chosen, w1 = types[0], types[1], types[3]
    return 6 * chosen.numel(symbols) * int(x.shape[1]) * int(w1.shape[1])


OPS: tuple[Op, ...] = (Op("experts_fp4", experts_fp4, flops=expert_flops, indices={"chosen_TK": Index("w1")}),)
