"""What engines store in 8 and 4 bits, bit by bit: quantised rows, and the entries of packed KV and index pools.

All scales are powers of two, rounded up (model.md 2.10), so dequantised values are exact in bfloat16. A packed pool is
uint8 [rows, entry bytes] as the pages need it, but a page of E entries holds all data first and then all scales:

    page p = bytes [p * E * B, (p + 1) * E * B):   E x data bytes, then E x scale bytes      B = data + scale

    kv        data: plain channels as E4M3, then the rotated ones as bfloat16; scale: 8 bytes, one E8M0 byte for each
              group of 64 plain channels (one group if 64 does not divide them), the rest 0.  512/64: 576 + 8 = 584
    index fp8 data: E4M3;        scale: one float32                                           128: 128 + 4 = 132
    index fp4 data: E2M1 pairs, the even channel in the low nibble; scale: 4 bytes, one E8M0 byte for each group of 32
              channels (one group if fewer), the rest 0                                       128: 64 + 4 = 68

E8M0 byte b stands for 2 ** (b - 127), 255 for NaN. A group that holds a NaN or an infinity is NaN as a whole: its scale
is, and its data are where they can be (E4M3; E2M1 has no NaN).

Legend: N rows of a pool, C channels of an entry, E entries a page.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dsv4c.model.quant import power_of_two_ceil, round_e2m1

IndexFormat = Literal["fp8", "fp4"]

E8M0_NAN = 255
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantise_rows(x: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    """E4M3 values [..., C] and float32 power-of-two scales [..., C / group] of x; amax is at least 1e-4.

    Both are NaN for a group that holds a NaN or an infinity.
    """
    wide = x.float().unflatten(-1, (-1, group))
    scale = power_of_two_ceil(wide.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)
    data = (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return data.flatten(-2), scale.squeeze(-1)


def dequantise_rows(data: Tensor, scale: Tensor) -> Tensor:
    """float32 values of `quantise_rows`."""
    wide = data.float().unflatten(-1, (scale.shape[-1], -1))
    out: Tensor = (wide * scale.unsqueeze(-1)).flatten(-2)
    return out


def dequantise_blocks(data: Tensor, scale: Tensor) -> Tensor:
    """float32 weight [..., N, K] of E4M3 data and float32 scales [..., ceil(N / 128), ceil(K / 128)]."""
    wide = scale.repeat_interleave(128, -2)[..., : data.shape[-2], :]
    out: Tensor = data.float() * wide.repeat_interleave(128, -1)[..., : data.shape[-1]]
    return out


def pack_e2m1(x: Tensor) -> Tensor:
    """uint8 [..., C / 2] of x rounded to E2M1 (|x| <= 6); the even channel is the low nibble. For NaN it holds 0."""
    x = torch.where(x.isnan(), 0.0, x)
    size = round_e2m1(x).abs()
    code = torch.bucketize(size, torch.tensor(_E2M1, device=x.device))
    code = code + 8 * torch.signbit(x).long()
    low, high = code.unflatten(-1, (-1, 2)).unbind(-1)
    packed: Tensor = (low + 16 * high).to(torch.uint8)
    return packed


def unpack_e2m1(data: Tensor) -> Tensor:
    """float32 [..., C] of packed E2M1 [..., C / 2]."""
    codes = torch.stack((data & 15, data >> 4), -1).flatten(-2).long()
    grid = torch.tensor((*_E2M1, *(-v for v in _E2M1)), device=data.device)
    return grid[codes]


def dequantise_fp4(data: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., C] of packed E2M1 [..., C / 2] and E8M0 bytes (uint8) [..., C / group]."""
    wide = unpack_e2m1(data).unflatten(-1, (scale.shape[-1], -1))
    out: Tensor = (wide * from_e8m0(scale).unsqueeze(-1)).flatten(-2)
    return out


def to_e8m0(scale: Tensor) -> Tensor:
    """uint8 exponents of float32 powers of two, and of NaN."""
    return torch.where(scale.isnan(), E8M0_NAN, torch.frexp(scale).exponent + 126).to(torch.uint8)


def from_e8m0(byte: Tensor) -> Tensor:
    """float32 powers of two of uint8 exponents, and NaN."""
    power = torch.ldexp(torch.ones_like(byte, dtype=torch.float32), byte.int() - 127)
    return power.where(byte != E8M0_NAN, torch.nan)


