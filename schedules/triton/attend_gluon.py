"""Attention over packed FP8 pools for Hopper, 64 heads of 512 channels a tile, with four specialised warp groups.

A thread block takes items (token, 64 heads, share of the keys) in turn. For each tile of 64 keys
    fill    gathers the entries, dequantises them in registers and writes bfloat16 [64, 512] to shared memory;
    score   multiplies by the queries, keeps the running maximum and sum, and publishes weights and the factor by
            which what was summed so far shrinks;
    values  (two groups, 256 channels each) shrink their sum and add weights x keys.
Two tiles are in shared memory: one is scored while the other is summed. A tile is given back in halves of 32 keys, so
that its refill overlaps with the rest of the sum. The limit is shared memory: 64 KB written, 192 KB read by the matrix
units a tile, against 128 bytes a cycle, is 2,050 cycles, as many as the matrix units need.

Legend: K = 64 keys of a tile, H = 64 heads of an item.
"""

import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsv4c.schedules.triton.attend_fill import fill, item_of

LOG2E = gl.constexpr(1.4426950408889634)
C = gl.constexpr(512)


@gluon.jit
def _load_queries(q, item, to):
    """Starts copying the 64 heads of an item."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    c = gl.arange(0, C, layout=gl.SliceLayout(0, LAYOUT))
    start = q + item.to(gl.int64) * (64 * C)
    async_copy.async_load(to.index(0), start + gl.expand_dims(h, 1) * C + gl.expand_dims(c, 0))
    async_copy.commit_group()


@gluon.jit
def _products(queries, keys, step, ACC: gl.constexpr):
    """Products of the queries and a tile's keys."""
    zero = gl.zeros([64, 64], gl.float32, ACC)
    # index 0, but the compiler must not know: it would keep 32 descriptors in registers it does not have
    query = queries.index(step >> 31)
    running = warpgroup_mma(query, keys.index(step & 1).permute([1, 0]), zero, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, [running])


