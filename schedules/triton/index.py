"""The lightning indexer: queries (RoPE, Hadamard, quantise), and scores of a few tokens over paged packed keys.

A page holds 64 keys: all data bytes, then 4 scale bytes a key. Scores come from E4M3 products in both formats: an FP4
key becomes E4M3 in registers, its four scales folded into the exponents (exact where they differ by 2^14 at most).

Legend: T tokens, H heads, C channels of a key, R rotated channels, E entries a row of scores holds, P pages a row of
the page table holds.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4c.schedules.triton.rows import e2m1_byte, e4m3_byte, inverse_power, largest, power

PAGE: tl.constexpr = tl.constexpr(64)  # keys: what StateLayout gives the index group
GROUP: tl.constexpr = tl.constexpr(16)  # entries whose maximum top-k asks for (triton/topk.py)

# Four bytes of E2M1 pairs become eight of E4M3 in channel order: the low 3 bits of a nibble select one of the eight
# magnitudes in ($3, $7), and `prmt` spreads its top bit (a nibble over 7 repeats the sign of byte 0x80, so 0xff).
_E2M1_TO_E4M3: tl.constexpr = tl.constexpr("""
{
.reg .b32 low, high, code, s;
and.b32 code, $2, 0x77777777;
shr.u32 high, code, 16;
prmt.b32 low, $3, $7, code;
prmt.b32 high, $3, $7, high;
prmt.b32 s, 0x80808080, 0x80808080, $2;
shl.b32 s, s, 1;
lop3.b32 $0, s, 0x80808080, low, 0xEA;
shr.u32 code, $2, 16;
prmt.b32 s, 0x80808080, 0x80808080, code;
shl.b32 s, s, 1;
lop3.b32 $1, s, 0x80808080, high, 0xEA;
}
""")


@triton.jit
def round_e2m1(x):
    """Nearest E2M1 value of |x| <= 6, ties to even: adding 1.5 * 2^23 steps and taking them away rounds to a step.

    The step is 0.5 below 2, then 1, then 2 from 4 on: the power of two at or below |x|, at least 1, halved.
    """
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    magic = (power + ((22 << 23) + 0x400000)).to(tl.float32, bitcast=True)
    return (x + magic) - magic


@triton.jit
def index_query(
    q, table, weight, data, scaled, rows,
    Q_STRIDE: tl.constexpr, W_STRIDE: tl.constexpr, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    FP4: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """E4M3 queries and their weights; a row is one head of one token."""
    gdc_wait()
    gdc_launch_dependents()
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    odd = i & j
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    hadamard = (1 - 2 * (odd & 1)).to(tl.bfloat16)
    channel = tl.arange(0, C)
    pair = tl.arange(0, C // 2) - (C - R) // 2
    for tile in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        row = tile * BM + tl.arange(0, BM)
        inside = row < rows
        token, head = (row // H).to(tl.int64), row % H
        at = (token * Q_STRIDE + head * C)[:, None] + channel[None, :]
        x = tl.load(q + at, mask=inside[:, None], other=0.0).to(tl.float32)
        even, uneven = tl.split(tl.reshape(x, (BM, C // 2, 2)))
        if BM == H:
            angle = table + tile.to(tl.int64) * R + pair[None, :]
            turns = pair[None, :] >= 0
        else:
            angle = table + token[:, None] * R + pair[None, :]
            turns = (pair[None, :] >= 0) & inside[:, None]
        cos = tl.load(angle, mask=turns, other=1.0)
        sin = tl.load(angle + R // 2, mask=turns, other=0.0)
        turned = tl.join(even * cos - uneven * sin, uneven * cos + even * sin)
        # the rotated query is bfloat16, as the unfused op leaves it; sums of 2^7 such values fit float32
        y = tl.dot(tl.reshape(turned, (BM, C)).to(tl.bfloat16), hadamard) * (C**-0.5)
        w = tl.load(weight + token * W_STRIDE + head, mask=inside, other=0.0).to(tl.float32) * ((H * C) ** -0.5)
        if FP4:
            groups = tl.reshape(y, (BM, (C + 31) // 32, min(32, C)))
            scale = e2m1_byte(largest(groups, 2))
            most = tl.max(scale, axis=1)  # NaN's byte is above all others
            lift = power(scale) * inverse_power(most)[:, None] * 64.0
            rounded = round_e2m1(groups * inverse_power(scale)[:, :, None]) * lift[:, :, None]
            out = tl.reshape(rounded, (BM, C))
            w *= power(most) * 0.015625
        else:
            scale = e4m3_byte(largest(y, 1))
            out = y * inverse_power(scale)[:, None]
            w *= power(scale)
        byte = out.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        tl.store(data + row.to(tl.int64)[:, None] * C + channel[None, :], byte, mask=inside[:, None])
        tl.store(scaled + row, w, mask=inside)


@triton.jit
def magnitudes(exponent):
    """Bytes of the E4M3 magnitudes 0, .5, 1, 1.5 and 2, 3, 4, 6 times 2^(exponent - 6), for exponents up to 12.

    Below 2^-6 E4M3 is a multiple of 2^-9; what is finer is cut off, so exponents under -2 lose bits.
    """
    step = exponent * 0x08080808
    down = tl.minimum(tl.maximum(-exponent, 0), 8)
    keep = (0xFF >> down) * 0x01010101
    low = tl.where(exponent > 0, (step & -256) + 0x0C080000, (0x0C080400 >> down) & keep)
    high = tl.where(exponent > -2, step + 0x1C181410, (0x30201810 >> down) & keep)
    return low.to(tl.int32), high.to(tl.int32)


@triton.jit
def load_keys(pool, page, inside, C: tl.constexpr, FP4: tl.constexpr, BN: tl.constexpr):
    """E4M3 keys [BN, C] and their float32 scales [BN] of pages [BN] (one for each key); zeros where not inside."""
    key = tl.arange(0, BN) % PAGE
    if FP4:
        GROUPS: tl.constexpr = (C + 31) // 32
        HALF: tl.constexpr = min(16, C // 2)  # bytes of a group
        base = page * (PAGE * (C // 2 + 4))
        at = (base + key * (C // 2))[:, None, None]
        at += tl.arange(0, GROUPS)[None, :, None] * HALF + tl.arange(0, HALF)[None, None, :]
        packed = tl.load(pool + at, mask=inside[:, None, None], other=0)
        at = (base + PAGE * (C // 2) + key * 4)[:, None] + tl.arange(0, GROUPS)[None, :]
        exponent = tl.load(pool + at, mask=inside[:, None], other=0).to(tl.int32)
        most = tl.max(exponent, axis=1)
        low, high = magnitudes(exponent - most[:, None] + 12)
        low, high = tl.broadcast_to(low[:, :, None], packed.shape), tl.broadcast_to(high[:, :, None], packed.shape)
        first, second = tl.inline_asm_elementwise(
            _E2M1_TO_E4M3, "=&r,=&r,r,r,r,r,r,r,r,r,r", [packed, low, high], [tl.uint8, tl.uint8], True, 4
        )
        first = tl.reshape(first, (BN, C // 8, 4))
        second = tl.reshape(second, (BN, C // 8, 4))
        keys = tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), (BN, C))
        return keys.to(tl.float8e4nv, bitcast=True), power(most) * 0.015625
    else:
        base = page * (PAGE * (C + 4))
        at = (base + key * C)[:, None] + tl.arange(0, C)[None, :]
        keys = tl.load(pool.to(tl.pointer_type(tl.float8e4nv)) + at, mask=inside[:, None], other=0.0)
        scale = tl.load((pool + base + PAGE * C).to(tl.pointer_type(tl.float32)) + key, mask=inside, other=0.0)
        return keys, scale


@triton.jit
def score_tokens(
    data, weight, pool, pages, requests, positions, scores, columns, first, count, maxima_at,
    RATIO: tl.constexpr, H: tl.constexpr, C: tl.constexpr, FP4: tl.constexpr, LEAST: tl.constexpr,
    MAXIMA: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scores of tokens that share no keys: all tiles of BN keys of BT tokens are dealt out evenly over the blocks.

    Rows `first` to `first + count` of the batch go to rows 0 to `count` of scores; maxima lie `maxima_at` behind.
    Tokens that see at most LEAST entries are left out. Up to the end of its last tile a row is written, with -inf
    for what the token does not see.
    """
    gdc_wait()
    gdc_launch_dependents()
    TILE_PAGES: tl.constexpr = BN // PAGE
    entries = columns * PAGE
    slot = tl.arange(0, BT)
    channel = tl.arange(0, C)
    for start in range(0, count, BT):
        position = tl.load(positions + first + start + slot, mask=start + slot < count, other=-1)
        seen_of = tl.minimum((position + 1) // RATIO, entries).to(tl.int32)
        tiles_of = tl.where(seen_of > LEAST, tl.cdiv(seen_of, BN), 0)
        ends = tl.cumsum(tiles_of, axis=0)
        total = tl.sum(tiles_of, axis=0).to(tl.int64)
        at = (total * tl.program_id(0) // tl.num_programs(0)).to(tl.int32)
        last = (total * (tl.program_id(0) + 1) // tl.num_programs(0)).to(tl.int32)
        while at < last:
            here = tl.sum((ends <= at).to(tl.int32), axis=0)  # the token of tile `at`
            end = tl.sum(tl.where(slot == here, ends, 0), axis=0)
            seen = tl.sum(tl.where(slot == here, seen_of, 0), axis=0)
            begin = end - tl.cdiv(seen, BN)
            line = (start + here).to(tl.int64)
            token = first + line
            table = pages + tl.load(requests + token) * columns
            head = tl.arange(0, H)
            q = tl.load(data + token * (H * C) + head[None, :] * C + channel[:, None])
            q = q.to(tl.float8e4nv, bitcast=True)
            w = tl.load(weight + token * H + head)
            stop = tl.minimum(end, last)
            for tile in range(at - begin, stop - begin):
                entry = tile * BN + tl.arange(0, BN)
                live = entry < tl.cdiv(seen, PAGE) * PAGE  # a page with no entry seen is not looked up
                page = tl.load(table + tile * TILE_PAGES + tl.arange(0, BN) // PAGE, mask=live, other=0)
                keys, scale = load_keys(pool, page, live, C, FP4, BN)
                dots = tl.maximum(tl.dot(keys, q), 0.0, propagate_nan=tl.PropagateNan.ALL)
                score = tl.sum(dots * w[None, :], axis=1) * scale
                score = tl.where((entry < seen) & (score == score), score + 0.0, float("-inf"))
                tl.store(scores + line * entries + entry, score, mask=entry < entries)
                if MAXIMA:
                    group = tile * (BN // GROUP) + tl.arange(0, BN // GROUP)
                    most = tl.max(tl.reshape(score, (BN // GROUP, GROUP)), axis=1)
                    bits = most.to(tl.int32, bitcast=True)  # in their order, as `ordered` of topk.py
                    at_group = maxima_at + line * (entries // GROUP) + group
                    to = (scores + at_group).to(tl.pointer_type(tl.int32))
                    tl.store(to, bits ^ ((bits >> 31) & 0x7FFFFFFF), mask=group < entries // GROUP)
            at = stop


@triton.jit
def fill_hidden(scores, positions, entries, RATIO: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr):
    """-inf behind the last tile of BN entries that a token sees."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    seen = tl.minimum((tl.load(positions + row) + 1) // RATIO, entries).to(tl.int32)
    for start in range(tl.cdiv(seen, BN) * BN + tl.program_id(1) * BLOCK, entries, tl.num_programs(1) * BLOCK):
        entry = start + tl.arange(0, BLOCK)
        tl.store(scores + row * entries + entry, tl.full((BLOCK,), float("-inf"), tl.float32), mask=entry < entries)