def kv_sizes(head_dim: int, rope_dim: int) -> tuple[int, int]:
    """Data and scale bytes of a packed KV entry."""
    return head_dim - rope_dim + 2 * rope_dim, 8


def kv_group(head_dim: int, rope_dim: int) -> int:
    """Plain channels that share a scale."""
    plain = head_dim - rope_dim
    return 64 if plain % 64 == 0 else plain


def pack_kv(x_NC: Tensor, rope_dim: int) -> tuple[Tensor, Tensor]:
    """Data and scale bytes of entries."""
    plain, rotated = x_NC.split([x_NC.shape[-1] - rope_dim, rope_dim], -1)
    data, scale = quantise_rows(plain, group=kv_group(x_NC.shape[-1], rope_dim))
    scales = torch.zeros(x_NC.shape[0], 8, dtype=torch.uint8, device=x_NC.device)
    scales[:, : scale.shape[1]] = to_e8m0(scale)
    return torch.cat((data.view(torch.uint8), rotated.to(torch.bfloat16).contiguous().view(torch.uint8)), -1), scales


def unpack_kv(data: Tensor, scales: Tensor, rope_dim: int) -> Tensor:
    """float32 entries [..., C] of their data and scale bytes."""
    plain, rotated = data.split([data.shape[-1] - 2 * rope_dim, 2 * rope_dim], -1)
    group = kv_group(plain.shape[-1] + rope_dim, rope_dim)
    scale = from_e8m0(scales[..., : plain.shape[-1] // group])
    wide = dequantise_rows(plain.contiguous().view(torch.float8_e4m3fn), scale)
    return torch.cat((wide, rotated.contiguous().view(torch.bfloat16).float()), -1)


def index_sizes(dim: int, fmt: IndexFormat) -> tuple[int, int]:
    """Data and scale bytes of a packed index key."""
    return (dim, 4) if fmt == "fp8" else (dim // 2, 4)


def pack_index(x_NC: Tensor, fmt: IndexFormat) -> tuple[Tensor, Tensor]:
    """Data and scale bytes of index vectors (already rotated by Hadamard)."""
    if fmt == "fp8":
        data, scale = quantise_rows(x_NC, group=x_NC.shape[-1])
        return data.view(torch.uint8), scale.flatten().view(torch.uint8).view(*scale.shape[:-1], 4)
    wide = x_NC.float().unflatten(-1, (-1, min(32, x_NC.shape[-1])))
    scale = power_of_two_ceil(wide.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126) / 6)
    scales = torch.zeros(*x_NC.shape[:-1], 4, dtype=torch.uint8, device=x_NC.device)
    scales[..., : wide.shape[-2]] = to_e8m0(scale.squeeze(-1))
    return pack_e2m1((wide / scale).clamp(-6, 6).flatten(-2)), scales


def unpack_index(data: Tensor, scales: Tensor, fmt: IndexFormat) -> Tensor:
    """float32 index vectors of their data and scale bytes."""
    if fmt == "fp8":
        return dequantise_rows(data.contiguous().view(torch.float8_e4m3fn), scales.contiguous().view(torch.float32))
    dim = 2 * data.shape[-1]
    return dequantise_fp4(data, scales[..., : max(1, dim // 32)])


def write_entries(pool: Tensor, slots: Tensor, data: Tensor, scales: Tensor, *, entries_per_page: int) -> Tensor:
    """The packed pool [N, B] with these entries in rows `slots`."""
    pages = pool.clone().view(-1, entries_per_page * pool.shape[1])
    page, entry = slots // entries_per_page, slots % entries_per_page
    for part, at in (
        (data, entry * data.shape[1]),
        (scales, entries_per_page * data.shape[1] + entry * scales.shape[1]),
    ):
        columns = at.unsqueeze(1) + torch.arange(part.shape[1], device=pool.device)
        pages[page.unsqueeze(1), columns] = part
    return pages.view(pool.shape)


def read_entries(pool: Tensor, rows: Tensor, data_bytes: int, *, entries_per_page: int) -> tuple[Tensor, Tensor]:
    """Data and scale bytes of the packed pool's rows (of any shape)."""
    pages = pool.view(-1, entries_per_page, pool.shape[1]).flatten(1)
    data = pages[:, : entries_per_page * data_bytes].unflatten(1, (entries_per_page, -1)).flatten(0, 1)
    scales = pages[:, entries_per_page * data_bytes :].unflatten(1, (entries_per_page, -1)).flatten(0, 1)
    return data[rows], scales[rows]
