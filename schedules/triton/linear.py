"""Linear maps on Hopper for few tokens: FP8 with block scales, and BF16 with float32 sums.

The weight is the left operand, 64 to 256 of its rows a tile; the tokens are the right one, so a batch of 1 pads to 16
and not to 64. Where a weight has too few rows to fill the card, the blocks of a cluster share a tile, each with its
part of K: every block streams its weights through a ring of tensor-map copies, then the blocks exchange their partial
sums through each other's shared memory and add them in order. One launch, no atomics, no partial sums in memory.

A kernel asks for its weights before it waits for the kernel in front (programmatic dependent launch).

Legend: T tokens, N output channels, K input channels (of one group, where there are groups).
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.constexpr_function
def _bases(ctas, rank, dim):
    """How a layout runs over the blocks of a cluster: along dimension `dim`, or (None) all in every block."""
    return [[1 << i if d == dim else 0 for d in range(rank)] for i in range(ctas.bit_length() - 1)]


@gluon.jit
def _block(CTAS: gl.constexpr):
    """Number of this block in its cluster."""
    block = 0
    if CTAS > 1:
        block = gl.inline_asm("mov.u32 $0, %cluster_ctarank;", "=r", (), gl.int32, is_pure=True)
    return block


@gluon.jit
def _barriers(STAGES: gl.constexpr):
    """One barrier a ring slot. The kernel behind may start as soon as there is room for it."""
    gl.inline_asm("griddepcontrol.launch_dependents;")
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.barrier()
    return full


@gluon.jit
def _write(out, sums, column, token, tokens, N: gl.constexpr, CTAS: gl.constexpr):
    """Adds the sums [BN, BT] of a cluster's blocks, a part of the rows each, and writes them transposed."""
    BN: gl.constexpr = sums.shape[0]
    BT: gl.constexpr = sums.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    if CTAS == 1:
        wide: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [1, WARPS], [0, 1])
        y = gl.convert_layout(sums, wide)
    else:
        # blocks are a dimension: first each holds its own sums, then all blocks' sums of its own rows
        lanes: gl.constexpr = BN // CTAS if BN // CTAS < 32 else 32
        own: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 32, 1], [1, 1, WARPS], [1, 2, 0], _bases(CTAS, 3, 0))
        part: gl.constexpr = gl.BlockedLayout(
            [CTAS, 1, 1], [1, lanes, 32 // lanes], [1, 1, WARPS], [1, 2, 0], _bases(CTAS, 3, 1)
        )
        mine = gl.expand_dims(gl.convert_layout(sums, gl.SliceLayout(0, own)), 0)
        every, _ = gl.broadcast(mine, gl.zeros([CTAS, BN, BT], gl.float32, own))
        y = gl.sum(gl.convert_layout(every, part), 0)
    layout: gl.constexpr = y.type.layout
    n = column + gl.arange(0, BN, gl.SliceLayout(1, layout))
    t = token + gl.arange(0, BT, gl.SliceLayout(0, layout))
    to = out + t[None, :].to(gl.int64) * N + n[:, None]
    gl.store(to, y.to(out.dtype.element_ty), (n < N)[:, None] & (t < tokens)[None, :])


@gluon.jit
def few_fp8(
    data, scale, weight, weight_scale, out, tokens,
    N: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr,
    CTAS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """data [T, G * K] by weight [N, K] of ROWS = N / G rows a group; out bfloat16 [T, N]."""
    BLOCKS: gl.constexpr = K // 128 // CTAS
    SCALES: gl.constexpr = N // ROWS * (K // 128)
    WARPS: gl.constexpr = gl.num_warps()
    PAD: gl.constexpr = triton.next_power_of_2(BLOCKS)
    COLUMNS: gl.constexpr = (N + BN - 1) // BN
    column = gl.program_id(0) % COLUMNS * BN
    token = gl.program_id(0) // COLUMNS * BT
    first = _block(CTAS) * BLOCKS
    start = column // ROWS * (K // 128) + first
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, BN, 128], weight.layout)
    x_ring = gl.allocate_shared_memory(data.dtype, [STAGES, BT, 128], data.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0], _bases(CTAS, 2, None))
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0], _bases(CTAS, 1, None))
    factors = gl.allocate_shared_memory(gl.float32, [PAD, BT], flat)
    full = _barriers(STAGES)
    size: gl.constexpr = data.nbytes_per_cta + weight.nbytes_per_cta
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), size)
        tma.async_load(weight, [column, (first + i) * 128], full.index(i), w_ring.index(i))
    gl.inline_asm("griddepcontrol.wait;")  # until here nothing was read that the kernel in front may write
    for i in gl.static_range(STAGES):
        tma.async_load(data, [token, (start + i) * 128], full.index(i), x_ring.index(i))
    # the scales of all blocks of K at once: one by one, each would cost a trip to memory
    table: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [0, 1], _bases(CTAS, 2, None))
    b = gl.arange(0, PAD, gl.SliceLayout(1, table))
    t = token + gl.arange(0, BT, gl.SliceLayout(0, table))
    live = b < BLOCKS
    s = gl.load(scale + t[None, :] * SCALES + (start + b)[:, None], (t < tokens)[None, :] & live[:, None], 0.0)
    ws = gl.load(weight_scale + column // 128 * (K // 128) + first + b, live, 0.0)
    factors.store(s * ws[:, None])
    by_block = factors.reinterpret(gl.float32, [PAD, BT], row)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BT, 32], _bases(CTAS, 2, None))
    sums = gl.zeros([BN, BT], gl.float32, mma)
    nothing = gl.zeros([BN, BT], gl.float32, mma)
    for k in range(BLOCKS):
        slot = k % STAGES
        mbarrier.wait(full.index(slot), k // STAGES & 1)
        x = x_ring.index(slot).permute((1, 0))
        part = warpgroup_mma(w_ring.index(slot), x, nothing, use_acc=False, is_async=True)
        factor = by_block.index(k).load(gl.SliceLayout(0, mma))
        part = warpgroup_mma_wait(0, [part])
        sums += part * factor[None, :]
        if STAGES < BLOCKS:
            gl.barrier()  # all warps have read the slot
            more = k + STAGES < BLOCKS
            mbarrier.expect(full.index(slot), size, pred=more)
            at = k + STAGES
            tma.async_load(weight, [column, (first + at) * 128], full.index(slot), w_ring.index(slot), pred=more)
            tma.async_load(data, [token, (start + at) * 128], full.index(slot), x_ring.index(slot), pred=more)
    _write(out, sums, column, token, tokens, N, CTAS)


@gluon.jit
def few_mixed(
    x, weight, out, tokens,
    N: gl.constexpr, K: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, CTAS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """x [T, K] by weight [N, K], bfloat16; out float32 [T, N]."""
    BLOCKS: gl.constexpr = K // 64 // CTAS
    WARPS: gl.constexpr = gl.num_warps()
    COLUMNS: gl.constexpr = (N + BN - 1) // BN
    column = gl.program_id(0) % COLUMNS * BN
    token = gl.program_id(0) // COLUMNS * BT
    first = _block(CTAS) * BLOCKS
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, BN, 64], weight.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BT, 64], x.layout)
    full = _barriers(STAGES)
    size: gl.constexpr = x.nbytes_per_cta + weight.nbytes_per_cta
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), size)
        tma.async_load(weight, [column, (first + i) * 64], full.index(i), w_ring.index(i))
    gl.inline_asm("griddepcontrol.wait;")  # until here nothing was read that the kernel in front may write
    for i in gl.static_range(STAGES):
        tma.async_load(x, [token, (first + i) * 64], full.index(i), x_ring.index(i))
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BT, 16], _bases(CTAS, 2, None))
    sums = gl.zeros([BN, BT], gl.float32, mma)
    for k in range(BLOCKS):
        slot = k % STAGES
        mbarrier.wait(full.index(slot), k // STAGES & 1)
        sums = warpgroup_mma(w_ring.index(slot), x_ring.index(slot).permute((1, 0)), sums)
        if STAGES < BLOCKS:
            gl.barrier()  # all warps have read the slot
            more = k + STAGES < BLOCKS
            mbarrier.expect(full.index(slot), size, pred=more)
            at = (first + k + STAGES) * 64
            tma.async_load(weight, [column, at], full.index(slot), w_ring.index(slot), pred=more)
            tma.async_load(x, [token, at], full.index(slot), x_ring.index(slot), pred=more)
    _write(out, sums, column, token, tokens, N, CTAS)
