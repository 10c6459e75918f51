"""Linear maps on Blackwell's matrix units: FP8 with its block scales as MXFP8, and BF16 with float32 sums.

Block scales are powers of two, so a scale for 128 channels is four equal E8M0 bytes for 32: the products are those of
the reference, bit for bit before they are summed. The weight is the left operand, the tokens the right one, at least
16 of them; both come through tensor maps. Where a weight has too few rows to fill the card, programs share its
channels and `add_parts` sums what they wrote, in order.

Legend: T tokens, N output channels, K input channels (of one group, where there are groups), S parts of the channels.
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
def scaled(
    data, scale, weight, weight_scale, out, tokens,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """data [T, G * K] by weight [N, K] of ROWS = N / G rows a group; scales float32 [T, G * K / 128] and E8M0 bytes
    [N / 128, K / 128]. out [T, N], or [S, T, N] float32."""
    COLUMNS: tl.constexpr = (N + BM - 1) // BM
    BLOCKS: tl.constexpr = K // 128
    line, token = tl.program_id(0) % COLUMNS * BM, tl.program_id(0) // COLUMNS * BT
    part = tl.program_id(1)
    group = line // ROWS
    t = token + tl.arange(0, BT)
    four = tl.zeros([1, 4], tl.uint8)
    gdc_wait()
    gdc_launch_dependents()
    acc = tl.zeros([BM, BT], tl.float32)
    for b in range(part * (BLOCKS // S), (part + 1) * (BLOCKS // S)):
        w = weight.load([line, b * 128])
        x = data.load([token, group * K + b * 128])
        at = scale + t.to(tl.int64) * (N // ROWS * BLOCKS) + group * BLOCKS + b
        xs = tl.load(at, mask=t < tokens, other=1.0)
        xs = (xs.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)[:, None] + four
        ws = tl.load(weight_scale + line // 128 * BLOCKS + b) + tl.zeros([BM, 4], tl.uint8)
        acc = tl.dot_scaled(w, ws, "e4m3", tl.trans(x), xs, "e4m3", acc)
    _store(acc, out, line, t, part, tokens, N, BM)


@jit
def mixed(
    x, weight, out, tokens,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """bfloat16 x [T, K] by weight [N, K]: out float32 [T, N], or [S, T, N]."""
    COLUMNS: tl.constexpr = (N + BM - 1) // BM
    STEPS: tl.constexpr = K // BK // S
    line, token = tl.program_id(0) % COLUMNS * BM, tl.program_id(0) // COLUMNS * BT
    part = tl.program_id(1)
    gdc_wait()
    gdc_launch_dependents()
    acc = tl.zeros([BM, BT], tl.float32)
    for step in range(part * STEPS, (part + 1) * STEPS):
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
