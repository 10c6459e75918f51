"""Linear maps on Hopper: FP8 with block scales and BF16 with float32 sums, for few tokens and for many.

Few tokens (`few_*`): the weight is the left operand, 64 or 128 of its rows a program, the tokens are the right one, so
a batch of 1 pads to 16 and not to 64. The weight is streamed once through a deep pipeline of tensor-map copies; K may
be split over programs, whose float32 parts `add_parts` sums in a fixed order.

Many tokens (`many`): persistent programs of one copying warp and one or two multiplying warp groups. FP8 products of
128 channels are summed by the tensor cores, then scaled and added to float32 registers, group by group.

Legend: T tokens, N output channels, K input channels (of one group, where there are groups).
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@triton.jit
def few_fp8(
    data, scale, weight, weight_scale, out, tokens,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """data [T, G * K] by weight [N, K] of ROWS = N / G rows a group; out [SPLIT, T, N], or [T, N] if SPLIT is 1."""
    BLOCKS: tl.constexpr = K // 128
    SCALES: tl.constexpr = N // ROWS * BLOCKS
    column = tl.program_id(0) * BN
    token = tl.program_id(1) * BT
    split = tl.program_id(2)
    group = column // ROWS
    t = token + tl.arange(0, BT)
    live = t < tokens
    scales = scale + t.to(tl.int64) * SCALES + group * BLOCKS
    weight_scales = weight_scale + column // 128 * BLOCKS
    sums = tl.zeros((BN, BT), tl.float32)
    for k in range(split * BLOCKS // SPLIT, (split + 1) * BLOCKS // SPLIT):
        w = weight.load([column, k * 128])
        x = data.load([token, group * K + k * 128])
        factor = tl.load(scales + k, live, 0.0) * tl.load(weight_scales + k)
        sums += tl.dot(w, x.T) * factor[None, :]
    n = column + tl.arange(0, BN)
    to = out + (split * tokens + t[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(to, sums.T.to(out.dtype.element_ty), live[:, None] & (n < N)[None, :])


@triton.jit
def few_mixed(
    x, weight, out, tokens,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """x [T, K] by weight [N, K], bfloat16; out float32 [SPLIT, T, N], or [T, N] if SPLIT is 1."""
    BLOCKS: tl.constexpr = K // BK
    column = tl.program_id(0) * BN
    token = tl.program_id(1) * BT
    split = tl.program_id(2)
    sums = tl.zeros((BN, BT), tl.float32)
    for k in range(split * BLOCKS // SPLIT, (split + 1) * BLOCKS // SPLIT):
        sums = tl.dot(weight.load([column, k * BK]), x.load([token, k * BK]).T, sums)
    t = token + tl.arange(0, BT)
    n = column + tl.arange(0, BN)
    to = out + (split * tokens + t[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(to, sums.T, (t < tokens)[:, None] & (n < N)[None, :])


@triton.jit
def add_parts(parts, out, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum over s of parts[s, i], in the order of s; `count` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    sums = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLIT):
        sums += tl.load(parts + s * count + at, live, 0.0)
    tl.store(out + at, sums.to(out.dtype.element_ty), live)


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
def _copy(data, weight, ring, tokens, shape: gl.constexpr):
    """Fills the ring of operand tiles; one warp."""
    N: gl.constexpr = shape[0]
    K: gl.constexpr = shape[1]
    ROWS: gl.constexpr = shape[2]
    BM: gl.constexpr = shape[3]
    BN: gl.constexpr = shape[4]
    BK: gl.constexpr = shape[5]
    BAND: gl.constexpr = shape[6]
    x_ring, w_ring, full, empty = ring
    stages: gl.constexpr = x_ring.type.shape[0]
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(tokens, BM) * ((N + BN - 1) // BN), gl.num_programs(0)):
        token, column = _place(tile, tokens, N, BM, BN, BAND)
        start = column // ROWS * K
        for k in range(0, K, BK):
            slot = step % stages
            mbarrier.wait(empty.index(slot), (step // stages & 1) ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, data.block_type.nbytes + weight.block_type.nbytes)
            tma.async_load(data, [token, start + k], ready, x_ring.index(slot))
            tma.async_load(weight, [column, k], ready, w_ring.index(slot))
            step += 1


@gluon.jit
def _store(out, tile, token, column, sums):
    """Writes 64 rows through shared memory; rows and channels beyond the output are cut off by its tensor map."""
    tma.store_wait(0)
    gl.barrier()
    tile.store(sums.to(out.dtype))
    fence_async_shared()
    gl.barrier()
    tma.async_store(out, [token, column], tile)


@gluon.jit
def _multiply_fp8(out, c_tiles, scale, weight_scale, ring, tokens, which: gl.constexpr, shape: gl.constexpr):
    """64 or 128 (SUB 2) rows of each tile; one warp group."""
    N: gl.constexpr = shape[0]
    K: gl.constexpr = shape[1]
    ROWS: gl.constexpr = shape[2]
    BM: gl.constexpr = shape[3]
    BN: gl.constexpr = shape[4]
    BAND: gl.constexpr = shape[6]
    SUB: gl.constexpr = shape[7]
    x_ring, w_ring, full, empty = ring
    stages: gl.constexpr = x_ring.type.shape[0]
    BLOCKS: gl.constexpr = K // 128
    SCALES: gl.constexpr = N // ROWS * BLOCKS
    first: gl.constexpr = which * 64 * SUB
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    lanes = gl.arange(0, 64, gl.SliceLayout(1, layout))
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(tokens, BM) * ((N + BN - 1) // BN), gl.num_programs(0)):
        token, column = _place(tile, tokens, N, BM, BN, BAND)
        start = column // ROWS * BLOCKS
        at = gl.minimum(token + first + lanes, tokens - 1) * SCALES + start
        at1 = gl.minimum(token + first + 64 + lanes, tokens - 1) * SCALES + start
        weight_at = column // 128 * BLOCKS
        sums = gl.zeros([64, BN], gl.float32, layout)
        sums1 = gl.zeros([64, BN], gl.float32, layout)
        # scales are fetched one block ahead
        s = gl.load(scale + at)
        s1 = s
        if SUB == 2:
            s1 = gl.load(scale + at1)
        ws = gl.load(weight_scale + weight_at)
        for k in range(BLOCKS):
            slot = step % stages
            mbarrier.wait(full.index(slot), step // stages & 1)
            w = w_ring.index(slot).permute((1, 0))
            x = x_ring.index(slot)
            nothing = gl.zeros([64, BN], gl.float32, layout)
            part = warpgroup_mma(x.slice(first, 64), w, nothing, use_acc=False, is_async=True)
            factor = s * ws
            factor1 = s1 * ws
            after = gl.minimum(k + 1, BLOCKS - 1)
            s = gl.load(scale + after + at)
            if SUB == 2:
                s1 = gl.load(scale + after + at1)
            ws = gl.load(weight_scale + after + weight_at)
            part = warpgroup_mma_wait(0, [part])
            if SUB == 1:
                mbarrier.arrive(empty.index(slot))
            sums += part * factor[:, None]
            if SUB == 2:
                part1 = warpgroup_mma(x.slice(first + 64, 64), w, nothing, use_acc=False, is_async=True)
                part1 = warpgroup_mma_wait(0, [part1])
                mbarrier.arrive(empty.index(slot))
                sums1 += part1 * factor1[:, None]
            step += 1
        _store(out, c_tiles.index(which), token + first, column, sums)
        if SUB == 2:
            _store(out, c_tiles.index(which), token + first + 64, column, sums1)
    tma.store_wait(0)


@gluon.jit
def _multiply_mixed(out, ring, tokens, which: gl.constexpr, shape: gl.constexpr):
    """64 or 128 (SUB 2) rows of each tile; one warp group, one product ahead of the wait."""
    N: gl.constexpr = shape[0]
    K: gl.constexpr = shape[1]
    BM: gl.constexpr = shape[3]
    BN: gl.constexpr = shape[4]
    BK: gl.constexpr = shape[5]
    BAND: gl.constexpr = shape[6]
    SUB: gl.constexpr = shape[7]
    x_ring, w_ring, full, empty = ring
    stages: gl.constexpr = x_ring.type.shape[0]
    first: gl.constexpr = which * 64 * SUB
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(tokens, BM) * ((N + BN - 1) // BN), gl.num_programs(0)):
        token, column = _place(tile, tokens, N, BM, BN, BAND)
        sums = gl.zeros([64 * SUB, BN], gl.float32, layout)
        for k in range(K // BK):
            slot = step % stages
            mbarrier.wait(full.index(slot), step // stages & 1)
            w = w_ring.index(slot).permute((1, 0))
            x = x_ring.index(slot).slice(first, 64 * SUB)
            sums = warpgroup_mma(x, w, sums, is_async=True)
            sums = warpgroup_mma_wait(1, [sums])
            # all but the newest product are done: the tile before is free
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
def _ring(data, weight, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
          GROUPS: gl.constexpr):  # fmt: skip
    """Operand tiles, and the barriers between the copying warp and GROUPS multiplying warp groups."""
    x_ring = gl.allocate_shared_memory(data.dtype, [STAGES, BM, BK], data.layout)
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, BN, BK], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    return x_ring, w_ring, full, empty


@gluon.jit
def many_fp8(
    data, scale, weight, weight_scale, out, tokens,
    N: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr,
    SUB: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """data [T, G * K] by weight [N, K] of ROWS = N / G rows a group; out [T, N] in tiles of 64 x BN."""
    GROUPS: gl.constexpr = BM // (64 * SUB)
    shape: gl.constexpr = (N, K, ROWS, BM, BN, 128, BAND, SUB)
    ring = _ring(data, weight, BM, BN, 128, STAGES, GROUPS)
    c_tiles = gl.allocate_shared_memory(out.dtype, [GROUPS, 64, BN], out.layout)
    copying = (data, weight, ring, tokens, shape)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply_fp8, (out, c_tiles, scale, weight_scale, ring, tokens, 0, shape)),
                (_copy, copying),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply_fp8, (out, c_tiles, scale, weight_scale, ring, tokens, 0, shape)),
                (_multiply_fp8, (out, c_tiles, scale, weight_scale, ring, tokens, 1, shape)),
                (_copy, copying),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


@gluon.jit
def many_mixed(
    x, weight, out, tokens,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, BAND: gl.constexpr,
    SUB: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [T, K] by weight [N, K], bfloat16; out float32 [T, N]."""
    GROUPS: gl.constexpr = BM // (64 * SUB)
    shape: gl.constexpr = (N, K, N, BM, BN, BK, BAND, SUB)
    ring = _ring(x, weight, BM, BN, BK, STAGES, GROUPS)
    copying = (x, weight, ring, tokens, shape)
    if GROUPS == 1:
        gl.warp_specialize([(_multiply_mixed, (out, ring, tokens, 0, shape)), (_copy, copying)], [1], [24])
    else:
        gl.warp_specialize(
            [
                (_multiply_mixed, (out, ring, tokens, 0, shape)),
                (_multiply_mixed, (out, ring, tokens, 1, shape)),
                (_copy, copying),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
