"""Hyper-connections as two plain kernels: `project` mixes and projects tiles, `finish` turns sums into coefficients.

The coefficients of a token need a product over all N * D channels, before any of its input can be formed. `project`
therefore splits channels over programs and writes partial sums; `finish` adds them, in order, and reads the streams
again: from L2 while they fit it (about a thousand tokens of 4096 channels), else from memory.

fn is float32: it is split into bfloat16 high and low parts, two products that leave an error of 2**-17; the streams
are bfloat16 and so exact.

Legend: T tokens, N = 4 streams, D channels, S splits of the channels, R rows of fn (pre, post, comb: 4 + 4 + 16).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4c.schedules.triton.rows import e4m3_byte, inverse_power, largest, power

PART = tl.constexpr(32)  # floats a token and split: 24 products (4 for the head), then the sum of squares
SQUARES = tl.constexpr(24)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def mixed(x, y, post, comb, k: tl.constexpr):
    """Stream k of hc_post: tuples of 4 streams [BT, BD] and of 4 and 16 coefficients [BT]."""
    s = post[k][:, None] * y
    for j in tl.static_range(4):
        s += comb[4 * j + k][:, None] * x[j]
    return s.to(tl.bfloat16)


@triton.jit
def coefficients(post, comb, t, live):
    """Tuples of post [BT] (4) and comb [BT] (16) of tokens t."""
    p = ()
    c = ()
    for k in tl.static_range(4):
        p += (tl.load(post + t * 4 + k, mask=live, other=0.0),)
    for jk in tl.static_range(16):
        c += (tl.load(comb + t * 16 + jk, mask=live, other=0.0),)
    return p, c


@triton.jit
def post(
    y, x, post_in, comb_in, out, tokens,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """hc_post of BT tokens and BD channels a program."""
    gdc_wait()
    gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = t < tokens
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    p, c = coefficients(post_in, comb_in, t, live)
    mask = live[:, None] & (d < D)[None, :]
    at = t[:, None] * (4 * D) + d[None, :]
    yt = tl.load(y + t[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    xs = ()
    for j in tl.static_range(4):
        xs += (tl.load(x + at + j * D, mask=mask, other=0.0).to(tl.float32),)
    for k in tl.static_range(4):
        tl.store(out + at + k * D, mixed(xs, yt, p, c, k), mask=mask)


@triton.jit
def project(
    y, x, post_in, comb_in, fn, streams, part, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, POST: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, DS: tl.constexpr,
    STAGES: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Partial products and squares of BT tokens over DS channels of all streams; with POST the streams are made here.

    Without POST `x` holds the streams, and y, post_in, comb_in and streams are not used. TURNED: fn's high and low
    rows, 64, are a product's rows and the tokens its columns: for matrix units that take no fewer rows.
    """
    gdc_wait()
    gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    split = tl.program_id(1)
    live = t < tokens
    r = tl.arange(0, PART)
    wanted = (r < ROWS)[None, :]
    q = tl.arange(0, 2 * PART)
    acc = tl.zeros([2 * PART, BT] if TURNED else [BT, PART], tl.float32)
    squares = tl.zeros([BT, BD], tl.float32)
    if POST:
        p, c = coefficients(post_in, comb_in, t, live)
    for start in tl.range(0, DS, BD, num_stages=STAGES):
        d = split * DS + start + tl.arange(0, BD)
        at = t[:, None] * (4 * D) + d[None, :]
        xs = ()
        for j in tl.static_range(4):
            xs += (tl.load(x + at + j * D, mask=live[:, None], other=0.0),)
        if POST:
            yt = tl.load(y + t[:, None] * D + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)
            wide = ()
            for j in tl.static_range(4):
                wide += (xs[j].to(tl.float32),)
        for k in tl.static_range(4):
            if POST:
                s = mixed(wide, yt, p, c, k)
                tl.store(streams + at + k * D, s, mask=live[:, None])
            else:
                s = xs[k]
            if TURNED:
                at_fn = fn + (q % PART)[:, None] * (4 * D) + k * D + d[None, :]
                f = tl.load(at_fn, mask=(q % PART < ROWS)[:, None], other=0.0)
                high = f.to(tl.bfloat16)
                low = (f - high.to(tl.float32)).to(tl.bfloat16)
                acc = tl.dot(tl.where((q < PART)[:, None], high, low), tl.trans(s), acc)
            else:
                f = tl.load(fn + r[None, :] * (4 * D) + k * D + d[:, None], mask=wanted, other=0.0)
                high = f.to(tl.bfloat16)
                low = (f - high.to(tl.float32)).to(tl.bfloat16)
                acc = tl.dot(s, high, acc)
                acc = tl.dot(s, low, acc)
            sf = s.to(tl.float32)
            squares += sf * sf
    if TURNED:
        acc = tl.trans(tl.sum(tl.reshape(acc, [2, PART, BT]), 0))
    total = tl.where((r == SQUARES)[None, :], tl.sum(squares, 1)[:, None], acc)
    at = (split * tokens.to(tl.int64) + t)[:, None] * PART + r[None, :]
    tl.store(part + at, total, mask=live[:, None])


