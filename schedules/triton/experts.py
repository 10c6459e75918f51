"""Grouped GEMMs over FP4 experts: weights are the rows of the product, tokens its columns (Gluon, Hopper).

    acc[64 V weight rows, N tokens] += dequantise(W)[64 V, 128] x^T[128, N]        wgmma, A in registers, B in shared

Two producer warps stream packed weights with scales, and tokens, into a ring of stages by bulk copies (one dimension,
no tensor maps: every operand is stored in the order in which shared memory needs it). 4 V consumer warps dequantise
straight into the A fragment of the matrix instruction: FP4 is never expanded in memory.

Weights  [E][M / 32][K / 128][warp][row of 8][group][16 bytes]: a thread's 16 bytes are the 32 channels of one scale
         group of one row, and its own part of the A fragment. Scales: [E][M / 32][K / 128][warp][row of 8][group].
Tokens   panels [K / 64][rows][64] bf16. The 16-byte chunk c of the r-th row of an expert stands at c ^ (r % 8), the
         128-byte swizzle of wgmma. Channels are permuted within 128: position 32 q + 16 j + 8 h + 2 t + c holds channel
         32 t + 8 q + 4 c + 2 j + h (t < 4, q < 4, j, h, c < 2), because thread t of four owns scale group t.
Tiles    (expert, first row, rows, -) of rows of one expert, from moe_sort.

Legend: M weight rows of an expert, K channels, V 64-row tiles a CTA takes at once, N columns of a tile, KB 128-channel
blocks a stage.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.constexpr_function
def _dequantised(words, scales, panel):
    """PTX of the 16 registers a0.. of half an A fragment (64 channels) from E2M1 words and E8M0 bytes, exactly.

    A nibble `s ee m` put at bits 15, 8..6 of a bfloat16 is its value times 2**-126 (subnormals included), so one
    product with 2**(scale - 1) finishes it: the bfloat16 with exponent field scale + 126. Scales up to 128 (2.0).
    """
    lines = []
    for half in range(2):
        lines += [f"mad.lo.u32 s, {scales[half]}, 0x00800080, 0x3F003F00;"]
        for q in range(2):
            word = words[4 * half + 2 * panel + q]
            for pair in range(4):
                if pair == 2:
                    lines.append(f"shr.u32 v, {word}, 8;")
                source = word if pair < 2 else "v"
                mask, factor = (("0x000F000F", "0x1040"), ("0x00F000F0", "0x104"))[pair % 2]
                lines += [f"and.b32 t, {source}, {mask};", f"mul.lo.u32 t, t, {factor};"]
                at = 4 * (2 * q + pair // 2) + 2 * (pair % 2) + half
                lines += ["and.b32 t, t, 0x81C081C0;", f"mul.rn.bf16x2 a{at}, t, s;"]
    return lines


@gluon.constexpr_function
def _step_asm(outputs, inputs, panel):
    """acc += W x^T for one panel, 64 channels; the step before is done when it returns, this one may still run."""
    acc = [register for part in outputs for register in part]
    words, scales, (slot,) = inputs[:3]
    columns = 2 * len(acc)
    shape = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16"
    lines = ["{", ".reg .b32 v, t, s, lo, a<16>;", ".reg .b64 b;", *_dequantised(words, scales, panel)]
    lines += [f"add.u32 lo, {slot}, {panel * columns * 128};", "bfe.u32 lo, lo, 4, 14;", "wgmma.fence.sync.aligned;"]
    for i in range(4):  # 16 channels are 32 bytes of a row; 8 rows are 1024 bytes; swizzled by 128 bytes
        operand = ", ".join(f"a{4 * i + j}" for j in range(4))
        lines += ["mov.b64 b, {lo, 0x40000040};", f"{shape} {{{', '.join(acc)}}}, {{{operand}}}, b, 1, 1, 1, 0;"]
        lines += ["add.u32 lo, lo, 2;"] if i < 3 else []
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 1;", "}"])


@gluon.constexpr_function
def _left_asm(outputs, inputs):
    return _step_asm(outputs, inputs, 0)


@gluon.constexpr_function
def _right_asm(outputs, inputs):
    return _step_asm(outputs, inputs, 1)


@gluon.constexpr_function
def _tied(n):
    """Constraints of a step: n / 2 accumulators are results and, behind 11 other arguments, arguments."""
    return ",".join(["=f"] * (n // 2) + ["r"] * 11 + [str(i) for i in range(n // 2)])


@gluon.constexpr_function
def _tied_only(n):
    return ",".join(["=f"] * (n // 2) + [str(i) for i in range(n // 2)])


@gluon.constexpr_function
def _parts(n):
    """The powers of two in n, largest first: tensors have such sizes, the matrix instruction takes all of them."""
    return [1 << i for i in range(8, 2, -1) if n & (1 << i)]


@gluon.constexpr_function
def _accumulator_types(v, n):
    layouts = [gl.NVMMADistributedLayout([3, 0], [4 * v, 1], [16, part, 16]) for part in _parts(n)]
    return tuple(
        gl.distributed_type(gl.float32, [64 * v, part], layout) for part, layout in zip(_parts(n), layouts, strict=True)
    )


@gluon.jit
def _bulk_load(dst, offset, src, size, bar):
    """One thread copies `size` bytes (a multiple of 16) to shared memory at dst + offset; `bar` counts them."""
    gl.inline_asm(
        "{ .reg .pred p; .reg .b32 d; elect.sync _|p, 0xffffffff; add.u32 d, $0, $1;"
        " @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [d], [$2], $3, [$4]; }",
        "r,r,l,r,r",
        [dst, offset, src, size, bar],
    )


@gluon.jit
def _expect(bar, size):
    gl.inline_asm(
        "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1; }",
        "r,r",
        [bar, size],
    )


@gluon.jit
def _columns(rows, VARIANTS: gl.constexpr):
    """N of the smallest variant that takes this many rows."""
    columns = VARIANTS[len(VARIANTS) - 1]
    for i in gl.static_range(len(VARIANTS) - 1):
        columns = gl.where(rows <= VARIANTS[len(VARIANTS) - 2 - i], VARIANTS[len(VARIANTS) - 2 - i], columns)
    return columns


@gluon.jit
def _stream_weights(
    expert, m, count, wa, sa, wb, sb, w_smem, s_smem, full, empty,
    UP: gl.constexpr, M: gl.constexpr, K: gl.constexpr, V: gl.constexpr, KB: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """All stages of one unit: rows m of an expert."""
    BLOCKS: gl.constexpr = K // 128
    first = expert.to(gl.int64) * (M // 32)
    for it in range(BLOCKS // KB):
        stage = count % STAGES
        mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        _expect(bar, V * 2 * KB * (2048 + 128))
        for v in gl.static_range(V):
            for half in gl.static_range(2):
                block = first + (m * V + v if UP else 2 * (m * V + v) + half)
                data = wa if half == 0 else wb
                scale = sa if half == 0 else sb
                at = data + (block * BLOCKS + it * KB) * 2048
                _bulk_load(w_smem.index(stage), (2 * v + half) * KB * 2048, at, KB * 2048, bar)
                at = scale + (block * BLOCKS + it * KB) * 128
                _bulk_load(s_smem.index(stage), (2 * v + half) * KB * 128, at, KB * 128, bar)
        count += 1


@gluon.jit
def _produce_weights(
    chosen, wa, sa, wb, sb, tiles, meta, rows, w_smem, s_smem, full, empty,
    UP: gl.constexpr, M: gl.constexpr, K: gl.constexpr, V: gl.constexpr, KB: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """With at most EARLY pairs (a tile an expert), the experts are found here: the sort may still be running."""
    ITERS: gl.constexpr = K // (128 * KB)
    TILES_M: gl.constexpr = M // 32 // V if UP else M // 64 // V
    NONE: gl.constexpr = 1 << 30
    count = 0
    unit = gl.program_id(0)
    if rows <= EARLY:
        lane = gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [1], [0]))
        ids = gl.load(chosen + lane, mask=lane < rows, other=NONE)
        expert = gl.min(ids, 0)
        tile = 0
        while expert < NONE:
            if unit // TILES_M > tile:
                expert = gl.min(gl.where(ids > expert, ids, NONE), 0)
                tile += 1
            else:
                _stream_weights(
                    expert, unit % TILES_M, count, wa, sa, wb, sb, w_smem, s_smem, full, empty, UP, M, K, V, KB, STAGES
                )  # fmt: skip
                count += ITERS
                unit += gl.num_programs(0)
    else:
        if UP:
            gdc_wait()
        units = gl.load(meta) * TILES_M
        while unit < units:
            expert = gl.load(tiles + 4 * (unit // TILES_M))
            _stream_weights(
                expert, unit % TILES_M, count, wa, sa, wb, sb, w_smem, s_smem, full, empty, UP, M, K, V, KB, STAGES
            )  # fmt: skip
            count += ITERS
            unit += gl.num_programs(0)


@gluon.jit
def _produce_tokens(
    x, tiles, meta, rows, x_smem, full, empty,
    UP: gl.constexpr, M: gl.constexpr, K: gl.constexpr, V: gl.constexpr, KB: gl.constexpr, STAGES: gl.constexpr,
    VARIANTS: gl.constexpr,
):  # fmt: skip
    """Tokens are what the launch before this one makes; weights are on their way already."""
    TILES_M: gl.constexpr = M // 32 // V if UP else M // 64 // V
    NMAX: gl.constexpr = VARIANTS[len(VARIANTS) - 1]
    gdc_wait()
    gdc_launch_dependents()
    units = gl.load(meta) * TILES_M
    count = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // TILES_M
        first = gl.load(tiles + 4 * tile + 1)
        live = gl.load(tiles + 4 * tile + 2)
        columns = _columns(live, VARIANTS)
        for it in range(K // (128 * KB)):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            _expect(bar, KB * 2 * live * 128)
            for kb in gl.static_range(KB):
                slot = x_smem.index((stage * KB + kb) * (NMAX // 8))
                for panel in gl.static_range(2):
                    row = ((it * KB + kb) * 2 + panel).to(gl.int64) * rows + first
                    _bulk_load(slot, panel * columns * 128, x + row * 64, live * 128, bar)
            count += 1


@gluon.jit
def _zeros(V: gl.constexpr, N: gl.constexpr):
    return gl.zeros([64 * V, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4 * V, 1], [16, N, 16]))


@gluon.constexpr_function
def _spread(v, low, shape):
    """Layout of [2 v, shape]: a row is a half of 64 weight rows; warps of a group, then groups, are the high bits."""
    registers = [[0, 1], [0, 2], [1, 0]] if low == 4 else [[1, 0]]
    lanes = [[0, low << i] for i in range(5)]
    warps = [[0, 32 * low], [0, 64 * low], *([2 << i, 0] for i in range(v.bit_length() - 1))]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [2 * v, shape])


@gluon.jit
def _words(stage, kb: gl.constexpr, V: gl.constexpr):
    """Packed weights of block kb: 4 words for each of a thread's two rows."""
    return stage.slice(kb * 512, 512, dim=1).load(_spread(V, 4, 512))


