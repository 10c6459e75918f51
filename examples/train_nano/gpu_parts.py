"""Triton kernels for the two parts of training that a chain of small tensor operations would dominate.

Sinkhorn normalisation of 4 x 4 matrices (forward, and backward at the converged matrix), and the k-th largest score
of every row by bisection. All are bound by one read and one write of their tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sinkhorn_forward(a_ptr, m_ptr, count, eps, ITERS: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    four = tl.arange(0, 4)
    at = t[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
    inside = at < count * 16
    a = tl.load(a_ptr + at, mask=inside, other=0.0)
    m = tl.exp(a - tl.max(a, 2)[:, :, None])
    m = m / tl.sum(m, 2)[:, :, None] + eps
    m = m / (tl.sum(m, 1)[:, None, :] + eps)
    for _ in range(ITERS - 1):
        m = m / (tl.sum(m, 2)[:, :, None] + eps)
        m = m / (tl.sum(m, 1)[:, None, :] + eps)
    tl.store(m_ptr + at, m, mask=inside)


@triton.jit
def _sinkhorn_backward(m_ptr, grad_ptr, out_ptr, count, ITERS: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    four = tl.arange(0, 4)
    at = t[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
    inside = at < count * 16
    m = tl.load(m_ptr + at, mask=inside, other=0.25)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0) * m
    for _ in range(ITERS):
        g = g - m * tl.sum(g, 1)[:, None, :]
        g = g - m * tl.sum(g, 2)[:, :, None]
    tl.store(out_ptr + at, g, mask=inside)


@triton.jit
def _row_threshold(x_ptr, out_ptr, width, k, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * width + column, mask=column < width, other=float("-inf"))
    present = x > float("-inf")
    high = tl.max(x, 0)
    low = tl.min(tl.where(present, x, high), 0)
    if tl.sum(present.to(tl.int32), 0) > k:
        for _ in range(STEPS):
            middle = (low + high) * 0.5
            enough = tl.sum((x >= middle).to(tl.int32), 0) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    tl.store(out_ptr + row, low)


def sinkhorn_forward(a_T16: Tensor, iters: int, eps: float) -> Tensor:
    m = torch.empty_like(a_T16)
    _sinkhorn_forward[(triton.cdiv(a_T16.shape[0], 128),)](a_T16, m, a_T16.shape[0], eps, iters, 128, num_warps=4)
    return m


def sinkhorn_backward(m_T16: Tensor, grad_T16: Tensor, iters: int) -> Tensor:
    out = torch.empty_like(m_T16)
    count = m_T16.shape[0]
    _sinkhorn_backward[(triton.cdiv(count, 128),)](m_T16, grad_T16, out, count, iters, 128, num_warps=4)
    return out


def row_threshold(scores: Tensor, k: int) -> Tensor:
    """[..., 1] a value with at least k scores not below it (all present ones where there are fewer)."""
    scores = scores.contiguous()
    width = scores.shape[-1]
    out = scores.new_empty((*scores.shape[:-1], 1))
    rows = scores.numel() // width
    _row_threshold[(rows,)](scores, out, width, k, triton.next_power_of_2(width), 24, num_warps=1)
    return out
