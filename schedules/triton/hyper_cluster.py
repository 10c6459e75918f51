"""Hyper-connections as one kernel: a cluster of 16 blocks holds a tile of tokens, each block its channels of them.

    block b of a cluster: channels [b * DC, (b + 1) * DC) of all 4 streams; its part of fn stays in shared memory
    tile n (M tokens):  copy streams and y in | hc_post in registers, streams out | products with fn, Gram matrix
                        | sums of the block's warps -> every block of the cluster | next input of tile n - 1, out

Streams are read once and written once. What a token needs from all its channels are 24 products and the 10 products of
its streams with each other: their squares give the norm before the projection, and with the coefficients also the
norm of the weighted sum, so one exchange between blocks is enough. It takes as long as the next tile's products.
Two tiles are in flight from memory (`copy`), one waits for its sums (`held` registers).

Sinkhorn does not hold up anything: block b collects the logits of token b of every tile, and solves them at the end.

fn is float32: it is split into bfloat16 high and low parts, two products that leave an error of 2**-17; the streams
are bfloat16 and so exact.

Legend: T tokens, N = 4 streams, D channels, C blocks of a cluster, W warps of a block, K channels of a warp, M tokens
of a tile. Tensors over channels are [W, K, M]; every thread holds 8 channels in a row, of one or two tokens.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

GRAM = gl.constexpr(10)  # products of streams with each other, squares first: 00 11 22 33 01 02 03 12 13 23
SHARED_ROWS = gl.constexpr(14)  # sums that every block needs: pre, Gram
OWN_ROWS = gl.constexpr(20)  # sums that the owner of a token needs: comb, post
CLUSTER_SYNC = gl.constexpr(
    "fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
)


@gluon.constexpr_function
def _bits(size):
    return [1 << i for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _layout(warps, channels, tokens):
    """[W, K, M]: as the B operand of a 16x8x16 product has it, 8 channels in a row."""
    regs = [[0, c, 0] for c in (1, 2, 4)] + [[0, c, 0] for c in _bits(channels) if c >= 32]
    regs += [[0, 0, t] for t in _bits(tokens) if t >= 8]
    lanes = [[0, 8, 0], [0, 16, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout(regs, lanes, [[w, 0, 0] for w in _bits(warps)], [], [warps, channels, tokens])


@gluon.constexpr_function
def _send_text(C, M, W):
    """Adds the warps' sums and stores them: pre and Gram in every block, comb and post in the token's own.

    Operands: sums of comb [16, W, M], of pre and post [8, W, M], of Gram [GRAM, W, M]; the destination of the shared
    sums [C, SHARED_ROWS, M], of the own ones [C, OWN_ROWS], their barrier; the rank of this block.
    """
    row = W * M * 4
    lines = [
        "{",
        ".reg .pred p, q;",
        ".reg .u32 t, v, k, a, b, to, own, far, bar;",
        ".reg .f32 x, y;",
        "mov.u32 t, %tid.x;",
        f"shr.u32 v, t, {M.bit_length() - 1};",
        f"and.b32 k, t, {M - 1};",
    ]

    def add(base):
        """x = sum over warps of row v of base; odd rows start at the second warp, in other banks than even ones."""
        text = [f"mad.lo.u32 a, v, {row}, {base};", "shl.b32 b, k, 2;", "add.u32 a, a, b;", "and.b32 b, v, 1;"]
        text += [f"mad.lo.u32 a, b, {M * 4}, a;", f"mul.lo.u32 b, b, {-2 * M * 4};", f"add.u32 b, b, {M * 4};"]
        text += ["add.u32 b, a, b;", "ld.shared.f32 x, [a];", "ld.shared.f32 y, [b];", "add.f32 x, x, y;"]
        for w in range(2, W, 2):
            text += [f"ld.shared.f32 y, [a + {w * M * 4}];", "add.f32 x, x, y;"]
            text += [f"ld.shared.f32 y, [b + {w * M * 4}];", "add.f32 x, x, y;"]
        return text

    def store(block):
        text = [f"mapa.shared::cluster.u32 far, to, {block};", f"mapa.shared::cluster.u32 bar, $5, {block};"]
        return [*text, "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [far], x, [bar];"]

    shared = SHARED_ROWS.value * M * 4
    lines += [f"setp.lt.u32 p, t, {SHARED_ROWS.value * M};", "@!p bra SHARED_DONE;"]
    lines += ["setp.lt.u32 q, v, 4;", "selp.u32 own, $1, $2, q;"]
    lines += ["@q bra SHARED_ROW;", "sub.u32 v, v, 4;", "SHARED_ROW:", *add("own")]
    lines += [f"mad.lo.u32 to, $6, {shared}, $3;", "shl.b32 b, t, 2;", "add.u32 to, to, b;"]
    for block in range(C):
        lines += store(block)
    lines += ["SHARED_DONE:", f"mad.lo.u32 own, $6, {OWN_ROWS.value * 4}, $4;", f"shr.u32 v, t, {M.bit_length() - 1};"]
    lines += [f"setp.lt.u32 p, t, {16 * M};", "@!p bra COMB_DONE;", *add("$0"), "shl.b32 b, v, 2;"]
    lines += ["add.u32 to, own, b;", *store("k"), "COMB_DONE:"]
    lines += [f"setp.lt.u32 p, t, {4 * M};", "@!p bra POST_DONE;", "add.u32 v, v, 4;", *add("$1"), "shl.b32 b, v, 2;"]
    lines += ["add.u32 to, own, b;", "add.u32 to, to, 48;", *store("k"), "POST_DONE:", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def _receive_text(C, M):
    """Row and token of this thread summed over blocks: operands shared sums [C, SHARED_ROWS, M], result rows."""
    lines = ["{", ".reg .pred p;", ".reg .u32 t, a, b;", ".reg .f32 x, y;", "mov.u32 t, %tid.x;"]
    lines += [
        f"setp.lt.u32 p, t, {SHARED_ROWS.value * M};",
        "@!p bra RECEIVED;",
        "shl.b32 b, t, 2;",
        "add.u32 a, $0, b;",
    ]
    lines += ["ld.shared.f32 x, [a];"]
    for block in range(1, C):
        lines += [f"ld.shared.f32 y, [a + {block * SHARED_ROWS.value * M * 4}];", "add.f32 x, x, y;"]
    lines += ["add.u32 a, $1, b;", "st.shared.f32 [a], x;", "RECEIVED:", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def _own_text(C, M, D, norm_eps):
    """Logits of the own token, by the first warp: comb as they are, post finished.

    Operands: own sums [C, OWN_ROWS], sums of Gram rows [.., M], base, scale, comb and post of the token; rank; whether
    there is such a token.
    """
    lines = ["{", ".reg .pred p, q;", ".reg .u32 t, a, b;", ".reg .u64 to, at;", ".reg .f32 x, y, r;"]
    lines += ["mov.u32 t, %tid.x;", f"setp.ge.u32 p, t, {OWN_ROWS.value};", "setp.eq.u32 q, $7, 0;", "or.pred p, p, q;"]
    lines += ["@p bra OWN_DONE;", "shl.b32 b, t, 2;", "add.u32 a, $0, b;", "ld.shared.f32 x, [a];"]
    for block in range(1, C):
        lines += [f"ld.shared.f32 y, [a + {block * OWN_ROWS.value * 4}];", "add.f32 x, x, y;"]
    lines += ["mad.lo.u32 a, $6, 4, $1;", f"ld.shared.f32 r, [a + {4 * M * 4}];"]
    for i in range(1, 4):
        lines += [f"ld.shared.f32 y, [a + {(4 + i) * M * 4}];", "add.f32 r, r, y;"]
    lines += [f"fma.rn.f32 r, r, {_hex(1 / (4 * D))}, {_hex(norm_eps)};", "rsqrt.approx.ftz.f32 r, r;"]
    lines += ["mul.f32 x, x, r;", "setp.lt.u32 q, t, 16;", "selp.u32 a, 8, 4, q;", "add.u64 at, $3, 0;"]
    lines += ["mul.wide.u32 to, a, 1;", "add.u64 at, at, to;", "ld.global.nc.f32 r, [at];"]
    # comb: base rows 8.., post: base rows 4..
    lines += ["selp.s32 a, 8, -12, q;", "add.s32 a, a, t;", "mul.wide.s32 to, a, 4;", "add.u64 at, $2, to;"]
    lines += ["ld.global.nc.f32 y, [at];", "fma.rn.f32 x, x, r, y;", "mul.wide.u32 to, t, 4;"]
    lines += ["@q bra COMB;", "mul.f32 x, x, 0fBFB8AA3B;", "ex2.approx.ftz.f32 x, x;", "add.f32 x, x, 0f3F800000;"]
    lines += ["rcp.approx.ftz.f32 x, x;", "add.f32 x, x, x;", "add.u64 at, $5, to;", "st.global.f32 [at + -64], x;"]
    lines += ["bra OWN_DONE;", "COMB:", "add.u64 at, $4, to;", "st.global.f32 [at], x;", "OWN_DONE:", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def _hex(value):
    import struct

    return "0f" + struct.pack(">f", value).hex().upper()


@gluon.jit
def _asm(text: gl.constexpr, constraints: gl.constexpr, args):
    gl.inline_asm(text, constraints, args, ())


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _row(memory, row: gl.constexpr, layout: gl.constexpr):
    return memory.index(row).load(layout)


@gluon.jit
def _spread(v):
    """[M] over [W, K, M]."""
    return v[None, None, :]


@gluon.jit
def _load_fn(fn, kept, first, D: gl.constexpr, W: gl.constexpr, K: gl.constexpr):
    """This block's channels of fn, 3 tiles a stream: rows of comb high, then low; pre and post high over low."""
    wide: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 4, 8], [W, 1, 1], [2, 1, 0])
    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, wide)))
    r = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, wide)))
    k = gl.arange(0, K, gl.SliceLayout(0, gl.SliceLayout(1, wide)))
    at = fn + first + w[:, None, None] * K + k[None, None, :]
    for j in gl.static_range(4):
        f = gl.load(at + j * D + (8 + r[None, :, None]) * (4 * D))
        g = gl.load(at + j * D + (r[None, :, None] % 8) * (4 * D))
        high = f.to(gl.bfloat16)
        kept.index(3 * j).store(high)
        kept.index(3 * j + 1).store((f - high.to(gl.float32)).to(gl.bfloat16))
        high = g.to(gl.bfloat16)
        kept.index(3 * j + 2).store(gl.where(r[None, :, None] < 8, high, (g - high.to(gl.float32)).to(gl.bfloat16)))


