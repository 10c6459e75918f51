"""Scores over paged keys of 128 channels with 64 heads, on the FP8 matrix units.

Keys are the rows of a product and heads its columns, so the weighted sum over heads runs along registers. The product
of 64 keys is in flight while the one before is rectified, weighted and summed on the vector units: 64 heads x 2
instructions a key and token take half of the issue slots of the product's time.

    score_keys    many tokens of one request: a block keeps its keys in registers and streams the tokens past them; a
                  key is loaded once for a block of tokens, an FP4 key made E4M3 once
    score_pages   tokens that share no keys: a block reads its share of all pages through a ring of copies

Legend: H heads, C channels, E entries a row of scores holds, BK keys of a block (MT tiles of 16 rows a warp).
"""

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

from dsv4c.schedules.triton.index_widen import (
    PAGE,
    largest_exponent,
    one_row_layout,
    packed_layout,
    power_of_two,
    widen_page,
    widen_tile,
)

NAN = gl.constexpr(tl.PropagateNan.ALL)
GROUP = gl.constexpr(16)  # entries whose maximum top-k asks for: the rows of a warp's tile


@gluon.jit
def _add(a, b):
    return a + b


@gluon.constexpr_function
def _weighted_sum(outputs, inputs):
    """Text of a thread's part of sum_h w_h relu(s_h), NaN kept, and of the sum over the four threads of a row.

    A thread holds rows g and g + 8 (bit 1 of the register) of 16 heads; of each pair of threads the even one ends with
    row g and the odd one with row g + 8.
    """
    ((out,),) = (outputs[0],)
    products, weights = inputs
    text = ["{", ".reg .f32 x, keep, give, s<4>;", ".reg .b32 lane;", ".reg .pred odd;"]
    started = set()
    for r, (s, w) in enumerate(zip(products, weights)):
        chain = (r >> 1 & 1) * 2 + (r >> 2 & 1)  # two chains a row: a multiply-add waits for the one before
        text.append(f"max.NaN.f32 x, {s}, 0f00000000;")
        text.append(f"fma.rn.f32 s{chain}, x, {w}, s{chain};" if chain in started else f"mul.rn.f32 s{chain}, x, {w};")
        started.add(chain)
    text += [
        "add.f32 s0, s0, s1;", "add.f32 s2, s2, s3;", "mov.u32 lane, %laneid;", "and.b32 lane, lane, 1;",
        "setp.ne.u32 odd, lane, 0;", "selp.f32 keep, s2, s0, odd;", "selp.f32 give, s0, s2, odd;",
        "shfl.sync.bfly.b32 x, give, 1, 31, -1;", "add.f32 keep, keep, x;",
        "shfl.sync.bfly.b32 x, keep, 2, 31, -1;", f"add.f32 {out}, keep, x;", "}",
    ]  # fmt: skip
    return "\n".join(text)


# The highest of a warp's scores as an integer in their order (topk.py: `ordered`).
_WARP_MAXIMUM = gl.constexpr("""
{
.reg .b32 x, s;
shr.s32 s, $1, 31;
lop3.b32 x, s, 0x7fffffff, $1, 0x6A;
redux.sync.max.s32 $0, x, -1;
}
""")


