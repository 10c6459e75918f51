"""Linear maps on Blackwell's matrix units: FP8 with its block scales as MXFP8, and BF16 with float32 sums.

Block scales are powers of two, so a scale for 128 channels is four equal E8M0 bytes for 32: the products are those of
the reference, bit for bit before they are summed. A weight's scale is one number for a whole tile and step: it is
multiplied into the tokens' scales, and the weight's own stay 1. The weight is the left operand, the tokens the right
one, at least 16 of them; both come through tensor maps. Where a weight has too few rows to fill the card, programs
share its channels and `add_parts` sums what they wrote, in order.

ROLES as in experts_scaled.py: "tiles" where programs take several tiles, "loop" where each has one.

Legend: T tokens, N output channels, K input channels (of one group, where there are groups), S parts of the channels,
B blocks of 128 channels in a step.
"""

import triton.language as tl
from triton import jit
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@jit
def _store(acc, out, line, t, part, tokens, N: tl.constexpr, BM: tl.constexpr):
    """The tile [BM, BT] as rows `part` * tokens + t of out [.., N]."""
    n = line + tl.arange(0, BM)
    at = (part.to(tl.int64) * tokens + t)[None, :] * N + n[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (t < tokens)[None, :])


@jit
def _token_scale(scale, weight_scale, token, tokens, block, at, C: tl.constexpr, BT: tl.constexpr, B: tl.constexpr):
    """E8M0 bytes [BT, 4 B] of the tokens' scales from block `at` of C on, times the weight's from `weight_scale` on."""
    if B == 1:
        t = token + tl.arange(0, BT)
        x = tl.load(scale + t.to(tl.int64) * C + at, mask=t < tokens, other=1.0)[:, None].to(tl.int32, bitcast=True)
        w = tl.load(weight_scale + block).to(tl.int32)
    else:
        x = scale.load([token, at // 4 * 4]).to(tl.int32, bitcast=True)  # a tensor map copies 16 bytes at least
        if B == 2:
            half = tl.arange(0, 2)[None, :, None] == at // 2 % 2
            x = tl.sum(tl.where(half, tl.reshape(x, (BT, 2, 2)), 0), axis=1)
        w = tl.load(weight_scale + block + tl.arange(0, B)).to(tl.int32)[None, :]
    both = (x >> 23) + w - 127
    both = tl.minimum(tl.maximum(both, 0), 254).to(tl.uint8)
    return tl.reshape(both[:, :, None] + tl.zeros([1, 1, 4], tl.uint8), (BT, 4 * B))


@jit
def scaled(
    data, scale, weight, weight_scale, out, tokens,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    B: tl.constexpr, ROLES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """data [T, G * K] by weight [N, K] of ROWS = N / G rows a group; scales float32 [T, G * K / 128] and E8M0 bytes
    [N / 128, K / 128]. out [T, N], or [S, T, N] float32."""
    COLUMNS: tl.constexpr = (N + BM - 1) // BM
    BLOCKS: tl.constexpr = K // 128
    STEPS: tl.constexpr = BLOCKS // B // S
    C: tl.constexpr = N // ROWS * BLOCKS
    gdc_wait()
    gdc_launch_dependents()
    part = tl.program_id(1)
    ones = tl.full([BM, 4 * B], 127, tl.uint8)
    for unit in tl.range(
        tl.program_id(0), (tokens + BT - 1) // BT * COLUMNS, tl.num_programs(0), warp_specialize=ROLES == "tiles"
    ):
        line, token = unit % COLUMNS * BM, unit // COLUMNS * BT
        group = line // ROWS
        acc = tl.zeros([BM, BT], tl.float32)
        for step in tl.range(part * STEPS, (part + 1) * STEPS, num_stages=STAGES, warp_specialize=ROLES == "loop"):
            b = step * B
            w = weight.load([line, b * 128])
            x = data.load([token, group * K + b * 128])
            xs = _token_scale(
                scale, weight_scale, token, tokens, line // 128 * BLOCKS + b, group * BLOCKS + b, C, BT, B
            )
            acc = tl.dot_scaled(w, ones, "e4m3", tl.trans(x), xs, "e4m3", acc)
        _store(acc, out, line, token + tl.arange(0, BT), part, tokens, N, BM)


@jit
def mixed(
    x, weight, out, tokens,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    ROLES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """bfloat16 x [T, K] by weight [N, K]: out float32 [T, N], or [S, T, N]."""
    COLUMNS: tl.constexpr = (N + BM - 1) // BM
    STEPS: tl.constexpr = K // BK // S
    gdc_wait()
    gdc_launch_dependents()
    part = tl.program_id(1)
    for unit in tl.range(
        tl.program_id(0), (tokens + BT - 1) // BT * COLUMNS, tl.num_programs(0), warp_specialize=ROLES == "tiles"
    ):
        line, token = unit % COLUMNS * BM, unit // COLUMNS * BT
        acc = tl.zeros([BM, BT], tl.float32)
        for step in tl.range(part * STEPS, (part + 1) * STEPS, num_stages=STAGES, warp_specialize=ROLES == "loop"):
            acc = tl.dot(weight.load([line, step * BK]), tl.trans(x.load([token, step * BK])), acc)
        _store(acc, out, line, token + tl.arange(0, BT), part, tokens, N, BM)


@jit
def add_parts(parts, out, count, S: tl.constexpr, B: tl.constexpr):
    """out[i] = the sum of parts [S, count] in order; B elements a program."""
    gdc_wait()
    gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    for s in tl.static_range(S):
        total += tl.load(parts + s * count.to(tl.int64) + i, mask=i < count, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)
