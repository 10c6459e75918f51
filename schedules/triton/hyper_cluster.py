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

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

W = gl.constexpr(8)  # warps
K = gl.constexpr(32)  # channels of a warp
SHARED = gl.constexpr(14)  # sums that every block needs: pre, then products of streams 00 11 22 33 01 02 03 12 13 23
OWN = gl.constexpr(20)  # sums that the owner of a token needs: comb, post

_GRAM = gl.constexpr(((0, 0, 1, 0, 4), (0, 2, 3, 5, 6), (1, 1, 2, 1, 7), (3, 3, 1, 3, 8), (2, 2, 3, 2, 9)))
"""(k, i, j, row of i * k, row of j * k): streams i over j times stream k gives two products at once."""


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


@gluon.constexpr_function
def _text(*lines):
    """A block of PTX with the thread's place in it: t, w, g, q."""
    head = [".reg .u32 t, w, g, q;", "mov.u32 t, %tid.x;", "shr.u32 w, t, 5;", "shr.u32 g, t, 2;", "and.b32 g, g, 7;"]
    return "\n".join(["{", *head, "and.b32 q, t, 3;", *lines, "}"])


@gluon.constexpr_function
def _group(refs):
    return "{" + ", ".join(refs) + "}"


@gluon.constexpr_function
def _start_text():
    """Makes and arms the barriers $0 for $1 bytes, and waits for the cluster."""
    lines = [".reg .pred p;", "setp.eq.u32 p, t, 0;"]
    for bar in ("[$0]", "[$0 + 8]"):
        lines.append(f"@p mbarrier.init.shared::cta.b64 {bar}, 1;")
    lines.append("@p fence.mbarrier_init.release.cluster;")
    for bar in ("[$0]", "[$0 + 8]"):
        lines.append(f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, {bar}, $1;")
    return _text(*lines, "barrier.cluster.arrive.release;", "barrier.cluster.wait.acquire;")


@gluon.constexpr_function
def _read_text(count, tokens):
    """`count` tensors of pairs from shared memory $last [count, W, M, K / 2]: what this thread copied there."""
    sets = tokens // 8
    lines = [".reg .u32 a;", f"mad.lo.u32 a, w, {tokens * 64}, ${count * 4 * sets};", "mad.lo.u32 a, g, 64, a;"]
    lines.append("mad.lo.u32 a, q, 16, a;")
    for i in range(count * sets):
        out = _group(f"${4 * i + r}" for r in range(4))
        lines.append(f"ld.shared.v4.b32 {out}, [a + {i // sets * 8 * tokens * 64 + i % sets * 512}];")
    return _text(*lines)


@gluon.constexpr_function
def _columns_text(count, width, tokens):
    """`count` tensors [M] from the rows of shared memory $last [M, width]."""
    sets = tokens // 8
    lines = [".reg .u32 a;", f"mad.lo.u32 a, g, {4 * width}, ${count * sets};"]
    for s in range(sets):
        for v in range(0, count, 4):
            size = min(4, count - v)
            out = _group(f"${(v + i) * sets + s}" for i in range(size))
            lines.append(f"ld.shared.v{size}.f32 {out}, [a + {s * 32 * width + v * 4}];")
    return _text(*lines)


@gluon.constexpr_function
def _broadcast_text():
    """16 values at shared memory $16, for every thread."""
    return "\n".join(
        f"ld.shared.v4.f32 {{${v}, ${v + 1}, ${v + 2}, ${v + 3}}}, [$16 + {4 * v}];" for v in (0, 4, 8, 12)
    )


@gluon.constexpr_function
def _unpack_text(outputs, inputs):
    """float32 of pairs."""
    lines = []
    for i, pair in enumerate(inputs[0]):
        lines += [f"shl.b32 {outputs[0][2 * i]}, {pair}, 16;", f"and.b32 {outputs[0][2 * i + 1]}, {pair}, -65536;"]
    return "\n".join(lines)


@gluon.constexpr_function
def _pack_text(outputs, inputs):
    """Pairs of float32, rounded."""
    wide = inputs[0]
    return "\n".join(f"cvt.rn.bf16x2.f32 {o}, {wide[2 * i + 1]}, {wide[2 * i]};" for i, o in enumerate(outputs[0]))


@gluon.constexpr_function
def _sums_text(tokens):
    """What each warp's channels add to the products of 4 streams (pairs) with fn, and with each other.

    Operands after the pairs: fn's part [12, W, 16, K], sums of comb [16, W, M], of pre and post [8, W, M], of the
    products of streams [10, W, M].
    """
    sets = tokens // 8
    kept, comb, mix, gram = (f"${16 * sets + i}" for i in range(4))
    row = 8 * tokens * 4
    lines = [
        ".reg .u32 a, b;",
        ".reg .pred p, odd;",
        ".reg .b32 f<4>;",
        ".reg .f32 x, zero;",
        "mov.f32 zero, 0f00000000;",
    ]
    lines += [f".reg .f32 h<{4 * sets}>, l<{4 * sets}>, m<{4 * sets}>, c<20>;"]
    lines += [f"mad.lo.u32 a, w, 1024, {kept};", "and.b32 b, t, 31;", "mad.lo.u32 a, b, 16, a;"]

    def product(to, a, b, first):
        added = ["zero"] * 4 if first else to
        operands = ", ".join(map(_group, (to, a, b, added)))
        return f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {operands};"

    def pair(j, s, r):
        return f"${4 * (j * sets + s) + r}"

    for j in range(4):
        for part, name in enumerate("hlm"):  # comb's rows high and low; those of pre and post high over low
            for k in (0, 2):
                lines.append(f"ld.shared.v4.b32 {{f0, f1, f2, f3}}, [a + {(3 * j + part) * 8 * 1024 + k * 256}];")
                for s in range(sets):
                    to = [f"{name}{4 * s + i}" for i in range(4)]
                    right = (pair(j, s, k), pair(j, s, k + 1))
                    lines.append(product(to, ("f0", "f1", "f2", "f3"), right, j == 0 and k == 0))
    lines += [f"mad.lo.u32 a, w, {tokens * 4}, {comb};", f"mad.lo.u32 a, g, {row}, a;", "mad.lo.u32 a, q, 8, a;"]
    lines += [f"mad.lo.u32 b, w, {tokens * 4}, {mix};", f"mad.lo.u32 b, g, {row}, b;", "mad.lo.u32 b, q, 8, b;"]
    for s in range(sets):
        lines += [f"add.f32 h{4 * s + i}, h{4 * s + i}, l{4 * s + i};" for i in range(4)]
        lines += [f"add.f32 m{4 * s + i}, m{4 * s + i}, m{4 * s + i + 2};" for i in range(2)]
        lines.append(f"st.shared.v2.f32 [a + {32 * s}], {{h{4 * s}, h{4 * s + 1}}};")
        lines.append(f"st.shared.v2.f32 [a + {32 * s + 8 * row}], {{h{4 * s + 2}, h{4 * s + 3}}};")
        lines.append(f"st.shared.v2.f32 [b + {32 * s}], {{m{4 * s}, m{4 * s + 1}}};")
    # Rows are one stream's tokens, columns another's: the products wanted are on the diagonals.
    lines += [f"mad.lo.u32 a, w, {tokens * 4}, {gram};", "mad.lo.u32 a, g, 4, a;", "shr.u32 b, g, 1;"]
    lines += ["setp.eq.u32 p, b, q;", "and.b32 b, g, 1;", "setp.eq.u32 odd, b, 1;"]
    for s in range(sets):
        for k in (0, 2):
            for i, (right, upper, lower, _, _) in enumerate(_GRAM.value):
                left = (pair(upper, s, k), pair(lower, s, k), pair(upper, s, k + 1), pair(lower, s, k + 1))
                to = [f"c{4 * i + n}" for n in range(4)]
                lines.append(product(to, left, (pair(right, s, k), pair(right, s, k + 1)), k == 0))
        for i, (_, _, _, upper, lower) in enumerate(_GRAM.value):
            for n, at in ((0, upper), (2, lower)):
                lines.append(f"selp.f32 x, c{4 * i + n + 1}, c{4 * i + n}, odd;")
                lines.append(f"@p st.shared.f32 [a + {at * row + 32 * s}], x;")
    return _text(*lines)


@gluon.constexpr_function
def _reduce_text(tokens):
    """Adds the warps' sums, and lays them out for sending: [SHARED, M] for every block, [M, OWN] for a token's own.

    Operands: sums of comb, of pre and post, of the streams; where the two go.
    """
    row, log = 8 * tokens * 4, tokens.bit_length() - 1
    lines = [".reg .pred p, odd;", ".reg .u32 v, k, a, b, to;", ".reg .f32 x, y;"]
    lines += [f"shr.u32 v, t, {log};", f"and.b32 k, t, {tokens - 1};"]

    def add(base):
        """x = sum over warps of row v of base; odd rows start at the second warp, in other banks than even ones."""
        text = [f"mad.lo.u32 a, v, {row}, {base};", "mad.lo.u32 a, k, 4, a;", "and.b32 b, v, 1;"]
        text += ["setp.eq.u32 odd, b, 1;", f"add.u32 b, a, {tokens * 4};"]
        text += ["@odd mov.u32 b, a;", f"@odd add.u32 a, a, {tokens * 4};"]
        text += ["ld.shared.f32 x, [a];", "ld.shared.f32 y, [b];", "add.f32 x, x, y;"]
        for w in range(2, 8, 2):
            text += [f"ld.shared.f32 y, [a + {w * tokens * 4}];", "add.f32 x, x, y;"]
            text += [f"ld.shared.f32 y, [b + {w * tokens * 4}];", "add.f32 x, x, y;"]
        return text

    lines += [f"setp.ge.u32 p, t, {SHARED.value * tokens};", "@p bra SHARED_DONE;", "setp.lt.u32 p, v, 4;"]
    lines += ["selp.u32 to, $1, $2, p;", "selp.u32 b, 0, 4, p;", "sub.u32 v, v, b;", *add("to")]
    lines += ["mad.lo.u32 to, t, 4, $3;", "st.shared.f32 [to], x;", "SHARED_DONE:", f"shr.u32 v, t, {log};"]
    own = [f"mad.lo.u32 to, k, {OWN.value * 4}, $4;", "mad.lo.u32 to, v, 4, to;"]
    lines += [f"setp.ge.u32 p, t, {16 * tokens};", "@p bra COMB_DONE;", *add("$0"), *own, "st.shared.f32 [to], x;"]
    lines += ["COMB_DONE:", f"setp.ge.u32 p, t, {4 * tokens};", "@p bra POST_DONE;", "add.u32 v, v, 4;", *add("$1")]
    return _text(*lines, *own, "st.shared.f32 [to + 48], x;", "POST_DONE:")


@gluon.constexpr_function
def _send_text(tokens):
    """Stores the laid out sums $0 and $1 to $2 [C, SHARED, M] and $3 [C, OWN] of other blocks, barrier $4; rank $5.

    16 threads a block, 16 bytes at a time: 4 at a time take four times as long, and bulk copies wait for each other.
    """
    store = "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
    shared, own = SHARED.value * tokens * 4, OWN.value * 4
    lines = [".reg .pred p;", ".reg .u32 d, i, from, far, bar;", ".reg .b32 v<4>;", "shr.u32 d, t, 4;"]
    lines += ["and.b32 i, t, 15;", "mapa.shared::cluster.u32 bar, $4, d;", "mapa.shared::cluster.u32 far, $2, d;"]
    lines += [f"mad.lo.u32 far, $5, {shared}, far;", "mad.lo.u32 far, i, 16, far;", "mad.lo.u32 from, i, 16, $0;"]
    for at in range(0, shared, 256):
        guard = ""
        if at + 256 > shared:
            lines.append(f"setp.lt.u32 p, i, {(shared - at) // 16};")
            guard = "@p "
        lines.append(f"{guard}ld.shared.v4.b32 {{v0, v1, v2, v3}}, [from + {at}];")
        lines.append(f"{guard}{store} [far + {at}], {{v0, v1, v2, v3}}, [bar];")
    # 5 stores a token; t / 5 is t * 205 / 1024 for these t
    lines += [f"setp.ge.u32 p, t, {tokens * own // 16};", "@p bra DONE;", "mul.lo.u32 d, t, 205;", "shr.u32 d, d, 10;"]
    lines += ["mul.lo.u32 i, d, 5;", "sub.u32 i, t, i;", "mapa.shared::cluster.u32 bar, $4, d;"]
    lines += ["mapa.shared::cluster.u32 far, $3, d;", f"mad.lo.u32 far, $5, {own}, far;", "mad.lo.u32 far, i, 16, far;"]
    lines += ["mad.lo.u32 from, t, 16, $1;", "ld.shared.v4.b32 {v0, v1, v2, v3}, [from];"]
    return _text(*lines, f"{store} [far], {{v0, v1, v2, v3}}, [bar];", "DONE:")


@gluon.constexpr_function
def _receive_text(blocks, tokens):
    """Waits for barrier $2, phase $3, arms it for the next $4 bytes, adds the blocks' sums $0 into rows $1 [M, 16]."""
    lines = [".reg .pred p;", ".reg .u32 v, k, a;", ".reg .f32 x, y;", "WAIT:"]
    lines += ["mbarrier.try_wait.parity.shared::cta.b64 p, [$2], $3;", "@!p bra WAIT;", "setp.eq.u32 p, t, 0;"]
    lines += ["@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], $4;"]
    lines += [f"setp.ge.u32 p, t, {SHARED.value * tokens};", "@p bra DONE;", "mad.lo.u32 a, t, 4, $0;"]
    lines += ["ld.shared.f32 x, [a];"]
    for block in range(1, blocks):
        lines += [f"ld.shared.f32 y, [a + {block * SHARED.value * tokens * 4}];", "add.f32 x, x, y;"]
    lines += [f"shr.u32 v, t, {tokens.bit_length() - 1};", f"and.b32 k, t, {tokens - 1};"]
    return _text(*lines, "mad.lo.u32 a, k, 64, $1;", "mad.lo.u32 a, v, 4, a;", "st.shared.f32 [a], x;", "DONE:")


@gluon.constexpr_function
def _weights_text(tokens, norm):
    """The four weights of each token's streams, `norm` over the root mean square of their sum, by the eighth warp.

    Operands: rows [M, 16], the weights [M, 4], base, scale; 1 / (N * D), 1 / D, and the epsilons of the streams' norm,
    of the weights and of the result's norm.
    """
    lines = [".reg .pred p;", ".reg .u32 a, k;", ".reg .f32 r<14>, p<4>, rho, x, y, z;", "and.b32 a, t, -32;"]
    lines += ["setp.ne.u32 p, a, 224;", "@p bra DONE;", "and.b32 k, t, 31;", f"min.u32 k, k, {tokens - 1};"]
    lines += ["mad.lo.u32 a, k, 64, $0;", "ld.shared.v2.f32 {r12, r13}, [a + 48];"]
    lines += [f"ld.shared.v4.f32 {_group(f'r{v + i}' for i in range(4))}, [a + {4 * v}];" for v in (0, 4, 8)]
    lines += ["ld.global.nc.f32 z, [$3];", "add.f32 x, r4, r5;", "add.f32 y, r6, r7;", "add.f32 x, x, y;"]
    lines += ["fma.rn.f32 x, x, $4, $6;", "rsqrt.approx.ftz.f32 rho, x;", "mul.f32 rho, rho, z;"]
    for j in range(4):  # 0fBFB8AA3B is -log2(e)
        lines += [f"ld.global.nc.f32 x, [$2 + {4 * j}];", f"fma.rn.f32 x, r{j}, rho, x;", "mul.f32 x, x, 0fBFB8AA3B;"]
        lines += ["ex2.approx.ftz.f32 x, x;", "add.f32 x, x, 0f3F800000;", "rcp.approx.ftz.f32 x, x;"]
        lines.append(f"add.f32 p{j}, x, $7;")
    if norm:  # sum over i, j of p_i p_j times the product of streams i and j: squares once, the others twice
        for i, others in enumerate((((1, 8), (2, 9), (3, 10)), ((2, 11), (3, 12)), ((3, 13),), ())):
            lines.append("mov.f32 x, 0f00000000;")
            lines += [f"fma.rn.f32 x, p{j}, r{row}, x;" for j, row in others]
            lines += ["add.f32 x, x, x;", f"fma.rn.f32 x, p{i}, r{4 + i}, x;"]
            lines.append(f"mul.f32 y, p{i}, x;" if i == 0 else f"fma.rn.f32 y, p{i}, x, y;")
        lines += ["max.f32 y, y, 0f00000000;", "fma.rn.f32 y, y, $5, $8;", "rsqrt.approx.ftz.f32 y, y;"]
        lines += [f"mul.f32 p{j}, p{j}, y;" for j in range(4)]
    return _text(*lines, "mad.lo.u32 a, k, 16, $1;", "st.shared.v4.f32 [a], {p0, p1, p2, p3};", "DONE:")


@gluon.constexpr_function
def _own_text(blocks, tokens):
    """The own token's logits of comb as they are, and its post. All warps do it, so that none is late; one stores.

    Operands: sums [C, OWN], rows [M, 16], base, scale, comb and post of the token, rank, whether there is a token,
    1 / (N * D), epsilon, shared memory for the last token's logits.
    """
    lines = [".reg .pred p, q16;", ".reg .u32 v, a;", ".reg .u64 to, at;", ".reg .f32 x, y, z, r, r1, r2, r3;"]
    lines += [
        "and.b32 v, t, 31;",
        f"min.u32 v, v, {OWN.value - 1};",
        "mad.lo.u32 a, v, 4, $0;",
        "ld.shared.f32 x, [a];",
    ]
    lines += [f"ld.shared.f32 z, [a + {OWN.value * 4}];"]
    for block in range(2, blocks, 2):
        lines += [f"ld.shared.f32 y, [a + {block * OWN.value * 4}];", "add.f32 x, x, y;"]
        lines += [f"ld.shared.f32 y, [a + {(block + 1) * OWN.value * 4}];", "add.f32 z, z, y;"]
    lines += ["add.f32 x, x, z;", f"min.u32 a, $6, {tokens - 1};", "mad.lo.u32 a, a, 64, $1;"]
    lines += ["ld.shared.v4.f32 {r, r1, r2, r3}, [a + 16];", "add.f32 r, r, r1;", "add.f32 r2, r2, r3;"]
    lines += ["add.f32 r, r, r2;", "fma.rn.f32 r, r, $8, $9;", "rsqrt.approx.ftz.f32 r, r;", "mul.f32 x, x, r;"]
    # comb: gain 2 and base rows 8..23; post: gain 1 and base rows 4..7. 0fBFB8AA3B is -log2(e).
    lines += ["setp.lt.u32 q16, v, 16;", "selp.u32 a, 8, 4, q16;", "cvt.u64.u32 to, a;", "add.u64 at, $3, to;"]
    lines += ["ld.global.nc.f32 r, [at];", "selp.s32 a, 8, -12, q16;", "add.s32 a, a, v;", "mul.wide.s32 to, a, 4;"]
    lines += ["add.u64 at, $2, to;", "ld.global.nc.f32 y, [at];", "fma.rn.f32 x, x, r, y;", "mul.f32 z, x, 0fBFB8AA3B;"]
    lines += ["ex2.approx.ftz.f32 z, z;", "add.f32 z, z, 0f3F800000;", "rcp.approx.ftz.f32 z, z;", "add.f32 z, z, z;"]
    lines += [f"setp.lt.u32 p, t, {OWN.value};", "setp.ne.and.u32 p, $7, 0, p;", "mul.wide.u32 to, v, 4;"]
    lines += ["@!p bra DONE;", "@q16 bra COMB;", "add.u64 at, $5, to;", "st.global.f32 [at + -64], z;", "bra DONE;"]
    lines += ["COMB:", "add.u64 at, $4, to;", "st.global.f32 [at], x;", "mad.lo.u32 a, v, 4, $10;"]
    return _text(*lines, "st.shared.f32 [a], x;", "DONE:")


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
    return gl.inline_asm(_unpack_text, ("=f", "r"), (pairs,), T, is_pure=True)


@gluon.jit
def _pack(x, P: gl.constexpr):
    T: gl.constexpr = gl.distributed_type(gl.int32, [W, K // 2, x.shape[2]], P)
    return gl.inline_asm(_pack_text, ("=r", "f"), (x,), T, is_pure=True)


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
    final = gl.inline_asm(_broadcast_text(), "=f," * 16 + "r", (last,), T)
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
def _quantise(pairs, data, data_scale, t, ch, first, tokens, D: gl.constexpr, L: gl.constexpr):
    """Groups of 128 channels of the rounded rows as E4M3, and their power-of-two scales."""
    M: gl.constexpr = pairs.shape[2]
    groups = gl.reshape(_unpack(pairs, L), [2, 128, M])
    top = gl.max(gl.abs(groups), axis=1)
    byte = ((gl.maximum(top, 1e-4).to(gl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8  # 448 = 1.75 * 2**8
    inverse = ((254 - byte) << 23).to(gl.float32, bitcast=True)
    small = gl.convert_layout(gl.reshape(groups * gl.expand_dims(inverse, 1), [W, K, M]), L)
    gl.store(data + (_spread(t.to(gl.int64)) * D + ch), small.to(gl.float8e4nv), mask=_spread(t < tokens))
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [1, W], [1, 0])
    g = gl.arange(0, 2, gl.SliceLayout(1, flat))
    tm = gl.convert_layout(t, gl.SliceLayout(0, flat))
    at = data_scale + tm.to(gl.int64)[None, :] * (D // 128) + (first // 128 + g)[:, None]
    power = gl.convert_layout((byte << 23).to(gl.float32, bitcast=True), flat)
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

    _copy_streams(x, slots, 0, start + token, pair, tokens, D)
    _copy_y(y, y_slot, start + token, pair, tokens, D, POST)
    loaded = _load_fn(fn, first, D)
    if POST:
        ct = gl.minimum(start + cm, tokens - 1).to(gl.int64)
        comb_next = gl.load(comb_in + ct[:, None] * 16 + c16[None, :])
        post_next = gl.load(post_in + ct[:, None] * 4 + c4[None, :])
    gain = gl.load(norm_weight + channel) if NORM else 0.0
    _copy_streams(x, slots, 1, start + step + token, pair, tokens, D)
    gl.inline_asm(_start_text(), "r,r", (_at(bars.index(0), rank), incoming), ())
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
            z = gl.inline_asm(_read_text(4, M), "=r," * (4 * R) + "r", (_at(slots.index(parity * 4), rank),), T4)
            if POST:
                T1: gl.constexpr = _types(gl.int32, [W, K // 2, M], P, 1)
                y_pairs = gl.inline_asm(_read_text(1, M), "=r," * R + "r", (_at(y_slot, rank),), T1)
                T16: gl.constexpr = _types(gl.float32, [M], TL, 16)
                TP: gl.constexpr = _types(gl.float32, [M], TL, 4)
                c = gl.inline_asm(_columns_text(16, 16, M), "=f," * (4 * R) + "r", (_at(comb_rows, rank),), T16)
                c += gl.inline_asm(_columns_text(4, 4, M), "=f," * R + "r", (_at(post_rows, rank),), TP)
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
                _sums_text(M), "r," * (4 * R) + "r,r,r,r",
                (z[0], z[1], z[2], z[3], _at(kept.index(0), rank), _at(comb_sums.index(0), rank),
                 _at(mix_sums.index(0), rank), _at(gram_sums.index(0), rank)), (),
            )  # fmt: skip
        if n > 0:
            gl.inline_asm(
                _receive_text(C, M), "r,r,r,r,r",
                (_at(shared.index((1 - parity) * (C * SHARED)), rank), _at(rows.index((1 - parity) * M), rank),
                 _at(bars.index(1 - parity), rank), ((n - 1) >> 1) & 1, incoming), (),
            )  # fmt: skip
        gl.barrier()
        if n > 0:
            gl.inline_asm(
                _weights_text(M, NORM), "r,r,l,l,f,f,f,f,f",
                (_at(rows.index((1 - parity) * M), rank), _at(weights.index(0), rank), base, scale,
                 gl.to_tensor(1.0 / (4 * D)), gl.to_tensor(1.0 / D), gl.to_tensor(NORM_EPS), gl.to_tensor(EPS),
                 gl.to_tensor(OUT_EPS)), (),
            )  # fmt: skip
        if n < count:
            gl.inline_asm(
                _reduce_text(M), "r,r,r,r,r",
                (_at(comb_sums.index(0), rank), _at(mix_sums.index(0), rank), _at(gram_sums.index(0), rank),
                 _at(shared_out.index(parity * SHARED), rank), _at(own_out.index(parity * (M * OWN // 4)), rank)), (),
            )  # fmt: skip
        gl.barrier()
        if n < count:
            gl.inline_asm(
                _send_text(M), "r,r,r,r,r,r",
                (_at(shared_out.index(parity * SHARED), rank), _at(own_out.index(parity * (M * OWN // 4)), rank),
                 shared.index(parity * (C * SHARED)), own.index((n & 3) * (C * OWN // 4)), bars.index(parity), rank),
                (),
            )  # fmt: skip
        if n > 0:
            t0 = start + (n - 1) * step
            mine = (t0 + rank).to(gl.int64)
            has = ((rank < M) & (t0 + rank < tokens)).to(gl.int32)
            gl.inline_asm(
                _own_text(C, M), "r,r,l,l,l,l,r,r,f,f,r",
                (_at(own.index(((n - 1) & 3) * (C * OWN // 4)), rank), _at(rows.index((1 - parity) * M), rank), base,
                 scale, comb_out + mine * 16, post_out + mine * 4, rank, has, gl.to_tensor(1.0 / (4 * D)),
                 gl.to_tensor(NORM_EPS), _at(last.index(0), rank)), (),
            )  # fmt: skip
            TW: gl.constexpr = _types(gl.float32, [M], TL, 4)
            a = gl.inline_asm(_columns_text(4, 4, M), "=f," * R + "r", (_at(weights.index(0), rank),), TW)
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
