"""Hyper-connections in one launch: a program keeps its tokens from the first read of the streams to the normed input.

    sweep 1   read streams and result, write the new streams, add products with fn and squares
    between   sums -> coefficients, Sinkhorn (a token a lane)
    sweep 2   read the streams again (just written: from L2), weigh and add them, write the sum, add its squares
    sweep 3   read the sum again (L2), norm, write, quantise

Memory sees 84 KB a token of flash, once; L2 gives another 48 KB and, for every BT tokens, fn (1.5 MB). So BT should be
large, but 132 tiles must exist to fill the card. fn is float32, split into two bfloat16 parts: an error of 2**-17.

Legend: T tokens, N = 4 streams, D channels, BT tokens of a program, BD, BW channels of an iteration.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4c.schedules.triton.hyper import coefficients, mixed, sigmoid, sinkhorn
from dsv4c.schedules.triton.rows import e4m3_byte, inverse_power, power


@triton.jit
def column(sums, c: tl.constexpr):
    """Column c of [BT, 32]."""
    at = tl.arange(0, 32)
    return tl.sum(tl.where((at == c)[None, :], sums, 0.0), 1)


@triton.jit
def post_pre_norm(
    y, x, post_in, comb_in, fn, base, scale, norm_weight, streams, out, post_out, comb_out, data, data_scale, tokens,
    D: tl.constexpr, POST: tl.constexpr, QUANTISE: tl.constexpr, ITERS: tl.constexpr, NORM_EPS: tl.constexpr,
    EPS: tl.constexpr, OUT_EPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = t < tokens
    mask = live[:, None]
    r = tl.arange(0, 32)
    wanted = (r < 24)[None, :]
    acc = tl.zeros([BT, 32], tl.float32)
    squares = tl.zeros([BT, BD], tl.float32)
    if POST:
        p, c = coefficients(post_in, comb_in, t, live)
    for start in tl.range(0, D, BD, num_stages=STAGES):
        d = start + tl.arange(0, BD)
        at = t[:, None] * (4 * D) + d[None, :]
        xs = ()
        for j in tl.static_range(4):
            xs += (tl.load(x + at + j * D, mask=mask, other=0.0),)
        if POST:
            yt = tl.load(y + t[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            wide = ()
            for j in tl.static_range(4):
                wide += (xs[j].to(tl.float32),)
        for k in tl.static_range(4):
            f = tl.load(fn + r[None, :] * (4 * D) + k * D + d[:, None], mask=wanted, other=0.0)
            high = f.to(tl.bfloat16)
            low = (f - high.to(tl.float32)).to(tl.bfloat16)
            if POST:
                s = mixed(wide, yt, p, c, k)
                tl.store(streams + at + k * D, s, mask=mask)
            else:
                s = xs[k]
            acc = tl.dot(s, high, acc)
            acc = tl.dot(s, low, acc)
            sf = s.to(tl.float32)
            squares += sf * sf
    rho = tl.rsqrt(tl.sum(squares, 1) / (4 * D) + NORM_EPS)
    gain0 = sigmoid(column(acc, 0) * rho * tl.load(scale) + tl.load(base)) + EPS
    gain1 = sigmoid(column(acc, 1) * rho * tl.load(scale) + tl.load(base + 1)) + EPS
    gain2 = sigmoid(column(acc, 2) * rho * tl.load(scale) + tl.load(base + 2)) + EPS
    gain3 = sigmoid(column(acc, 3) * rho * tl.load(scale) + tl.load(base + 3)) + EPS
    for k in tl.static_range(4):
        mix = 2.0 * sigmoid(column(acc, 4 + k) * rho * tl.load(scale + 1) + tl.load(base + 4 + k))
        tl.store(post_out + t * 4 + k, mix, mask=live)
    m = ()
    for jk in tl.static_range(16):
        m += (column(acc, 8 + jk) * rho * tl.load(scale + 2) + tl.load(base + 8 + jk),)
    e = sinkhorn(m, EPS, ITERS)
    for jk in tl.static_range(16):
        tl.store(comb_out + t * 16 + jk, e[jk], mask=live)

    source = streams if POST else x
    tl.debug_barrier()  # the streams that other threads of this program wrote
    squares2 = tl.zeros([BT, BW], tl.float32)
    for start in tl.range(0, D, BW, num_stages=STAGES):
        d = start + tl.arange(0, BW)
        at = t[:, None] * (4 * D) + d[None, :]
        o = gain0[:, None] * tl.load(source + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        o += gain1[:, None] * tl.load(source + at + D, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        o += gain2[:, None] * tl.load(source + at + 2 * D, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        o += gain3[:, None] * tl.load(source + at + 3 * D, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        row = o.to(tl.bfloat16)
        tl.store(out + t[:, None] * D + d[None, :], row, mask=mask)
        wide_row = row.to(tl.float32)
        squares2 += wide_row * wide_row
    inverse = tl.rsqrt(tl.sum(squares2, 1) / D + OUT_EPS)
    tl.debug_barrier()
    for start in tl.range(0, D, BW, num_stages=STAGES):
        d = start + tl.arange(0, BW)
        at = t[:, None] * D + d[None, :]
        row = tl.load(out + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        weight = tl.load(norm_weight + d).to(tl.float32)
        row = (row * inverse[:, None] * weight[None, :]).to(tl.bfloat16)
        tl.store(out + at, row, mask=mask)
        if QUANTISE:
            groups = tl.reshape(row.to(tl.float32), [BT, BW // 128, 128])
            byte = e4m3_byte(tl.max(tl.abs(groups), 2))
            small = tl.reshape(groups * inverse_power(byte)[:, :, None], [BT, BW])
            tl.store(data + at, small.to(tl.float8e4nv), mask=mask)
            g = start // 128 + tl.arange(0, BW // 128)
            tl.store(data_scale + t[:, None] * (D // 128) + g[None, :], power(byte), mask=mask)
