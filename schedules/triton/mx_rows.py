"""Rows in the block-scaled formats of Blackwell's matrix units: where their scales lie, how they are rounded, and the
sort of a mixture of experts that leaves its tokens' rows in them.

    FORMAT  data of a row's channels          scales                                 instruction
    mxfp8   E4M3                              E8M0 byte for 32 channels              kind::mxf8f6f4
    mxfp4   E2M1, even channel in low nibble  E8M0 byte for 32                       kind::mxf4
    nvfp4   E2M1, the same                    E4M3 for 16, and float32 for a tensor  kind::mxf4nvf4
    bf16    as they are                       none                                   kind::f16

Scales of MX formats are powers of two, rounded up, so nothing saturates. A group that holds a NaN or an infinity has a
NaN for its scale (E8M0 255, E4M3 127): what multiplies it is NaN, whatever its data.

A tile of N rows has its scales in one block, in the order in which they are copied: for 128 rows as tensor memory
takes them (`tcgen05.cp`: 512 bytes hold 4 groups of 128 rows, [32][4][4] by row % 32, row // 32, group), for fewer
rows a step of S channels after another, each row's scales of the step together.

Legend: T tokens, D hidden_size, K experts a token, N rows of a tile, G channels of a scale, S channels of a step.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4c.schedules.triton.moe_sort import _counted, _split, _tiled


@triton.constexpr_function
def group_of(format):
    """Channels that share a scale."""
    return 16 if format == "nvfp4" else 32


@triton.constexpr_function
def element_of(format):
    """The matrix unit's name for one value of a row."""
    return {"bf16": "bf16", "mxfp8": "e4m3"}.get(format, "e2m1")


@triton.constexpr_function
def packed(format):
    """Values of a byte (of an element, for bf16)."""
    return 1 if format in ("bf16", "mxfp8") else 2


@triton.jit
def factor_of(factors, i, FORMAT: tl.constexpr):
    """Number i of NVFP4's factors; other formats have none."""
    return tl.load(factors + i) if FORMAT == "nvfp4" else 1.0


@triton.jit
def _e2m1_code(x):
    """Nearest E2M1 code of float32 x, ties to even, 6 at most; int32 0 to 15."""
    x = tl.minimum(tl.maximum(x, -6.0), 6.0)
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    magic = (power + ((22 << 23) + 0x400000)).to(tl.float32, bitcast=True)
    bits = ((x + magic) - magic).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # from 1 on a code is the exponent and a bit of mantissa; below it counts halves
    large = (size >> 22) - 2 * 127 + 2
    small = (size >= 0x3F000000).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(size >= 0x3F800000, large, small) | sign


