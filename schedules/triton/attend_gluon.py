"""Attention over packed FP8 pools for Hopper, 64 heads of 512 channels a tile, with four specialised warp groups.

A thread block takes items (token, 64 heads, share of the keys) in turn. For each tile of 64 keys
    fill    gathers the entries, dequantises them in registers and writes bfloat16 [64, 512] to shared memory;
    score   multiplies by the queries, keeps the running maximum and sum, and publishes weights and the factor by
            which what was summed so far shrinks;
    values  (two groups, 256 channels each) shrink their sum and add weights x keys.
Two tiles are in shared memory: one is scored while the other is summed. A tile is given back in halves of 32 keys, so
that its refill overlaps with the rest of the sum. The limit is shared memory: 64 KB written, 192 KB read by the matrix
units a tile, against 128 bytes a cycle, is 2,050 cycles, as many as the matrix units need.

Keys are counted without holes: first the window's (those that exist), then the entries; an entry that nobody may see
is never read, its bfloat16 values are 0 and its score -inf.

Legend: K = 64 keys of a tile, H = 64 heads of an item.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
C = gl.constexpr(512)
PLAIN_BYTES = gl.constexpr(448)
DATA_BYTES = gl.constexpr(576)  # 448 E4M3 and 64 bfloat16
ENTRY_BYTES = gl.constexpr(584)  # and 8 scale bytes, which follow the data of the whole page

# E4M3 -> bfloat16, two at a time: the byte to the high half of its 16 bits, sign filled in below the next one's, so
# that one arithmetic shift leaves sign and exponent in place. The result is 2**-120 of the value; `$3` is the scale
# times 2**120 in both halves (exact, subnormals too).
DEQUANTISE = gl.constexpr("""
{
.reg .b32 a, b;
prmt.b32 a, $2, 0, 0x1804;
prmt.b32 b, $2, 0, 0x3A24;
shr.s32 a, a, 4;
shr.s32 b, b, 4;
and.b32 a, a, 0x87f087f0;
and.b32 b, b, 0x87f087f0;
mul.rn.bf16x2 $0, a, $3;
mul.rn.bf16x2 $1, b, $3;
}
""")


@gluon.constexpr_function
def _load_text(outputs, inputs):
    """A 16-byte load, zeros where the key is not seen."""
    words, (address,), (entry,) = outputs[0], *inputs
    lines = ["{", ".reg .pred p;", f"setp.ge.s32 p, {entry}, 0;"]
    lines += [f"mov.b32 {word}, 0;" for word in words]
    return "\n".join([*lines, f"@p ld.global.v4.b32 {{{', '.join(words)}}}, [{address}];", "}"])


@gluon.constexpr_function
def _load_scales_text(outputs, inputs):
    """An 8-byte load, zeros where the key is not seen."""
    ((low,), (high,)), (address,), (entry,) = outputs, *inputs
    lines = ["{", ".reg .pred p;", f"setp.ge.s32 p, {entry}, 0;", f"mov.b32 {low}, 0;", f"mov.b32 {high}, 0;"]
    return "\n".join([*lines, f"@p ld.global.v2.b32 {{{low}, {high}}}, [{address}];", "}"])


@gluon.jit
def _load(address, entry, WORDS: gl.constexpr):
    """16 bytes a thread: int32 [32, 16]."""
    kind: gl.constexpr = gl.distributed_type(gl.int32, [32, 16], WORDS)
    return gl.inline_asm(_load_text, ("=&r", "l", "r"), [address, entry], kind)


@gluon.jit
def _load_scales(address, entry, WORDS: gl.constexpr):
    """The 8 scale bytes of each row as two int32 [32]."""
    kind: gl.constexpr = gl.distributed_type(gl.int32, [32], gl.SliceLayout(1, WORDS))
    return gl.inline_asm(_load_scales_text, ("=&r", "=&r", "l", "r"), [address, entry], (kind, kind))


@gluon.jit
def _item(item, BLOCKS: gl.constexpr, SHARES: gl.constexpr):
    """Token, block of heads and share of an item; the blocks of a token are neighbours, for its entries in L2."""
    return item // (BLOCKS * SHARES), item // SHARES % BLOCKS, item % SHARES


@gluon.jit
def _entry(i, recent, position, complete, picks, KIND: gl.constexpr, TOPK: gl.constexpr):
    """Which entry key `i` is: of the window where i < recent, else of the compressed ones; -1 if there is none."""
    if KIND == "window":
        return gl.where(i < recent, position - recent + 1 + i, -1)
    if KIND == "csa":
        rest = gl.load(picks + (i - recent), mask=(i >= recent) & (i < recent + TOPK), other=-1)
    else:
        rest = gl.where(i < recent + complete, i - recent, -1)
    return gl.where(i < recent, position - recent + 1 + i, rest)


@gluon.jit
def _page(i, entry, recent, window_table, entry_table, KIND: gl.constexpr, PAGE: gl.constexpr, ENTRIES: gl.constexpr):
    """Pages of the entries."""
    if KIND == "window":
        return gl.load(window_table + entry // PAGE, mask=entry >= 0, other=0)
    at = gl.where(i < recent, window_table + entry // PAGE, entry_table + entry // ENTRIES)
    return gl.load(at, mask=entry >= 0, other=0)


@gluon.jit
def _pool_row(i, entry, page, recent, KIND: gl.constexpr, PAGE: gl.constexpr, ENTRIES: gl.constexpr):
    """int32 rows of the entries in their pool; -1 where the key is not seen."""
    if KIND == "window" or ENTRIES == PAGE:
        row = page.to(gl.int32) * PAGE + entry % PAGE
    else:
        row = gl.where(i < recent, page.to(gl.int32) * PAGE + entry % PAGE, page.to(gl.int32) * ENTRIES + entry % ENTRIES)
    return gl.where(entry >= 0, row, -1)


@gluon.jit
def _address(i, at, recent, pool, entry_pool, KIND: gl.constexpr, PAGE: gl.constexpr, ENTRIES: gl.constexpr):
    """Addresses of the data and of the scales of rows `at` of their pools."""
    if KIND == "window" or ENTRIES == PAGE:
        page, slot = at // PAGE, at % PAGE
        scales = PAGE * DATA_BYTES + slot * 8
        page_bytes = PAGE * ENTRY_BYTES
        start = pool.to(gl.int64) if KIND == "window" else gl.where(i < recent, pool.to(gl.int64), entry_pool.to(gl.int64))
    else:
        page = gl.where(i < recent, at // PAGE, at // ENTRIES)
        slot = gl.where(i < recent, at % PAGE, at % ENTRIES)
        per_page = gl.where(i < recent, PAGE, ENTRIES)
        scales = per_page * DATA_BYTES + slot * 8
        page_bytes = per_page * ENTRY_BYTES
        start = gl.where(i < recent, pool.to(gl.int64), entry_pool.to(gl.int64))
    start += page.to(gl.int64) * page_bytes
    return start + slot * DATA_BYTES, start + scales


@gluon.jit
def _store_plain(words, scales, to, G: gl.constexpr):
    """16 E4M3 bytes a thread, of group G, as bfloat16."""
    byte = (scales >> (8 * (G % 4))) & 255
    # the exponent field of a bfloat16, in both halves; scales of up to 2**7 fit, 57344 as the largest value
    factor = (byte + 120) * 0x00800080
    low, high = gl.inline_asm_elementwise(
        DEQUANTISE, "=r,=r,r,r", [words, gl.expand_dims(factor, 1)], (gl.int32, gl.int32), True, 1
    )
    to.slice(32 * G, 32, dim=1).store(gl.join(low, high).reshape([32, 32]))


@gluon.jit
def _fill(
    pool, pages, entry_pool, entry_pages, picks, request_rows, positions, items, columns, entry_columns,
    keys, bias, lengths, rows, ready, empty,
    KIND: gl.constexpr, BLOCKS: gl.constexpr, WINDOW: gl.constexpr, PAGE: gl.constexpr, ENTRIES: gl.constexpr,
    RATIO: gl.constexpr, TOPK: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """Fills the two tiles of keys in turn, half a tile a step: four threads an entry, 16 bytes of each 64.

    Loads run ahead: a step loads the next half's data (each register as soon as it is free); a tile finds the rows of
    the next one in its pool, the pages of the one after that and the picks of the third.
    """
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    LANES: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, LANES)
    KEYS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    COUNT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    WORDS_OF_K: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    row = gl.arange(0, 32, layout=ROWS)
    key = gl.arange(0, 64, layout=KEYS)
    lane = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, LANES)).to(gl.int64) * 16, 0)
    step = 0
    token, _block, share = _item(gl.program_id(0), BLOCKS, SHARES)
    next_position = gl.load(positions + token)
    next_request = gl.load(request_rows + token)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        position, request = next_position.to(gl.int32), next_request
        recent = gl.minimum(position + 1, WINDOW)
        complete = (position + 1) // RATIO
        window_table = pages + request * columns
        entry_table = entry_pages + request * entry_columns
        token, _block, share = _item(item, BLOCKS, SHARES)
        row_picks = picks + token.to(gl.int64) * TOPK
        total = recent
        if KIND == "csa":
            k = gl.arange(0, TOPK, layout=COUNT)
            total += gl.max(gl.where(gl.load(row_picks + k) >= 0, k + 1, 0), 0)
        if KIND == "hca":
            total += complete
        all_tiles = (total + 63) // 64
        some = (all_tiles + SHARES - 1) // SHARES
        first = share * some
        # a share without keys still makes one tile, with nothing seen
        tiles = gl.maximum(gl.minimum(some, all_tiles - first), 1)
        i = first * 64 + row
        k = first * 64 + key
        entry = _entry(k, recent, position, complete, row_picks, KIND, TOPK)
        entry1 = _entry(k + 64, recent, position, complete, row_picks, KIND, TOPK)
        entry2 = _entry(k + 128, recent, position, complete, row_picks, KIND, TOPK)
        page = _page(k, entry, recent, window_table, entry_table, KIND, PAGE, ENTRIES)
        page1 = _page(k + 64, entry1, recent, window_table, entry_table, KIND, PAGE, ENTRIES)
        token, _block, share = _item(gl.minimum(item + gl.num_programs(0), items - 1), BLOCKS, SHARES)
        next_position = gl.load(positions + token)
        next_request = gl.load(request_rows + token)
        rows.index(step & 1).store(_pool_row(k, entry, page, recent, KIND, PAGE, ENTRIES))
        at = rows.index(step & 1).slice(0, 32).load(ROWS)
        address, scale_address = _address(i, at, recent, pool, entry_pool, KIND, PAGE, ENTRIES)
        address = gl.expand_dims(address, 1) + lane
        d0 = _load(address, at, WORDS)
        d1 = _load(address + 64, at, WORDS)
        d2 = _load(address + 128, at, WORDS)
        d3 = _load(address + 192, at, WORDS)
        d4 = _load(address + 256, at, WORDS)
        d5 = _load(address + 320, at, WORDS)
        d6 = _load(address + 384, at, WORDS)
        r0 = _load(address + 448, at, WORDS)
        r1 = _load(address + 512, at, WORDS)
        s0, s1 = _load_scales(scale_address, at, WORDS)
        for _tile in range(tiles):
            stage = step & 1
            for half in gl.static_range(2):
                if half == 0:
                    after = rows.index(stage).slice(32, 32).load(ROWS)
                else:
                    k += 64
                    rows.index(stage ^ 1).store(_pool_row(k, entry1, page1, recent, KIND, PAGE, ENTRIES))
                    after = rows.index(stage ^ 1).slice(0, 32).load(ROWS)
                    page1 = _page(k + 64, entry2, recent, window_table, entry_table, KIND, PAGE, ENTRIES)
                    entry1 = entry2
                    entry2 = _entry(k + 128, recent, position, complete, row_picks, KIND, TOPK)
                i += 32
                address, scale_address = _address(i, after, recent, pool, entry_pool, KIND, PAGE, ENTRIES)
                address = gl.expand_dims(address, 1) + lane
                mbarrier.wait(empty.index(stage * 2 + half), ((step >> 1) & 1) ^ 1)
                to = keys.index(stage).reinterpret(gl.int32, [64, 256], WORDS_OF_K).slice(32 * half, 32, dim=0)
                _store_plain(d0, s0, to, 0)
                d0 = _load(address, after, WORDS)
                _store_plain(d1, s0, to, 1)
                d1 = _load(address + 64, after, WORDS)
                _store_plain(d2, s0, to, 2)
                d2 = _load(address + 128, after, WORDS)
                _store_plain(d3, s0, to, 3)
                d3 = _load(address + 192, after, WORDS)
                _store_plain(d4, s1, to, 4)
                d4 = _load(address + 256, after, WORDS)
                _store_plain(d5, s1, to, 5)
                d5 = _load(address + 320, after, WORDS)
                _store_plain(d6, s1, to, 6)
                d6 = _load(address + 384, after, WORDS)
                to.slice(224, 16, dim=1).store(r0)
                r0 = _load(address + 448, after, WORDS)
                to.slice(240, 16, dim=1).store(r1)
                r1 = _load(address + 512, after, WORDS)
                s0, s1 = _load_scales(scale_address, after, WORDS)
                bias.index(stage).slice(32 * half, 32).store(gl.where(at >= 0, 0.0, float("-inf")))
                if half == 0:
                    lengths.index(stage).store(gl.full([1], tiles, gl.int32, COUNT))
                fence_async_shared()
                mbarrier.arrive(ready.index(stage))
                at = after
            step += 1


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
    higher = gl.maximum(top, gl.max(x, 1))
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
        token, block, share = _item(item, BLOCKS, SHARES)
        # starts at the sink, whose weight counts once
        top = gl.maximum(next_sink * LOG2E, -1e30)
        weight_sum = gl.where(share == 0, 1.0, 0.0) + gl.zeros([64], gl.float32, ROWS)
        inverse = inverses.index(number & 3)
        number += 1
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
            gl.store(at + h, gl.where(weight_sum > 0, top + gl.log2(weight_sum), float("-inf")))
    async_copy.wait_group(0)


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
        token, block, share = _item(item, BLOCKS, SHARES)
        acc = gl.zeros([64, 256], gl.float32, ACC)
        mbarrier.wait(weights_ready.index(step & 1), (step >> 1) & 1)
        tiles = gl.max(lengths.index(step & 1).load(ONE), 0)
        for _tile in range(tiles):
            stage = step & 1
            mbarrier.wait(weights_ready.index(stage), (step >> 1) & 1)
            acc = acc * gl.expand_dims(shrinks.index(stage).load(ROWS), 1)
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
        number += 1
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
    rows = gl.allocate_shared_memory(gl.int32, [2, 64], flat)
    ready = mbarrier.allocate_mbarrier(batch=2)  # both halves of a tile are filled
    empty = mbarrier.allocate_mbarrier(batch=4)  # both value groups are done with a half
    weights_ready = mbarrier.allocate_mbarrier(batch=2)
    weights_empty = mbarrier.allocate_mbarrier(batch=2)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=2)
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
                _fill,
                (
                    pool, pages, entry_pool, entry_pages, picks, request_rows, positions, items, columns, entry_columns,
                    keys, bias, lengths, rows, ready, empty, KIND, BLOCKS, WINDOW, PAGE, ENTRIES, RATIO, TOPK, SHARES,
                ),
            ),
        ],
        [4, 4, 4],
        [160, 160, 96],
    )  # fmt: skip
