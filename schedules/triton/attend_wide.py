"""Attention over packed FP8 pools for tensor memory: 64 heads of 512 channels, keys once in shared memory.

One program attends with 64 heads of one token to one share of its keys, a tile of keys at a time. A tile is gathered as
bytes (asynchronous copies, tiles ahead), dequantised to bfloat16 and written once to shared memory in four pieces of
128 channels; both products read it there:
    scores  [64 heads, K keys]         = queries x keys^T      a thread of four warps holds whole rows
    result  [128 channels, 64 heads]   += keys^T x weights^T   four sums of 128 rows, the full height of the unit
The sums stay in tensor memory: 256 of its columns, beside 64 of scores. They are read and written only where a maximum
rose by more than 2**8: until then weights are taken against the old one and stay in range.

Keys are counted in tiles: those of the window, then those of the entries; shares are runs of tiles. The sink's own
weight is counted once, in the first share. Where weights are cut to bfloat16 they are summed uncut.

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
# scale times 2**120 (exact, subnormals too). As in attend_fill.py, where it runs on a card.
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
def _factor(scales, GROUP: tl.constexpr):
    """[K, 1]: the scale of a group, times 2**120. Scales of up to 2**7 fit, 57344 as the largest value."""
    half = (scales >> 32).to(tl.int32) if GROUP > 3 else scales.to(tl.int32)
    byte = (half >> (8 * (GROUP % 4))) & 255
    return ((byte + 120) << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)[:, None]


@triton.jit
def _plain(data, scales, seen, FROM: tl.constexpr, K: tl.constexpr):
    """[K, 64] channels from FROM on; 0 where not seen."""
    c = tl.arange(0, 64)
    x = tl.load(data[:, None] + (FROM + c)[None, :], mask=seen[:, None], other=0)
    return widen(x, tl.broadcast_to(_factor(scales, FROM // 64), (K, 64)))


@triton.jit
def _beside(left, right, K: tl.constexpr):
    """[K, 128] of two [K, 64]."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (K, 128))


@triton.jit
def attend(
    q, pool, pages, entry_pool, entry_pages, picks, request_rows, positions, sink, out, lse,
    columns, entry_columns,
    KIND: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr, PAGE_SHIFT: tl.constexpr,
    ENTRIES_SHIFT: tl.constexpr, RATIO: tl.constexpr, TOPK: tl.constexpr, SHARES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """KIND: `window`, `csa` or `hca`. Grid: blocks of 64 heads, tokens, shares.

    With one share `out` is the result; else it is bfloat16 [T, S, H, C], with `lse` float32 [T, S, H], for `combine`
    of attend.py. A page holds 2 ** PAGE_SHIFT window entries, or 2 ** ENTRIES_SHIFT others.
    """
    gdc_wait()
    gdc_launch_dependents()
    token = tl.program_id(1).to(tl.int64)
    share = tl.program_id(2)
    h = tl.program_id(0) * 64 + tl.arange(0, 64)
    c = tl.arange(0, 128)
    request = tl.load(request_rows + token)
    position = tl.load(positions + token).to(tl.int32)
    row = q + (token * HEADS + h)[:, None] * C + c[None, :]
    q0, q1, q2, q3 = tl.load(row), tl.load(row + 128), tl.load(row + 256), tl.load(row + 384)

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
    top = tl.maximum(tl.load(sink + h) * LOG2E, -1e30)
    weight_sum = tl.where(share == 0, tl.full([64], 1.0, tl.float32), 0.0)
    sum0 = tl.zeros([128, 64], tl.float32)
    sum1 = tl.zeros([128, 64], tl.float32)
    sum2 = tl.zeros([128, 64], tl.float32)
    sum3 = tl.zeros([128, 64], tl.float32)
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
        scale_at = (at + ((DATA_BYTES << shift) + slot * 8)).to(tl.pointer_type(tl.int64))
        scales = tl.load(scale_at, mask=seen, other=0)
        plain0 = _plain(data, scales, seen, 0, K)
        plain1 = _plain(data, scales, seen, 64, K)
        key0 = _beside(plain0, plain1, K)
        plain0 = _plain(data, scales, seen, 128, K)
        plain1 = _plain(data, scales, seen, 192, K)
        key1 = _beside(plain0, plain1, K)
        plain0 = _plain(data, scales, seen, 256, K)
        plain1 = _plain(data, scales, seen, 320, K)
        key2 = _beside(plain0, plain1, K)
        turned = (data + PLAIN).to(tl.pointer_type(tl.bfloat16))[:, None] + tl.arange(0, 64)[None, :]
        key3 = _beside(_plain(data, scales, seen, 384, K), tl.load(turned, mask=seen[:, None], other=0.0), K)

        score = tl.dot(q0, tl.trans(key0))
        score = tl.dot(q1, tl.trans(key1), score)
        score = tl.dot(q2, tl.trans(key2), score)
        score = tl.dot(q3, tl.trans(key3), score)
        score = tl.where(seen[None, :], score * (LOG2E * C**-0.5), float("-inf"))
        higher = tl.max(score, 1)
        higher = tl.maximum(higher, top)
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(score - higher[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weight, 1)
        top = higher
        turned_weight = tl.trans(weight.to(tl.bfloat16))
        sum0 = tl.dot(tl.trans(key0), turned_weight, sum0 * shrink[None, :])
        sum1 = tl.dot(tl.trans(key1), turned_weight, sum1 * shrink[None, :])
        sum2 = tl.dot(tl.trans(key2), turned_weight, sum2 * shrink[None, :])
        sum3 = tl.dot(tl.trans(key3), turned_weight, sum3 * shrink[None, :])

    # the first share has the sink's weight, at least a rounding above 0 unless the keys outweigh it
    inverse = (1.0 / tl.maximum(weight_sum, 1e-38))[None, :]
    line = (token * SHARES + share) * HEADS + h
    to = out + line[:, None] * C + c[None, :]
    tl.store(to, tl.trans((sum0 * inverse).to(tl.bfloat16)))
    tl.store(to + 128, tl.trans((sum1 * inverse).to(tl.bfloat16)))
    tl.store(to + 256, tl.trans((sum2 * inverse).to(tl.bfloat16)))
    tl.store(to + 384, tl.trans((sum3 * inverse).to(tl.bfloat16)))
    if SHARES > 1:
        tl.store(lse + line, tl.where(weight_sum > 0, top + tl.log2(weight_sum), float("-inf")))