@gluon.jit
def _scales(stage, kb: gl.constexpr, V: gl.constexpr):
    """Scale bytes of block kb: one for each of a thread's two rows."""
    return stage.slice(kb * 128, 128, dim=1).load(_spread(V, 1, 128)).to(gl.int32)


@gluon.jit
def _step(words, scales, slot, panel: gl.constexpr, accs, V: gl.constexpr, N: gl.constexpr):
    args = (words, scales, slot) + accs  # noqa: RUF005 (Triton has no starred tuples)
    return gl.inline_asm(_right_asm if panel else _left_asm, _tied(N), args, _accumulator_types(V, N))


@gluon.jit
def _wait(accs, V: gl.constexpr, N: gl.constexpr):
    return gl.inline_asm("wgmma.wait_group.sync.aligned 0;", _tied_only(N), accs, _accumulator_types(V, N))


@gluon.jit
def _release(bar, needed):
    """Each warp has read the stage: its loads are in registers, its products done. Nothing if not needed."""
    gl.inline_asm(
        "{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.ne.and.s32 q, $1, 0, p;"
        " @q mbarrier.arrive.shared.b64 _, [$0]; }",
        "r,r",
        [bar, needed],
    )


@gluon.jit
def _accumulate(
    count, w_smem, s_smem, x_smem, full, empty,
    ITERS: gl.constexpr, V: gl.constexpr, KB: gl.constexpr, STAGES: gl.constexpr, N: gl.constexpr,
    NMAX: gl.constexpr,
):  # fmt: skip
    """The accumulators [64 V, part] of one tile, by powers of two in N: ITERS stages from the count-th on.

    A product runs while the next fragment is made: the two panels of a block alternate.
    """
    accs = ()
    for part in gl.static_range(len(_parts(N))):
        accs = accs + (_zeros(V, _parts(N)[part]),)  # noqa: RUF005 (Triton has no starred tuples)
    for it in range(ITERS):
        stage = count % STAGES
        mbarrier.wait(full.index(stage), (count // STAGES) & 1)
        for kb in gl.static_range(KB):
            words = _words(w_smem.index(stage), kb, V)
            scales = _scales(s_smem.index(stage), kb, V)
            slot = x_smem.index((stage * KB + kb) * (NMAX // 8))
            accs = _step(words, scales, slot, 0, accs, V, N)
            if kb == 0:
                _release(empty.index((count + STAGES - 1) % STAGES), it)
            accs = _step(words, scales, slot, 1, accs, V, N)
        count += 1
    accs = _wait(accs, V, N)
    _release(empty.index((count + STAGES - 1) % STAGES), 1)
    return accs


@gluon.jit
def _finish(
    acc, out, row_weight, m, first, live, rows, out_smem, UP: gl.constexpr, LIMIT: gl.constexpr, V: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """UP: of 16 rows 0..7 are the gate's, 8..15 the up projection's, for the same 8 positions of hidden."""
    if N > 64:
        left, right = acc.reshape([64 * V, 2, N // 2]).permute((0, 2, 1)).split()
        _finish(left, out, row_weight, m, first, live, rows, out_smem, UP, LIMIT, V, N // 2)
        _finish(right, out, row_weight, m, first + N // 2, live - N // 2, rows, out_smem, UP, LIMIT, V, N // 2)
    elif UP:
        gate, up = acc.reshape([4 * V, 2, 8, N]).permute((0, 2, 3, 1)).split()
        gate = gl.minimum(gate, LIMIT, propagate_nan=NAN)
        up = gl.minimum(gl.maximum(up, -LIMIT, propagate_nan=NAN), LIMIT, propagate_nan=NAN)
        value = (gate * up / (1.0 + gl.exp(-gate))).reshape([32 * V, N])
        index = gl.arange(0, N, layout=gl.SliceLayout(0, value.type.layout))
        value *= gl.load(row_weight + first + index, mask=index < live, other=0.0)[None, :]
        _store(value.to(gl.bfloat16), out, m * 32 * V, first, live, rows, out_smem, 32 * V, N)
    else:
        _store(acc.to(gl.bfloat16), out, m * 64 * V, first, live, rows, out_smem, 64 * V, N)


@gluon.jit
def _store(value, out, channel, first, live, rows, out_smem, M: gl.constexpr, N: gl.constexpr):
    """value[M channels, N rows] to the panels of `out`: whole panels by a bulk copy, half ones directly."""
    if M % 64:
        L: gl.constexpr = value.type.layout
        position = channel + gl.arange(0, M, layout=gl.SliceLayout(1, L))
        index = gl.arange(0, N, layout=gl.SliceLayout(0, L))
        panel = (position // 64).to(gl.int64) * rows * 64
        chunk = ((position % 64) // 8)[:, None] ^ (index % 8)[None, :]
        at = (panel + position % 8)[:, None] + ((first + index) * 64)[None, :] + chunk * 8
        gl.store(out + at, value, mask=(index < live)[None, :])
    else:
        PANELS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        tile = out_smem.reinterpret(gl.bfloat16, [N, M], PANELS)
        _first_thread("cp.async.bulk.wait_group.read 0;")
        gl.barrier()
        tile.permute((1, 0)).store(value)
        fence_async_shared()
        gl.barrier()
        size = gl.minimum(live, N) * 128
        for panel in gl.static_range(M // 64):
            at = (channel // 64 + panel).to(gl.int64) * rows + first
            _bulk_store(out + at * 64, out_smem, panel * N * 128, size)


@gluon.jit
def _first_thread(INSTRUCTION: gl.constexpr):
    gl.inline_asm(_predicated(INSTRUCTION), "", ())


@gluon.constexpr_function
def _predicated(instruction):
    return "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.s32 p, t, 0; @p " + instruction + " }"


@gluon.jit
def _bulk_store(dst, src, offset, size):
    """The first thread copies `size` bytes (a multiple of 16, none if not positive) from shared to global memory."""
    gl.inline_asm(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.s32 p, t, 0; setp.gt.and.s32 p, $3, 0, p;"
        " add.u32 t, $1, $2; @p cp.async.bulk.global.shared::cta.bulk_group [$0], [t], $3;"
        " @p cp.async.bulk.commit_group; }",
        "l,r,r,r",
        [dst, src, offset, size],
    )


@gluon.jit
def _tile(
    count, m, first, live, out, row_weight, rows, w_smem, s_smem, x_smem, out_smem, full, empty,
    UP: gl.constexpr, LIMIT: gl.constexpr, ITERS: gl.constexpr, V: gl.constexpr, KB: gl.constexpr,
    STAGES: gl.constexpr, N: gl.constexpr, NMAX: gl.constexpr,
):  # fmt: skip
    accs = _accumulate(count, w_smem, s_smem, x_smem, full, empty, ITERS, V, KB, STAGES, N, NMAX)
    for part in gl.static_range(len(_parts(N))):
        _finish(accs[part], out, row_weight, m, first, live, rows, out_smem, UP, LIMIT, V, _parts(N)[part])
        first += _parts(N)[part]
        live -= _parts(N)[part]


@gluon.jit
def _dispatch(
    i: gl.constexpr, columns, count, m, first, live, out, row_weight, rows, w_smem, s_smem, x_smem, out_smem, full,
    empty, UP: gl.constexpr, LIMIT: gl.constexpr, ITERS: gl.constexpr, V: gl.constexpr, KB: gl.constexpr,
    STAGES: gl.constexpr, VARIANTS: gl.constexpr,
):  # fmt: skip
    LAST: gl.constexpr = len(VARIANTS) - 1
    if i == LAST:
        _tile(
            count, m, first, live, out, row_weight, rows, w_smem, s_smem, x_smem, out_smem, full, empty, UP, LIMIT,
            ITERS, V, KB, STAGES, VARIANTS[i], VARIANTS[LAST],
        )  # fmt: skip
    else:
        if columns == VARIANTS[i]:
            _tile(
                count, m, first, live, out, row_weight, rows, w_smem, s_smem, x_smem, out_smem, full, empty, UP, LIMIT,
                ITERS, V, KB, STAGES, VARIANTS[i], VARIANTS[LAST],
            )  # fmt: skip
        else:
            _dispatch(
                i + 1, columns, count, m, first, live, out, row_weight, rows, w_smem, s_smem, x_smem, out_smem, full,
                empty, UP, LIMIT, ITERS, V, KB, STAGES, VARIANTS,
            )  # fmt: skip


@gluon.jit
def _consume(
    tiles, meta, out, row_weight, rows, w_smem, s_smem, x_smem, out_smem, full, empty,
    UP: gl.constexpr, LIMIT: gl.constexpr, M: gl.constexpr, K: gl.constexpr, V: gl.constexpr, KB: gl.constexpr,
    STAGES: gl.constexpr, VARIANTS: gl.constexpr,
):  # fmt: skip
    ITERS: gl.constexpr = K // (128 * KB)
    TILES_M: gl.constexpr = M // 32 // V if UP else M // 64 // V
    if UP:
        gdc_wait()
    units = gl.load(meta) * TILES_M
    count = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // TILES_M
        m = unit % TILES_M
        first = gl.load(tiles + 4 * tile + 1)
        live = gl.load(tiles + 4 * tile + 2)
        columns = _columns(live, VARIANTS)
        _dispatch(
            0, columns, count, m, first, live, out, row_weight, rows, w_smem, s_smem, x_smem, out_smem, full, empty, UP,
            LIMIT, ITERS, V, KB, STAGES, VARIANTS,
        )  # fmt: skip
        count += ITERS
    _first_thread("cp.async.bulk.wait_group 0;")


@gluon.jit
def grouped_gemm(
    x, chosen, wa, sa, wb, sb, tiles, meta, row_weight, out, rows,
    UP: gl.constexpr, LIMIT: gl.constexpr, M: gl.constexpr, K: gl.constexpr, V: gl.constexpr, KB: gl.constexpr,
    STAGES: gl.constexpr, VARIANTS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """UP: out = weight * swiglu(wa x, wb x) (M rows in each of wa, wb). Else out = wa x (wb is wa, M rows).

    meta[0] is the number of token tiles, `rows` the pairs and rows of a panel, VARIANTS the numbers of columns,
    ascending.
    """
    NMAX: gl.constexpr = VARIANTS[len(VARIANTS) - 1]
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 2 * V, KB * 512], FLAT)
    s_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, 2 * V, KB * 128], FLAT)
    x_smem = gl.allocate_shared_memory(gl.uint8, [STAGES * KB * NMAX // 8, 2048], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    CHANNELS: gl.constexpr = 32 * V if UP else 64 * V
    OUT: gl.constexpr = 16 if CHANNELS % 64 else 2 * CHANNELS * min(64, _parts(NMAX)[0])
    out_smem = gl.allocate_shared_memory(gl.uint8, [OUT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=4 * V)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (tiles, meta, out, row_weight, rows, w_smem, s_smem, x_smem, out_smem, full, empty, UP, LIMIT, M, K, V,
                 KB, STAGES, VARIANTS),
            ),
            (
                _produce_weights,
                (chosen, wa, sa, wb, sb, tiles, meta, rows, w_smem, s_smem, full, empty, UP, M, K, V, KB, STAGES,
                 EARLY),
            ),
            (_produce_tokens, (x, tiles, meta, rows, x_smem, full, empty, UP, M, K, V, KB, STAGES, VARIANTS)),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip
