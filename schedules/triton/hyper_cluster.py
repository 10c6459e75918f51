"""Hyper-connections as one kernel: a cluster of 16 blocks holds a tile of tokens, each block its channels of them.

    block b of a cluster: channels [b * 256, (b + 1) * 256) of all 4 streams; its part of fn stays in shared memory
    tile n (M tokens):  copy streams and y in | hc_post in registers, streams out | products with fn, Gram matrix
                        | next input of tile n - 1, out | sums of the block's warps -> every block of the cluster

Streams are read once and written once. What a token needs from all its channels are 24 products and the 10 products of
its streams with each other: their squares give the norm before the projection, and with the coefficients also the
norm of the weighted sum, so one exchange between blocks is enough. It takes as long as the next tile's products.
Two tiles are on their way from memory, one waits in registers for its sums.

Sinkhorn does not hold up anything: block b collects the logits of token b of every tile, and solves them at the end.

fn is float32: it is split into bfloat16 high and low parts, two products that leave an error of 2**-17; the streams
are bfloat16 and so exact.

What the language lacks is written as PTX, each block with its operands in its docstring: packed pairs of bfloat16 that
feed both operands of a product, sums that warps send to other blocks, and a wait without barriers around it.

Legend: T tokens, N = 4 streams, D channels, C blocks of a cluster, W = 8 warps of a block, M tokens of a tile.
Thread (w, g, q) = (id / 32, id / 4 % 8, id % 4) holds channels 32 w + 8 q + 0..7 of tokens g + 8 s, s < M / 8.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from dsv4c.schedules.triton.hyper_ptx import (
    OWN,
    SHARED,
    broadcast_text,
    columns_text,
    own_text,
    pack_text,
    read_text,
    receive_text,
    reduce_text,
    send_text,
    start_text,
    sums_text,
    unpack_text,
    weights_text,
)

W = gl.constexpr(8)  # warps
K = gl.constexpr(32)  # channels of a warp


@gluon.constexpr_function
def _wide(tokens):
    """Layout of [W, K, M]."""
    regs = [[0, 1, 0], [0, 2, 0], [0, 4, 0]] + [[0, 0, 8]] * (tokens // 16)
    lanes = [[0, 8, 0], [0, 16, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout(regs, lanes, [[1, 0, 0], [2, 0, 0], [4, 0, 0]], [], [8, 32, tokens])


@gluon.constexpr_function
def _pairs(tokens):
    """Layout of [W, K / 2, M]: the same, two channels a register."""
    regs = [[0, 1, 0], [0, 2, 0]] + [[0, 0, 8]] * (tokens // 16)
    lanes = [[0, 4, 0], [0, 8, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout(regs, lanes, [[1, 0, 0], [2, 0, 0], [4, 0, 0]], [], [8, 16, tokens])


@gluon.constexpr_function
def _fragments():
    """Shared layout of [W, 16, K] of fn: 16 bytes are what a thread gives to one product, a warp's are in a row."""
    thread = [[0, 0, 1], [0, 8, 0], [0, 0, 2]]
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.SharedLinearLayout([*thread, *lanes, [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]])


@gluon.constexpr_function
def _types(dtype, shape, layout, count):
    return tuple(gl.distributed_type(dtype, shape, layout) for _ in range(count))


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _at(memory, rank):
    """Address of shared memory in this block; as an operand it lacks the bits of the block's rank."""
    return gl.inline_asm("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", (memory, rank), gl.int32)


@gluon.jit
def _spread(v):
    """[M] over [W, K, M]."""
    return v[None, None, :]


@gluon.jit
def _unpack(pairs, L: gl.constexpr):
    T: gl.constexpr = gl.distributed_type(gl.float32, [W, K, pairs.shape[2]], L)
    return gl.inline_asm(unpack_text, ("=f", "r"), (pairs,), T, is_pure=True)


@gluon.jit
def _pack(x, P: gl.constexpr):
    T: gl.constexpr = gl.distributed_type(gl.int32, [W, K // 2, x.shape[2]], P)
    return gl.inline_asm(pack_text, ("=r", "f"), (x,), T, is_pure=True)


@gluon.jit
def _load_fn(fn, first, D: gl.constexpr):
    """This block's channels of fn: for each stream comb's rows [W, 2, 8, K], and those of pre and post [W, 8, K]."""
    wide: gl.constexpr = gl.BlockedLayout([1, 2, 1, 4], [1, 1, 4, 8], [W, 1, 1, 1], [3, 2, 1, 0])
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, wide))))[:, None, None, None]
    i = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, wide))))[None, :, None, None]
    r = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, wide))))[None, None, :, None]
    k = gl.arange(0, K, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, wide))))[None, None, None, :]
    out = ()
    for j in gl.static_range(4):
        at = fn + (first + w * K + k) + j * D + r * (4 * D)
        out += (gl.load(at + (8 + 8 * i) * (4 * D)), gl.load(at))
    return out


