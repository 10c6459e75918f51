"""Scores of many tokens of one request: a block keeps its keys in registers and streams the tokens past them.

Keys are the rows of the product and heads its columns, so the weighted sum over heads runs along registers. A key is
loaded once for a whole block of tokens, an FP4 key made E4M3 once. The product of the next 64 keys a warpgroup is in
flight while the one before is rectified, weighted and summed on the vector units: 64 heads x 2 instructions a key and
token fill half of the issue slots that the product takes.

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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

PAGE = gl.constexpr(64)  # keys
NAN = gl.constexpr(tl.PropagateNan.ALL)
GROUP = gl.constexpr(16)  # entries whose maximum top-k asks for: the rows of a warp's tile

# One word of E2M1 codes to two words of E4M3 in channel order (see triton/index.py).
_E2M1_TO_E4M3 = gl.constexpr("""
{
.reg .b32 low, high, code, s;
and.b32 code, $2, 0x77777777;
shr.u32 high, code, 16;
prmt.b32 low, $3, $4, code;
prmt.b32 high, $3, $4, high;
prmt.b32 s, 0x80808080, 0x80808080, $2;
shl.b32 s, s, 1;
lop3.b32 $0, s, 0x80808080, low, 0xEA;
shr.u32 code, $2, 16;
prmt.b32 s, 0x80808080, 0x80808080, code;
shl.b32 s, s, 1;
lop3.b32 $1, s, 0x80808080, high, 0xEA;
}
""")


@gluon.jit
def magnitudes(exponent):
    """Words with the E4M3 magnitudes of the E2M1 codes 0-3 and 4-7 times 2^(exponent - 6) (see triton/index.py)."""
    step = exponent * 0x08080808
    down = gl.minimum(gl.maximum(0 - exponent, 0), 8)
    keep = (0xFF >> down) * 0x01010101
    low = gl.where(exponent > 0, (step & -256) + 0x0C080000, (0x0C080400 >> down) & keep)
    high = gl.where(exponent > -2, step + 0x1C181410, (0x30201810 >> down) & keep)
    return low, high


@gluon.jit
def widen_page(packed, keys, pool, at, NUM_WARPS: gl.constexpr):
    """E4M3 keys [64, 128] in shared memory from E2M1 ones [64, 64 bytes]; the page's bytes start at pool + at."""
    word: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [NUM_WARPS, 1], [1, 0])  # a thread: 32 channels of a key
    group: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [NUM_WARPS, 1, 1], [2, 1, 0])
    four: gl.constexpr = gl.SliceLayout(2, group)
    codes = packed.reinterpret(gl.int32, [PAGE, 16], gl.NVMMASharedLayout(64, 32, 2)).load(word)
    codes = gl.convert_layout(gl.reshape(codes, [PAGE, 4, 4]), group)
    key = gl.arange(0, PAGE, layout=gl.SliceLayout(1, four))
    place = gl.arange(0, 4, layout=gl.SliceLayout(0, four))
    exponent = gl.load(pool + at + PAGE * 64 + gl.expand_dims(key, 1) * 4 + gl.expand_dims(place, 0)).to(gl.int32)
    low, high = magnitudes(exponent - gl.expand_dims(gl.max(exponent, axis=1), 1) + 12)
    low, _ = gl.broadcast(gl.expand_dims(low, 2), codes)
    high, _ = gl.broadcast(gl.expand_dims(high, 2), codes)
    first, second = gl.inline_asm_elementwise(
        _E2M1_TO_E4M3, "=r,=r,r,r,r", [codes, low, high], dtype=[gl.int32, gl.int32], is_pure=True, pack=1
    )
    wide = gl.reshape(gl.join(first, second), [PAGE, 32])
    keys.reinterpret(gl.int32, [PAGE, 32], gl.NVMMASharedLayout(128, 32, 2)).store(wide)


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


