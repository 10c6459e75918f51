"""Kernels that make one pass over rows: norms, rotation, activation, quantisation, and the write into packed pools.

Loads and stores are 16 bytes a thread where the types allow it. Arithmetic is float32, and every rounding to bfloat16
that the reference makes is made here. Rows are addressed in int64: T * H * C passes 2**31.

Legend: T tokens, H heads, C channels, R rotated channels (the last of a head), Q channels of the query latent.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def larger(a, b):
    """The larger of two, NaN if one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """The largest magnitudes along an axis, NaN where one is NaN."""
    return tl.reduce(tl.abs(x), AXIS, larger)


@triton.jit
def e4m3_byte(amax):
    """E8M0 byte of the smallest power of two s with amax / s <= 448 = 1.75 * 2**8; amax counts as at least 1e-4.

    255, which stands for NaN, where amax is NaN or infinite."""
    bits = larger(amax, 1e-4).to(tl.int32, bitcast=True)
    # 0x1FFFFF: a mantissa above 1.75 carries into the exponent
    return tl.where(bits < 0x7F800000, ((bits + 0x1FFFFF) >> 23) - 8, 255)


@triton.jit
def e2m1_byte(amax):
    """E8M0 byte of the smallest power of two s with amax / s <= 6 = 1.5 * 2**2; amax counts as at least 6 * 2**-126.

    255, which stands for NaN, where amax is NaN or infinite."""
    bits = larger(amax, 7.0529661049337254e-38).to(tl.int32, bitcast=True)
    # 0x3FFFFF: a mantissa above 1.5 carries into the exponent
    return tl.where(bits < 0x7F800000, ((bits + 0x3FFFFF) >> 23) - 2, 255)