@gluon.jit
def _narrow(x):
    """bfloat16, two values an instruction."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], gl.bfloat16, True, 2)


@gluon.jit
def _keep_fn(loaded, kept):
    """As bfloat16, 3 tiles a stream: rows of comb high, then low; rows of pre and post high over low."""
    for j in gl.static_range(4):
        f = loaded[2 * j]
        high = _narrow(f)
        kept.index(3 * j).store(gl.reshape(high, [W, 16, K]))
        kept.index(3 * j + 1).store(gl.reshape(_narrow(f - high.to(gl.float32)), [W, 16, K]))
        g = loaded[2 * j + 1]
        high = _narrow(g)
        low = _narrow(g - high.to(gl.float32))
        i = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, f.type.layout))))[None, :, None, None]
        kept.index(3 * j + 2).store(gl.reshape(gl.where(i == 0, high, low), [W, 16, K]))


@gluon.jit
def _copy_streams(x, slots, slot, t, pair, tokens, D: gl.constexpr):
    """Starts the copy of a tile: tokens t (clamped to live ones) and pairs of channels of all streams."""
    t = gl.minimum(t, tokens - 1).to(gl.int64)[None, None, :]
    for j in gl.static_range(4):
        async_copy.async_load(slots.index(slot * 4 + j), x + (t * (2 * D) + (pair + j * (D // 2))))
    async_copy.commit_group()


@gluon.jit
def _copy_y(y, y_slot, t, pair, tokens, D: gl.constexpr, POST: gl.constexpr):
    if POST:
        t = gl.minimum(t, tokens - 1).to(gl.int64)[None, None, :]
        async_copy.async_load(y_slot, y + (t * (D // 2) + pair))
    async_copy.commit_group()


@gluon.jit
def _mix(x, y, c, k: gl.constexpr, P: gl.constexpr):
    """Stream k of hc_post, packed; c holds comb's 16 coefficients, then post's 4."""
    s = _spread(c[16 + k]) * y
    for j in gl.static_range(4):
        s = gl.fma(_spread(c[4 * j + k]), x[j], s)
    return _pack(s, P)


@gluon.jit
def _sinkhorn(m, eps, ITERS: gl.constexpr):
    """A tuple of 16 tensors, row-major logits, as a doubly stochastic matrix."""
    e = ()
    for j in gl.static_range(4):
        top = gl.maximum(gl.maximum(m[4 * j], m[4 * j + 1]), gl.maximum(m[4 * j + 2], m[4 * j + 3]))
        a = gl.exp(m[4 * j] - top)
        b = gl.exp(m[4 * j + 1] - top)
        c = gl.exp(m[4 * j + 2] - top)
        d = gl.exp(m[4 * j + 3] - top)
        inverse = _reciprocal((a + b) + (c + d))
        e += (a * inverse + eps, b * inverse + eps, c * inverse + eps, d * inverse + eps)
    e = _columns(e, eps)
    for _ in range(ITERS - 1):
        n = ()
        for j in gl.static_range(4):
            inverse = _reciprocal((e[4 * j] + e[4 * j + 1]) + (e[4 * j + 2] + e[4 * j + 3]) + eps)
            n += (e[4 * j] * inverse, e[4 * j + 1] * inverse, e[4 * j + 2] * inverse, e[4 * j + 3] * inverse)
        e = _columns(n, eps)
    return e


@gluon.jit
def _columns(e, eps):
    i = ()
    for k in gl.static_range(4):
        i += (_reciprocal((e[k] + e[4 + k]) + (e[8 + k] + e[12 + k]) + eps),)
    n = ()
    for jk in gl.static_range(16):
        n += (e[jk] * i[jk % 4],)
    return n


@gluon.jit
def _solve(comb_out, last, first, step, tokens, eps, ITERS: gl.constexpr):
    """Turns the logits of tokens first, first + step, ... in place into comb, one a thread; `last` has the last's."""
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    T: gl.constexpr = _types(gl.float32, [32 * W], lane, 16)
    final = gl.inline_asm(broadcast_text(), "=f," * 16 + "r", (last,), T)
    t_last = first + (tokens - 1 - first) // step * step
    for start in range(first, tokens, 32 * W * step):
        t = start + gl.arange(0, 32 * W, lane) * step
        at = comb_out + t.to(gl.int64) * 16
        m = ()
        for jk in gl.static_range(16):
            m += (gl.where(t == t_last, final[jk], gl.load(at + jk, mask=t < t_last, other=0.0)),)
        m = _sinkhorn(m, eps, ITERS)
        for jk in gl.static_range(16):
            gl.store(at + jk, m[jk], mask=t <= t_last)