@triton.jit
def e2m1_pair(even, odd, NATIVE: tl.constexpr):
    """Bytes of two float32 values each, the even one in the low nibble; NATIVE: by Blackwell's own instruction."""
    if NATIVE:
        both = tl.inline_asm_elementwise(
            "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, $2, $1; cvt.u32.u8 $0, t; }",
            "=r,f,f",
            [even, odd],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        both = _e2m1_code(even) | (_e2m1_code(odd) << 4)
    return both.to(tl.uint8)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """float32 bits of the largest magnitudes of x along an axis; infinity is above numbers, NaN above it."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=AXIS)


@triton.jit
def scales_of(most, global_scale, FORMAT: tl.constexpr):
    """(stored scales, float32 factors that bring values into the format's range) of groups' `largest`.

    Where that is no number the scale is NaN, and the factor anything."""
    number = most < 0x7F800000
    if FORMAT == "nvfp4":
        # E4M3 rounds to nearest: a group may then saturate by a sixteenth, as NVIDIA's own quantisers do
        wanted = tl.minimum(tl.div_rn(most.to(tl.float32, bitcast=True), 6.0 * global_scale), 448.0)
        stored = tl.where(number, wanted, float("nan")).to(tl.float8e4nv)
        wide = stored.to(tl.float32)
        return stored, tl.where(wide > 0, tl.div_rn(1.0, tl.maximum(wide, 0.001953125) * global_scale), 0.0)
    else:
        # the power of two from most / (1.75 * 2^8) or most / (1.5 * 2^2) up: a mantissa beyond 1.75 or 1.5 carries
        BEYOND: tl.constexpr = 0x1FFFFF if FORMAT == "mxfp8" else 0x3FFFFF
        BELOW: tl.constexpr = 8 << 23 if FORMAT == "mxfp8" else 2 << 23
        power = ((most + BEYOND) & 0x7F800000) - BELOW
        power = tl.maximum(power, 0x00800000)  # 2^-126
        return tl.where(number, power >> 23, 255).to(tl.uint8), ((254 << 23) - power).to(tl.float32, bitcast=True)


@triton.jit
def scale_place(row, group, G: tl.constexpr, N: tl.constexpr, S: tl.constexpr):
    """Where in a tile's block the scale of its row and group lies; the two broadcast against each other."""
    if N == 128:
        return group // 4 * 512 + group % 4 + row % 32 * 16 + row // 32 * 4
    else:
        return group // (S // G) * (N * (S // G)) + group % (S // G) + row * (S // G)


@triton.jit
def _store_rows(
    x, data, scale, row, slot, channel, kept, global_scale,
    C: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """Writes bfloat16 x [R rows, BD channels from `channel` on] to rows of C channels, and scales to their slots."""
    if FORMAT == "bf16":
        at = row.to(tl.int64)[:, None] * C + (channel + tl.arange(0, BD))[None, :]
        tl.store(data + at, x, mask=kept[:, None])
    else:
        G: tl.constexpr = group_of(FORMAT)
        P: tl.constexpr = packed(FORMAT)
        grouped = tl.reshape(x.to(tl.float32), (R, BD // G, G))
        stored, factor = scales_of(largest(grouped, 2), global_scale, FORMAT)
        group = channel // G + tl.arange(0, BD // G)
        block = (slot // N).to(tl.int64) * (N * (C // G))
        to = block[:, None] + scale_place((slot % N)[:, None], group[None, :], G, N, S)
        tl.store(scale + to, stored, mask=kept[:, None])
        values = tl.reshape(grouped * factor[:, :, None], (R, BD // P, P))
        at = row.to(tl.int64)[:, None] * (C // P) + (channel // P + tl.arange(0, BD // P))[None, :]
        if FORMAT == "mxfp8":
            tl.store(data + at, tl.reshape(values, (R, BD)).to(tl.float8e4nv), mask=kept[:, None])
        else:
            even, odd = tl.split(values)
            tl.store(data + at, e2m1_pair(even, odd, NATIVE), mask=kept[:, None])


@triton.jit
def _move(
    x, data, scale, token, row, slot, channel, kept, global_scale,
    D: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    at = token.to(tl.int64)[:, None] * D + (channel + tl.arange(0, BD))[None, :]
    value = tl.load(x + at, mask=kept[:, None], other=0.0)
    _store_rows(value, data, scale, row, slot, channel, kept, global_scale, D, FORMAT, NATIVE, R, BD, N, S)


@triton.jit
def _placed(index, row, slot, kept, weight, place, pair, slots, slot_weight):
    tl.store(place + index, row, mask=kept)
    tl.store(pair + row, index, mask=kept)
    tl.store(slots + row, slot, mask=kept)
    tl.store(slot_weight + slot, tl.load(weight + index, mask=kept), mask=kept)


@triton.jit
def _before(counts, e, EP: tl.constexpr, N: tl.constexpr):
    """Tiles of the experts before e, and the rows of one of e's tiles."""
    bins = tl.arange(0, EP)
    many, size = _split(counts, N)
    return tl.sum(tl.where(bins < e, many, 0)), tl.maximum(tl.sum(tl.where(bins == e, size, 0)), 1)


@triton.jit
def sort_slots(
    chosen, weight, place, pair, slots, slot_weight, tiles, meta, pairs,
    EP: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, MOST_TILES: tl.constexpr,
):  # fmt: skip
    """Program e places the pairs of expert e: each has a row among all, and a slot, its tile * N + row of the tile."""
    gdc_wait()
    gdc_launch_dependents()
    e = tl.program_id(0)
    counts = _counted(chosen, pairs, EP, BLOCK)
    first, count = _tiled(counts, e, tiles, meta, EP, N, MOST_TILES)
    if count > 0:
        tile, size = _before(counts, e, EP, N)
        rank = 0
        for start in range(0, pairs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mine = (tl.load(chosen + index, mask=index < pairs, other=-1) == e).to(tl.int32)
            ranks = rank + tl.cumsum(mine) - mine
            slot = (tile + ranks // size) * N + ranks % size
            _placed(index, first + ranks, slot, mine != 0, weight, place, pair, slots, slot_weight)
            rank += tl.sum(mine)


@triton.jit
def gather_rows(
    x, pair, slots, data, scale, rows, factor,
    K: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
    N: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Tokens' rows [T, D] in the order of the pairs, quantised: R rows and BD channels a program."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0) * R + tl.arange(0, R)
    kept = row < rows
    token = tl.load(pair + row, mask=kept, other=0) // K
    slot = tl.load(slots + row, mask=kept, other=0)
    channel = tl.program_id(1) * BD
    global_scale = factor_of(factor, 0, FORMAT)
    _move(x, data, scale, token, row, slot, channel, kept, global_scale, D, FORMAT, NATIVE, R, BD, N, S)


@triton.jit
def sort_gather(
    x, chosen, weight, place, pair, slots, slot_weight, tiles, meta, data, scale, pairs, factor,
    EP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, R: tl.constexpr,
    BD: tl.constexpr, N: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, MOST_TILES: tl.constexpr,
):  # fmt: skip
    """sort_slots and gather_rows at once, for few pairs: program (p, s) takes the p-th expert that is hit and BD
    channels of its rows."""
    gdc_wait()
    gdc_launch_dependents()
    bins = tl.arange(0, EP)
    counts = _counted(chosen, pairs, EP, BLOCK)
    nth = tl.cumsum((counts > 0).to(tl.int32))
    e = tl.sum(tl.where((nth == tl.program_id(0) + 1) & (counts > 0), bins + 1, 0)) - 1
    if e >= 0:
        first, _ = _tiled(counts, e, tiles, meta, EP, N, MOST_TILES)  # equal stores by all s do no harm
        tile, size = _before(counts, e, EP, N)
        channel = tl.program_id(1) * BD
        global_scale = factor_of(factor, 0, FORMAT)
        rank = 0
        for start in range(0, pairs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mine = (tl.load(chosen + index, mask=index < pairs, other=-1) == e).to(tl.int32)
            ranks = rank + tl.cumsum(mine) - mine
            if tl.program_id(1) == 0:
                slot = (tile + ranks // size) * N + ranks % size
                _placed(index, first + ranks, slot, mine != 0, weight, place, pair, slots, slot_weight)
            upto = rank + tl.sum(mine)
            for low in range(rank, upto, R):
                wanted = low + tl.arange(0, R)
                found = (ranks[None, :] == wanted[:, None]) & (mine != 0)[None, :]
                token = tl.sum(tl.where(found, index[None, :], 0), 1) // K
                slot = (tile + wanted // size) * N + wanted % size
                kept = wanted < upto
                row = first + wanted
                _move(x, data, scale, token, row, slot, channel, kept, global_scale, D, FORMAT, NATIVE, R, BD, N, S)
            rank = upto