@triton.jit
def power(byte):
    """float32 2**(byte - 127), NaN for 255."""
    return tl.where(byte == 255, 0x7FC00000, byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power(byte):
    """float32 2**(127 - byte), NaN for 255."""
    return tl.where(byte == 255, 0x7FC00000, (254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x):
    """x after a trip through bfloat16; two values share the conversion."""
    bits = tl.inline_asm_elementwise(
        "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
        "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
    )  # fmt: skip
    return bits


@triton.jit
def fast_exp(x):
    """exp(x), 0 below 2**-126: without the code that keeps smaller results."""
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def turned_pairs(x, cos, sin, INVERSE: tl.constexpr):
    """The even and the odd channels [N, C / 2] of x [N, C], and the same turned by angles that broadcast to them."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    if INVERSE:
        left = even * cos + odd * sin
        right = odd * cos - even * sin
    else:
        left = even * cos - odd * sin
        right = odd * cos + even * sin
    return even, odd, left, right


@triton.jit
def turn(x, cos, sin, turns, INVERSE: tl.constexpr):
    """x [N, C] with the pairs that `turns` names turned."""
    even, odd, left, right = turned_pairs(x, cos, sin, INVERSE)
    left = tl.where(turns, left, even)
    right = tl.where(turns, right, odd)
    return tl.reshape(tl.join(left, right), [x.shape[0], x.shape[1]])


@triton.jit
def angles(table, token, C: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Cosines and sines [1, W / 2] of a token for rows of W / C heads, and which pairs turn."""
    pair = tl.arange(0, W // 2) % (C // 2)
    turns = pair >= (C - R) // 2
    at = table + token * R + pair - (C - R) // 2
    cos = tl.load(at, mask=turns, other=1.0)
    sin = tl.load(at + R // 2, mask=turns, other=0.0)
    return cos[None, :], sin[None, :], turns[None, :]


@triton.jit
def store_quantised(data, scale, group_row, x, live, GROUP: tl.constexpr):
    """x [N, K * GROUP] as E4M3 at `data` rows, and its K scales for each row; `group_row` numbers the first group."""
    K: tl.constexpr = x.shape[1] // GROUP
    groups = tl.reshape(x, [x.shape[0], K, GROUP])
    byte = e4m3_byte(largest(groups, 2))
    small = groups * inverse_power(byte)[:, :, None]
    k = tl.arange(0, K)
    tl.store(scale + group_row[:, None] + k[None, :], power(byte), mask=live[:, None])
    c = tl.max_contiguous(tl.arange(0, K * GROUP), 8)  # 8 of a thread's loads: no exchange between threads
    at = data + group_row[:, None] * GROUP + c[None, :]
    tl.store(at, tl.reshape(small, [x.shape[0], K * GROUP]).to(tl.float8e4nv), mask=live[:, None])


@triton.jit
def quantise_rows(x, data, scale, tokens, D: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr):
    """N groups a program, numbered through all rows."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    live = row < tokens.to(tl.int64) * (D // GROUP)
    start = row // (D // GROUP) * STRIDE + row % (D // GROUP) * GROUP
    c = tl.arange(0, GROUP)
    v = tl.load(x + start[:, None] + c[None, :], mask=live[:, None], other=0.0)
    store_quantised(data, scale, row, v.to(tl.float32), live, GROUP)


@triton.jit
def swiglu(
    gate_up, out, scale, tokens,
    INNER: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, LIMIT: tl.constexpr,
    QUANTISE: tl.constexpr,
):  # fmt: skip
    """silu(min(gate, limit)) * clamp(up, limit) for N groups of GROUP channels a program; `scale` only to quantise."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    live = row < tokens.to(tl.int64) * (INNER // GROUP)
    c = tl.arange(0, GROUP)
    at = gate_up + (row // (INNER // GROUP) * STRIDE + row % (INNER // GROUP) * GROUP)[:, None] + c[None, :]
    gate = tl.load(at, mask=live[:, None], other=0.0)
    up = tl.load(at + INNER, mask=live[:, None], other=0.0)
    gate = tl.minimum(gate.to(tl.float32), LIMIT, tl.PropagateNan.ALL)
    up = tl.minimum(larger(up.to(tl.float32), -LIMIT), LIMIT, tl.PropagateNan.ALL)
    y = gate / (1.0 + fast_exp(-gate)) * up
    if QUANTISE:
        store_quantised(out, scale, row, rounded(y), live, GROUP)
    else:
        tl.store(out + row[:, None] * GROUP + c[None, :], y.to(tl.bfloat16), mask=live[:, None])


@triton.jit
def normed(v, weight, D: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm of rows v [N, W] (0 from channel D on) by weight [W], rounded to bfloat16."""
    factor = tl.rsqrt(tl.sum(v * v, 1) / D + EPS)
    return rounded(v * factor[:, None] * weight.to(tl.float32)[None, :])


@triton.jit
def rms_norm(
    x, weight, out, scale, tokens,
    D: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """N rows of D <= W channels a program; quantised in groups of GROUP, or as bfloat16 where GROUP is 0."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    _rms_norm(x, weight, out, scale, row, row < tokens, D, STRIDE, W, EPS, GROUP)


@triton.jit
def _rms_norm(
    x, weight, out, scale, row, live,
    D: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, W)
    mask = live[:, None] & (c < D)[None, :]
    v = tl.load(x + row[:, None] * STRIDE + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = normed(v, tl.load(weight + c, mask=c < D, other=0.0), D, EPS)
    if GROUP == 0:
        tl.store(out + row[:, None] * D + c[None, :], y.to(tl.bfloat16), mask=mask)
    else:
        K: tl.constexpr = W // GROUP
        groups = tl.reshape(y, [y.shape[0], K, GROUP])
        byte = e4m3_byte(largest(groups, 2))
        small = tl.reshape(groups * inverse_power(byte)[:, :, None], [y.shape[0], W])
        to = tl.max_contiguous(c, 8)  # as many as a thread loads
        tl.store(out + row[:, None] * D + to[None, :], small.to(tl.float8e4nv), mask=mask)
        k = tl.arange(0, K)
        at = scale + row[:, None] * (D // GROUP) + k[None, :]
        tl.store(at, power(byte), mask=live[:, None] & (k < D // GROUP)[None, :])


@triton.jit
def head_norm_rope(
    q, table, out,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """N heads of one token a program: divided by their root mean square, then turned."""
    gdc_wait()
    gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64) // (H // N)
    head = tl.program_id(0) % (H // N) * N + tl.arange(0, N)
    c = tl.arange(0, C)
    v = tl.load(q + token * STRIDE + head[:, None] * C + c[None, :]).to(tl.float32)
    cos, sin, turns = angles(table, token, C, R, C)
    v = rounded(v * tl.rsqrt(tl.sum(v * v, 1) / C + EPS)[:, None])
    v = turn(v, cos, sin, turns, False)
    tl.store(out + token * H * C + head[:, None] * C + c[None, :], v.to(tl.bfloat16))


@triton.jit
def rope_quantise(
    o, table, data, scale,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """N runs of W channels of one token a program (W: a head, or the heads of a group): turned back, quantised."""
    gdc_wait()
    gdc_launch_dependents()
    RUNS: tl.constexpr = H * C // W
    token = tl.program_id(0).to(tl.int64) // (RUNS // N)
    run = tl.program_id(0) % (RUNS // N) * N + tl.arange(0, N)
    c = tl.arange(0, W)
    v = tl.load(o + token * STRIDE + run[:, None] * W + c[None, :]).to(tl.float32)
    cos, sin, turns = angles(table, token, C, R, W)
    v = rounded(turn(v, cos, sin, turns, True))
    group_row = token * (H * C // GROUP) + run * (W // GROUP)
    store_quantised(data, scale, group_row, v, run >= 0, GROUP)


@triton.jit
def pack_plain(
    pool, slot, live, v,
    C: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """All but the last R channels of entries v [N, C] and their scales in the pool's rows `slot` (formats.pack_kv)."""
    PLAIN: tl.constexpr = C - R
    DATA: tl.constexpr = PLAIN + 2 * R
    K: tl.constexpr = C // GROUP
    page = pool + slot // ENTRIES * (ENTRIES * (DATA + 8))
    at = page + slot % ENTRIES * DATA
    groups = tl.reshape(v, [v.shape[0], K, GROUP])
    byte = e4m3_byte(largest(groups, 2))
    small = tl.reshape(groups * inverse_power(byte)[:, :, None], [v.shape[0], C]).to(tl.float8e4nv)
    c = tl.max_contiguous(tl.arange(0, C), 8)  # as many as a thread loads
    tl.store(at[:, None] + c[None, :], small.to(tl.uint8, bitcast=True), mask=live[:, None] & (c < PLAIN)[None, :])
    scales = page + ENTRIES * DATA + slot % ENTRIES * 8
    k = tl.arange(0, K)
    byte = tl.where((k < PLAIN // GROUP)[None, :], byte, 0)
    tl.store(scales[:, None] + k[None, :], byte.to(tl.uint8), mask=live[:, None])
    if K < 8:
        k = tl.arange(0, 8)
        zero = tl.zeros([v.shape[0], 8], tl.uint8)
        tl.store(scales[:, None] + k[None, :], zero, mask=live[:, None] & (k >= K)[None, :])


@triton.jit
def turned_at(pool, slot, C: tl.constexpr, R: tl.constexpr, ENTRIES: tl.constexpr):
    """Where the last R channels of the pool's rows `slot` lie, as bfloat16."""
    PLAIN: tl.constexpr = C - R
    DATA: tl.constexpr = PLAIN + 2 * R
    at = pool + slot // ENTRIES * (ENTRIES * (DATA + 8)) + slot % ENTRIES * DATA + PLAIN
    return at.to(tl.pointer_type(tl.bfloat16), bitcast=True)


@triton.jit
def hadamard(x):
    """The orthonormal Walsh-Hadamard transform of rows x [N, C], rounded to bfloat16; sums in the reference's order."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    HALF: tl.constexpr = C // 2
    for stage in tl.static_range(10):  # of up to 1024 channels
        if (1 << stage) < C:
            pairs = tl.permute(tl.reshape(x, [N, HALF >> stage, 2, 1 << stage]), (0, 1, 3, 2))
            left, right = tl.split(pairs)
            x = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 1, 3, 2)), [N, C])
    return rounded(x * C**-0.5)


@triton.jit
def e2m1_code(x):
    """The nibble of x rounded to E2M1, ties to even; |x| <= 6."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75) + (size > 1.25) + (size >= 1.75)
    code += (size > 2.5).to(tl.int32) + (size >= 3.5) + (size > 5.0)
    return code + ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def pack_index(pool, slot, live, v, C: tl.constexpr, FP4: tl.constexpr, ENTRIES: tl.constexpr):
    """Index keys v [N, C] in the pool's rows `slot` (formats.pack_index, formats.write_entries)."""
    N: tl.constexpr = v.shape[0]
    DATA: tl.constexpr = C // 2 if FP4 else C
    page = pool + slot // ENTRIES * (ENTRIES * (DATA + 4))
    at = page + slot % ENTRIES * DATA
    scales = page + ENTRIES * DATA + slot % ENTRIES * 4
    c = tl.arange(0, DATA)
    if FP4:
        GROUP: tl.constexpr = 32 if C > 32 else C
        K: tl.constexpr = C // GROUP
        groups = tl.reshape(v, [N, K, GROUP])
        byte = e2m1_byte(largest(groups, 2))
        code = e2m1_code(tl.reshape(groups * inverse_power(byte)[:, :, None], [N, C]))
        low, high = tl.split(tl.reshape(code, [N, DATA, 2]))
        tl.store(at[:, None] + c[None, :], (low | (high << 4)).to(tl.uint8), mask=live[:, None])
        k = tl.arange(0, K)
        tl.store(scales[:, None] + k[None, :], byte.to(tl.uint8), mask=live[:, None])
        if K < 4:
            k = tl.arange(0, 4)
            tl.store(scales[:, None] + k[None, :], tl.zeros([N, 4], tl.uint8), mask=live[:, None] & (k >= K)[None, :])
    else:
        byte = e4m3_byte(largest(v, 1))
        small = (v * inverse_power(byte)[:, None]).to(tl.float8e4nv)
        tl.store(at[:, None] + c[None, :], small.to(tl.uint8, bitcast=True), mask=live[:, None])
        tl.store(scales.to(tl.pointer_type(tl.float32), bitcast=True), power(byte), mask=live)


@triton.jit
def norm_rope_pack(
    pool, slots, x, weight, table, tokens,
    C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, ENTRIES: tl.constexpr,
    N: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """N window entries a program: RMSNorm, turn, pack. Rows meant for the null page are left out."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    _norm_rope_pack(pool, slots, x, weight, table, row, row < tokens, C, R, STRIDE, GROUP, ENTRIES, EPS)


@triton.jit
def _norm_rope_pack(
    pool, slots, x, weight, table, row, live,
    C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, ENTRIES: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    at = x + row[:, None] * STRIDE
    c = tl.arange(0, C)
    v = tl.load(at + c[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    # the channels to turn once more, by themselves: a quarter of the arithmetic of turning whole rows
    r = tl.arange(0, R)
    last = tl.load(at + C - R + r[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    slot = tl.load(slots + row, mask=live, other=0)
    pair = tl.arange(0, R // 2)
    angle = table + row[:, None] * R + pair[None, :]
    cos = tl.load(angle, mask=live[:, None], other=1.0)
    sin = tl.load(angle + R // 2, mask=live[:, None], other=0.0)
    w = tl.load(weight + c)
    w_last = tl.load(weight + C - R + r)
    factor = tl.rsqrt(tl.sum(v * v, 1) / C + EPS)[:, None]
    live = live & (slot >= ENTRIES)
    v = rounded(v * factor * w.to(tl.float32)[None, :])
    pack_plain(pool, slot, live, v, C, R, GROUP, ENTRIES)
    last = rounded(last * factor * w_last.to(tl.float32)[None, :])
    _, _, left, right = turned_pairs(last, cos, sin, False)
    last = tl.reshape(tl.join(left, right), [last.shape[0], R])
    to = turned_at(pool, slot, C, R, ENTRIES)
    tl.store(to[:, None] + r[None, :], last.to(tl.bfloat16), mask=live[:, None])


@triton.jit
def row_angles(table, row, live, C: tl.constexpr, R: tl.constexpr):
    """Cosines and sines [N, C / 2] of N rows of the table, and which pairs turn."""
    pair = tl.arange(0, C // 2)
    turns = (pair >= (C - R) // 2)[None, :]
    at = table + row[:, None] * R + (pair - (C - R) // 2)[None, :]
    mask = turns & live[:, None]
    return tl.load(at, mask=mask, other=1.0), tl.load(at + R // 2, mask=mask, other=0.0), turns


@triton.jit
def qkv_norm_rope_pack(
    pool, slots, x, q_weight, kv_weight, table, data, scale, tokens,
    Q: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, QGROUP: tl.constexpr,
    GROUP: tl.constexpr, ENTRIES: tl.constexpr, W: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """The first programs take NQ rows of the query latent each, the others NK window entries each."""
    gdc_wait()
    gdc_launch_dependents()
    program = tl.program_id(0)
    latents = tl.cdiv(tokens, NQ)
    if program < latents:
        latent = program.to(tl.int64) * NQ + tl.arange(0, NQ)
        _rms_norm(x, q_weight, data, scale, latent, latent < tokens, Q, STRIDE, W, EPS, QGROUP)
    else:
        row = (program - latents).to(tl.int64) * NK + tl.arange(0, NK)
        _norm_rope_pack(pool, slots, x + Q, kv_weight, table, row, row < tokens, C, R, STRIDE, GROUP, ENTRIES, EPS)


@triton.jit
def take_rows(x, index, out, D: tl.constexpr, COPIES: tl.constexpr, W: tl.constexpr):
    """COPIES copies of row `index` of x [., D], W channels of it a program."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * W + tl.arange(0, W)
    v = tl.load(x + tl.load(index + row) * D + c, mask=c < D)
    for copy in tl.static_range(COPIES):
        tl.store(out + (row * COPIES + copy) * D + c, v, mask=c < D)


@triton.jit
def slots(
    pages, request_rows, positions, ends, out, count, columns,
    RATIO: tl.constexpr, ENTRIES: tl.constexpr, FROM_ENDS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Pool rows of tokens, or of the entries that the rows `ends` complete (a negative one: null row 0)."""
    gdc_wait()
    gdc_launch_dependents()
    i = tl.program_id(0) * N + tl.arange(0, N)
    live = i < count
    at = i.to(tl.int64)
    if FROM_ENDS:
        at = tl.load(ends + i, mask=live, other=-1)
    known = live & (at >= 0)
    entry = tl.load(positions + at, mask=known, other=0) // RATIO
    request = tl.load(request_rows + at, mask=known, other=0)
    page = tl.load(pages + request * columns + entry // ENTRIES, mask=known, other=0)
    tl.store(out + i, tl.where(known, page * ENTRIES + entry % ENTRIES, 0), mask=live)


@triton.jit
def rope_table(
    positions, ends, frequency, out, count,
    R: tl.constexpr, RATIO: tl.constexpr, FROM_ENDS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Cosines, then sines, of tokens, or of the first tokens of the windows that the rows `ends` complete."""
    gdc_wait()
    gdc_launch_dependents()
    i = tl.program_id(0) * N + tl.arange(0, N)
    live = i < count
    at = i.to(tl.int64)
    if FROM_ENDS:
        at = tl.load(ends + i, mask=live, other=-1)
    position = tl.load(positions + at, mask=live & (at >= 0), other=RATIO - 1) - (RATIO - 1)
    c = tl.arange(0, R // 2)
    angle = position.to(tl.float32)[:, None] * tl.load(frequency + c)[None, :]
    to = out + i[:, None] * R + c[None, :]
    tl.store(to, tl.cos(angle), mask=live[:, None])
    tl.store(to + R // 2, tl.sin(angle), mask=live[:, None])
