"""Rows in the block-scaled formats of Blackwell's matrix units, value by value, and experts that compute on them.

    mxfp8   E4M3, an E8M0 byte (uint8) for 32 channels
    mxfp4   E2M1 pairs, the even channel in the low nibble, an E8M0 byte for 32 channels
    nvfp4   E2M1 pairs, an E4M3 scale for 16 channels, and one float32 factor for all

MX scales are the powers of two from amax / largest up, at least 2**-126: nothing saturates. (The conversion that OCP's
MX specification describes rounds down instead, and lets values above the largest saturate.) NVFP4's are rounded to the
nearest E4M3, at most 448, so a group's largest value may saturate; groups whose scale rounds to 0 are 0. Values round
to nearest even. A group that holds a NaN or an infinity gets a NaN for its scale, E8M0's 255 or E4M3's 127, and is NaN.

Legend: T tokens, D hidden_size, K experts a token, E experts, I `moe_intermediate_size`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4c.model.quant import power_of_two_ceil
from dsv4c.ops._op import Index, Op
from dsv4c.ops.experts import expert_flops
from dsv4c.ops.formats import (
    E8M0_NAN,
    dequantise_fp4,
    dequantise_rows,
    from_e8m0,
    pack_e2m1,
    to_e8m0,
    unpack_e2m1,
)

MxFormat = Literal["mxfp8", "mxfp4", "nvfp4"]
LARGEST = {"mxfp8": 448.0, "mxfp4": 6.0, "nvfp4": 6.0}


def mx_group(fmt: MxFormat) -> int:
    """Channels that share a scale."""
    return 16 if fmt == "nvfp4" else 32


def quantise_mx(x: Tensor, fmt: MxFormat, global_scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Data and scales of rows [..., C]; `global_scale` (float32, one element) is NVFP4's factor for all."""
    wide = x.float().unflatten(-1, (-1, mx_group(fmt)))
    most = wide.abs().amax(-1, keepdim=True)
    finite = most.isfinite()
    wide, most = wide.where(finite, 0.0), most.where(finite, 0.0)
    if fmt == "nvfp4":
        scale = (most / (6.0 * global_scale)).clamp(max=448).to(torch.float8_e4m3fn)
        factor = scale.float() * global_scale
        values = (wide * torch.where(factor > 0, 1 / factor, 0.0)).clamp(-6, 6)
        stored = torch.where(finite, scale.float(), torch.nan).to(torch.float8_e4m3fn)
        return pack_e2m1(values.flatten(-2)), stored.squeeze(-1)
    power = power_of_two_ceil((most / LARGEST[fmt]).clamp(min=2.0**-126))
    values = (wide / power).flatten(-2)
    data = values.to(torch.float8_e4m3fn) if fmt == "mxfp8" else pack_e2m1(values)
    return data, torch.where(finite, to_e8m0(power), E8M0_NAN).squeeze(-1)


def dequantise_mx(data: Tensor, scale: Tensor, fmt: MxFormat, global_scale: Tensor | float = 1.0) -> Tensor:
    """float32 rows of their data and scales."""
    if fmt == "mxfp8":
        return dequantise_rows(data, from_e8m0(scale))
    if fmt == "mxfp4":
        return dequantise_fp4(data, scale)
    return dequantise_rows(unpack_e2m1(data), scale.float() * global_scale)


def rounded_mx(x: Tensor, fmt: MxFormat, global_scale: Tensor | float = 1.0) -> Tensor:
    """float32 rows as the format holds them."""
    return dequantise_mx(*quantise_mx(x, fmt, global_scale), fmt, global_scale)


def experts_mx(
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
    activations: MxFormat,
) -> Tensor:
    """`experts_fp4` with both products' activations rounded to `activations`: `mxfp8` (W4A8) or `mxfp4` (W4A4).

    w1, w3: uint8 [E, I, D / 2] with scale bytes [E, I, D / 32]; w2: [E, D, I / 2] with [E, D, I / 32].
    """
    pairs = ((w1, s1), (w3, s3), (w2, s2))

    def weights(which: int, expert: int) -> Tensor:
        data, scale = pairs[which]
        return dequantise_fp4(data[expert], scale[expert])

    def rounded(x: Tensor, expert: int = 0) -> Tensor:
        return rounded_mx(x, activations)

    return experts_of(x_TD, chosen_TK, weight_TK, weights, shared_TD, limit, rounded, rounded)


def experts_nvfp4(
    x_TD: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    w1: Tensor,
    s1: Tensor,
    g1_E: Tensor,
    w3: Tensor,
    s3: Tensor,
    g3_E: Tensor,
    w2: Tensor,
    s2: Tensor,
    g2_E: Tensor,
    x_global: Tensor,
    hidden_global_E: Tensor,
    shared_TD: Tensor,
    *,
    limit: float,
    activations: Literal["bf16", "nvfp4"],
) -> Tensor:
    """Experts of an NVFP4 checkpoint: scales E4M3 [.., C / 16], a float32 factor for each expert.

    Activations are NVFP4 (W4A4) or as they are (`bf16`, W4A16). `x_global` [1] is the factor of the tokens, which are
    quantised once for all experts, `hidden_global_E` that of each expert's second product.
    """
    stored = ((w1, s1, g1_E), (w3, s3, g3_E), (w2, s2, g2_E))

    def weights(which: int, expert: int) -> Tensor:
        data, scale, whole = stored[which]
        return dequantise_mx(data[expert], scale[expert], "nvfp4") * whole[expert]

    def tokens(x: Tensor) -> Tensor:
        return rounded_mx(x, "nvfp4", x_global) if activations == "nvfp4" else x

    def hidden(x: Tensor, expert: int) -> Tensor:
        return rounded_mx(x, "nvfp4", hidden_global_E[expert]) if activations == "nvfp4" else x

    return experts_of(x_TD, chosen_TK, weight_TK, weights, shared_TD, limit, tokens, hidden)


def experts_of(
    x_TD: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    weight_of: Callable[[int, int], Tensor],
    shared_TD: Tensor,
    limit: float,
    round_x: Callable[[Tensor], Tensor],
    round_hidden: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Routed experts whose two products read what `round_x` and `round_hidden` make of their float32 rows.

    `weight_of`: w1, w3 or w2 (0 to 2) of an expert, float32. `round_hidden` is told the expert.
    """
    out = shared_TD.to(torch.float32, copy=True)
    rows, dtype = round_x(x_TD.float()), x_TD.dtype
    for expert in chosen_TK.unique().tolist():
        token, k = (chosen_TK == expert).nonzero(as_tuple=True)
        gate, up = (rows[token] @ weight_of(which, expert).T for which in (0, 1))
        hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weight_TK[token, k].unsqueeze(1)
        out.index_add_(0, token, round_hidden(hidden, expert) @ weight_of(2, expert).T)
    return out.to(dtype)


OPS: tuple[Op, ...] = (
    Op("experts_mx", experts_mx, flops=expert_flops, indices={"chosen_TK": Index("w1")}),
    Op("experts_nvfp4", experts_nvfp4, flops=expert_flops, indices={"chosen_TK": Index("w1")}),
)
