"""FP8 and FP4 weights to floats and back, exactly, and the two number grids behind them.

FP8: float8_e4m3fn values, one scale for each tile of 128 x 128 (tiles at the edges are partial).
FP4: two e2m1 codes a byte, channel 2j in the low nibble and 2j + 1 in the high one; a scale for 32 channels of a row.
NVFP4: the same codes; a float8_e4m3fn scale for 16 channels of a row, and one float32 factor for the matrix.
Another scale is float8_e8m0fnu (byte b stands for 2^(b - 127), 255 for NaN) or, in FP8 of Base checkpoints, float32.
Quantisers round scales up to a power of two, so nothing saturates, and values to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4c.checkpoint.names import BLOCK, GROUP
from dsv4c.nvfp4 import NVFP4_GROUP

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0..7; bit 3 of a code is the sign."""

# Midpoints of the grid. A tie goes to the even code: down at the first four, up at the other three.
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)
_BIAS = 127
_NAN_BYTE = 255
_E4M3_NAN, _E4M3_MINUS_ZERO = 0x7F, 0x80


def e2m1_encode(x: Tensor) -> Tensor:
    """Codes 0..15 (uint8, shape of x) of the nearest grid values, ties to even; magnitudes over 6 become 6."""
    magnitude = x.abs().float()
    code = torch.bucketize(magnitude, magnitude.new_tensor(_TIES_DOWN), out_int32=True)
    code += torch.bucketize(magnitude, magnitude.new_tensor(_TIES_UP), out_int32=True, right=True)
    return (code + x.signbit() * 8).to(torch.uint8)


def e2m1_decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes 0..15, same shape."""
    return _grid(dtype, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def _grid(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=dtype, device=device)


def bad_scales(scale: Tensor, least: float | None = None) -> Tensor:
    """How many scales cannot be right (a count on their device): e8m0 bytes of 255, NaN or infinite float32 (or below
    `least`), and of e4m3, which only NVFP4 has, NaN and negative numbers.
    """
    if scale.dtype == torch.float8_e8m0fnu:
        return (scale.view(torch.uint8) == _NAN_BYTE).sum()
    if scale.dtype == torch.float8_e4m3fn:
        byte = scale.view(torch.uint8)
        return ((byte == _E4M3_NAN) | (byte > _E4M3_MINUS_ZERO)).sum()
    bad = ~torch.isfinite(scale)
    return (bad if least is None else bad | (scale < least)).sum()


def dequantise_fp8_block(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[out, in] float8_e4m3fn and its scale [ceil(out/128), ceil(in/128)] (e8m0 or float32) as a new `dtype` tensor.

    Exact in float32 and, for e8m0 scales, in bfloat16 (outside of the subnormal range).
    """
    if scale.dtype != torch.float8_e8m0fnu and dtype != torch.float32:
        return dequantise_fp8_block(weight, scale).to(dtype)
    rows, columns = weight.shape
    out = weight.to(dtype)
    factor = scale.to(dtype).repeat_interleave(BLOCK, 0)[:rows]
    whole = columns // BLOCK * BLOCK
    out[:, :whole].unflatten(1, (-1, BLOCK)).mul_(factor[:, : whole // BLOCK, None])
    out[:, whole:].mul_(factor[:, whole // BLOCK :])
    return out


def dequantise_fp4(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[out, in/2] int8 or uint8 bytes and their e8m0 scale [out, in/32] as a new [out, in] `dtype` tensor.

    Exact in float32 and bfloat16 (outside of the subnormal range).
    """
    out = _unpacked(packed, dtype)
    out.unflatten(1, (-1, GROUP)).mul_(scale.to(dtype)[:, :, None])
    return out


def dequantise_nvfp4(
    packed: Tensor, scale: Tensor, factor: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:  # fmt: skip
    """[out, in/2] bytes, their e4m3 scale [out, in/16] and the matrix's float32 factor as a new [out, in] tensor.

    Codes times scales are exact in float32; the product with the factor is rounded once, and once more to `dtype`.
    """
    out = _unpacked(packed, torch.float32)
    out.unflatten(1, (-1, NVFP4_GROUP)).mul_(scale.float()[:, :, None])
    return out.mul_(factor.reshape(())).to(dtype)


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in/2] bytes -> the values [out, in] of their codes."""
    rows, half = packed.shape
    grid = _grid(dtype, packed.device)
    pairs = torch.stack([grid.repeat(16), grid.repeat_interleave(16)], 1)  # byte -> (low nibble, high nibble)
    return pairs.index_select(0, packed.view(torch.uint8).flatten().int()).view(rows, half * 2)


def widen(parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """A stored tensor and, if its type is FP8 or packed FP4, its scales -> its values as `dtype`; int64 stays."""
    weight = parts[0]
    if weight.dtype == torch.float8_e4m3fn:
        return dequantise_fp8_block(weight, parts[1], dtype)
    if len(parts) == 3:
        return dequantise_nvfp4(weight, parts[1], parts[2], dtype)
    if weight.dtype in (torch.int8, torch.uint8):
        return dequantise_fp4(weight, parts[1], dtype)
    return weight if weight.dtype == torch.int64 else weight.to(dtype)


def _scale_exponent(amax: Tensor, top: float) -> Tensor:
    """Least k (int32) with amax <= top * 2^k, held within e8m0's -127..127; -127 for 0."""
    top_mantissa, top_exponent = torch.frexp(torch.tensor(top))
    mantissa, exponent = torch.frexp(amax)
    k = exponent - top_exponent + (mantissa > top_mantissa).int()
    return torch.where(amax > 0, k, -_BIAS).clamp(-_BIAS, _BIAS)


def _e8m0(exponent: Tensor) -> Tensor:
    return (exponent + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def quantise_fp8_block(w: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] finite floats -> (float8_e4m3fn [out, in], float8_e8m0fnu [ceil(out/128), ceil(in/128)])."""
    rows, columns = w.shape
    tiles = torch.nn.functional.pad(w.detach().float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = tiles.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    exponent = _scale_exponent(tiles.abs().amax((1, 3)), E4M3_MAX)
    scaled = (tiles * _e8m0(-exponent).float()[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    return scaled[:rows, :columns].to(torch.float8_e4m3fn), _e8m0(exponent)


def quantise_fp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] finite floats, in a multiple of 32 -> (packed int8 [out, in/2], float8_e8m0fnu [out, in/32])."""
    if w.shape[1] % GROUP:
        raise ValueError(f"FP4 needs a multiple of {GROUP} input channels, not {w.shape[1]}")
    groups = w.detach().float().unflatten(1, (-1, GROUP))
    exponent = _scale_exponent(groups.abs().amax(2), E2M1_MAX)
    codes = e2m1_encode(groups * _e8m0(-exponent).float()[:, :, None]).flatten(1)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8), _e8m0(exponent)
