"""Hyper-connections of few tokens in one launch: clusters whose blocks share the channels, and no matrix unit.

A token's products with fn are 0.8 MFLOP: what counts is how many steps wait for each other. Two clusters work on a
token, each on all of its channels:

    even   streams out | rows 0 to 6 of fn (pre, post but its last), squares | next input, its norm, quantised
    odd                | row 7 (the last of post), comb, squares             | Sinkhorn

so that the forty dependent steps of Sinkhorn run beside the exchange that the norm needs. fn is read before the kernel
ahead has finished and stays in registers as it is, float32; products and sums are float32.

Softmax over a row of comb does not see what is added to all of the row: its products are with fn's rows less the first
of their four, 12 instead of 16. So a cluster has 8 or 16 sums, which cross it together.

The text is plain Triton: a tensor of all channels spans the cluster, and a sum over it is the exchange. One token a
cluster: of 2 and 4, which read fn once, a cluster of 16 blocks took 10 and 12 us instead of 5 (H200).

Legend: T tokens, N = 4 streams, D channels, P the power of two that holds them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4c.schedules.triton.hyper import halves, sigmoid
from dsv4c.schedules.triton.rows import e4m3_byte, inverse_power, largest, power

FIRST = tl.constexpr(7)  # rows of fn that the even cluster multiplies with


@triton.jit
def reciprocal(x):
    """1 / x, 0 where that is below 2**-126."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def row(fn, r: tl.constexpr, d, D: tl.constexpr):
    """Row r of fn: a tensor [P] for each stream."""
    out = ()
    for j in tl.static_range(4):
        out += (tl.load(fn + (4 * r + j) * D + d, mask=d < D, other=0.0),)
    return out


@triton.jit
def less(a, b):
    """a - b, of tuples."""
    out = ()
    for j in tl.static_range(len(a)):
        out += (a[j] - b[j],)
    return out


@triton.jit
def dot(f, s, start):
    """What each channel adds to one product, and to `start`: [P]."""
    for j in tl.static_range(4):
        start += f[j] * s[j]
    return start


@triton.jit
def streams_of(y, x, post_in, comb_in, t, d, D: tl.constexpr, POST: tl.constexpr):
    """The four streams [P] of token t, bfloat16; with POST they are made here."""
    at = t * (4 * D) + d
    mask = d < D
    xs = ()
    for j in tl.static_range(4):
        xs += (tl.load(x + at + j * D, mask=mask, other=0.0),)
    if not POST:
        return xs
    yt = tl.load(y + t * D + d, mask=mask, other=0.0).to(tl.float32)
    out = ()
    for k in tl.static_range(4):
        s = tl.load(post_in + t * 4 + k) * yt
        for j in tl.static_range(4):
            s += tl.load(comb_in + t * 16 + 4 * j + k) * xs[j].to(tl.float32)
        out += (s.to(tl.bfloat16),)
    return out


@triton.jit
def widened(s):
    """float32 of a tuple."""
    out = ()
    for j in tl.static_range(len(s)):
        out += (s[j].to(tl.float32),)
    return out


