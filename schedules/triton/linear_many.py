"""Linear maps on Hopper for many tokens: FP8 with block scales, and BF16 with float32 sums.

Persistent programs: one warp copies operand tiles into a ring by tensor maps, two warp groups multiply 64 rows of
tokens each (or 128, BF16). The tensor cores sum FP8 products of 128 channels; these are scaled and added to float32
registers while the next 128 are multiplied, so each warp group always has a product under way, across tiles too.

Legend: T tokens, N output channels, K input channels (of one group, where there are groups).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _place(tile, tokens, N: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr):
    """First token and first channel of a tile. BAND neighbouring tiles share a weight tile in the L2 cache."""
    rows = gl.cdiv(tokens, BM)
    columns: gl.constexpr = (N + BN - 1) // BN
    first = tile // (BAND * columns) * BAND
    height = gl.minimum(rows - first, BAND)
    within = tile % (BAND * columns)
    return (first + within % height) * BM, within // height * BN


@gluon.jit
def _tiles(tokens, N: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    return gl.cdiv(tokens, BM) * ((N + BN - 1) // BN)


@gluon.jit
def _copy_fp8(data, scale, weight, rings, tokens, shape: gl.constexpr):
    """Fills the rings; one warp."""
    N: gl.constexpr = shape[0]
    K: gl.constexpr = shape[1]
    ROWS: gl.constexpr = shape[2]
    BM: gl.constexpr = shape[3]
    BN: gl.constexpr = shape[4]
    BAND: gl.constexpr = shape[5]
    x_ring, w_ring, s_ring, full, empty = rings
    stages: gl.constexpr = x_ring.type.shape[0]
    scale_stages: gl.constexpr = s_ring.type.shape[0]
    size: gl.constexpr = data.nbytes_per_cta + weight.nbytes_per_cta
    step = 0
    for tile in range(gl.program_id(0), _tiles(tokens, N, BM, BN), gl.num_programs(0)):
        token, column = _place(tile, tokens, N, BM, BN, BAND)
        start = column // ROWS * (K // 128)
        for k in range(K // 128):
            slot = step % stages
            mbarrier.wait(empty.index(slot), (step // stages & 1) ^ 1)
            ready = full.index(slot)
            if k % 4 == 0:
                mbarrier.expect(ready, size + scale.nbytes_per_cta)
                tma.async_load(scale, [token, start + k], ready, s_ring.index(step // 4 % scale_stages))
            else:
                mbarrier.expect(ready, size)
            tma.async_load(data, [token, (start + k) * 128], ready, x_ring.index(slot))
            tma.async_load(weight, [column, k * 128], ready, w_ring.index(slot))
            step += 1


@gluon.jit
def _product(rings, step, layout: gl.constexpr, first: gl.constexpr):
    """Begins the product of a ring slot."""
    x_ring, w_ring, _, full, _ = rings
    stages: gl.constexpr = x_ring.type.shape[0]
    slot = step % stages
    mbarrier.wait(full.index(slot), step // stages & 1)
    x = x_ring.index(slot).slice(first, 64)
    w = w_ring.index(slot).permute((1, 0))
    nothing = gl.zeros([64, w.shape[1]], gl.float32, layout)
    return warpgroup_mma(x, w, nothing, use_acc=False, is_async=True)


@gluon.jit
def _multiply_fp8(out, tiles, weight_scale, rings, tokens, which: gl.constexpr, shape: gl.constexpr):
    """64 rows of every tile; one warp group."""
    N: gl.constexpr = shape[0]
    K: gl.constexpr = shape[1]
    BM: gl.constexpr = shape[3]
    BN: gl.constexpr = shape[4]
    BAND: gl.constexpr = shape[5]
    x_ring, _, s_ring, _, empty = rings
    stages: gl.constexpr = x_ring.type.shape[0]
    scale_stages: gl.constexpr = s_ring.type.shape[0]
    BLOCKS: gl.constexpr = K // 128
    first: gl.constexpr = which * 64
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    c = tiles.index(which)
    step = 0
    for tile in range(gl.program_id(0), _tiles(tokens, N, BM, BN), gl.num_programs(0)):
        token, column = _place(tile, tokens, N, BM, BN, BAND)
        weight_scales = weight_scale + column // 128 * BLOCKS
        sums = gl.zeros([64, BN], gl.float32, layout)
        for k in range(0, BLOCKS, 4):
            scales = s_ring.index(step // 4 % scale_stages).slice(first, 64)
            # the assembler keeps products asynchronous only within one pass of a loop
            part = _product(rings, step, layout, first)
            for j in gl.static_range(4):
                ws = gl.load(weight_scales + k + j)
                after = part
                if j < 3:
                    after = _product(rings, step + 1, layout, first)
                s = scales.slice(j, 1, dim=1).load(layout)
                done = warpgroup_mma_wait(1 if j < 3 else 0, [part])
                mbarrier.arrive(empty.index(step % stages))
                sums += done * (s * ws)
                part = after
                step += 1
        tma.store_wait(0)
        gl.barrier()
        c.store(sums.to(out.dtype))
        fence_async_shared()
        gl.barrier()
        tma.async_store(out, [token + first, column], c)
    tma.store_wait(0)


@gluon.jit
def many_fp8(
    data, scale, weight, weight_scale, out, tokens,
    N: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """data [T, G * K] by weight [N, K] of ROWS = N / G rows a group; out [T, N] in tiles of 64 x BN."""
    gl.inline_asm("griddepcontrol.wait;", "~{memory}")
    gl.inline_asm("griddepcontrol.launch_dependents;", "~{memory}")
    GROUPS: gl.constexpr = BM // 64
    shape: gl.constexpr = (N, K, ROWS, BM, BN, BAND)
    x_ring = gl.allocate_shared_memory(data.dtype, [STAGES, BM, 128], data.layout)
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, BN, 128], weight.layout)
    # a tile of scales outlives its four blocks by as many as the ring may run ahead
    s_ring = gl.allocate_shared_memory(gl.float32, [(STAGES + 3) // 4 + 1, BM, 4], scale.layout)
    tiles = gl.allocate_shared_memory(out.dtype, [GROUPS, 64, BN], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    rings = (x_ring, w_ring, s_ring, full, empty)
    copying = (data, scale, weight, rings, tokens, shape)
    if GROUPS == 1:
        gl.warp_specialize(
            [(_multiply_fp8, (out, tiles, weight_scale, rings, tokens, 0, shape)), (_copy_fp8, copying)], [1], [24]
        )
    else:
        gl.warp_specialize(
            [
                (_multiply_fp8, (out, tiles, weight_scale, rings, tokens, 0, shape)),
                (_multiply_fp8, (out, tiles, weight_scale, rings, tokens, 1, shape)),
                (_copy_fp8, copying),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


@gluon.jit
def _copy_mixed(x, weight, rings, tokens, shape: gl.constexpr):
    """Fills the rings; one warp."""
    N: gl.constexpr = shape[0]
    K: gl.constexpr = shape[1]
    BM: gl.constexpr = shape[2]
    BN: gl.constexpr = shape[3]
    BAND: gl.constexpr = shape[4]
    x_ring, w_ring, full, empty = rings
    stages: gl.constexpr = x_ring.type.shape[0]
    size: gl.constexpr = x.nbytes_per_cta + weight.nbytes_per_cta
    step = 0
    for tile in range(gl.program_id(0), _tiles(tokens, N, BM, BN), gl.num_programs(0)):
        token, column = _place(tile, tokens, N, BM, BN, BAND)
        for k in range(0, K, 64):
            slot = step % stages
            mbarrier.wait(empty.index(slot), (step // stages & 1) ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, size)
            tma.async_load(x, [token, k], ready, x_ring.index(slot))
            tma.async_load(weight, [column, k], ready, w_ring.index(slot))
            step += 1


@gluon.jit
def _multiply_mixed(out, rings, tokens, which: gl.constexpr, shape: gl.constexpr):
    """64 or 128 (SUB 2) rows of each tile; one warp group, one product ahead of the wait."""
    N: gl.constexpr = shape[0]
    K: gl.constexpr = shape[1]
    BM: gl.constexpr = shape[2]
    BN: gl.constexpr = shape[3]
    BAND: gl.constexpr = shape[4]
    SUB: gl.constexpr = shape[5]
    x_ring, w_ring, full, empty = rings
    stages: gl.constexpr = x_ring.type.shape[0]
    first: gl.constexpr = which * 64 * SUB
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    step = 0
    for tile in range(gl.program_id(0), _tiles(tokens, N, BM, BN), gl.num_programs(0)):
        token, column = _place(tile, tokens, N, BM, BN, BAND)
        sums = gl.zeros([64 * SUB, BN], gl.float32, layout)
        for k in range(K // 64):
            slot = step % stages
            mbarrier.wait(full.index(slot), step // stages & 1)
            x = x_ring.index(slot).slice(first, 64 * SUB)
            sums = warpgroup_mma(x, w_ring.index(slot).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, [sums])
            # all but the newest product are done: the slot before is free
            mbarrier.arrive(empty.index((step + stages - 1) % stages), pred=k > 0)
            step += 1
        sums = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(empty.index((step + stages - 1) % stages))
        # a quad of lanes holds 32 bytes of a row: whole sectors, without shared memory
        t = token + first + gl.arange(0, 64 * SUB, gl.SliceLayout(1, layout))
        n = column + gl.arange(0, BN, gl.SliceLayout(0, layout))
        to = out + t[:, None].to(gl.int64) * N + n[None, :]
        gl.store(to, sums, (t < tokens)[:, None] & (n < N)[None, :])


@gluon.jit
def many_mixed(
    x, weight, out, tokens,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr, SUB: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [T, K] by weight [N, K], bfloat16; out float32 [T, N]."""
    gl.inline_asm("griddepcontrol.wait;", "~{memory}")
    gl.inline_asm("griddepcontrol.launch_dependents;", "~{memory}")
    GROUPS: gl.constexpr = BM // (64 * SUB)
    shape: gl.constexpr = (N, K, BM, BN, BAND, SUB)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BM, 64], x.layout)
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, BN, 64], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    rings = (x_ring, w_ring, full, empty)
    copying = (x, weight, rings, tokens, shape)
    if GROUPS == 1:
        gl.warp_specialize([(_multiply_mixed, (out, rings, tokens, 0, shape)), (_copy_mixed, copying)], [1], [24])
    else:
        gl.warp_specialize(
            [
                (_multiply_mixed, (out, rings, tokens, 0, shape)),
                (_multiply_mixed, (out, rings, tokens, 1, shape)),
                (_copy_mixed, copying),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