@gluon.jit
def _copy(x, y, slots, y_slots, slot, t, ch, D: gl.constexpr, POST: gl.constexpr, tokens):
    """Starts the copy of a tile: tokens t (clamped to live ones) and channels ch of all streams, and of y."""
    t = gl.minimum(t, tokens - 1).to(gl.int64)[None, None, :]
    for j in gl.static_range(4):
        async_copy.async_load(slots.index(slot * 4 + j), x + (t * (4 * D) + (ch + j * D)))
    if POST:
        async_copy.async_load(y_slots.index(slot), y + (t * D + ch))


@gluon.jit
def _mix(x, y, post_rows, comb_rows, k: gl.constexpr, TL: gl.constexpr):
    """Stream k of hc_post."""
    s = _spread(_row(post_rows, k, TL)) * y
    for j in gl.static_range(4):
        s += _spread(_row(comb_rows, 4 * j + k, TL)) * x[j]
    return s.to(gl.bfloat16)


@gluon.jit
def _sums(z0, z1, z2, z3, kept, comb_sums, mix_sums, gram_sums, W: gl.constexpr, M: gl.constexpr, MMA: gl.constexpr,
          A: gl.constexpr, B: gl.constexpr):  # fmt: skip
    """What each warp's channels add to the 24 products with fn, and to the products of streams with each other."""
    z = (z0, z1, z2, z3)
    comb = gl.zeros([W, 16, M], gl.float32, layout=MMA)
    mix = gl.zeros([W, 16, M], gl.float32, layout=MMA)
    for j in gl.static_range(4):
        b = gl.convert_layout(z[j], B)
        comb = mma_v2(kept.index(3 * j).load(A), b, comb)
        comb = mma_v2(kept.index(3 * j + 1).load(A), b, comb)
        mix = mma_v2(kept.index(3 * j + 2).load(A), b, mix)
    comb_sums.permute([1, 0, 2]).store(comb)
    mix_sums.permute([1, 0, 2]).store(gl.sum(gl.reshape(mix, [W, 2, 8, M]), axis=1))
    wide = (z0.to(gl.float32), z1.to(gl.float32), z2.to(gl.float32), z3.to(gl.float32))
    row: gl.constexpr = 4
    for j in gl.static_range(4):
        gram_sums.index(j).store(gl.sum(wide[j] * wide[j], axis=1))
    gram_sums.index(row).store(gl.sum(wide[0] * wide[1], axis=1))
    gram_sums.index(row + 1).store(gl.sum(wide[0] * wide[2], axis=1))
    gram_sums.index(row + 2).store(gl.sum(wide[0] * wide[3], axis=1))
    gram_sums.index(row + 3).store(gl.sum(wide[1] * wide[2], axis=1))
    gram_sums.index(row + 4).store(gl.sum(wide[1] * wide[3], axis=1))
    gram_sums.index(row + 5).store(gl.sum(wide[2] * wide[3], axis=1))


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
def _solve(comb_out, first, step, count, eps, W: gl.constexpr, ITERS: gl.constexpr):
    """Turns the logits of tokens first + i * step, i < count, in place into comb: a token a thread."""
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    for start in range(0, count, 32 * W):
        i = start + gl.arange(0, 32 * W, lane)
        live = i < count
        at = comb_out + (first + i.to(gl.int64) * step) * 16
        m = ()
        for jk in gl.static_range(16):
            m += (gl.load(at + jk, mask=live, other=0.0),)
        m = _sinkhorn(m, eps, ITERS)
        for jk in gl.static_range(16):
            gl.store(at + jk, m[jk], mask=live)


