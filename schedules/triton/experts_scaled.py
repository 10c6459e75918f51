"""A mixture of experts on Blackwell's block-scaled matrix units: FP4 weights, activations in MXFP8, MXFP4 or NVFP4.

    quantise_mx     rows of tokens to data and scales, once a token
    grouped_up      weight * swiglu(w1 x, w3 x) of an expert's tokens, quantised again on its way out
    grouped_down    w2 times that, a bfloat16 row a pair
    combine_pairs   the shared expert's row and a token's pairs, summed in float32

The weight is the left operand, 128 of its rows a tile, the tokens are the right one: 16 columns at least, so that a
decoding batch pads to 16 tokens an expert and not to 128. Sums stay in tensor memory. Rows of tokens are gathered
where they lie (pair // K), weights come through tensor maps. Which tokens an expert has: moe_sort.py.

    FORMAT  data of a row's channels          scales                                 instruction
    mxfp8   E4M3                              E8M0 byte for 32 channels              kind::mxf8f6f4
    mxfp4   E2M1, even channel in low nibble  E8M0 byte for 32                       kind::mxf4
    nvfp4   E2M1, the same                    E4M3 for 16, and float32 for a tensor  kind::mxf4nvf4
    bf16    as they are; weights are widened  none                                   kind::f16

Scales of MX formats are powers of two, rounded up, so nothing saturates. With nvfp4 `*_global` holds a float32 factor
for each expert; that of activations is a number of the kernel.

Legend: T tokens, D hidden_size, I moe_intermediate_size, K experts a token, M weight rows and N tokens of a tile,
G channels of a scale.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
    """Values of a byte."""
    return 1 if format in ("bf16", "mxfp8") else 2


@triton.jit
def _factor(factors, i, FORMAT: tl.constexpr):
    """Number i of NVFP4's factors; other formats have none."""
    return tl.load(factors + i) if FORMAT == "nvfp4" else 1.0


