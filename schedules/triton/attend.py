"""Attention over packed FP8 pools in plain Triton: any head count and entry size; and the combine of split keys.

One program attends with some heads of one token to one share of its keys. Keys are counted without holes: first the
window's (those that exist), then the entries; a tile of keys is dequantised to bfloat16 in registers and used twice,
as K and as V. Weights are base-2 exponentials against a running maximum that starts at the sink, so that nothing
overflows; the sink's own weight is counted once, in the first share.

Legend: T tokens, H heads, C head_dim, K keys of a tile, S shares.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _keys(pool, table, entry, seen, C: tl.constexpr, ROPE: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr):
    """bfloat16 [K, CHANNELS] of the request's entries; those not seen, and channels from C up, are 0."""
    PLAIN: tl.constexpr = C - ROPE
    GROUP: tl.constexpr = 64 if PLAIN % 64 == 0 else PLAIN
    DATA: tl.constexpr = PLAIN + 2 * ROPE
    page = tl.load(table + entry // ENTRIES, mask=seen, other=0)
    slot = entry % ENTRIES
    start = page * (ENTRIES * (DATA + 8))
    data = pool + start + slot * DATA
    c = tl.arange(0, CHANNELS)
    plain = c < PLAIN
    x = tl.load(data[:, None] + c[None, :], mask=seen[:, None] & plain[None, :], other=0)
    scale_at = pool + start + ENTRIES * DATA + slot * 8
    scale = tl.load(scale_at[:, None] + (c // GROUP)[None, :], mask=seen[:, None] & plain[None, :], other=0)
    # the E8M0 byte is the exponent field of a bfloat16
    scale = (scale.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
    values = (x.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale.to(tl.float32)).to(tl.bfloat16)
    turned = (data + PLAIN).to(tl.pointer_type(tl.bfloat16))[:, None] + (c - PLAIN)[None, :]
    rotated = tl.load(turned, mask=seen[:, None] & ((c >= PLAIN) & (c < C))[None, :], other=0.0)
    return tl.where(plain[None, :], values, rotated)


@triton.jit
def attend(
    q, pool, pages, entry_pool, entry_pages, picks, request_rows, positions, sink, out, lse,
    columns, entry_columns,
    KIND: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, ROPE: tl.constexpr, CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, ENTRIES: tl.constexpr, RATIO: tl.constexpr, TOPK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """KIND: `window`, `csa` or `hca`. Grid: tokens, blocks of heads, shares.

    With one share `out` is the result, else [T, S, H, C] for `combine`.
    """
    gdc_wait()
    gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    share = tl.program_id(2)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, CHANNELS)
    request = tl.load(request_rows + token)
    position = tl.load(positions + token)
    here = (h < HEADS)[:, None] & (c < C)[None, :]
    query = tl.load(q + (token * HEADS + h)[:, None] * C + c[None, :], mask=here, other=0.0)

    recent = tl.minimum(position + 1, WINDOW).to(tl.int32)
    total = recent
    if KIND == "csa":
        k = tl.arange(0, triton.next_power_of_2(TOPK))
        last = tl.load(picks + token * TOPK + k, mask=k < TOPK, other=-1)
        total += tl.max(tl.where(last >= 0, k + 1, 0), 0)
    if KIND == "hca":
        total += ((position + 1) // RATIO).to(tl.int32)
    length = tl.cdiv(tl.cdiv(total, SHARES), BLOCK_K) * BLOCK_K
    first = share * length
    end = tl.minimum(first + length, total)

    # scores in units of log2, so that exp2 serves
    top = tl.maximum(tl.load(sink + h, mask=h < HEADS, other=0.0) * LOG2E, -1e30, tl.PropagateNan.ALL)
    weight_sum = tl.where(share == 0, tl.full([BLOCK_H], 1.0, tl.float32), 0.0)
    acc = tl.zeros([BLOCK_H, CHANNELS], tl.float32)
    for at in range(first, end, BLOCK_K):
        i = at + tl.arange(0, BLOCK_K)
        in_window = i < recent
        seen = i < end
        if KIND == "window":
            key = _keys(pool, pages + request * columns, position - recent + 1 + i, seen, C, ROPE, CHANNELS, PAGE)
        else:
            if KIND == "csa":
                entry = tl.load(picks + token * TOPK + i - recent, mask=seen & (i >= recent), other=-1).to(tl.int64)
                seen = in_window | (entry >= 0)
            else:
                entry = (i - recent).to(tl.int64)
            # a tile of either kind needs only one gather; the tile where they meet needs both
            key = tl.zeros([BLOCK_K, CHANNELS], tl.bfloat16)
            if at < recent:
                key = _keys(
                    pool, pages + request * columns, position - recent + 1 + i, seen & in_window,
                    C, ROPE, CHANNELS, PAGE,
                )  # fmt: skip
            if at + BLOCK_K > recent:
                more = _keys(
                    entry_pool, entry_pages + request * entry_columns, tl.maximum(entry, 0),
                    seen & (i >= recent), C, ROPE, CHANNELS, ENTRIES,
                )  # fmt: skip
                key = tl.where(in_window[:, None], key, more)
        score = tl.dot(query, tl.trans(key)) * (LOG2E * C**-0.5)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(score - higher[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(tl.bfloat16), key, acc * shrink[:, None])
        top = higher

    # the first share has the sink's weight, at least a rounding above 0 unless the keys outweigh it
    result = acc / tl.maximum(weight_sum, 1e-38)[:, None]
    row = (token * SHARES + share) * HEADS + h
    tl.store(out + row[:, None] * C + c[None, :], result.to(tl.bfloat16), mask=here)
    if SHARES > 1:
        tl.store(lse + row, tl.where(weight_sum == 0, float("-inf"), top + tl.log2(weight_sum)), mask=h < HEADS)


@triton.jit
def combine(
    part, lse, out, C: tl.constexpr, HEADS: tl.constexpr, SHARES: tl.constexpr, ROUND: tl.constexpr, PIECE: tl.constexpr
):
    """The mean of the shares' results, weighted by their sums. Grid: T * H, pieces of C.

    ROUND is SHARES as a power of two. A share without keys has weight 0 and is not read. The order of the sum is fixed.
    """
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    share = tl.arange(0, ROUND)
    at = (row // HEADS * SHARES + share) * HEADS + row % HEADS
    sums = tl.load(lse + at, mask=share < SHARES, other=float("-inf"))
    weight = tl.exp2(sums - tl.max(sums, 0))
    values = tl.load(part + at[:, None] * C + c[None, :], mask=(weight > 0)[:, None] & (c < C)[None, :], other=0.0)
    total = tl.sum(values.to(tl.float32) * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * C + c, total.to(tl.bfloat16), mask=c < C)