@gluon.jit
def _larger(a, b):
    """The larger of two, NaN if one is NaN."""
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _quantise(pairs, data, data_scale, t, ch, first, tokens, D: gl.constexpr, L: gl.constexpr):
    """Groups of 128 channels of the rounded rows as E4M3, and their power-of-two scales."""
    M: gl.constexpr = pairs.shape[2]
    groups = gl.reshape(_unpack(pairs, L), [2, 128, M])
    top = _larger(gl.reduce(gl.abs(groups), 1, _larger), 1e-4).to(gl.int32, bitcast=True)
    number = top < 0x7F800000  # else the group's data and scale are NaN
    byte = ((top + 0x1FFFFF) >> 23) - 8  # 448 = 1.75 * 2**8
    inverse = gl.where(number, (254 - byte) << 23, 0x7FC00000).to(gl.float32, bitcast=True)
    small = gl.convert_layout(gl.reshape(groups * gl.expand_dims(inverse, 1), [W, K, M]), L)
    gl.store(data + (_spread(t.to(gl.int64)) * D + ch), small.to(gl.float8e4nv), mask=_spread(t < tokens))
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [1, W], [1, 0])
    g = gl.arange(0, 2, gl.SliceLayout(1, flat))
    tm = gl.convert_layout(t, gl.SliceLayout(0, flat))
    at = data_scale + tm.to(gl.int64)[None, :] * (D // 128) + (first // 128 + g)[:, None]
    power = gl.where(number, byte << 23, 0x7FC00000).to(gl.float32, bitcast=True)
    power = gl.convert_layout(power, flat)
    gl.store(at, power, mask=(tm < tokens)[None, :])


@gluon.jit
def fused(
    y, x, post_in, comb_in, fn, base, scale, norm_weight, streams, out, post_out, comb_out, data, data_scale, tokens,
    D: gl.constexpr, C: gl.constexpr, M: gl.constexpr, POST: gl.constexpr, NORM: gl.constexpr,
    QUANTISE: gl.constexpr, ITERS: gl.constexpr, NORM_EPS: gl.constexpr, EPS: gl.constexpr, OUT_EPS: gl.constexpr,
):  # fmt: skip
    """[hc_post,] hc_pre [and RMSNorm [and quantisation]] of every token. Without POST `x` holds the streams.

    y, x, streams and out point to pairs of channels (int32).
    """
    gl.static_assert(D == C * W * K)
    gl.static_assert(gl.num_warps() == W)
    gl.static_assert(C == 16)
    R: gl.constexpr = M // 8 * 4  # registers of a stream's pairs
    L: gl.constexpr = _wide(M)
    P: gl.constexpr = _pairs(M)
    TL: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, L))
    BY_TOKEN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    INCOMING: gl.constexpr = C * SHARED * M * 4  # bytes a tile, for every block

    rank = gl.program_id(0) % C
    step = gl.num_programs(0) // C * M  # tokens between two tiles of a cluster
    start = gl.program_id(0) // C * M
    count = gl.cdiv(tokens - start, step)
    incoming = INCOMING + gl.where(rank < M, C * OWN * 4, 0)

    kept = gl.allocate_shared_memory(gl.bfloat16, [12, W, 16, K], _fragments())
    slots = gl.allocate_shared_memory(gl.int32, [8, W, K // 2, M], BY_TOKEN)
    y_slot = gl.allocate_shared_memory(gl.int32, [W, K // 2, M], BY_TOKEN)
    comb_sums = gl.allocate_shared_memory(gl.float32, [16 * W, M], FLAT)
    mix_sums = gl.allocate_shared_memory(gl.float32, [8 * W, M], FLAT)
    gram_sums = gl.allocate_shared_memory(gl.float32, [10 * W, M], FLAT)
    shared = gl.allocate_shared_memory(gl.float32, [2 * C * SHARED, M], FLAT)
    own = gl.allocate_shared_memory(gl.float32, [4 * C * OWN // 4, 4], FLAT)
    shared_out = gl.allocate_shared_memory(gl.float32, [2 * SHARED, M], FLAT)
    own_out = gl.allocate_shared_memory(gl.float32, [2 * M * OWN // 4, 4], FLAT)
    rows = gl.allocate_shared_memory(gl.float32, [2 * M, 16], FLAT)
    weights = gl.allocate_shared_memory(gl.float32, [M, 4], FLAT)
    last = gl.allocate_shared_memory(gl.float32, [1, 16], FLAT)
    post_rows = gl.allocate_shared_memory(gl.float32, [M, 4], PLAIN)
    comb_rows = gl.allocate_shared_memory(gl.float32, [M, 16], PLAIN)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], FLAT)

    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, P)))
    half = gl.arange(0, K // 2, gl.SliceLayout(0, gl.SliceLayout(2, P)))
    first = rank * (D // C)
    pair = first // 2 + w[:, None, None] * (K // 2) + half[None, :, None]
    wl = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    kl = gl.arange(0, K, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    channel = first + wl[:, None] * K + kl[None, :]
    token = gl.arange(0, M, gl.SliceLayout(0, gl.SliceLayout(1, P)))
    CR: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [W, 1], [1, 0])
    cm = gl.arange(0, M, gl.SliceLayout(1, CR))
    c16 = gl.arange(0, 16, gl.SliceLayout(0, CR))
    c4 = gl.arange(0, 4, gl.SliceLayout(0, CR))

    # Weights are there before the kernel ahead has finished: this one may start early for them.
    gl.inline_asm("griddepcontrol.launch_dependents;", "", (), ())
    loaded = _load_fn(fn, first, D)
    gain = gl.load(norm_weight + channel) if NORM else 0.0
    lane = gl.minimum(gl.arange(0, 32, gl.BlockedLayout([1], [32], [W], [0])), OWN - 1)  # comb's rows, then post's
    lane_base = gl.load(base + gl.where(lane < 16, 8 + lane, lane - 12))
    lane_scale = gl.load(scale + gl.where(lane < 16, 2, 1))
    gl.inline_asm("griddepcontrol.wait;", "", (), ())
    _copy_streams(x, slots, 0, start + token, pair, tokens, D)
    _copy_y(y, y_slot, start + token, pair, tokens, D, POST)
    if POST:
        ct = gl.minimum(start + cm, tokens - 1).to(gl.int64)
        comb_next = gl.load(comb_in + ct[:, None] * 16 + c16[None, :])
        post_next = gl.load(post_in + ct[:, None] * 4 + c4[None, :])
    _copy_streams(x, slots, 1, start + step + token, pair, tokens, D)
    gl.inline_asm(start_text(), "r,r", (_at(bars.index(0), rank), incoming), ())
    _keep_fn(loaded, kept)

    h = (gl.zeros([W, K // 2, M], gl.int32, layout=P),) * 4
    for n in range(count + 1):
        parity = n & 1
        z = h
        if n < count:
            t0 = start + n * step
            if POST:
                comb_rows.store(comb_next)
                post_rows.store(post_next)
            async_copy.wait_group(1)
            gl.barrier()
            T4: gl.constexpr = _types(gl.int32, [W, K // 2, M], P, 4)
            z = gl.inline_asm(read_text(4, M), "=r," * (4 * R) + "r", (_at(slots.index(parity * 4), rank),), T4)
            if POST:
                T1: gl.constexpr = _types(gl.int32, [W, K // 2, M], P, 1)
                y_pairs = gl.inline_asm(read_text(1, M), "=r," * R + "r", (_at(y_slot, rank),), T1)
                T16: gl.constexpr = _types(gl.float32, [M], TL, 16)
                TP: gl.constexpr = _types(gl.float32, [M], TL, 4)
                c = gl.inline_asm(columns_text(16, 16, M), "=f," * (4 * R) + "r", (_at(comb_rows, rank),), T16)
                c += gl.inline_asm(columns_text(4, 4, M), "=f," * R + "r", (_at(post_rows, rank),), TP)
                ct = gl.minimum(t0 + step + cm, tokens - 1).to(gl.int64)
                comb_next = gl.load(comb_in + ct[:, None] * 16 + c16[None, :])
                post_next = gl.load(post_in + ct[:, None] * 4 + c4[None, :])
                wide = (_unpack(z[0], L), _unpack(z[1], L), _unpack(z[2], L), _unpack(z[3], L))
                y_wide = _unpack(y_pairs[0], L)
                z = (_mix(wide, y_wide, c, 0, P), _mix(wide, y_wide, c, 1, P), _mix(wide, y_wide, c, 2, P),
                     _mix(wide, y_wide, c, 3, P))  # fmt: skip
                t = t0 + token
                for k in gl.static_range(4):
                    to = streams + (_spread(t.to(gl.int64)) * (2 * D) + (pair + k * (D // 2)))
                    gl.store(to, z[k], mask=_spread(t < tokens))
            _copy_y(y, y_slot, t0 + step + token, pair, tokens, D, POST)
            _copy_streams(x, slots, parity, t0 + 2 * step + token, pair, tokens, D)
            gl.inline_asm(
                sums_text(M), "r," * (4 * R) + "r,r,r,r",
                (z[0], z[1], z[2], z[3], _at(kept.index(0), rank), _at(comb_sums.index(0), rank),
                 _at(mix_sums.index(0), rank), _at(gram_sums.index(0), rank)), (),
            )  # fmt: skip
        if n > 0:
            gl.inline_asm(
                receive_text(C, M), "r,r,r,r,r",
                (_at(shared.index((1 - parity) * (C * SHARED)), rank), _at(rows.index((1 - parity) * M), rank),
                 _at(bars.index(1 - parity), rank), ((n - 1) >> 1) & 1, incoming), (),
            )  # fmt: skip
        gl.barrier()
        if n > 0:
            gl.inline_asm(
                weights_text(M, NORM), "r,r,l,l,f,f,f,f,f",
                (_at(rows.index((1 - parity) * M), rank), _at(weights.index(0), rank), base, scale,
                 gl.to_tensor(1.0 / (4 * D)), gl.to_tensor(1.0 / D), gl.to_tensor(NORM_EPS), gl.to_tensor(EPS),
                 gl.to_tensor(OUT_EPS)), (),
            )  # fmt: skip
        if n < count:
            gl.inline_asm(
                reduce_text(M), "r,r,r,r,r",
                (_at(comb_sums.index(0), rank), _at(mix_sums.index(0), rank), _at(gram_sums.index(0), rank),
                 _at(shared_out.index(parity * SHARED), rank), _at(own_out.index(parity * (M * OWN // 4)), rank)), (),
            )  # fmt: skip
        gl.barrier()
        if n < count:
            gl.inline_asm(
                send_text(M), "r,r,r,r,r,r",
                (_at(shared_out.index(parity * SHARED), rank), _at(own_out.index(parity * (M * OWN // 4)), rank),
                 shared.index(parity * (C * SHARED)), own.index((n & 3) * (C * OWN // 4)), bars.index(parity), rank),
                (),
            )  # fmt: skip
        if n > 0:
            t0 = start + (n - 1) * step
            mine = (t0 + rank).to(gl.int64)
            has = ((rank < M) & (t0 + rank < tokens)).to(gl.int32)
            gl.inline_asm(
                own_text(C, M), "r,r,f,f,l,l,r,r,f,f,r",
                (_at(own.index(((n - 1) & 3) * (C * OWN // 4)), rank), _at(rows.index((1 - parity) * M), rank),
                 lane_base, lane_scale, comb_out + mine * 16, post_out + mine * 4, rank, has,
                 gl.to_tensor(1.0 / (4 * D)), gl.to_tensor(NORM_EPS), _at(last.index(0), rank)), (),
            )  # fmt: skip
            TW: gl.constexpr = _types(gl.float32, [M], TL, 4)
            a = gl.inline_asm(columns_text(4, 4, M), "=f," * R + "r", (_at(weights.index(0), rank),), TW)
            o = _spread(a[0]) * _unpack(h[0], L)
            for k in gl.static_range(1, 4):
                o = gl.fma(_spread(a[k]), _unpack(h[k], L), o)
            if NORM:
                o *= gl.expand_dims(gain, 2)
            o = _pack(o, P)
            t = t0 + token
            gl.store(out + (_spread(t.to(gl.int64)) * (D // 2) + pair), o, mask=_spread(t < tokens))
            if QUANTISE:
                tl = gl.convert_layout(t, TL)
                _quantise(o, data, data_scale, tl, gl.expand_dims(channel, 2), first, tokens, D, L)
        h = z
    gl.barrier()
    if rank < M:
        _solve(comb_out, _at(last.index(0), rank), start + rank, step, tokens, EPS, ITERS)