@triton.jit
def sinkhorn(m, eps, ITERS: tl.constexpr):
    """A tuple of 16 tensors, row-major logits, as a doubly stochastic matrix."""
    e = ()
    for j in tl.static_range(4):
        top = tl.maximum(tl.maximum(m[4 * j], m[4 * j + 1]), tl.maximum(m[4 * j + 2], m[4 * j + 3]))
        a = tl.exp(m[4 * j] - top)
        b = tl.exp(m[4 * j + 1] - top)
        c = tl.exp(m[4 * j + 2] - top)
        d = tl.exp(m[4 * j + 3] - top)
        inverse = 1.0 / ((a + b) + (c + d))
        e += (a * inverse + eps, b * inverse + eps, c * inverse + eps, d * inverse + eps)
    e = columns(e, eps)
    for _ in range(ITERS - 1):
        n = ()
        for j in tl.static_range(4):
            inverse = 1.0 / ((e[4 * j] + e[4 * j + 1]) + (e[4 * j + 2] + e[4 * j + 3]) + eps)
            n += (e[4 * j] * inverse, e[4 * j + 1] * inverse, e[4 * j + 2] * inverse, e[4 * j + 3] * inverse)
        e = columns(n, eps)
    return e


@triton.jit
def columns(e, eps):
    """The matrix with its columns divided by their sums."""
    i = ()
    for k in tl.static_range(4):
        i += (1.0 / ((e[k] + e[4 + k]) + (e[8 + k] + e[12 + k]) + eps),)
    n = ()
    for jk in tl.static_range(16):
        n += (e[jk] * i[jk % 4],)
    return n


@triton.jit
def unpack16(m):
    """[BS, 16] as a tuple of 16 tensors [BS]."""
    out = (tl.reshape(m, [m.shape[0], 2, 2, 2, 2]),)
    for _ in tl.static_range(4):
        n = ()
        for i in tl.static_range(len(out)):
            n += (out[i],)
        out = halves(n)
    return out


@triton.jit
def halves(parts):
    """Each tensor split along its last dimension: all even parts, then all odd ones."""
    even = ()
    odd = ()
    for i in tl.static_range(len(parts)):
        a, b = tl.split(parts[i])
        even += (a,)
        odd += (b,)
    return even + odd


