"""PTX of the cluster kernel (hyper_cluster.py), for what its language lacks: texts with their operands' numbers.

Legend: C blocks of a cluster, W = 8 warps of a block, K = 32 channels of a warp, M tokens of a tile. Thread (w, g, q) =
(id / 32, id / 4 % 8, id % 4) holds channels 32 w + 8 q + 0..7 of tokens g + 8 s, s < M / 8.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SHARED = gl.constexpr(14)  # sums that every block needs: pre, then products of streams 00 11 22 33 01 02 03 12 13 23
OWN = gl.constexpr(20)  # sums that the owner of a token needs: comb, post

_GRAM = gl.constexpr(((0, 0, 1, 0, 4), (0, 2, 3, 5, 6), (1, 1, 2, 1, 7), (3, 3, 1, 3, 8), (2, 2, 3, 2, 9)))
"""(k, i, j, row of i * k, row of j * k): streams i over j times stream k gives two products at once."""


@gluon.constexpr_function
def _text(*lines):
    """A block of PTX with the thread's place in it: t, w, g, q."""
    head = [".reg .u32 t, w, g, q;", "mov.u32 t, %tid.x;", "shr.u32 w, t, 5;", "shr.u32 g, t, 2;", "and.b32 g, g, 7;"]
    return "\n".join(["{", *head, "and.b32 q, t, 3;", *lines, "}"])


@gluon.constexpr_function
def _group(refs):
    return "{" + ", ".join(refs) + "}"


@gluon.constexpr_function
def start_text():
    """Makes and arms the barriers $0 for $1 bytes, and waits for the cluster."""
    lines = [".reg .pred p;", "setp.eq.u32 p, t, 0;"]
    for bar in ("[$0]", "[$0 + 8]"):
        lines.append(f"@p mbarrier.init.shared::cta.b64 {bar}, 1;")
    lines.append("@p fence.mbarrier_init.release.cluster;")
    for bar in ("[$0]", "[$0 + 8]"):
        lines.append(f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, {bar}, $1;")
    return _text(*lines, "barrier.cluster.arrive.release;", "barrier.cluster.wait.acquire;")


@gluon.constexpr_function
def read_text(count, tokens):
    """`count` tensors of pairs from shared memory $last [count, W, M, K / 2]: what this thread copied there."""
    sets = tokens // 8
    lines = [".reg .u32 a;", f"mad.lo.u32 a, w, {tokens * 64}, ${count * 4 * sets};", "mad.lo.u32 a, g, 64, a;"]
    lines.append("mad.lo.u32 a, q, 16, a;")
    for i in range(count * sets):
        out = _group(f"${4 * i + r}" for r in range(4))
        lines.append(f"ld.shared.v4.b32 {out}, [a + {i // sets * 8 * tokens * 64 + i % sets * 512}];")
    return _text(*lines)


@gluon.constexpr_function
def columns_text(count, width, tokens):
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
def broadcast_text():
    """16 values at shared memory $16, for every thread."""
    return "\n".join(
        f"ld.shared.v4.f32 {{${v}, ${v + 1}, ${v + 2}, ${v + 3}}}, [$16 + {4 * v}];" for v in (0, 4, 8, 12)
    )


@gluon.constexpr_function
def unpack_text(outputs, inputs):
    """float32 of pairs."""
    lines = []
    for i, pair in enumerate(inputs[0]):
        lines += [f"shl.b32 {outputs[0][2 * i]}, {pair}, 16;", f"and.b32 {outputs[0][2 * i + 1]}, {pair}, -65536;"]
    return "\n".join(lines)


@gluon.constexpr_function
def pack_text(outputs, inputs):
    """Pairs of float32, rounded."""
    wide = inputs[0]
    return "\n".join(f"cvt.rn.bf16x2.f32 {o}, {wide[2 * i + 1]}, {wide[2 * i]};" for i, o in enumerate(outputs[0]))


@gluon.constexpr_function
def sums_text(tokens):
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
def reduce_text(tokens):
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
def send_text(tokens):
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
def receive_text(blocks, tokens):
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
def weights_text(tokens, norm):
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
        lines += ["max.NaN.f32 y, y, 0f00000000;", "fma.rn.f32 y, y, $5, $8;", "rsqrt.approx.ftz.f32 y, y;"]
        lines += [f"mul.f32 p{j}, p{j}, y;" for j in range(4)]
    return _text(*lines, "mad.lo.u32 a, k, 16, $1;", "st.shared.v4.f32 [a], {p0, p1, p2, p3};", "DONE:")


@gluon.constexpr_function
def own_text(blocks, tokens):
    """The own token's logits of comb as they are, and its post. All warps do it, so that none is late; one stores.

    Operands: sums [C, OWN], rows [M, 16], this lane's base and scale, comb and post of the token, rank, whether there
    is such a token, 1 / (N * D), epsilon, shared memory for the last token's logits.
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
    lines += ["setp.lt.u32 q16, v, 16;", "fma.rn.f32 x, x, $3, $2;", "mul.f32 z, x, 0fBFB8AA3B;"]  # -log2(e)
    lines += ["ex2.approx.ftz.f32 z, z;", "add.f32 z, z, 0f3F800000;", "rcp.approx.ftz.f32 z, z;", "add.f32 z, z, z;"]
    lines += [f"setp.lt.u32 p, t, {OWN.value};", "setp.ne.and.u32 p, $7, 0, p;", "mul.wide.u32 to, v, 4;"]
    lines += ["@!p bra DONE;", "@q16 bra COMB;", "add.u64 at, $5, to;", "st.global.f32 [at + -64], z;", "bra DONE;"]
    lines += ["COMB:", "add.u64 at, $4, to;", "st.global.f32 [at], x;", "mad.lo.u32 a, v, 4, $10;"]
    return _text(*lines, "st.shared.f32 [a], x;", "DONE:")