@triton.jit
def totals(parts, LOG: tl.constexpr):
    """Sums over the channels of up to 2**LOG tensors [P], as scalars: one exchange between the blocks."""
    for _ in tl.static_range(len(parts), 1 << LOG):
        parts += (tl.zeros_like(parts[0]),)
    for _ in tl.static_range(LOG):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            joined += (tl.join(parts[i], parts[i + len(parts) // 2]),)
        parts = joined
    out = (tl.sum(parts[0], 0),)
    for _ in tl.static_range(LOG):
        out = halves(out)
    return out


@triton.jit
def next_input(
    y, x, post_in, comb_in, fn, base, scale, norm_weight, streams, out, post_out, data, data_scale, t,
    D: tl.constexpr, P: tl.constexpr, POST: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr,
    QUANTISE: tl.constexpr, NORM_EPS: tl.constexpr, EPS: tl.constexpr, OUT_EPS: tl.constexpr,
):  # fmt: skip
    """Streams, their weighted sum with its norm, and all of post but the last, of token t."""
    d = tl.arange(0, P)
    mask = d < D
    ROWS: tl.constexpr = 4 if HEAD else FIRST
    f = ()
    bases = ()
    for r in tl.static_range(ROWS):
        f += (row(fn, r, d, D),)
        bases += (tl.load(base + r),)
    pre_scale = tl.load(scale)
    if not HEAD:
        post_scale = tl.load(scale + 1)
    if NORM:
        gain = tl.load(norm_weight + d, mask=mask, other=0.0)
    gdc_wait()
    held = streams_of(y, x, post_in, comb_in, t, d, D, POST)
    s = widened(held)
    parts = ()
    for r in tl.static_range(ROWS):
        parts += (dot(f[r], s, tl.zeros_like(s[0])),)
    parts += (dot(s, s, tl.zeros_like(s[0])),)
    sums = totals(parts, 3)
    rho = tl.rsqrt(sums[ROWS] / (4 * D) + NORM_EPS)
    o = tl.zeros_like(s[0])
    for k in tl.static_range(4):
        o += (sigmoid(sums[k] * rho * pre_scale + bases[k]) + EPS) * s[k]
    if NORM:
        o = o.to(tl.bfloat16).to(tl.float32)
        o = o * tl.rsqrt(tl.sum(o * o, 0) / D + OUT_EPS) * gain
    # nothing is stored before: an exchange would wait until all can see it
    if POST:
        for k in tl.static_range(4):
            tl.store(streams + t * (4 * D) + k * D + d, held[k], mask=mask)
    for k in tl.static_range(4, ROWS):
        tl.store(post_out + t * 4 + k - 4, 2.0 * sigmoid(sums[k] * rho * post_scale + bases[k]))
    o = o.to(tl.bfloat16)
    tl.store(out + t * D + d, o, mask=mask)
    if QUANTISE:
        groups = tl.reshape(o.to(tl.float32), [P // 128, 128])
        byte = e4m3_byte(largest(groups, 1))
        small = tl.reshape(groups * inverse_power(byte)[:, None], [P])
        tl.store(data + t * D + d, small.to(tl.float8e4nv), mask=mask)
        g = tl.arange(0, P // 128)
        tl.store(data_scale + t * (D // 128) + g, power(byte), mask=g < D // 128)


@triton.jit
def coefficients(
    y, x, post_in, comb_in, fn, base, scale, post_out, comb_out, t,
    D: tl.constexpr, P: tl.constexpr, POST: tl.constexpr, ITERS: tl.constexpr, NORM_EPS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """comb and the last of post of token t."""
    d = tl.arange(0, P)
    f = (row(fn, FIRST, d, D),)
    bases = (tl.load(base + FIRST),)
    for j in tl.static_range(4):
        lead = row(fn, 8 + 4 * j, d, D)
        for k in tl.static_range(1, 4):
            f += (less(row(fn, 8 + 4 * j + k, d, D), lead),)
            bases += (tl.load(base + 8 + 4 * j + k) - tl.load(base + 8 + 4 * j),)
    post_scale = tl.load(scale + 1)
    comb_scale = tl.load(scale + 2)
    gdc_wait()
    s = widened(streams_of(y, x, post_in, comb_in, t, d, D, POST))
    parts = ()
    for r in tl.static_range(13):
        parts += (dot(f[r], s, tl.zeros_like(s[0])),)
    parts += (dot(s, s, tl.zeros_like(s[0])),)
    sums = totals(parts, 4)
    rho = tl.rsqrt(sums[13] / (4 * D) + NORM_EPS)
    tl.store(post_out + t * 4 + 3, 2.0 * sigmoid(sums[0] * rho * post_scale + bases[0]))
    e = ()
    for j in tl.static_range(4):
        e += (tl.zeros_like(rho),)
        for k in tl.static_range(1, 4):
            e += (sums[3 * j + k] * rho * comb_scale + bases[3 * j + k],)
    e = sinkhorn(e, EPS, ITERS)
    for jk in tl.static_range(16):
        tl.store(comb_out + t * 16 + jk, e[jk])


@triton.jit
def sinkhorn(m, eps, ITERS: tl.constexpr):
    """A tuple of 16 scalars, row-major logits, as a doubly stochastic matrix."""
    e = ()
    for j in tl.static_range(4):
        top = tl.maximum(tl.maximum(m[4 * j], m[4 * j + 1]), tl.maximum(m[4 * j + 2], m[4 * j + 3]))
        a = tl.exp(m[4 * j] - top)
        b = tl.exp(m[4 * j + 1] - top)
        c = tl.exp(m[4 * j + 2] - top)
        g = tl.exp(m[4 * j + 3] - top)
        inverse = reciprocal((a + b) + (c + g))
        e += (a * inverse + eps, b * inverse + eps, c * inverse + eps, g * inverse + eps)
    e = columns(e, eps)
    for _ in range(ITERS - 1):
        n = ()
        for j in tl.static_range(4):
            inverse = reciprocal((e[4 * j] + e[4 * j + 1]) + ((e[4 * j + 2] + e[4 * j + 3]) + eps))
            n += (e[4 * j] * inverse, e[4 * j + 1] * inverse, e[4 * j + 2] * inverse, e[4 * j + 3] * inverse)
        e = columns(n, eps)
    return e


@triton.jit
def columns(e, eps):
    """The matrix with its columns divided by their sums."""
    i = ()
    for k in tl.static_range(4):
        i += (reciprocal((e[k] + e[4 + k]) + ((e[8 + k] + e[12 + k]) + eps)),)
    n = ()
    for jk in tl.static_range(16):
        n += (e[jk] * i[jk % 4],)
    return n


@triton.jit
def fused(
    y, x, post_in, comb_in, fn, base, scale, norm_weight, streams, out, post_out, comb_out, data, data_scale,
    D: tl.constexpr, P: tl.constexpr, POST: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr,
    QUANTISE: tl.constexpr, ITERS: tl.constexpr, NORM_EPS: tl.constexpr, EPS: tl.constexpr, OUT_EPS: tl.constexpr,
):  # fmt: skip
    """[hc_post,] hc_pre or hc_head [and RMSNorm [and quantisation]]. Without POST `x` holds the streams.

    Two clusters a token, one for HEAD.
    """
    gdc_launch_dependents()
    pid = tl.program_id(0)
    if HEAD:
        next_input(
            y, x, post_in, comb_in, fn, base, scale, norm_weight, streams, out, post_out, data, data_scale,
            pid.to(tl.int64), D, P, POST, HEAD, NORM, QUANTISE, NORM_EPS, EPS, OUT_EPS,
        )  # fmt: skip
    elif pid % 2 == 0:
        next_input(
            y, x, post_in, comb_in, fn, base, scale, norm_weight, streams, out, post_out, data, data_scale,
            (pid // 2).to(tl.int64), D, P, POST, HEAD, NORM, QUANTISE, NORM_EPS, EPS, OUT_EPS,
        )  # fmt: skip
    else:
        coefficients(
            y, x, post_in, comb_in, fn, base, scale, post_out, comb_out, (pid // 2).to(tl.int64), D, P, POST, ITERS,
            NORM_EPS, EPS,
        )  # fmt: skip
