"""Token sort of a mixture of experts, and what goes with it: rows into GEMM order, and their sum back (Triton).

Pairs (token, k-th expert) are sorted by expert, in order of the pair's number within an expert: the order is a function
of the input alone. One program an expert counts all pairs itself, so one launch does histogram, scan and scatter.

    place[pair]  8 * row + rank % 8: the pair's row among all pairs, and its rank within the expert (the swizzle phase)
    pair[row], row_weight[row]
    tiles[i]     (expert, first row, rows, 0): at most TILE rows of one expert; an expert's tiles are of even size
    meta[0]      number of tiles

With programmatic launches a kernel lets the next one start once its own predecessor is done, so that each may read what
came two kernels before it without waiting.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _counted(chosen, pairs, EP: tl.constexpr, BLOCK: tl.constexpr):
    """Pairs of every expert."""
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([EP], tl.int32)
    for start in range(0, pairs, BLOCK):
        kept = start + lane < pairs
        counts += tl.histogram(tl.load(chosen + start + lane, mask=kept, other=0), EP, mask=kept)
    return counts


@triton.jit
def _split(count, TILE: tl.constexpr):
    """Number and size of the tiles of `count` rows. Sizes are multiples of 8: a tile starts with swizzle phase 0."""
    many = tl.maximum((count + TILE - 1) // TILE, 1)
    size = ((count + many - 1) // many + 7) // 8 * 8
    return tl.where(count > 0, (count + size - 1) // tl.maximum(size, 1), 0), size


@triton.jit
def _tiled(counts, e, tiles, meta, EP: tl.constexpr, TILE: tl.constexpr, MOST_TILES: tl.constexpr):
    """Writes the tiles of expert e; returns its first row and its number of rows."""
    bins = tl.arange(0, EP)
    many, _ = _split(counts, TILE)
    both = counts.to(tl.int64) + (many.to(tl.int64) << 32)  # one reduction for two sums
    before = tl.sum(tl.where(bins < e, both, 0))
    row, tile = before.to(tl.int32), (before >> 32).to(tl.int32)
    count = tl.sum(tl.where(bins == e, counts, 0))
    if row == 0:
        tl.store(meta, (tl.sum(both) >> 32).to(tl.int32))
    many, size = _split(count, TILE)
    for start in range(0, many, MOST_TILES):
        i = start + tl.arange(0, MOST_TILES)
        to = tiles + 4 * (tile + i)
        kept = i < many
        tl.store(to, tl.zeros_like(i) + e, mask=kept)
        tl.store(to + 1, row + i * size, mask=kept)
        tl.store(to + 2, tl.minimum(size, count - i * size), mask=kept)
        tl.store(to + 3, tl.zeros_like(i), mask=kept)
    return row, count


@triton.jit
def sort_pairs(
    chosen, weight, place, pair, row_weight, tiles, meta, pairs,
    EP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, MOST_TILES: tl.constexpr,
):  # fmt: skip
    """Program e places the pairs of expert e. EP: power of two from the experts up; MOST_TILES written at once."""
    gdc_wait()
    gdc_launch_dependents()
    e = tl.program_id(0)
    counts = _counted(chosen, pairs, EP, BLOCK)
    row, count = _tiled(counts, e, tiles, meta, EP, TILE, MOST_TILES)
    if count > 0:
        rank = 0
        for start in range(0, pairs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mine = (tl.load(chosen + index, mask=index < pairs, other=-1) == e).to(tl.int32)
            ranks = rank + tl.cumsum(mine) - mine
            _placed(index, row, ranks, mine != 0, weight, place, pair, row_weight)
            rank += tl.sum(mine)


@triton.jit
def _placed(index, row, ranks, kept, weight, place, pair, row_weight):
    tl.store(place + index, 8 * (row + ranks) + ranks % 8, mask=kept)
    tl.store(pair + row + ranks, index, mask=kept)
    tl.store(row_weight + row + ranks, tl.load(weight + index, mask=kept), mask=kept)


@triton.jit
def sort_gather(
    x, chosen, weight, place, pair, row_weight, tiles, meta, out, pairs,
    EP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, MOST_TILES: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """sort_pairs and gather_rows at once, for few pairs: program (p, s) takes the p-th expert that is hit, and BLOCKS
    128-channel blocks of its rows."""
    gdc_wait()
    gdc_launch_dependents()
    bins = tl.arange(0, EP)
    counts = _counted(chosen, pairs, EP, BLOCK)
    nth = tl.cumsum((counts > 0).to(tl.int32))
    e = tl.sum(tl.where((nth == tl.program_id(0) + 1) & (counts > 0), bins + 1, 0)) - 1
    if e >= 0:
        row, _ = _tiled(counts, e, tiles, meta, EP, TILE, MOST_TILES)  # equal stores by all s do no harm
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        rank = 0
        for start in range(0, pairs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mine = (tl.load(chosen + index, mask=index < pairs, other=-1) == e).to(tl.int32)
            ranks = rank + tl.cumsum(mine) - mine
            if tl.program_id(1) == 0:
                _placed(index, row, ranks, mine != 0, weight, place, pair, row_weight)
            upto = rank + tl.sum(mine)
            for low in range(rank, upto, ROWS):
                wanted = low + tl.arange(0, ROWS)
                found = (ranks[None, :] == wanted[:, None]) & (mine != 0)[None, :]
                which = tl.sum(tl.where(found, index[None, :], 0), 1)
                _move_rows(x, which // K, row + wanted, wanted % 8, wanted < upto, block, out, pairs, D, ROWS, BLOCKS)
            rank = upto


@triton.jit
def gather_rows(x, pair, place, out, rows, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Tokens' rows [T, D] in the order of the pairs. A program takes ROWS rows and BLOCKS 128-channel blocks."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    kept = row < rows
    which = tl.load(pair + row, mask=kept, other=0)
    phase = tl.load(place + which, mask=kept, other=0) % 8
    _move_rows(x, which // K, row, phase, kept, block, out, rows, D, ROWS, BLOCKS)


@triton.jit
def _move_rows(x, token, row, phase, kept, block, out, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Tokens' rows to panels [D / 64][rows][64], permuted and swizzled as experts.py says."""
    channel = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = channel < D
    value = tl.load(
        x + token.to(tl.int64)[:, None, None] * D + channel[None, :, :],
        mask=kept[:, None, None] & inside[None, :, :],
        other=0.0,
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
    total = tl.load(shared + token * D + channel, mask=inside, other=0.0).to(tl.float32)
    gdc_wait()
    for k in tl.static_range(K):
        where = tl.load(place + token * K + k)
        chunk = (tl.arange(0, 8) ^ (where % 8))[:, None] * 8 + tl.arange(0, 8)[None, :]
        at = (panel.to(tl.int64) * rows + where // 8)[:, None] * 64 + tl.reshape(chunk, [64])[None, :]
        total += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + channel, total.to(tl.bfloat16), mask=inside)
