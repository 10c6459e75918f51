"""Small GPU kernels that the framework's tests compile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale(x, y, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(y + at, (tl.load(x + at, mask=inside).to(tl.float32) * FACTOR).to(tl.bfloat16), mask=inside)


@triton.jit
def product(a, b, c, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        total = tl.dot(a.load([m, k]), b.load([n, k]).T, total)
    c.store([m, n], total.to(tl.bfloat16))


@triton.jit
def scratch(x, y, n, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [n, 64], [64, 1], [BLOCK, 64])
    target = tl.make_tensor_descriptor(y, [n, 64], [64, 1], [BLOCK, 64])
    target.store([0, 0], source.load([0, 0]))