@gluon.jit
def _publish(
    scores, top, weight_sum, step, bias, weights, shrinks, inverse, weights_ready, weights_empty,
    LAST: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The tile's weights to shared memory; the new maximum and sum."""
    stage = step & 1
    column: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    x = scores * (LOG2E * C**-0.5) + gl.expand_dims(bias.index(stage).load(column), 0)
    # the maximum only has to keep weights in range: while they stay below 2**8, the sums need no new scale
    higher = gl.max(x, 1)
    higher = gl.where(higher > top + 8.0, higher, top)
    shrink = gl.exp2(top - higher)
    weight = gl.exp2(x - gl.expand_dims(higher, 1))
    weight_sum = weight_sum * shrink + gl.sum(weight, 1)
    mbarrier.wait(weights_empty.index(stage), ((step >> 1) & 1) ^ 1)
    weights.index(stage).store(weight.to(gl.bfloat16))
    shrinks.index(stage).store(shrink)
    if LAST:
        # 0 only in a share without keys, which the combine leaves out
        inverse.store(1.0 / gl.maximum(weight_sum, 1e-38))
    fence_async_shared()
    mbarrier.arrive(weights_ready.index(stage))
    return higher, weight_sum


@gluon.jit
def _score(
    q, sink, lse, items, queries, keys, bias, lengths, weights, shrinks, inverses,
    ready, weights_ready, weights_empty, BLOCKS: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """Scores of each tile and their softmax, in units of log2. The next item's queries load during the last softmax."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    h = gl.arange(0, 64, layout=ROWS)
    step = 0
    number = 0
    _load_queries(q, gl.program_id(0) // SHARES, queries)
    next_sink = gl.load(sink + gl.program_id(0) // SHARES % BLOCKS * 64 + h)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, block, share = item_of(item, BLOCKS, SHARES)
        # starts at the sink, whose weight counts once
        top = gl.maximum(next_sink * LOG2E, -1e30, propagate_nan=tl.PropagateNan.ALL)
        weight_sum = gl.where(share == 0, 1.0, 0.0) + gl.zeros([64], gl.float32, ROWS)
        inverse = inverses.index(number & 3)
        number = number + 1
        async_copy.wait_group(0)
        fence_async_shared()
        gl.barrier()
        mbarrier.wait(ready.index(step & 1), (step >> 1) & 1)
        tiles = gl.max(lengths.index(step & 1).load(ONE), 0)
        scores = _products(queries, keys, step, ACC)
        for _tile in range(tiles - 1):
            # before the next tile is waited for: its room is free only after the values of the one before this
            top, weight_sum = _publish(
                scores, top, weight_sum, step, bias, weights, shrinks, inverse, weights_ready, weights_empty, False, ACC
            )
            step += 1
            mbarrier.wait(ready.index(step & 1), (step >> 1) & 1)
            scores = _products(queries, keys, step, ACC)
        gl.barrier()
        following = gl.minimum(item + gl.num_programs(0), items - 1) // SHARES
        _load_queries(q, following, queries)
        next_sink = gl.load(sink + following % BLOCKS * 64 + h)
        top, weight_sum = _publish(
            scores, top, weight_sum, step, bias, weights, shrinks, inverse, weights_ready, weights_empty, True, ACC
        )
        step += 1
        if SHARES > 1:
            at = lse + ((token.to(gl.int64) * SHARES + share) * BLOCKS + block) * 64
            gl.store(at + h, gl.where(weight_sum == 0, float("-inf"), top + gl.log2(weight_sum)))
    async_copy.wait_group(0)


@gluon.constexpr_function
def _shrink_text(outputs, inputs):
    """Multiplies by the factors of a thread's two rows, unless those of the whole warp are 1."""
    (sums,), (_, (low, high)) = outputs, inputs
    lines = ["{", ".reg .pred p;", f"setp.eq.f32 p, {low}, 0f3f800000;", f"setp.eq.and.f32 p, {high}, 0f3f800000, p;"]
    lines += ["vote.sync.all.pred p, p, 0xffffffff;", "@p bra DONE;"]
    # a product's registers: two columns of the lower row, the same two of the upper one, and so on
    lines += [f"mul.f32 {one}, {one}, {(low, high)[i // 2 % 2]};" for i, one in enumerate(sums)]
    return "\n".join([*lines, "DONE:", "}"])


@gluon.constexpr_function
def _shrink_constraints(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f", "f"])


@gluon.jit
def _shrink(acc, factors):
    """acc * factors[:, None]; nothing where a warp's factors are 1, as they are for most tiles."""
    CONSTRAINTS: gl.constexpr = _shrink_constraints(128)
    return gl.inline_asm(_shrink_text, CONSTRAINTS, [acc, factors], acc.type, is_pure=True)


@gluon.jit
def _values(
    out, items, keys, lengths, weights, shrinks, inverses, empty, weights_ready, weights_empty,
    FROM: gl.constexpr, BLOCKS: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """Channels FROM to FROM + 255 of the result. `out`: [token, share, head, channel]."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    # 8 channels a thread: the products' layout has 2, half a sector a row; rows stay in their warps
    OUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [0, 128], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 256],
    )
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    c = gl.arange(0, 256, layout=gl.SliceLayout(0, OUT))
    step = 0
    number = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, block, share = item_of(item, BLOCKS, SHARES)
        acc = gl.zeros([64, 256], gl.float32, ACC)
        mbarrier.wait(weights_ready.index(step & 1), (step >> 1) & 1)
        tiles = gl.max(lengths.index(step & 1).load(ONE), 0)
        for _tile in range(tiles):
            stage = step & 1
            mbarrier.wait(weights_ready.index(stage), (step >> 1) & 1)
            acc = _shrink(acc, shrinks.index(stage).load(ROWS))
            value = keys.index(stage).slice(FROM, 256, dim=1)
            weight = weights.index(stage)
            running = warpgroup_mma(weight.slice(0, 32, dim=1), value.slice(0, 32, dim=0), acc, is_async=True)
            running = warpgroup_mma(weight.slice(32, 32, dim=1), value.slice(32, 32, dim=0), running, is_async=True)
            running = warpgroup_mma_wait(1, [running])
            mbarrier.arrive(empty.index(stage * 2))
            acc = warpgroup_mma_wait(0, [running])
            mbarrier.arrive(empty.index(stage * 2 + 1))
            mbarrier.arrive(weights_empty.index(stage))
            step += 1
        acc = acc * gl.expand_dims(inverses.index(number & 3).load(ROWS), 1)
        number = number + 1
        start = out + ((token.to(gl.int64) * SHARES + share) * BLOCKS + block) * (64 * C) + FROM
        gl.store(start + gl.expand_dims(h, 1) * C + gl.expand_dims(c, 0), gl.convert_layout(acc.to(gl.bfloat16), OUT))


@gluon.jit
def attend(
    q, pool, pages, entry_pool, entry_pages, picks, request_rows, positions, sink, out, lse,
    tokens, columns, entry_columns,
    KIND: gl.constexpr, BLOCKS: gl.constexpr, WINDOW: gl.constexpr, PAGE: gl.constexpr, ENTRIES: gl.constexpr,
    RATIO: gl.constexpr, TOPK: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """KIND: `window`, `csa` or `hca`; BLOCKS of 64 heads. Any grid: each program takes every grid-th item.

    With one share `out` is the result; else it is bfloat16 [T, SHARES, H, C], with `lse` float32 [T, SHARES, H], for
    `combine`. 4 warps and 12 specialised ones.
    """
    gl.inline_asm("griddepcontrol.wait;", "~{memory}")
    gl.inline_asm("griddepcontrol.launch_dependents;", "~{memory}")
    items = tokens * (BLOCKS * SHARES)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queries = gl.allocate_shared_memory(gl.bfloat16, [1, 64, C], wide)
    keys = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C], wide)
    weights = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], wide)
    bias = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    shrinks = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    inverses = gl.allocate_shared_memory(gl.float32, [4, 64], flat)  # by item: the values lag by less than 3
    lengths = gl.allocate_shared_memory(gl.int32, [2, 1], flat)
    addresses = gl.allocate_shared_memory(gl.int64, [4, 64], flat)  # of data, 2 tiles; of scales, 2 tiles
    ahead = gl.allocate_shared_memory(gl.int32, [2, 64], flat)  # pages, picks
    ready = mbarrier.allocate_mbarrier(batch=2)  # both halves of a tile are filled
    empty = mbarrier.allocate_mbarrier(batch=4)  # both value groups are done with a half
    weights_ready = mbarrier.allocate_mbarrier(batch=2)
    weights_empty = mbarrier.allocate_mbarrier(batch=2)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=8)  # 4 warps, 2 halves
        mbarrier.init(weights_ready.index(i), count=1)
        mbarrier.init(weights_empty.index(i), count=2)
    for i in gl.static_range(4):
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _score,
                (
                    q, sink, lse, items, queries, keys, bias, lengths, weights, shrinks, inverses,
                    ready, weights_ready, weights_empty, BLOCKS, SHARES,
                ),
            ),
            (
                _values,
                (
                    out, items, keys, lengths, weights, shrinks, inverses, empty, weights_ready, weights_empty,
                    0, BLOCKS, SHARES,
                ),
            ),
            (
                _values,
                (
                    out, items, keys, lengths, weights, shrinks, inverses, empty, weights_ready, weights_empty,
                    256, BLOCKS, SHARES,
                ),
            ),
            (
                fill,
                (
                    pool, pages, entry_pool, entry_pages, picks, request_rows, positions, items, columns, entry_columns,
                    keys, bias, lengths, addresses, ahead, ready, empty,
                    KIND, BLOCKS, WINDOW, PAGE, ENTRIES, RATIO, TOPK, SHARES,
                ),
            ),
        ],
        [4, 4, 4],
        [160, 160, 104],
    )  # fmt: skip
