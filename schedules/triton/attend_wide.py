"""Attention over packed FP8 pools for tensor memory: 64 heads of 512 channels, keys once in shared memory.

One program attends with 64 heads of one token to one share of its keys, a tile of 64 keys at a time. The bytes of
later tiles are on their way (asynchronous copies: picks, pages and entries one tile apart); a tile is dequantised in
registers and written once, as bfloat16, where both products read it:
    scores  [64 heads, K keys]      = queries x keys^T       a thread has half a row, so softmax needs few exchanges
    sums    [512 channels, 64 heads] += keys^T x weights^T   128 rows at a time, the full height of the matrix unit
The second product runs while the next tile is dequantised. Its sums take 256 columns of tensor memory and leave it
only to be scaled where a maximum rose. Shared memory is the limit: 64 KB of queries, 64 KB of keys, 37 KB on their way.

Keys are counted in tiles: those of the window, then those of the entries; shares are runs of tiles. Weights are base-2
exponentials against a running maximum that starts at the sink, whose own weight is counted once, in the first share.

Legend: T tokens, H heads, C = 512 channels, K keys of a tile, S shares.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
C = tl.constexpr(512)
PLAIN = tl.constexpr(448)  # E4M3 channels, in groups of 64 of one scale; 64 bfloat16 follow
DATA_BYTES = tl.constexpr(576)
ENTRY_BYTES = tl.constexpr(584)  # and 8 scale bytes, which follow the data of the whole page

# E4M3 -> bfloat16, four at a time: the byte to the high half of its 16 bits, sign filled in below the next one's, so
# that one arithmetic shift leaves sign and exponent in place. The result is 2**-120 of the value; the factor is the
# scale times 2**120 (exact, subnormals too). As in attend_fill.py, where it was run on a card.
WIDEN = tl.constexpr("""
{
.reg .b32 a, b;
prmt.b32 a, $2, 0, 0x1804;
prmt.b32 b, $2, 0, 0x3A24;
shr.s32 a, a, 4;
shr.s32 b, b, 4;
and.b32 a, a, 0x87f087f0;
and.b32 b, b, 0x87f087f0;
mul.rn.bf16x2 $0, a, $3;
mul.rn.bf16x2 $1, b, $4;
}
""")


@triton.jit
def widen(x, factor):
    """E4M3 bytes times `factor` * 2**-120, a bfloat16 power of two for each: bfloat16."""
    return tl.inline_asm_elementwise(WIDEN, "=r,=r,r,r,r", [x, factor], tl.bfloat16, True, 4)


@triton.jit
def _group(data, scales, seen, GROUP: tl.constexpr, K: tl.constexpr):
    """bfloat16 [K, 64] of a group of plain channels; 0 where not seen."""
    x = tl.load(data[:, None] + (GROUP * 64 + tl.arange(0, 64))[None, :], mask=seen[:, None], other=0)
    half = (scales >> 32).to(tl.int32) if GROUP > 3 else scales.to(tl.int32)
    byte = (half >> (8 * (GROUP % 4))) & 255
    # an exponent field; scales of up to 2**7 fit, 57344 as the largest value, and beyond it is infinity's, as for NaN
    factor = ((tl.minimum(byte, 135) + 120) << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return widen(x, tl.broadcast_to(factor[:, None], (K, 64)))


@triton.jit
def _beside(left, right):
    """[K, 2 N] of two [K, N]."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (both.shape[0], 2 * both.shape[2]))


@triton.jit
def _keys(data, scales, seen, K: tl.constexpr):
    """bfloat16 [K, 512] of the entries whose data lie at `data`."""
    turned = (data + PLAIN).to(tl.pointer_type(tl.bfloat16))[:, None] + tl.arange(0, 64)[None, :]
    rotated = tl.load(turned, mask=seen[:, None], other=0.0)
    first = _beside(_group(data, scales, seen, 0, K), _group(data, scales, seen, 1, K))
    second = _beside(_group(data, scales, seen, 2, K), _group(data, scales, seen, 3, K))
    third = _beside(_group(data, scales, seen, 4, K), _group(data, scales, seen, 5, K))
    fourth = _beside(_group(data, scales, seen, 6, K), rotated)
    return _beside(_beside(first, second), _beside(third, fourth))