@gluon.jit
def _weights(rows, base, scale, D: gl.constexpr, NORM: gl.constexpr, NORM_EPS: gl.constexpr, EPS: gl.constexpr,
             OUT_EPS: gl.constexpr, TL: gl.constexpr):  # fmt: skip
    """The four weights [M] of a tile's streams, with NORM over the root mean square of their sum."""
    g = ()
    for v in gl.static_range(GRAM):
        g += (_row(rows, 4 + v, TL),)
    rho = gl.rsqrt((g[0] + g[1] + g[2] + g[3]) * (1.0 / (4 * D)) + NORM_EPS)
    gain = gl.load(scale)
    p = ()
    for j in gl.static_range(4):
        mix = _row(rows, j, TL) * rho * gain + gl.load(base + j)
        p += (_reciprocal(1.0 + gl.exp(-mix)) + EPS,)
    if NORM:
        q = p[0] * (p[0] * g[0] + 2.0 * (p[1] * g[4] + p[2] * g[5] + p[3] * g[6]))
        q += p[1] * (p[1] * g[1] + 2.0 * (p[2] * g[7] + p[3] * g[8]))
        q += p[2] * (p[2] * g[2] + 2.0 * (p[3] * g[9])) + p[3] * p[3] * g[3]
        inverse = gl.rsqrt(gl.maximum(q, 0.0) * (1.0 / D) + OUT_EPS)
        p = (p[0] * inverse, p[1] * inverse, p[2] * inverse, p[3] * inverse)
    return p