@triton.jit
def write_coefficients(
    part, base, scale, post_out, comb_out, first, tokens,
    D: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BS: tl.constexpr, ITERS: tl.constexpr, NORM_EPS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """post and comb of BS tokens from their partial sums."""
    t = first + tl.arange(0, BS)
    live = t < tokens
    s = tl.arange(0, SP)
    at = part + (s[:, None] * tokens.to(tl.int64) + t[None, :]) * PART
    live2 = (s < S)[:, None] & live[None, :]
    squares = tl.sum(tl.load(at + SQUARES, mask=live2, other=0.0), 0)
    rho = tl.rsqrt(squares / (4 * D) + NORM_EPS)
    r = tl.arange(0, 16)
    logits = tl.sum(tl.load(at[:, :, None] + 8 + r[None, None, :], mask=live2[:, :, None], other=0.0), 0)
    logits = logits * rho[:, None] * tl.load(scale + 2) + tl.load(base + 8 + r)[None, :]
    k = tl.arange(0, 4)
    mix = tl.sum(tl.load(at[:, :, None] + 4 + k[None, None, :], mask=live2[:, :, None], other=0.0), 0)
    mix = mix * rho[:, None] * tl.load(scale + 1) + tl.load(base + 4 + k)[None, :]
    tl.store(post_out + t[:, None] * 4 + k[None, :], 2.0 * sigmoid(mix), mask=live[:, None])
    e = sinkhorn(unpack16(logits), EPS, ITERS)
    for jk in tl.static_range(16):
        tl.store(comb_out + t * 16 + jk, e[jk], mask=live)


@triton.jit
def finish(
    streams, part, base, scale, norm_weight, x, post_out, comb_out, data, data_scale, tokens,
    D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BS: tl.constexpr, HEAD: tl.constexpr,
    NORM: tl.constexpr, QUANTISE: tl.constexpr, ITERS: tl.constexpr, NORM_EPS: tl.constexpr, EPS: tl.constexpr,
    OUT_EPS: tl.constexpr,
):  # fmt: skip
    """One token a program: its input, normed, and quantised in groups of 128 channels.

    The first cdiv(T, BS) programs write post and comb of BS tokens each, beside the others (no HEAD has them).
    """
    gdc_wait()
    gdc_launch_dependents()
    pid = tl.program_id(0)
    if not HEAD:
        others = tl.cdiv(tokens, BS)
        if pid < others:
            write_coefficients(
                part, base, scale, post_out, comb_out, pid.to(tl.int64) * BS, tokens,
                D, S, SP, BS, ITERS, NORM_EPS, EPS,
            )  # fmt: skip
            return
        pid -= others
    t = pid.to(tl.int64)
    d = tl.arange(0, BD)
    row = streams + t * (4 * D) + d
    x0 = tl.load(row, mask=d < D, other=0.0)
    x1 = tl.load(row + D, mask=d < D, other=0.0)
    x2 = tl.load(row + 2 * D, mask=d < D, other=0.0)
    x3 = tl.load(row + 3 * D, mask=d < D, other=0.0)
    s = tl.arange(0, SP)
    r = tl.arange(0, PART)
    at = part + (s[:, None] * tokens.to(tl.int64) + t) * PART + r[None, :]
    sums = tl.sum(tl.load(at, mask=(s < S)[:, None], other=0.0), 0)
    rho = tl.rsqrt(tl.sum(tl.where(r == SQUARES, sums, 0.0), 0) / (4 * D) + NORM_EPS)
    gain = sigmoid(sums * rho * tl.load(scale) + tl.load(base + r, mask=r < 4, other=0.0)) + EPS
    out = tl.sum(tl.where(r == 0, gain, 0.0), 0) * x0.to(tl.float32)
    out += tl.sum(tl.where(r == 1, gain, 0.0), 0) * x1.to(tl.float32)
    out += tl.sum(tl.where(r == 2, gain, 0.0), 0) * x2.to(tl.float32)
    out += tl.sum(tl.where(r == 3, gain, 0.0), 0) * x3.to(tl.float32)
    if NORM:
        out = out.to(tl.bfloat16).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(out * out, 0) / D + OUT_EPS)
        out = out * inverse * tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)
    out = out.to(tl.bfloat16)
    tl.store(x + t * D + d, out, mask=d < D)
    if QUANTISE:
        groups = tl.reshape(out.to(tl.float32), [BD // 128, 128])
        byte = e4m3_byte(largest(groups, 1))
        small = tl.reshape(groups * inverse_power(byte)[:, None], [BD])
        tl.store(data + t * D + d, small.to(tl.float8e4nv), mask=d < D)
        g = tl.arange(0, BD // 128)
        tl.store(data_scale + t * (D // 128) + g, power(byte), mask=g < D // 128)