@triton.jit
def attend(
    q, pool, pages, entry_pool, entry_pages, picks, request_rows, positions, sink, out, lse,
    columns, entry_columns,
    KIND: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr, PAGE_SHIFT: tl.constexpr,
    ENTRIES_SHIFT: tl.constexpr, RATIO: tl.constexpr, TOPK: tl.constexpr, SHARES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """KIND: `window`, `csa` or `hca`. Grid: blocks of 64 heads, tokens, shares.

    With one share `out` is the result; else it is bfloat16 [T, S, H, C], with `lse` float32 [T, S, H], for `combine`
    of attend.py. A page holds 2 ** PAGE_SHIFT entries of the window, or 2 ** ENTRIES_SHIFT others.
    """
    gdc_wait()
    gdc_launch_dependents()
    token = tl.program_id(1).to(tl.int64)
    share = tl.program_id(2)
    h = tl.program_id(0) * 64 + tl.arange(0, 64)
    c = tl.arange(0, C)
    request = tl.load(request_rows + token)
    position = tl.load(positions + token).to(tl.int32)
    query = tl.load(q + (token * HEADS + h)[:, None] * C + c[None, :], mask=(h < HEADS)[:, None], other=0.0)

    recent = tl.minimum(position + 1, WINDOW)
    near = tl.cdiv(recent, K)  # tiles of the window
    others = 0
    if KIND == "csa":
        k = tl.arange(0, triton.next_power_of_2(TOPK))
        last = tl.load(picks + token * TOPK + k, mask=k < TOPK, other=-1)
        others = tl.max(tl.where(last >= 0, k + 1, 0), 0)
    if KIND == "hca":
        others = (position + 1) // RATIO
    tiles = near + tl.cdiv(others, K)
    length = tl.cdiv(tiles, SHARES)
    first = share * length

    # scores in units of log2, so that exp2 serves
    top = tl.maximum(tl.load(sink + h, mask=h < HEADS, other=0.0) * LOG2E, -1e30, tl.PropagateNan.ALL)
    weight_sum = tl.where(share == 0, tl.full([64], 1.0, tl.float32), 0.0)
    sums = tl.zeros([C, 64], tl.float32)
    # what stays the same is computed anew: 96 descriptors of operands would be kept in registers that there are not
    for tile in tl.range(first, tl.minimum(first + length, tiles), disable_licm=True):
        entry = position - recent + 1 + tile * K + tl.arange(0, K)
        seen = entry <= position
        table = pages + request * columns
        start, shift = pool, PAGE_SHIFT
        if KIND != "window":
            in_window = tile < near
            other = (tile - near) * K + tl.arange(0, K)
            seen = tl.where(in_window, entry <= position, other < others)
            if KIND == "csa":
                pick = tl.load(picks + token * TOPK + other, mask=seen & (other >= 0), other=-1)
                seen = seen & (in_window | (pick >= 0))
                other = tl.maximum(pick, 0)
            entry = tl.where(in_window, entry, other)
            table = tl.where(in_window, table, entry_pages + request * entry_columns)
            start = tl.where(in_window, pool, entry_pool)
            shift = tl.where(in_window, PAGE_SHIFT, ENTRIES_SHIFT)
        page = tl.load(table + (entry >> shift), mask=seen, other=0)
        slot = entry & ((1 << shift) - 1)
        at = start + ((page * ENTRY_BYTES) << shift)
        data = tl.multiple_of(at + slot * DATA_BYTES, [16])
        scale_at = at + ((DATA_BYTES << shift) + slot * 8)
        scales = tl.load(scale_at.to(tl.pointer_type(tl.int64)), mask=seen, other=0)
        key = _keys(data, scales, seen, K)

        score = tl.dot(query, tl.trans(key))
        score = tl.where(seen[None, :], score * (LOG2E * C**-0.5), float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(score - higher[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weight, 1)
        top = higher
        sums = tl.dot(tl.trans(key), tl.trans(weight.to(tl.bfloat16)), sums * shrink[None, :])

    # the first share has the sink's weight, at least a rounding above 0 unless the keys outweigh it
    result = sums * (1.0 / tl.maximum(weight_sum, 1e-38))[None, :]
    line = (token * SHARES + share) * HEADS + h
    tl.store(out + line[:, None] * C + c[None, :], tl.trans(result.to(tl.bfloat16)), mask=(h < HEADS)[:, None])
    if SHARES > 1:
        tl.store(lse + line, tl.where(weight_sum == 0, float("-inf"), top + tl.log2(weight_sum)), mask=h < HEADS)