@gluon.jit
def _quantise(out, data, data_scale, t, ch, first, live, D: gl.constexpr, W: gl.constexpr, K: gl.constexpr,
              M: gl.constexpr):  # fmt: skip
    """Groups of 128 channels of out [W, K, M] as E4M3, and their power-of-two scales."""
    G: gl.constexpr = W * K // 128
    groups = gl.reshape(out.to(gl.float32), [G, 128, M])
    top = gl.max(gl.abs(groups), axis=1)
    bits = gl.maximum(top, 1e-4).to(gl.int32, bitcast=True)
    byte = ((bits + 0x1FFFFF) >> 23) - 8  # 448 = 1.75 * 2**8: a mantissa above 1.75 carries into the exponent
    inverse = ((254 - byte) << 23).to(gl.float32, bitcast=True)
    small = gl.reshape(groups * gl.expand_dims(inverse, 1), [W, K, M])
    small = gl.convert_layout(small, out.type.layout)
    t64 = t.to(gl.int64)
    gl.store(data + (_spread(t64) * D + ch), small.to(gl.float8e4nv), mask=_spread(live))
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [W, 1], [1, 0])
    g = gl.arange(0, G, gl.SliceLayout(1, flat))
    power = gl.convert_layout((byte << 23).to(gl.float32, bitcast=True), flat)
    tm = gl.convert_layout(t64, gl.SliceLayout(0, flat))
    lm = gl.convert_layout(live, gl.SliceLayout(0, flat))
    gl.store(data_scale + tm[None, :] * (D // 128) + (first // 128 + g)[:, None], power, mask=lm[None, :])


@gluon.jit
def fused(
    y, x, post_in, comb_in, fn, base, scale, norm_weight, streams, out, post_out, comb_out, data, data_scale, tokens,
    D: gl.constexpr, C: gl.constexpr, M: gl.constexpr, POST: gl.constexpr, NORM: gl.constexpr,
    QUANTISE: gl.constexpr, ITERS: gl.constexpr, NORM_EPS: gl.constexpr, EPS: gl.constexpr, OUT_EPS: gl.constexpr,
):  # fmt: skip
    """[hc_post,] hc_pre [and RMSNorm [and quantisation]] of every token. Without POST `x` holds the streams."""
    W: gl.constexpr = gl.num_warps()
    K: gl.constexpr = D // (C * W)
    L: gl.constexpr = _layout(W, K, M)
    TL: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, L))
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    PLAIN2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    rank = gl.program_id(0) % C
    cluster = gl.program_id(0) // C
    clusters = gl.num_programs(0) // C
    count = (gl.cdiv(tokens, M) - cluster + clusters - 1) // clusters

    kept = gl.allocate_shared_memory(gl.bfloat16, [12, W, 16, K], PLAIN3)
    slots = gl.allocate_shared_memory(gl.bfloat16, [8, W, K, M], gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0]))
    y_slots = gl.allocate_shared_memory(gl.bfloat16, [2, W, K, M], gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0]))
    comb_sums = gl.allocate_shared_memory(gl.float32, [16, W, M], PLAIN3)
    mix_sums = gl.allocate_shared_memory(gl.float32, [8, W, M], PLAIN3)
    gram_sums = gl.allocate_shared_memory(gl.float32, [GRAM, W, M], PLAIN2)
    shared = gl.allocate_shared_memory(gl.float32, [2 * C * SHARED_ROWS, M], FLAT)
    own = gl.allocate_shared_memory(gl.float32, [2 * C * OWN_ROWS // 4, 4], FLAT)
    rows = gl.allocate_shared_memory(gl.float32, [SHARED_ROWS, M], FLAT)
    post_rows = gl.allocate_shared_memory(gl.float32, [4, M], FLAT)
    comb_rows = gl.allocate_shared_memory(gl.float32, [16, M], FLAT)
    bars = mbarrier.allocate_mbarrier(batch=2)

    w = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    k = gl.arange(0, K, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    first = rank * (D // C)
    ch = first + w[:, None, None] * K + k[None, :, None]
    token = gl.arange(0, M, TL)

    CR: gl.constexpr = gl.BlockedLayout([1, 1], [32 // M, M], [W, 1], [1, 0])
    cr = gl.arange(0, 16, gl.SliceLayout(1, CR))
    cm = gl.arange(0, M, gl.SliceLayout(0, CR))
    pr = gl.arange(0, 4, gl.SliceLayout(1, CR))

    t0 = cluster * M
    _copy(x, y, slots, y_slots, 0, t0 + token, ch, D, POST, tokens)
    async_copy.commit_group()
    _copy(x, y, slots, y_slots, 1, t0 + clusters * M + token, ch, D, POST, tokens)
    async_copy.commit_group()
    if POST:
        ct = gl.minimum(t0 + cm, tokens - 1).to(gl.int64)
        comb_next = gl.load(comb_in + ct[None, :] * 16 + cr[:, None])
        post_next = gl.load(post_in + ct[None, :] * 4 + pr[:, None])
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    INCOMING: gl.constexpr = C * SHARED_ROWS * M * 4  # bytes a tile; OWN_ROWS sums of each block more for an owner
    SHARED_PART: gl.constexpr = C * SHARED_ROWS
    OWN_PART: gl.constexpr = C * OWN_ROWS // 4
    _load_fn(fn, kept, first, D, W, K)
    gain = gl.load(norm_weight + first + w[:, None] * K + k[None, :]) if NORM else 0.0
    for i in gl.static_range(2):
        mbarrier.expect(bars.index(i), INCOMING + C * OWN_ROWS * 4, pred=rank < M)
        mbarrier.expect(bars.index(i), INCOMING, pred=rank >= M)
    _asm(CLUSTER_SYNC, "", ())

    h0 = gl.zeros([W, K, M], gl.bfloat16, layout=L)
    h1 = h0
    h2 = h0
    h3 = h0
    for n in range(count + 1):
        z0 = h0
        z1 = h1
        z2 = h2
        z3 = h3
        if n < count:
            if POST:
                comb_rows.reinterpret(gl.float32, [16, M], PLAIN2).store(comb_next)
                post_rows.reinterpret(gl.float32, [4, M], PLAIN2).store(post_next)
            async_copy.wait_group(1)
            gl.barrier()
            z0 = slots.index((n & 1) * 4 + 0).load(L)
            z1 = slots.index((n & 1) * 4 + 1).load(L)
            z2 = slots.index((n & 1) * 4 + 2).load(L)
            z3 = slots.index((n & 1) * 4 + 3).load(L)
            t0 = (cluster + n * clusters) * M
            if POST:
                wide = (z0.to(gl.float32), z1.to(gl.float32), z2.to(gl.float32), z3.to(gl.float32))
                y_wide = y_slots.index(n & 1).load(L).to(gl.float32)
            ahead = t0 + 2 * clusters * M
            _copy(x, y, slots, y_slots, n & 1, ahead + token, ch, D, POST, tokens)
            async_copy.commit_group()
            if POST:
                ct = gl.minimum(t0 + clusters * M + cm, tokens - 1).to(gl.int64)
                comb_next = gl.load(comb_in + ct[None, :] * 16 + cr[:, None])
                post_next = gl.load(post_in + ct[None, :] * 4 + pr[:, None])
                z0 = _mix(wide, y_wide, post_rows, comb_rows, 0, TL)
                z1 = _mix(wide, y_wide, post_rows, comb_rows, 1, TL)
                z2 = _mix(wide, y_wide, post_rows, comb_rows, 2, TL)
                z3 = _mix(wide, y_wide, post_rows, comb_rows, 3, TL)
                t = t0 + token
                to = streams + (_spread(t.to(gl.int64)) * (4 * D) + ch)
                live = _spread(t < tokens)
                gl.store(to, z0, mask=live)
                gl.store(to + D, z1, mask=live)
                gl.store(to + 2 * D, z2, mask=live)
                gl.store(to + 3 * D, z3, mask=live)
            _sums(z0, z1, z2, z3, kept, comb_sums, mix_sums, gram_sums, W, M, MMA, A, B)
        if n > 0:
            parity = (n - 1) & 1
            mbarrier.wait(bars.index(parity), ((n - 1) >> 1) & 1)
            mbarrier.expect(bars.index(parity), INCOMING + C * OWN_ROWS * 4, pred=rank < M)
            mbarrier.expect(bars.index(parity), INCOMING, pred=rank >= M)
            _asm(_receive_text(C, M), "r,r", (shared.index(parity * SHARED_PART), rows))
            gl.barrier()
            t0 = (cluster + (n - 1) * clusters) * M
            mine = (t0 + rank).to(gl.int64)
            has = ((rank < M) & (t0 + rank < tokens)).to(gl.int32)
            _asm(
                _own_text(C, M, D, NORM_EPS), "r,r,l,l,l,l,r,r",
                (own.index(parity * OWN_PART), rows, base, scale, comb_out + mine * 16, post_out + mine * 4,
                 rank, has),
            )  # fmt: skip
            a = _weights(rows, base, scale, D, NORM, NORM_EPS, EPS, OUT_EPS, TL)
            o = _spread(a[0]) * h0.to(gl.float32) + _spread(a[1]) * h1.to(gl.float32)
            o += _spread(a[2]) * h2.to(gl.float32) + _spread(a[3]) * h3.to(gl.float32)
            if NORM:
                o *= gl.expand_dims(gain, 2)
            t = t0 + token
            o16 = o.to(gl.bfloat16)
            gl.store(out + (_spread(t.to(gl.int64)) * D + ch), o16, mask=_spread(t < tokens))
            if QUANTISE:
                _quantise(o16, data, data_scale, t, ch, first, t < tokens, D, W, K, M)
        if n < count:
            gl.barrier()
            _asm(
                _send_text(C, M, W), "r,r,r,r,r,r,r",
                (comb_sums, mix_sums, gram_sums, shared.index((n & 1) * SHARED_PART),
                 own.index((n & 1) * OWN_PART), bars.index(n & 1), rank),
            )  # fmt: skip
        h0 = z0
        h1 = z1
        h2 = z2
        h3 = z3
    gl.barrier()
    owned = gl.where(rank < M, (gl.cdiv(tokens - cluster * M - rank, clusters * M)), 0)
    _solve(comb_out, cluster * M + rank, clusters * M, owned, EPS, W, ITERS)