@triton.jit
def _power_of_two_ceil(x):
    """The smallest power of two that is not below x, a normal positive float32."""
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1_code(x):
    """Nearest E2M1 code of float32 |x| <= 6, ties to even; int32 0 to 15."""
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
def _scales(most, global_scale, FORMAT: tl.constexpr):
    """(stored scales, float32 factors that bring values into the format's range) of groups' largest magnitudes."""
    if FORMAT == "nvfp4":
        # E4M3 rounds to nearest: a group may then saturate by a sixteenth, as NVIDIA's own quantisers do
        stored = tl.minimum(tl.div_rn(most, 6.0 * global_scale), 448.0).to(tl.float8e4nv)
        wide = stored.to(tl.float32)
        return stored, tl.where(wide > 0, tl.div_rn(1.0, tl.maximum(wide, 0.001953125) * global_scale), 0.0)
    else:
        LARGEST: tl.constexpr = 448.0 if FORMAT == "mxfp8" else 6.0
        scale = _power_of_two_ceil(tl.maximum(tl.div_rn(most, LARGEST), 1.1754943508222875e-38))  # 2^-126
        byte = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
        return byte, ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _store_quantised(
    x, data, scale, row, channel, live, global_scale,
    C: tl.constexpr, FORMAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Writes float32 x [M channels from `channel` on, N rows] as rows of C channels and their scales."""
    G: tl.constexpr = group_of(FORMAT)
    grouped = tl.reshape(x, (M // G, G, N))
    stored, factor = _scales(tl.max(tl.abs(grouped), axis=1), global_scale, FORMAT)
    group = channel // G + tl.arange(0, M // G)
    to = scale + row.to(tl.int64)[None, :] * (C // G) + group[:, None]
    tl.store(to, stored, mask=live[None, :])
    values = tl.reshape(grouped * factor[:, None, :], (M, N))
    if FORMAT == "mxfp8":
        at = row.to(tl.int64)[None, :] * C + (channel + tl.arange(0, M))[:, None]
        tl.store(data + at, values.to(tl.float8e4nv), mask=live[None, :])
    else:
        code = _e2m1_code(tl.minimum(tl.maximum(values, -6.0), 6.0))
        even, odd = tl.split(tl.permute(tl.reshape(code, (M // 2, 2, N)), (0, 2, 1)))
        at = row.to(tl.int64)[None, :] * (C // 2) + (channel // 2 + tl.arange(0, M // 2))[:, None]
        tl.store(data + at, (even | (odd << 4)).to(tl.uint8), mask=live[None, :])


@triton.jit
def quantise_mx(
    x, data, scale, rows, factor,
    D: tl.constexpr, FORMAT: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """bfloat16 x [T, D] as data and scales: N rows and BD channels a program."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0) * N + tl.arange(0, N)
    channel = tl.program_id(1) * BD
    live = row < rows
    at = row.to(tl.int64)[None, :] * D + (channel + tl.arange(0, BD))[:, None]
    value = tl.load(x + at, mask=live[None, :], other=0.0).to(tl.float32)
    _store_quantised(value, data, scale, row, channel, live, _factor(factor, 0, FORMAT), D, FORMAT, BD, N)


@triton.jit
def _operand(data, row, k, C: tl.constexpr, FORMAT: tl.constexpr, BK: tl.constexpr):
    """Channels k to k + BK of rows [N]: data [BK, N], or its bytes."""
    P: tl.constexpr = packed(FORMAT)
    byte = k // P + tl.arange(0, BK // P)
    return tl.load(data + row.to(tl.int64)[None, :] * (C // P) + byte[:, None])


@triton.jit
def _multiply(a, a_scale, x, scale, row, k, acc, C: tl.constexpr, FORMAT: tl.constexpr, BK: tl.constexpr):
    """acc + a x, with the scales [N, BK / G] of x's rows."""
    G: tl.constexpr = group_of(FORMAT)
    E: tl.constexpr = element_of(FORMAT)
    if FORMAT == "bf16":
        acc = tl.dot_scaled(a, a_scale, "e2m1", x, None, E, acc)
    else:
        group = k // G + tl.arange(0, BK // G)
        x_scale = tl.load(scale + row.to(tl.int64)[:, None] * (C // G) + group[None, :])
        acc = tl.dot_scaled(a, a_scale, "e2m1", x, x_scale, E, acc)
    return acc


@triton.jit
def _weight_scale(scale, line, k, C: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BK: tl.constexpr):
    """Scales [M, BK / G] of weight rows from `line` on."""
    row = (line + tl.arange(0, M)).to(tl.int64)
    return tl.load(scale + row[:, None] * (C // G) + (k // G + tl.arange(0, BK // G))[None, :])


@triton.jit
def grouped_up(
    data, scale, w1, s1, w3, s3, w1_global, w3_global, tiles, meta, pair, row_weight, out, out_scale,
    x_global, out_global,
    LIMIT: tl.constexpr, FORMAT: tl.constexpr, D: tl.constexpr, I: tl.constexpr, K: tl.constexpr,  # noqa: E741
    M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [rows, I] = quantised row_weight * swiglu(w1 x, w3 x) of the rows in meta[0] tiles."""
    gdc_wait()
    gdc_launch_dependents()
    G: tl.constexpr = group_of(FORMAT)
    count = tl.load(meta) * (I // M)
    for unit in range(tl.program_id(0), count, tl.num_programs(0)):
        tile, m = unit // (I // M), unit % (I // M) * M
        expert = tl.load(tiles + 4 * tile)
        first = tl.load(tiles + 4 * tile + 1)
        column = tl.arange(0, N)
        live = column < tl.load(tiles + 4 * tile + 2)
        token = tl.load(pair + first + column, mask=live, other=0) // K
        line = expert * I + m
        gate = tl.zeros([M, N], tl.float32)
        up = tl.zeros([M, N], tl.float32)
        for k in range(0, D, BK):
            x = _operand(data, token, k, D, FORMAT, BK)
            a, a_scale = w1.load([line, k // 2]), _weight_scale(s1, line, k, D, G, M, BK)
            b, b_scale = w3.load([line, k // 2]), _weight_scale(s3, line, k, D, G, M, BK)
            gate = _multiply(a, a_scale, x, scale, token, k, gate, D, FORMAT, BK)
            up = _multiply(b, b_scale, x, scale, token, k, up, D, FORMAT, BK)
        if FORMAT == "nvfp4":
            of_x = tl.load(x_global)
            gate *= tl.load(w1_global + expert) * of_x
            up *= tl.load(w3_global + expert) * of_x
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        weight = tl.load(row_weight + first + column, mask=live, other=0.0)
        hidden = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up * weight[None, :]
        if FORMAT == "bf16":
            at = (first + column).to(tl.int64)[None, :] * I + (m + tl.arange(0, M))[:, None]
            tl.store(out + at, hidden.to(tl.bfloat16), mask=live[None, :])
        else:
            of_hidden = _factor(out_global, expert, FORMAT)
            _store_quantised(hidden, out, out_scale, first + column, m, live, of_hidden, I, FORMAT, M, N)


@triton.jit
def grouped_down(
    data, scale, w2, s2, w2_global, tiles, meta, out, x_global,
    FORMAT: tl.constexpr, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [rows, D], bfloat16: w2 times the rows that `grouped_up` wrote."""
    gdc_wait()
    gdc_launch_dependents()
    G: tl.constexpr = group_of(FORMAT)
    count = tl.load(meta) * (D // M)
    for unit in range(tl.program_id(0), count, tl.num_programs(0)):
        tile, m = unit // (D // M), unit % (D // M) * M
        expert = tl.load(tiles + 4 * tile)
        column = tl.arange(0, N)
        live = column < tl.load(tiles + 4 * tile + 2)
        row = tl.load(tiles + 4 * tile + 1) + tl.where(live, column, 0)
        line = expert * D + m
        acc = tl.zeros([M, N], tl.float32)
        for k in range(0, I, BK):
            x = _operand(data, row, k, I, FORMAT, BK)
            a, a_scale = w2.load([line, k // 2]), _weight_scale(s2, line, k, I, G, M, BK)
            acc = _multiply(a, a_scale, x, scale, row, k, acc, I, FORMAT, BK)
        if FORMAT == "nvfp4":
            acc *= tl.load(w2_global + expert) * tl.load(x_global + expert)
        at = row.to(tl.int64)[None, :] * D + (m + tl.arange(0, M))[:, None]
        tl.store(out + at, acc.to(tl.bfloat16), mask=live[None, :])


@triton.jit
def combine_pairs(y, place, shared, out, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """out[token] = shared[token] + the sum of its pairs' rows in y, in float32. Grid: tokens, pieces of BD channels."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = channel < D
    total = tl.load(shared + token * D + channel, mask=inside, other=0.0).to(tl.float32)
    gdc_wait()
    for k in tl.static_range(K):
        row = (tl.load(place + token * K + k) // 8).to(
            tl.int64
        )  # behind it is the row's rank, which Hopper swizzles by
        total += tl.load(y + row * D + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + channel, total.to(tl.bfloat16), mask=inside)
