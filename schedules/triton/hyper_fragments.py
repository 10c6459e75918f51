"""The first half of hyper-connections, one warp a program: streams are read as the tensor cores take them.

A sum over channels does not mind their order. So a lane reads 8 neighbouring channels of a row, 16 bytes, and hands
them to the matrix instruction as if they were the 2 x 4 that its fragment scatters (`k_width=8`); fn is read in the
same order. Nothing passes through shared memory, no warp waits for another, and what hc_post computes sits in the
registers in which the product wants it.

Partial products and squares go where `hyper.finish` reads them. fn is float32, split into two bfloat16 parts: an error
of 2**-17.

Legend: T tokens, N = 4 streams, D channels, BT tokens of a program, DS channels of a program, BD of an iteration.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def project(
    y, x, post_in, comb_in, fn, streams, part, tokens,
    D: gl.constexpr, ROWS: gl.constexpr, POST: gl.constexpr, BT: gl.constexpr, DS: gl.constexpr, BD: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=8)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=mma, k_width=8)
    rows: gl.constexpr = gl.SliceLayout(1, left)
    t = gl.program_id(0).to(gl.int64) * BT + gl.arange(0, BT, layout=rows)
    live = t < tokens
    d = gl.program_id(1) * DS + gl.arange(0, BD, layout=gl.SliceLayout(0, left))
    at = t[:, None] * (4 * D) + d[None, :]
    mask = live[:, None] & (d < D)[None, :]
    r = gl.arange(0, 32, layout=gl.SliceLayout(0, right))
    k = gl.program_id(1) * DS + gl.arange(0, BD, layout=gl.SliceLayout(1, right))
    from_fn = r[None, :] * (4 * D) + k[:, None]
    wanted = (r < ROWS)[None, :] & (k < D)[:, None]
    acc = gl.zeros([BT, 32], gl.float32, mma)
    squares = gl.zeros([BT, BD], gl.float32, left)
    if POST:
        p0 = gl.load(post_in + t * 4, mask=live, other=0.0)
        p1 = gl.load(post_in + t * 4 + 1, mask=live, other=0.0)
        p2 = gl.load(post_in + t * 4 + 2, mask=live, other=0.0)
        p3 = gl.load(post_in + t * 4 + 3, mask=live, other=0.0)
        p = (p0, p1, p2, p3)
        c = ()
        for jk in gl.static_range(16):
            c += (gl.load(comb_in + t * 16 + jk, mask=live, other=0.0),)
    for start in range(0, DS, BD):
        xs = ()
        for j in gl.static_range(4):
            xs += (gl.load(x + at + (start + j * D), mask=mask, other=0.0),)
        if POST:
            yt = gl.load(y + t[:, None] * D + d[None, :] + start, mask=mask, other=0.0).to(gl.float32)
        for s in gl.static_range(4):
            f = gl.load(fn + from_fn + (start + s * D), mask=wanted, other=0.0)
            high = f.to(gl.bfloat16)
            low = (f - high.to(gl.float32)).to(gl.bfloat16)
            if POST:
                wide = p[s][:, None] * yt
                for j in gl.static_range(4):
                    wide += c[4 * j + s][:, None] * xs[j].to(gl.float32)
                row = wide.to(gl.bfloat16)
                gl.store(streams + at + (start + s * D), row, mask=mask)
            else:
                row = xs[s]
            acc = mma_v2(row, high, acc)
            acc = mma_v2(row, low, acc)
            again = row.to(gl.float32)
            squares += again * again
    square = gl.convert_layout(gl.sum(squares, 1), gl.SliceLayout(1, mma))
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, mma))
    total = gl.where((column == 24)[None, :], square[:, None], acc)
    to = gl.program_id(0).to(gl.int64) * BT + gl.arange(0, BT, layout=gl.SliceLayout(1, mma))
    place = (gl.program_id(1) * tokens.to(gl.int64) + to)[:, None] * 32 + column[None, :]
    gl.store(part + place, total, mask=(to < tokens)[:, None])
