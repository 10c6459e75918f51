"""Token sort of a mixture of experts, and what goes with it: rows into GEMM order, and their sum back (Triton).

Pairs (token, k-th expert) are sorted by expert, in order of the pair's number within an expert: the order is a function
of the input alone. One program an expert counts all pairs itself, so one launch does histogram, scan and scatter.

    place[pair]  8 * row + rank % 8: the pair's row among all pairs, and its rank within the expert (the swizzle phase)
    pair[row], row_weight[row]
    tiles[i]     (expert, first row, rows, 0): at most TILE rows of one expert; an expert's tiles are of even size
    meta         (number of tiles, experts hit)
"""

import triton
import triton.language as tl


@triton.jit
def sort_pairs(
    chosen, weight, place, pair, row_weight, tiles, meta, pairs,
    E: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, MOST_TILES: tl.constexpr,
):  # fmt: skip
    """Program e places the pairs of expert e. EP: power of two from E up; MOST_TILES: tiles written at once."""
    e = tl.program_id(0)
    bins = tl.arange(0, EP)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([EP], tl.int32)
    for start in range(0, pairs, BLOCK):
        kept = start + lane < pairs
        counts += tl.histogram(tl.load(chosen + start + lane, mask=kept, other=0), EP, mask=kept)
    split = tl.maximum((counts + TILE - 1) // TILE, 1)
    size = ((counts + split - 1) // split + 7) // 8 * 8  # multiples of 8: a tile starts with swizzle phase 0
    split = (counts + size - 1) // tl.maximum(size, 1)
    before = bins < e
    row = tl.sum(tl.where(before, counts, 0))
    tile = tl.sum(tl.where(before, split, 0))
    count = tl.sum(tl.where(bins == e, counts, 0))
    if e == 0:
        tl.store(meta, tl.sum(split))
        tl.store(meta + 1, tl.sum((counts > 0).to(tl.int32)))
    if count > 0:
        rank = 0
        for start in range(0, pairs, BLOCK):
            index = start + lane
            kept = index < pairs
            mine = (tl.load(chosen + index, mask=kept, other=-1) == e).to(tl.int32)
            ranks = rank + tl.cumsum(mine) - mine
            kept = mine != 0
            tl.store(place + index, 8 * (row + ranks) + ranks % 8, mask=kept)
            tl.store(pair + row + ranks, index, mask=kept)
            tl.store(row_weight + row + ranks, tl.load(weight + index, mask=kept), mask=kept)
            rank += tl.sum(mine)
        many = tl.sum(tl.where(bins == e, split, 0))
        each = tl.sum(tl.where(bins == e, size, 0))
        for start in range(0, many, MOST_TILES):
            i = start + tl.arange(0, MOST_TILES)
            to = tiles + 4 * (tile + i)
            kept = i < many
            tl.store(to, tl.zeros_like(i) + e, mask=kept)
            tl.store(to + 1, row + i * each, mask=kept)
            tl.store(to + 2, tl.minimum(each, count - i * each), mask=kept)
            tl.store(to + 3, tl.zeros_like(i), mask=kept)


@triton.jit
def gather_rows(x, pair, place, out, rows, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Tokens' rows [T, D] to panels [D / 64][rows][64] in the order of the pairs, permuted and swizzled as experts.py
    says. A program takes ROWS rows and BLOCKS 128-channel blocks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    kept = row < rows
    which = tl.load(pair + row, mask=kept, other=0)
    phase = tl.load(place + which, mask=kept, other=0) % 8
    token = (which // K).to(tl.int64)
    channel = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = channel < D
    value = tl.load(
        x + token[:, None, None] * D + channel[None, :, :], mask=kept[:, None, None] & inside[None, :, :], other=0.0
    )
    value = tl.reshape(value, [ROWS, BLOCKS, 4, 4, 2, 4])  # t, q, c, (j, h)
    value = tl.permute(value, [0, 1, 3, 5, 2, 4])  # q, (j, h), t, c
    value = tl.reshape(value, [ROWS, BLOCKS, 2, 8, 8])
    panel = (2 * block[:, None] + tl.arange(0, 2)[None, :]).to(tl.int64) * rows
    chunk = tl.arange(0, 8)[None, :] ^ phase[:, None]
    at = (panel[None, :, :] + row[:, None, None])[:, :, :, None] * 64 + (chunk * 8)[:, None, None, :]
    at = at[:, :, :, :, None] + tl.arange(0, 8)[None, None, None, None, :]
    whole = (kept[:, None] & (block < D // 128)[None, :])[:, :, None, None, None]
    tl.store(out + at, value, mask=whole)


@triton.jit
def combine_rows(y, place, shared, out, rows, K: tl.constexpr, D: tl.constexpr, PANELS: tl.constexpr):
    """out[token] = shared[token] + the sum of its pairs' rows in y (panels, channels in order), in float32."""
    token = tl.program_id(0).to(tl.int64)
    panel = tl.program_id(1) * PANELS + tl.arange(0, PANELS)
    inside = (panel < D // 64)[:, None]
    channel = panel[:, None] * 64 + tl.arange(0, 64)[None, :]
    total = tl.zeros([PANELS, 64], tl.float32)
    for k in tl.static_range(K):
        where = tl.load(place + token * K + k)
        chunk = (tl.arange(0, 8) ^ (where % 8))[:, None] * 8 + tl.arange(0, 8)[None, :]
        at = (panel.to(tl.int64) * rows + where // 8)[:, None] * 64 + tl.reshape(chunk, [64])[None, :]
        total += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(shared + token * D + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + channel, total.to(tl.bfloat16), mask=inside)
