"""References of the linear maps as engines run them: FP8 with block scales, BF16 with float32 sums, and fused gates.

Weights are as stored in the checkpoint: E4M3 [N, K] with a float32 power-of-two scale for each 128 x 128 block (edge
blocks may be partial), or BF16 [N, K]. FP8 activations are `formats.quantise_rows` in groups of 128 channels.

Legend: T tokens, N output channels, K input channels, S = K / 128 scale groups, G groups of heads, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4c.model.moe import gate_bias, gate_hash
from dsv4c.ops._op import Index, Op, TensorType
from dsv4c.ops.formats import dequantise_blocks, dequantise_rows


def linear_fp8(data_TK: Tensor, scale_TS: Tensor, weight_NK: Tensor, weight_scale: Tensor) -> Tensor:
    """Quantised rows times a quantised weight: bfloat16 [T, N]."""
    x = dequantise_rows(data_TK, scale_TS)
    return (x @ dequantise_blocks(weight_NK, weight_scale).T).to(torch.bfloat16)


def grouped_linear_fp8(
    data_TGK: Tensor, scale_TGS: Tensor, weight: Tensor, weight_scale: Tensor, *, groups: int
) -> Tensor:
    """Each group of a row through its own rows of weight [G * N, K]: bfloat16 [T, G * N]."""
    x_TGK = dequantise_rows(data_TGK, scale_TGS)
    weight_GNK = dequantise_blocks(weight, weight_scale).unflatten(0, (groups, -1))
    return torch.einsum("tgk,gnk->tgn", x_TGK, weight_GNK).flatten(1).to(torch.bfloat16)


def linear_mixed(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """BF16 rows times a BF16 weight, summed and kept in float32: [T, N]."""
    return x_TK.float() @ weight_NK.float().T


def gate_linear_bias(
    x_TK: Tensor, weight_EK: Tensor, bias_E: Tensor, *, topk: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """The router's `linear_mixed`, then `gate_bias`: (ids int32, weight)."""
    ids, weight = gate_bias(linear_mixed(x_TK, weight_EK), bias_E, topk=topk, scaling=scaling)
    return ids.to(torch.int32), weight


def gate_linear_hash(
    x_TK: Tensor, weight_EK: Tensor, token_ids: Tensor, tid2eid: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """The router's `linear_mixed`, then `gate_hash`: (ids int32, weight)."""
    ids, weight = gate_hash(linear_mixed(x_TK, weight_EK), token_ids, tid2eid, scaling=scaling)
    return ids.to(torch.int32), weight


def _linear_flops(types: Sequence[TensorType], attrs: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
    weight = next(t for t in types[1:] if len(t.shape) == 2 and t.dtype in ("float8_e4m3fn", "bfloat16"))
    return 2 * types[0].numel(symbols) * int(weight.shape[0]) // int(attrs.get("groups", 1))


OPS = (
    Op("linear_fp8", linear_fp8, flops=_linear_flops),
    Op("grouped_linear_fp8", grouped_linear_fp8, flops=_linear_flops),
    Op("linear_mixed", linear_mixed, flops=_linear_flops),
    Op("gate_linear_bias", gate_linear_bias, outputs=2, flops=_linear_flops, indices={0: Index("weight_EK")}),
    Op(
        "gate_linear_hash",
        gate_linear_hash,
        outputs=2,
        flops=_linear_flops,
        indices={0: Index("weight_EK"), "token_ids": Index("tid2eid")},
    ),
)