@gluon.jit
def finish(
    done, w, scale, row, groups, left, inside, ahead, key_of, MAXIMA: gl.constexpr, NUM_WARPS: gl.constexpr
):  # fmt: skip
    """Scores of a tile of keys from their products with one token's heads.

    row, groups: where the scores go, and (a whole group alike) the maxima of their groups; `inside`: if they go there.
    The token sees the keys with `ahead` < left.
    """
    layout: gl.constexpr = one_row_layout(NUM_WARPS)
    kind: gl.constexpr = gl.distributed_type(gl.float32, [16 * NUM_WARPS], layout)
    total = gl.inline_asm(_weighted_sum, ("=f", "f", "f"), [done, w], kind, is_pure=True)
    # + 0 makes a zero positive, and the maximum takes -inf for NaN
    score = gl.where(ahead < left, gl.maximum(gl.fma(total, scale, 0.0), float("-inf")), float("-inf"))
    gl.store(row, score, mask=inside)
    if MAXIMA:
        bits = score.to(gl.int32, bitcast=True)
        most = gl.inline_asm_elementwise(_WARP_MAXIMUM, "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1)
        gl.store(groups, most, mask=inside & (key_of % GROUP == 0))


@gluon.jit
def ask_tokens(data, weight, token, bar, q_stage, w_stage, TS: gl.constexpr):
    """Queries and weights of TS tokens into one stage of their rings."""
    mbarrier.expect(bar, TS * (64 * 128 + 64 * 4))
    tma.async_load(data, [token * 64, 0], bar, q_stage)
    tma.async_load(weight, [token, 0], bar, w_stage)


@gluon.jit
def score_keys(
    data, weight, keys, pool, pages, requests, positions, scores, entries, columns, first, count, maxima_at,
    RATIO: gl.constexpr, FP4: gl.constexpr, LEAST: gl.constexpr, MAXIMA: gl.constexpr,
    BT: gl.constexpr, TS: gl.constexpr, MT: gl.constexpr, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Rows `first` to `first + count` of the batch to rows 0 to `count` of scores; maxima lie `maxima_at` behind.

    data: tiles [TS * 64, 128] of E4M3 [T * H, C]; weight: tiles [TS, 64] of float32 [T, H]; keys: tiles of one page of
    the pool's data bytes, pool: all its bytes. Tokens that see at most LEAST entries may be left out.
    """
    gl.inline_asm("griddepcontrol.wait;", "~{memory}")
    gl.inline_asm("griddepcontrol.launch_dependents;", "~{memory}")
    H: gl.constexpr = 64
    C: gl.constexpr = 128
    ROWS: gl.constexpr = 16 * NUM_WARPS
    TILE_PAGES: gl.constexpr = ROWS // PAGE
    BK: gl.constexpr = MT * ROWS
    KEY_BYTES: gl.constexpr = 64 if FP4 else 128
    PAGE_BYTES: gl.constexpr = 64 * (KEY_BYTES + 4)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, 64, 32])
    row: gl.constexpr = one_row_layout(NUM_WARPS)
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)

    q_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TS * H, C], data.layout)
    w_ring = gl.allocate_shared_memory(gl.float32, [STAGES, TS, H], weight.layout)
    seen_list = gl.allocate_shared_memory(gl.int32, [BT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    key_tiles = gl.allocate_shared_memory(gl.float8e4nv, [1 if FP4 else MT, ROWS, C], wide)
    if FP4:
        packed = gl.allocate_shared_memory(gl.uint8, [MT * TILE_PAGES, PAGE, KEY_BYTES], keys.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    mbarrier.init(loaded, count=1)
    fence_async_shared()

    block_key = gl.program_id(0) * BK
    token_layout: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    slot = gl.arange(0, BT, layout=token_layout)
    begin = gl.program_id(1) * BT
    stop = gl.minimum(begin + BT, count)
    inside = begin + slot < stop
    request_of = gl.load(requests + first + begin + slot, mask=inside, other=-1)
    position_of = gl.load(positions + first + begin + slot, mask=inside, other=-1)
    seen_of = gl.minimum((position_of + 1) // RATIO, entries).to(gl.int32)
    wanted = inside & (seen_of > gl.maximum(block_key, LEAST))
    seen_list.store(seen_of)
    key_of = gl.arange(0, ROWS, layout=row)

    issued = 0  # stages asked for
    turn = 0  # runs whose keys were loaded
    at = 0
    while at < stop - begin:
        request = gl.load(requests + first + begin + at)
        after = gl.min(gl.where((slot > at) & (request_of != request), slot, BT), axis=0)
        mine = wanted & (slot >= at) & (slot < after)
        low = gl.min(gl.where(mine, slot, BT), axis=0)
        high = gl.max(gl.where(mine, slot, -1), axis=0)
        live = gl.cdiv(gl.max(gl.where(mine, seen_of, 0), axis=0), PAGE)
        if low <= high:
            steps = gl.cdiv(high - low + 1, TS)
            token = first + begin + low
            for s in gl.static_range(STAGES):
                if s < steps:
                    stage = (issued + s) % STAGES
                    ask_tokens(data, weight, token + s * TS, ready.index(stage), q_ring.index(stage),
                               w_ring.index(stage), TS)  # fmt: skip
            table = pages + request * columns
            mbarrier.expect(loaded, MT * TILE_PAGES * PAGE * KEY_BYTES)
            for p in gl.static_range(MT * TILE_PAGES):
                page = gl.load(table + gl.minimum(block_key // PAGE + p, live - 1)).to(gl.int32)
                if FP4:
                    target = packed.index(p)
                else:
                    target = key_tiles.index(p // TILE_PAGES).slice(p % TILE_PAGES * PAGE, PAGE)
                tma.async_load(keys, [page * (PAGE_BYTES // KEY_BYTES), 0], loaded, target)
            mbarrier.wait(loaded, turn & 1)
            turn += 1
            operands = ()
            scales = ()
            for m in gl.static_range(MT):
                if FP4:
                    gl.barrier()  # everyone has read the tile before
                    for p in gl.static_range(TILE_PAGES):
                        page = gl.load(table + gl.minimum((block_key + m * ROWS) // PAGE + p, live - 1))
                        target = key_tiles.index(0).slice(p * PAGE, PAGE)
                        widen_page(packed.index(m * TILE_PAGES + p), target, pool, page * PAGE_BYTES, NUM_WARPS)
                    gl.barrier()
                page_of = gl.load(table + gl.minimum((block_key + m * ROWS + key_of) // PAGE, live - 1))
                where_scale = page_of * PAGE_BYTES + PAGE * KEY_BYTES + key_of % PAGE * 4
                if FP4:
                    word = gl.load((pool + where_scale).to(gl.pointer_type(gl.int32)))
                    scale = power_of_two(largest_exponent(word))
                else:
                    scale = gl.load((pool + where_scale).to(gl.pointer_type(gl.float32)))
                scales = scales + (scale,)  # noqa: RUF005 (the kernel language knows no unpacking)
                operands = operands + (key_tiles.index(0 if FP4 else m).load(operand),)  # noqa: RUF005

            spare = gl.zeros([ROWS, H], gl.float32, mma)
            for i in range(steps):
                stage = (issued + i) % STAGES
                mbarrier.wait(ready.index(stage), ((issued + i) // STAGES) & 1)
                busy = warpgroup_mma(operands[0], q_ring.index(stage).slice(0, H).permute((1, 0)), spare,
                                     use_acc=False, is_async=True)  # fmt: skip
                for j in gl.static_range(TS):
                    here = low + i * TS + j
                    w = w_ring.index(stage).slice(j, 1).load(mma)
                    seen = seen_list.gather(gl.full_like(key_of, 0) + gl.minimum(here, BT - 1), 0)
                    left = seen - block_key - key_of
                    line = (begin + here).to(gl.int64)
                    to = scores + line * entries + block_key + key_of
                    groups = scores + maxima_at + line * (entries // GROUP) + (block_key + key_of) // GROUP
                    groups = groups.to(gl.pointer_type(gl.int32))
                    for m in gl.static_range(MT):
                        if j * MT + m + 1 < TS * MT:
                            # the next product is on its way while this one is summed up
                            q = q_ring.index(stage).slice((j * MT + m + 1) // MT * H, H).permute((1, 0))
                            product = warpgroup_mma(operands[(m + 1) % MT], q, spare, use_acc=False, is_async=True)
                            done = warpgroup_mma_wait(1, deps=[busy])
                            busy = product
                        else:
                            done = warpgroup_mma_wait(0, deps=[busy])
                            gl.barrier()  # all products of these tokens are done: their stage is free
                            if i + STAGES < steps:
                                ask_tokens(data, weight, token + (i + STAGES) * TS, ready.index(stage),
                                           q_ring.index(stage), w_ring.index(stage), TS)  # fmt: skip
                        fits = (here <= high) & (block_key + (m + 1) * ROWS <= entries)
                        finish(done, w, scales[m], to + m * ROWS, groups + m * ROWS // GROUP, left, fits, m * ROWS,
                               key_of, MAXIMA, NUM_WARPS)  # fmt: skip
                        spare = done
            issued += steps
            gl.barrier()  # every query is read: the next run may overwrite its stage
        at = after


@gluon.jit
def find_pages(table, column, last, PS: gl.constexpr):
    """The numbers of PS pages from `column` of a table on; behind `last`, that one again."""
    found = ()
    for p in gl.static_range(PS):
        page = gl.load(table + gl.minimum(column + p, last)).to(gl.int32)
        found = found + (page,)  # noqa: RUF005 (the kernel language knows no unpacking)
    return found


@gluon.jit
def ask_pages(keys, marks, found, bar, key_ring, mark_ring, at, KEY_BYTES: gl.constexpr, PS: gl.constexpr):
    """The keys and scales of PS pages into their rings from `at` on."""
    PAGE_BYTES: gl.constexpr = PAGE * (KEY_BYTES + 4)
    mbarrier.expect(bar, PS * PAGE_BYTES)
    for p in gl.static_range(PS):
        tma.async_load(keys, [found[p] * (PAGE_BYTES // 128), 0], bar, key_ring.index(at + p))
        # in rows of 256 bytes a page is its data, then one row of scales
        row = found[p] * (PAGE_BYTES // 256) + PAGE * KEY_BYTES // 256
        tma.async_load(marks, [row, 0], bar, mark_ring.index(at + p))


@gluon.jit
def multiply_page(keys, marks, q_tile, spare, FP4: gl.constexpr, mma: gl.constexpr):
    """Starts the product of a page with the query; also the scales of its keys."""
    if FP4:
        rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, packed_layout(3)))
        bits = marks.reshape([PAGE]).load(rows).to(gl.int32, bitcast=True)
        operand, scale = widen_tile(keys.load(packed_layout(2)), bits, mma)
        return warpgroup_mma(operand, q_tile.permute((1, 0)), spare, use_acc=False, is_async=True), scale
    else:
        scale = marks.reshape([PAGE]).load(one_row_layout(4))
        return warpgroup_mma(keys, q_tile.permute((1, 0)), spare, use_acc=False, is_async=True), scale


@gluon.jit
def score_pages(
    data, weight, keys, marks, pages, requests, positions, scores, columns, first, count, maxima_at,
    RATIO: gl.constexpr, FP4: gl.constexpr, LEAST: gl.constexpr, MAXIMA: gl.constexpr,
    BT: gl.constexpr, PS: gl.constexpr, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Scores of tokens that share no keys: all pages of BT tokens are dealt out evenly over the blocks.

    As `score_tokens` of triton/index.py, with a ring of STAGES times PS pages on their way. keys: tiles of one page of
    the pool's data bytes, in rows of 128 bytes; marks: tiles [1, 64] of its scales, as float32.
    """
    gl.inline_asm("griddepcontrol.wait;", "~{memory}")
    gl.inline_asm("griddepcontrol.launch_dependents;", "~{memory}")
    H: gl.constexpr = 64
    C: gl.constexpr = 128
    KEY_BYTES: gl.constexpr = 64 if FP4 else 128
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, 64, 32])
    entries = columns * PAGE

    q_tile = gl.allocate_shared_memory(gl.float8e4nv, [H, C], gl.NVMMASharedLayout(128, 8, 2))
    key_ring = gl.allocate_shared_memory(keys.dtype, [STAGES * PS, PAGE * KEY_BYTES // 128, 128], keys.layout)
    mark_ring = gl.allocate_shared_memory(gl.float32, [STAGES * PS, 1, PAGE], marks.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()

    slot = gl.arange(0, BT, layout=gl.BlockedLayout([BT // 128 if BT > 128 else 1], [32], [NUM_WARPS], [0]))
    key_of = gl.arange(0, PAGE, layout=one_row_layout(NUM_WARPS))
    issued = 0
    spares = ()
    for _ in gl.static_range(PS):
        spares = spares + (gl.zeros([PAGE, H], gl.float32, mma),)  # noqa: RUF005
    for start in range(0, count, BT):
        position = gl.load(positions + first + start + slot, mask=start + slot < count, other=-1)
        seen_of = gl.minimum((position + 1) // RATIO, entries).to(gl.int32)
        pages_of = gl.where(seen_of > LEAST, gl.cdiv(seen_of, PAGE), 0)
        ends = gl.associative_scan(pages_of, 0, _add)
        total = gl.sum(pages_of, axis=0).to(gl.int64)
        at = (total * gl.program_id(0) // gl.num_programs(0)).to(gl.int32)
        last = (total * (gl.program_id(0) + 1) // gl.num_programs(0)).to(gl.int32)
        while at < last:
            here = gl.sum((ends <= at).to(gl.int32), axis=0)  # the token of page `at`
            end = gl.sum(gl.where(slot == here, ends, 0), axis=0)
            seen = gl.sum(gl.where(slot == here, seen_of, 0), axis=0)
            line = (start + here).to(gl.int64)
            token = first + line
            low = at - end + gl.cdiv(seen, PAGE)  # the page's column of the token's table
            number = gl.minimum(end, last) - at
            steps = gl.cdiv(number, PS)
            table = pages + gl.load(requests + token) * columns + low
            for s in gl.static_range(STAGES):
                if s < steps:
                    stage = (issued + s) % STAGES
                    found = find_pages(table, s * PS, number - 1, PS)
                    ask_pages(keys, marks, found, ready.index(stage), key_ring, mark_ring, stage * PS, KEY_BYTES, PS)
            load_query(data + token * (H * C), q_tile, FP4, NUM_WARPS)
            w = gl.expand_dims(gl.load(weight + token * H + gl.arange(0, H, layout=gl.SliceLayout(0, mma))), 0)
            to = scores + line * entries + low * PAGE + key_of
            groups = scores + maxima_at + line * (entries // GROUP) + (low * PAGE + key_of) // GROUP
            groups = groups.to(gl.pointer_type(gl.int32))
            left = seen - low * PAGE - key_of  # entries from this key on
            after = find_pages(table, STAGES * PS, number - 1, PS)
            for i in range(steps):
                stage = (issued + i) % STAGES
                found = after
                after = find_pages(table, (i + 1 + STAGES) * PS, number - 1, PS)
                mbarrier.wait(ready.index(stage), ((issued + i) // STAGES) & 1)
                products = ()
                scales = ()
                for p in gl.static_range(PS):
                    product, scale = multiply_page(key_ring.index(stage * PS + p), mark_ring.index(stage * PS + p),
                                                   q_tile, spares[p], FP4, mma)  # fmt: skip
                    products = products + (product,)  # noqa: RUF005
                    scales = scales + (scale,)  # noqa: RUF005
                dones = ()
                for p in gl.static_range(PS):
                    dones = dones + (warpgroup_mma_wait(PS - 1 - p, deps=[products[p]]),)  # noqa: RUF005
                gl.barrier()  # everyone has read the stage
                if i + STAGES < steps:
                    # before the scores are written: the copies wait for all memory accesses before them
                    ask_pages(keys, marks, found, ready.index(stage), key_ring, mark_ring, stage * PS, KEY_BYTES, PS)
                for p in gl.static_range(PS):
                    ahead = (i * PS + p) * PAGE
                    finish(dones[p], w, scales[p], to + ahead, groups + ahead // GROUP, left, i * PS + p < number,
                           ahead, key_of, MAXIMA, NUM_WARPS)  # fmt: skip
                spares = dones
            issued += steps
            at += number
            gl.barrier()  # the next token's query replaces this one


@gluon.jit
def load_query(data, q_tile, FP4: gl.constexpr, NUM_WARPS: gl.constexpr):
    """One token's query into shared memory, its channels in the order of the operand that `widen_tile` makes."""
    flat: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [NUM_WARPS, 1], [1, 0])
    head = gl.arange(0, 64, layout=gl.SliceLayout(1, flat))
    channel = gl.arange(0, 128, layout=gl.SliceLayout(0, flat))
    q = gl.load(data + gl.expand_dims(head, 1) * 128 + gl.expand_dims(channel, 0))
    if FP4:
        q = gl.reshape(gl.permute(gl.reshape(q, [64, 4, 4, 2, 4]), [0, 2, 3, 1, 4]), [64, 128])
    q_tile.store(q.to(gl.float8e4nv, bitcast=True))
    fence_async_shared()
    gl.barrier()