_WARP_MAXIMUM = gl.constexpr("""
{
.reg .b32 x, s;
shr.s32 s, $1, 31;
lop3.b32 x, s, 0x7fffffff, $1, 0x6A;
redux.sync.max.s32 x, x, -1;
shr.s32 s, x, 31;
lop3.b32 $0, s, 0x7fffffff, x, 0x6A;
}
""")


@gluon.constexpr_function
def one_row_layout(num_warps):
    """A row a thread, as `_weighted_sum` leaves them: bit 0 of the lane is row bit 3, bit 1 repeats."""
    warps = [[16 << i] for i in range(num_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([], [[8], [0], [1], [2], [4]], warps, [], [16 * num_warps])


@gluon.jit
def finish(
    done, w, scale, scores, maxima, entry, seen, entries, MAXIMA: gl.constexpr, NUM_WARPS: gl.constexpr
):  # fmt: skip
    """Scores of a tile of keys from their products with one token's heads, written to its row."""
    row: gl.constexpr = one_row_layout(NUM_WARPS)
    kind: gl.constexpr = gl.distributed_type(gl.float32, [16 * NUM_WARPS], row)
    score = gl.inline_asm(_weighted_sum, ("=f", "f", "f"), [done, w], kind, is_pure=True) * scale
    score = gl.where((entry < seen) & (score == score), score, float("-inf"))
    gl.store(scores + entry, score, mask=entry < entries)
    if MAXIMA:
        bits = score.to(gl.int32, bitcast=True)
        most = gl.inline_asm_elementwise(_WARP_MAXIMUM, "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1)
        first = (entry % GROUP == 0) & (entry < entries)
        gl.store(maxima + entry // GROUP, most.to(gl.float32, bitcast=True), mask=first)


@gluon.jit
def score_keys(
    data, weight, keys, pool, pages, requests, positions, scores, entries, columns, first, count, maxima_at,
    RATIO: gl.constexpr, FP4: gl.constexpr, LEAST: gl.constexpr, MAXIMA: gl.constexpr,
    BT: gl.constexpr, MT: gl.constexpr, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Rows `first` to `first + count` of the batch to rows 0 to `count` of scores; maxima lie `maxima_at` behind.

    data: tiles [64, 128] of E4M3 [T * H, C]; weight: tiles [1, 64] of float32 [T, H]; keys: tiles of one page of the
    pool's data bytes, pool: all its bytes. Tokens that see at most LEAST entries may be left out.
    """
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

    q_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, H, C], data.layout)
    w_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, H], weight.layout)
    key_tile = gl.allocate_shared_memory(gl.float8e4nv, [ROWS, C], wide)
    if FP4:
        packed = gl.allocate_shared_memory(gl.uint8, [TILE_PAGES, PAGE, KEY_BYTES], keys.layout)
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

    issued = 0  # tokens whose query was asked for
    turn = 0  # tiles of keys loaded
    at = 0
    while at < stop - begin:
        request = gl.load(requests + first + begin + at)
        after = gl.min(gl.where((slot > at) & (request_of != request), slot, BT), axis=0)
        mine = wanted & (slot >= at) & (slot < after)
        low = gl.min(gl.where(mine, slot, BT), axis=0)
        high = gl.max(gl.where(mine, slot, -1), axis=0)
        live = gl.cdiv(gl.max(gl.where(mine, seen_of, 0), axis=0), PAGE)
        if low <= high:
            tokens = high - low + 1
            token = first + begin + low
            for s in gl.static_range(STAGES):
                if s < tokens:
                    bar = ready.index((issued + s) % STAGES)
                    mbarrier.expect(bar, H * C + 4 * H)
                    tma.async_load(data, [(token + s) * H, 0], bar, q_ring.index((issued + s) % STAGES))
                    tma.async_load(weight, [token + s, 0], bar, w_ring.index((issued + s) % STAGES))
            table = pages + request * columns
            operands = ()
            scales = ()
            for m in gl.static_range(MT):
                gl.barrier()  # everyone has read the tile before
                mbarrier.expect(loaded, TILE_PAGES * PAGE * KEY_BYTES)
                for p in gl.static_range(TILE_PAGES):
                    column = (block_key + m * ROWS) // PAGE + p
                    page = gl.load(table + gl.minimum(column, live - 1)).to(gl.int32)
                    target = packed.index(p) if FP4 else key_tile.slice(p * PAGE, PAGE)
                    tma.async_load(keys, [page * (PAGE_BYTES // KEY_BYTES), 0], loaded, target)
                mbarrier.wait(loaded, turn & 1)
                turn += 1
                if FP4:
                    for p in gl.static_range(TILE_PAGES):
                        column = (block_key + m * ROWS) // PAGE + p
                        page = gl.load(table + gl.minimum(column, live - 1))
                        widen_page(packed.index(p), key_tile.slice(p * PAGE, PAGE), pool, page * PAGE_BYTES, NUM_WARPS)
                    gl.barrier()
                entry = block_key + m * ROWS + gl.arange(0, ROWS, layout=row)
                page_of = gl.load(table + gl.minimum(entry // PAGE, live - 1))
                where_scale = page_of * PAGE_BYTES + PAGE * KEY_BYTES + entry % PAGE * 4
                if FP4:
                    word = gl.load((pool + where_scale).to(gl.pointer_type(gl.int32)))
                    upper = gl.maximum((word >> 16) & 0xFF, (word >> 24) & 0xFF)
                    most = gl.maximum(gl.maximum(word & 0xFF, (word >> 8) & 0xFF), upper)
                    scale = (most << 23).to(gl.float32, bitcast=True) * 0.015625
                else:
                    scale = gl.load((pool + where_scale).to(gl.pointer_type(gl.float32)))
                scales = scales + (scale,)  # noqa: RUF005 (the kernel language knows no unpacking)
                operands = operands + (key_tile.load(operand),)  # noqa: RUF005

            spare = gl.zeros([ROWS, H], gl.float32, mma)
            busy = warpgroup_mma_init(gl.zeros([ROWS, H], gl.float32, mma))
            for i in range(tokens):
                stage = (issued + i) % STAGES
                mbarrier.wait(ready.index(stage), ((issued + i) // STAGES) & 1)
                q = q_ring.index(stage).permute((1, 0))
                w = w_ring.index(stage).load(mma)
                here = (begin + low + i).to(gl.int64)
                seen = gl.minimum((gl.load(positions + first + here) + 1) // RATIO, entries).to(gl.int32)
                row_here = scores + here * entries
                group_here = scores + maxima_at + here * (entries // GROUP)
                busy = warpgroup_mma(operands[0], q, spare, use_acc=False, is_async=True)
                for m in gl.static_range(1, MT):
                    product = warpgroup_mma(operands[m], q, spare, use_acc=False, is_async=True)
                    done = warpgroup_mma_wait(1, deps=[busy])
                    entry = block_key + (m - 1) * ROWS + gl.arange(0, ROWS, layout=row)
                    finish(done, w, scales[m - 1], row_here, group_here, entry, seen, entries, MAXIMA, NUM_WARPS)
                    busy = product
                done = warpgroup_mma_wait(0, deps=[busy])
                gl.barrier()  # all products of the token are done: its stage is free
                if i + STAGES < tokens:
                    mbarrier.expect(ready.index(stage), H * C + 4 * H)
                    tma.async_load(data, [(token + i + STAGES) * H, 0], ready.index(stage), q_ring.index(stage))
                    tma.async_load(weight, [token + i + STAGES, 0], ready.index(stage), w_ring.index(stage))
                entry = block_key + (MT - 1) * ROWS + gl.arange(0, ROWS, layout=row)
                finish(done, w, scales[MT - 1], row_here, group_here, entry, seen, entries, MAXIMA, NUM_WARPS)
            issued += tokens
            gl.barrier()  # every query is read: the next run may overwrite its stage
        at = after
