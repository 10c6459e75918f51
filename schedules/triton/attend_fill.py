"""The filling group of `attend_gluon`: finds, gathers and dequantises a token's entries, a tile ahead of their use.

Keys are counted without holes: first the window's (those that exist), then the entries. One that nobody may see is
never read: its bfloat16 values are 0 and its score -inf.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

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
    """A load of 4 bytes for each output register, zeros where the key is not seen."""
    words, (address, seen) = [w for operand in outputs for w in operand], [operand[0] for operand in inputs]
    lines = ["{", ".reg .pred p;", f"setp.ne.s32 p, {seen}, 0;", *(f"mov.b32 {word}, 0;" for word in words)]
    return "\n".join([*lines, f"@p ld.global.v{len(words)}.b32 {{{', '.join(words)}}}, [{address}];", "}"])


@gluon.jit
def _load(address, seen, WORDS: gl.constexpr):
    """16 bytes a thread: int32 [32, 16]."""
    kind: gl.constexpr = gl.distributed_type(gl.int32, [32, 16], WORDS)
    return gl.inline_asm(_load_text, ("=&r", "l", "r"), [address, seen], kind)


@gluon.jit
def _load_scales(address, seen, WORDS: gl.constexpr):
    """The 8 scale bytes of each row as two int32 [32]."""
    kind: gl.constexpr = gl.distributed_type(gl.int32, [32], gl.SliceLayout(1, WORDS))
    return gl.inline_asm(_load_text, ("=&r", "=&r", "l", "r"), [address, seen], (kind, kind))


@gluon.jit
def _warp_sync():
    """Holds loads back from being moved below: they start as soon as their registers are free."""
    gl.inline_asm("bar.warp.sync 0xffffffff;", "~{memory}")


@gluon.jit
def _arrive(barrier):
    """Each warp alone says that what it wrote is there for the matrix units: the group need not meet first."""
    gl.inline_asm(
        """
        {
        .reg .pred p;
        .reg .b32 lane;
        fence.proxy.async.shared::cta;
        bar.warp.sync 0xffffffff;
        elect.sync lane|p, 0xffffffff;
        @p mbarrier.arrive.shared::cta.b64 _, [$0];
        }
        """,
        "r,~{memory}",
        [barrier],
    )


@gluon.jit
def item_of(item, BLOCKS: gl.constexpr, SHARES: gl.constexpr):
    """Token, block of heads and share of an item; the blocks of a token are neighbours, for its entries in L2."""
    return item // (BLOCKS * SHARES), item // SHARES % BLOCKS, item % SHARES


@gluon.jit
def _entry(k, position, pick, WINDOW: gl.constexpr, RATIO: gl.constexpr, TOPK: gl.constexpr, KIND: gl.constexpr):
    """Which entry key `k` is: of the window where k < recent, else of the compressed ones; -1 if there is none."""
    recent = gl.minimum(position + 1, WINDOW)
    rest = -1
    if KIND == "csa":
        rest = gl.where(k < recent + TOPK, pick, -1)
    if KIND == "hca":
        rest = gl.where(k < recent + (position + 1) // RATIO, k - recent, -1)
    return gl.where(k < recent, position - recent + 1 + k, rest)


@gluon.jit
def _pick_at(k, position, picks, WINDOW: gl.constexpr, TOPK: gl.constexpr):
    """Where the pick for key `k` is, and whether there is one."""
    recent = gl.minimum(position + 1, WINDOW)
    return picks + (k - recent), (k >= recent) & (k < recent + TOPK)


@gluon.jit
def _load_entry(k, position, picks, WINDOW: gl.constexpr, RATIO: gl.constexpr, TOPK: gl.constexpr, KIND: gl.constexpr):
    """`_entry`, with the pick loaded."""
    if KIND != "csa":
        return _entry(k, position, k, WINDOW, RATIO, TOPK, KIND)
    at, some = _pick_at(k, position, picks, WINDOW, TOPK)
    return _entry(k, position, gl.load(at, mask=some, other=-1), WINDOW, RATIO, TOPK, KIND)


@gluon.jit
def _page_at(
    k, entry, position, request, pages, entry_pages, columns, entry_columns,
    WINDOW: gl.constexpr, PAGE: gl.constexpr, ENTRIES: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Where the pages of the entries are: the low halves of a table's numbers."""
    at = pages + request * columns * 2 + entry // PAGE * 2
    if KIND != "window":
        recent = gl.minimum(position + 1, WINDOW)
        at = gl.where(k < recent, at, entry_pages + request * entry_columns * 2 + entry // ENTRIES * 2)
    return at


@gluon.jit
def _store_addresses(
    k, entry, page, position, pool, entry_pool, addresses, stage,
    WINDOW: gl.constexpr, PAGE: gl.constexpr, ENTRIES: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Addresses of the data and of the scales of a tile's entries to shared memory; 0 where the key is not seen."""
    start, slot, data_bytes, page_bytes = pool.to(gl.int64), entry % PAGE, PAGE * DATA_BYTES, PAGE * ENTRY_BYTES
    if KIND != "window":
        in_window = k < gl.minimum(position + 1, WINDOW)
        start = gl.where(in_window, start, entry_pool.to(gl.int64))
        if ENTRIES != PAGE:
            slot = gl.where(in_window, slot, entry % ENTRIES)
            data_bytes = gl.where(in_window, data_bytes, ENTRIES * DATA_BYTES)
            page_bytes = gl.where(in_window, page_bytes, ENTRIES * ENTRY_BYTES)
    start += page.to(gl.int64) * page_bytes
    addresses.index(stage).store(gl.where(entry >= 0, start + slot * DATA_BYTES, 0))
    addresses.index(stage + 2).store(start + data_bytes + slot * 8)


@gluon.jit
def _store_plain(words, scales, to, G: gl.constexpr):
    """16 E4M3 bytes a thread, of group G, as bfloat16."""
    byte = gl.minimum((scales >> (8 * (G % 4))) & 255, 135)
    # the exponent field of a bfloat16, in both halves; scales of up to 2**7 fit, 57344 as the largest value; beyond it
    # is infinity's: all that is left of E8M0's NaN, as the bytes of E4M3's NaN are taken for 480
    factor = (byte + 120) * 0x00800080
    low, high = gl.inline_asm_elementwise(
        DEQUANTISE, "=r,=r,r,r", [words, gl.expand_dims(factor, 1)], (gl.int32, gl.int32), True, 1
    )
    to.slice(32 * G, 32, dim=1).store(gl.join(low, high).reshape([32, 32]))


@gluon.jit
def _load_half(addresses, stage, lane, HALF: gl.constexpr, WORDS: gl.constexpr, LANES: gl.constexpr):
    """Starts loading half a tile: data, scales, and which keys are seen."""
    ROWS: gl.constexpr = gl.SliceLayout(1, LANES)
    at = addresses.index(stage).slice(32 * HALF, 32).load(ROWS)
    seen = (at != 0).to(gl.int32)
    at = gl.expand_dims(at, 1) + lane
    s0, s1 = _load_scales(addresses.index(stage + 2).slice(32 * HALF, 32).load(ROWS), seen, WORDS)
    d0 = _load(at, seen, WORDS)
    d1 = _load(at + 64, seen, WORDS)
    d2 = _load(at + 128, seen, WORDS)
    d3 = _load(at + 192, seen, WORDS)
    d4 = _load(at + 256, seen, WORDS)
    d5 = _load(at + 320, seen, WORDS)
    d6 = _load(at + 384, seen, WORDS)
    r0 = _load(at + 448, seen, WORDS)
    r1 = _load(at + 512, seen, WORDS)
    return d0, d1, d2, d3, d4, d5, d6, r0, r1, s0, s1, seen


@gluon.jit
def _turn_over(half, addresses, stage, lane, to, bias, HALF: gl.constexpr, WORDS: gl.constexpr, LANES: gl.constexpr):
    """Writes the loaded half `half` to `to`, and loads half HALF of the tile in `stage` of `addresses`."""
    ROWS: gl.constexpr = gl.SliceLayout(1, LANES)
    d0, d1, d2, d3, d4, d5, d6, r0, r1, s0, s1, seen = half
    bias.store(gl.where(seen != 0, 0.0, float("-inf")))
    at = addresses.index(stage).slice(32 * HALF, 32).load(ROWS)
    seen = (at != 0).to(gl.int32)
    at = gl.expand_dims(at, 1) + lane
    # the scales first: they are needed first
    t0, t1 = _load_scales(addresses.index(stage + 2).slice(32 * HALF, 32).load(ROWS), seen, WORDS)
    _warp_sync()
    _store_plain(d0, s0, to, 0)
    _store_plain(d1, s0, to, 1)
    _store_plain(d2, s0, to, 2)
    d0 = _load(at, seen, WORDS)
    d1 = _load(at + 64, seen, WORDS)
    d2 = _load(at + 128, seen, WORDS)
    _warp_sync()
    _store_plain(d3, s0, to, 3)
    _store_plain(d4, s1, to, 4)
    _store_plain(d5, s1, to, 5)
    d3 = _load(at + 192, seen, WORDS)
    d4 = _load(at + 256, seen, WORDS)
    d5 = _load(at + 320, seen, WORDS)
    _warp_sync()
    _store_plain(d6, s1, to, 6)
    to.slice(224, 16, dim=1).store(r0)
    to.slice(240, 16, dim=1).store(r1)
    d6 = _load(at + 384, seen, WORDS)
    r0 = _load(at + 448, seen, WORDS)
    r1 = _load(at + 512, seen, WORDS)
    return d0, d1, d2, d3, d4, d5, d6, r0, r1, t0, t1, seen


@gluon.jit
def _tiles(
    position, picks, share,
    WINDOW: gl.constexpr, RATIO: gl.constexpr, TOPK: gl.constexpr, SHARES: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """First tile of a share of a token's keys, and how many: one, with nothing seen, if it has no keys."""
    COUNT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    total = gl.minimum(position + 1, WINDOW)
    if KIND == "csa":
        if SHARES == 1:
            k = gl.arange(0, TOPK, layout=COUNT)
            total += gl.max(gl.where(gl.load(picks + k) >= 0, k + 1, 0), 0)
        else:
            # where a share begins must be known before the picks are
            total += TOPK
    if KIND == "hca":
        total += (position + 1) // RATIO
    tiles = (total + 63) // 64
    some = (tiles + SHARES - 1) // SHARES
    return share * some, gl.maximum(gl.minimum(some, tiles - share * some), 1)


@gluon.jit
def fill(
    pool, pages, entry_pool, entry_pages, picks, request_rows, positions, items, columns, entry_columns,
    keys, bias, lengths, addresses, ahead, ready, empty,
    KIND: gl.constexpr, BLOCKS: gl.constexpr, WINDOW: gl.constexpr, PAGE: gl.constexpr, ENTRIES: gl.constexpr,
    RATIO: gl.constexpr, TOPK: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """Fills the two tiles of keys in turn, half a tile a step: four threads an entry, 16 bytes of each 64.

    Loads run ahead: a step loads the next half's data (each register as soon as it is free); a tile finds the
    addresses of the next one, the pages of the one after that and the picks of the third; an item finds the first
    picks of the next item and the position of the one after that.
    """
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    LANES: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    KEYS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    WORDS_OF_K: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    key = gl.arange(0, 64, layout=KEYS)
    lane = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, LANES)).to(gl.int64) * 16, 0)
    pages = pages.to(gl.pointer_type(gl.int32))
    entry_pages = entry_pages.to(gl.pointer_type(gl.int32))
    step = 0
    item = gl.program_id(0)
    token, _block, share = item_of(item, BLOCKS, SHARES)
    position = gl.load(positions + token).to(gl.int32)
    request = gl.load(request_rows + token)
    row_picks = picks + token.to(gl.int64) * TOPK
    token, _block, share1 = item_of(gl.minimum(item + gl.num_programs(0), items - 1), BLOCKS, SHARES)
    position1 = gl.load(positions + token).to(gl.int32)
    request1 = gl.load(request_rows + token)
    picks1 = picks + token.to(gl.int64) * TOPK
    k, k1, tiles1 = key, key, 0
    if SHARES > 1:
        first, tiles = _tiles(position, row_picks, share, WINDOW, RATIO, TOPK, SHARES, KIND)
        k += first * 64
        first, tiles1 = _tiles(position1, picks1, share1, WINDOW, RATIO, TOPK, SHARES, KIND)
        k1 += first * 64
    entry = _load_entry(k, position, row_picks, WINDOW, RATIO, TOPK, KIND)
    entry1 = _load_entry(k + 64, position, row_picks, WINDOW, RATIO, TOPK, KIND)
    at = _page_at(k, entry, position, request, pages, entry_pages, columns, entry_columns, WINDOW, PAGE, ENTRIES, KIND)
    page = gl.load(at, mask=entry >= 0, other=0)
    at = _page_at(
        k + 64, entry1, position, request, pages, entry_pages, columns, entry_columns, WINDOW, PAGE, ENTRIES, KIND
    )
    async_copy.async_load(ahead.index(0), at, entry1 >= 0)
    if KIND == "csa":
        at, some = _pick_at(k + 128, position, row_picks, WINDOW, TOPK)
        async_copy.async_load(ahead.index(1), at, some)
    async_copy.commit_group()
    _store_addresses(k, entry, page, position, pool, entry_pool, addresses, 0, WINDOW, PAGE, ENTRIES, KIND)
    half = _load_half(addresses, 0, lane, 0, WORDS, LANES)
    first0 = _load_entry(k1, position1, picks1, WINDOW, RATIO, TOPK, KIND)
    first1 = _load_entry(k1 + 64, position1, picks1, WINDOW, RATIO, TOPK, KIND)
    if SHARES == 1:
        first, tiles = _tiles(position, row_picks, share, WINDOW, RATIO, TOPK, SHARES, KIND)
    while item < items:
        item += gl.num_programs(0)
        token, _block, share1 = item_of(gl.minimum(item + gl.num_programs(0), items - 1), BLOCKS, SHARES)
        position2 = gl.load(positions + token)
        request2 = gl.load(request_rows + token)
        at = _page_at(
            k1, first0, position1, request1, pages, entry_pages, columns, entry_columns, WINDOW, PAGE, ENTRIES, KIND
        )
        # used here, so that no tile waits for them
        page0 = gl.maximum(gl.load(at, mask=first0 >= 0, other=0), 0)
        first1 = gl.maximum(first1, -1)
        for tile in range(tiles):
            stage = step & 1
            last = tile == tiles - 1
            parity = ((step >> 1) & 1) ^ 1
            # The next tile, of this item or the next: its pages and the picks of the tile after it came through
            # shared memory, because a wait for a load into registers is often one for all such loads.
            async_copy.wait_group(0)
            page = ahead.index(0).load(KEYS)
            pick = ahead.index(1).load(KEYS)
            position = gl.where(last, position1, position)
            request = gl.where(last, request1, request)
            row_picks = gl.where(last, picks1, row_picks)
            k = gl.where(last, k1, k + 64)
            entry = gl.where(last, first0, entry1)
            page = gl.where(last, page0, page)
            _store_addresses(
                k, entry, page, position, pool, entry_pool, addresses, stage ^ 1, WINDOW, PAGE, ENTRIES, KIND
            )
            entry1 = gl.where(last, first1, _entry(k + 64, position, pick, WINDOW, RATIO, TOPK, KIND))
            at = _page_at(
                k + 64, entry1, position, request, pages, entry_pages, columns, entry_columns,
                WINDOW, PAGE, ENTRIES, KIND,
            )  # fmt: skip
            async_copy.async_load(ahead.index(0), at, entry1 >= 0)
            if KIND == "csa":
                at, some = _pick_at(k + 128, position, row_picks, WINDOW, TOPK)
                async_copy.async_load(ahead.index(1), at, some)
            async_copy.commit_group()
            to = keys.index(stage).reinterpret(gl.int32, [64, 256], WORDS_OF_K)
            mbarrier.wait(empty.index(stage * 2), parity)
            half = _turn_over(
                half, addresses, stage, lane, to.slice(0, 32), bias.index(stage).slice(0, 32), 1, WORDS, LANES
            )
            lengths.index(stage).store(gl.full([1], tiles, gl.int32, KEYS))
            _arrive(ready.index(stage))
            mbarrier.wait(empty.index(stage * 2 + 1), parity)
            half = _turn_over(
                half, addresses, stage ^ 1, lane, to.slice(32, 32), bias.index(stage).slice(32, 32), 0, WORDS, LANES
            )
            _arrive(ready.index(stage))
            step += 1
        if SHARES == 1:
            # while the next item's first loads are on their way
            first, tiles = _tiles(position1, picks1, share1, WINDOW, RATIO, TOPK, SHARES, KIND)
        else:
            tiles = tiles1
        position1 = position2.to(gl.int32)
        request1 = request2
        picks1 = picks + token.to(gl.int64) * TOPK
        k1 = key
        if SHARES > 1:
            first, tiles1 = _tiles(position1, picks1, share1, WINDOW, RATIO, TOPK, SHARES, KIND)
            k1 += first * 64
        first0 = _load_entry(k1, position1, picks1, WINDOW, RATIO, TOPK, KIND)
        first1 = _load_entry(k1 + 64, position1, picks1, WINDOW, RATIO, TOPK, KIND)
    async_copy.wait_group(0)
