"""Index scores for tensor memory: keys are the 128 rows of a product, heads its columns: a thread sums a key's heads.

E4M3 keys are multiplied as they lie (`kind::f8f6f4`); so are FP4 keys, as E2M1 with their E8M0 scales for 32 channels
beside E4M3 queries of scale 1 (`kind::mxf8f6f4`): the unit applies the scales, nothing is widened and nothing cut off.

    score_tiles  deals tiles of keys out over the card, each for one token: decode, where reading the keys binds
    score_runs   keeps a tile of keys and takes a request's tokens past it, TS at a time: prefill, where products bind

Layout of pages, scores and maxima as in index.py. Legend: T tokens, H heads, C channels of a key, BN keys of a tile.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4c.schedules.triton.index import GROUP, PAGE


@triton.jit
def _keys(pool, page, entry, live, C: tl.constexpr, FP4: tl.constexpr):
    """Keys [BN, C] (FP4: bytes [BN, C / 2]) and scales: float32 [BN] (FP4: bytes [BN, C / 32]); zeros if not live."""
    key = entry % PAGE
    if FP4:
        base = page * (PAGE * (C // 2 + 4))
        at = pool + base + key * (C // 2)
        keys = tl.load(at[:, None] + tl.arange(0, C // 2)[None, :], mask=live[:, None], other=0)
        at = pool + base + PAGE * (C // 2) + key * 4
        scales = tl.load(at[:, None] + tl.arange(0, C // 32)[None, :], mask=live[:, None], other=0)
        return keys, scales
    else:
        base = page * (PAGE * (C + 4))
        at = pool.to(tl.pointer_type(tl.float8e4nv)) + base + key * C
        keys = tl.load(at[:, None] + tl.arange(0, C)[None, :], mask=live[:, None], other=0.0)
        scales = tl.load((pool + base + PAGE * C).to(tl.pointer_type(tl.float32)) + key, mask=live, other=0.0)
        return keys, scales


@triton.jit
def _products(keys, scales, query, C: tl.constexpr, FP4: tl.constexpr):
    """float32 [BN, N] of keys and E4M3 queries [N, C]; only an FP4 key's scales are in it."""
    if FP4:
        ones = tl.full([query.shape[0], C // 32], 127, tl.uint8)
        return tl.dot_scaled(keys, scales, "e2m1", tl.trans(query), ones, "e4m3")
    else:
        return tl.dot(keys, tl.trans(query))


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _ordered(score):
    """Bits whose order as integers is that of the numbers, as `ordered` of topk.py."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_tiles(
    data, weight, pool, pages, requests, positions, scores, columns, first, count, maxima_at,
    RATIO: tl.constexpr, H: tl.constexpr, C: tl.constexpr, FP4: tl.constexpr, LEAST: tl.constexpr,
    MAXIMA: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scores of tokens that share no keys; parameters and result as `score_tokens` of index.py."""
    gdc_wait()
    gdc_launch_dependents()
    entries = columns * PAGE
    slot = tl.arange(0, BT)
    for start in range(0, count, BT):
        position = tl.load(positions + first + start + slot, mask=start + slot < count, other=-1)
        seen_of = tl.minimum((position + 1) // RATIO, entries).to(tl.int32)
        tiles_of = tl.where(seen_of > LEAST, tl.cdiv(seen_of, BN), 0)
        ends = tl.cumsum(tiles_of, axis=0)
        total = tl.sum(tiles_of, axis=0).to(tl.int64)
        at = (total * tl.program_id(0) // tl.num_programs(0)).to(tl.int32)
        last = (total * (tl.program_id(0) + 1) // tl.num_programs(0)).to(tl.int32)
        while at < last:
            here = tl.sum((ends <= at).to(tl.int32), axis=0)  # the token of tile `at`
            end = tl.sum(tl.where(slot == here, ends, 0), axis=0)
            seen = tl.sum(tl.where(slot == here, seen_of, 0), axis=0)
            begin = end - tl.cdiv(seen, BN)
            line = (start + here).to(tl.int64)
            token = first + line
            table = pages + tl.load(requests + token) * columns
            head = tl.arange(0, H)
            query = tl.load(data + token * (H * C) + head[:, None] * C + tl.arange(0, C)[None, :])
            query = query.to(tl.float8e4nv, bitcast=True)
            w = tl.load(weight + token * H + head)
            stop = tl.minimum(end, last)
            for tile in tl.range(at - begin, stop - begin, disable_licm=True):
                entry = tile * BN + tl.arange(0, BN)
                live = entry < tl.cdiv(seen, PAGE) * PAGE  # a page with no entry seen is not looked up
                page = tl.load(table + entry // PAGE, mask=live, other=0)
                keys, scales = _keys(pool, page, entry, live, C, FP4)
                score = tl.sum(_relu(_products(keys, scales, query, C, FP4)) * w[None, :], axis=1)
                if not FP4:
                    score *= scales
                score = tl.where((entry < seen) & (score == score), score + 0.0, float("-inf"))
                tl.store(scores + line * entries + entry, score, mask=entry < entries)
                if MAXIMA:
                    group = tile * (BN // GROUP) + tl.arange(0, BN // GROUP)
                    most = tl.max(tl.reshape(score, (BN // GROUP, GROUP)), axis=1)
                    to = (scores + maxima_at + line * (entries // GROUP)).to(tl.pointer_type(tl.int32))
                    tl.store(to + group, _ordered(most), mask=group < entries // GROUP)
            at = stop


@triton.jit
def score_runs(
    data, weight, pool, pages, requests, positions, scores, columns, first, count, maxima_at,
    RATIO: tl.constexpr, H: tl.constexpr, C: tl.constexpr, FP4: tl.constexpr, LEAST: tl.constexpr,
    MAXIMA: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, TS: tl.constexpr,
):  # fmt: skip
    """Scores of BN keys and BT tokens, of which neighbours share a request. Grid: tiles of keys, blocks of tokens.

    As `score_tokens` of index.py; of a run that has a token which sees some of the keys, rows between such tokens are
    written too, with -inf for what they do not see.
    """
    gdc_wait()
    gdc_launch_dependents()
    entries = columns * PAGE
    slot = tl.arange(0, BT)
    entry = tl.program_id(0) * BN + tl.arange(0, BN)
    begin = tl.program_id(1) * BT
    inside = begin + slot < count
    request_of = tl.load(requests + first + begin + slot, mask=inside, other=-1)
    position_of = tl.load(positions + first + begin + slot, mask=inside, other=-1)
    seen_of = tl.minimum((position_of + 1) // RATIO, entries).to(tl.int32)
    wanted = inside & (seen_of > tl.maximum(tl.program_id(0) * BN, LEAST))
    row = tl.arange(0, TS * H)
    at = 0
    while at < tl.minimum(BT, count - begin):
        request = tl.load(requests + first + begin + at)
        after = tl.min(tl.where((slot > at) & (request_of != request), slot, BT), axis=0)
        mine = wanted & (slot >= at) & (slot < after)
        low = tl.min(tl.where(mine, slot, BT), axis=0)
        high = tl.max(tl.where(mine, slot, -1), axis=0)
        most = tl.max(tl.where(mine, seen_of, 0), axis=0)
        if low <= high:
            live = entry < tl.cdiv(most, PAGE) * PAGE
            page = tl.load(pages + request * columns + entry // PAGE, mask=live, other=0)
            keys, scales = _keys(pool, page, entry, live, C, FP4)
            for here in tl.range(low, high + 1, TS, disable_licm=True):
                token = (first + begin + here).to(tl.int64)
                some = here + row // H <= high
                query = tl.load(
                    data + token * (H * C) + row[:, None] * C + tl.arange(0, C)[None, :], mask=some[:, None]
                )
                w = tl.load(weight + token * H + row, mask=some, other=0.0)
                dots = _relu(_products(keys, scales, query.to(tl.float8e4nv, bitcast=True), C, FP4)) * w[None, :]
                score = tl.sum(tl.reshape(dots, (BN, TS, H)), axis=2)
                if not FP4:
                    score *= scales[:, None]
                one = here + tl.arange(0, TS)
                position = tl.load(positions + first + begin + one, mask=one <= high, other=-1)
                seen = tl.minimum((position + 1) // RATIO, entries).to(tl.int32)
                score = tl.where((entry[:, None] < seen[None, :]) & (score == score), score + 0.0, float("-inf"))
                line = (begin + one).to(tl.int64)
                ours = (one <= high)[None, :]
                to = scores + line[None, :] * entries + entry[:, None]
                tl.store(to, score, mask=ours & (entry < entries)[:, None])
                if MAXIMA:
                    group = tl.program_id(0) * (BN // GROUP) + tl.arange(0, BN // GROUP)
                    top = tl.max(tl.reshape(score, (BN // GROUP, GROUP, TS)), axis=1)
                    to = (scores + maxima_at).to(tl.pointer_type(tl.int32))
                    to += line[None, :] * (entries // GROUP) + group[:, None]
                    tl.store(to, _ordered(top), mask=ours & (group < entries // GROUP)[:, None])
        at = after
