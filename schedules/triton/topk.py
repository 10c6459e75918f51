"""Exact top-k of scores: no sort, one read. What is picked does not depend on the order in which anything runs.

Entries are taken in groups of 16. The k entries with the highest scores lie in the k groups with the highest maxima
(a group outside them has k entries before all of its own; groups and entries are in one order, so ties agree), so

    group_maxima   reads the scores once and writes the maximum of every group (the score kernels write it themselves)
    select_rows    finds the k-th largest maximum, lists the k groups in ascending order, and takes the k entries with
                   the highest of their 16 k scores

The k-th largest of a set in registers is found by bisection on the ordered integer form of float32: a count for each
step, and no step more once a threshold has exactly k above it. Scores: float32 [T, E]; maxima: float32 [T, E / 16].
"""

import triton
import triton.language as tl

LEAST: tl.constexpr = tl.constexpr(-(2**31))
MOST: tl.constexpr = tl.constexpr(2**31 - 1)
GROUP: tl.constexpr = tl.constexpr(16)  # entries: 64 bytes, two sectors of a cache line


@triton.jit
def ordered(x):
    """int32 in the order of the float32 values: -0 equals 0, and NaN and -inf are LEAST."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x > float("-inf"), tl.where(bits < 0, bits ^ MOST, bits), LEAST)


@triton.jit
def kth_largest(key, K: tl.constexpr):
    """A threshold with at least K keys at or above it and fewer than K above; the least key if there are fewer.

    LEAST counts as no key.
    """
    low = tl.min(tl.where(key == LEAST, MOST, key), axis=0).to(tl.int64)
    high = tl.max(key, axis=0).to(tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        count = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), axis=0)
        high = tl.where(count == K, middle, tl.where(count > K, high, middle - 1))
        low = tl.where(count >= K, middle, low)
    return low.to(tl.int32)


@triton.jit
def places(key, K: tl.constexpr):
    """(whether a key is one of the K largest, its place among them in the order of positions, how many there are)."""
    threshold = kth_largest(key, K)
    above = key > threshold
    equal = (key == threshold) & (key > LEAST)
    room = K - tl.sum(above.to(tl.int32), axis=0)
    # one scan for both counts: at most 2^14 keys, so they fit the halves of an int32
    both = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
    taken_above, taken_equal = both & 0xFFFF, both >> 16
    taken = above | (equal & (taken_equal <= room))
    total = tl.sum(taken.to(tl.int32), axis=0)
    return taken, taken_above + tl.minimum(taken_equal, room) - 1, total


@triton.jit
def write_picks(picks, key, entry, K: tl.constexpr):
    """The entries of the K largest keys in ascending order, then -1."""
    taken, place, total = places(key, K)
    tl.store(picks + place, entry, mask=taken)
    at = tl.arange(0, K)
    tl.store(picks + at, tl.full((K,), -1, tl.int32), mask=at >= total)


@triton.jit
def select_all(scores, picks, seen, K: tl.constexpr, BLOCK: tl.constexpr):
    """Straight from the scores, for rows that fit registers."""
    entry = tl.arange(0, BLOCK)
    key = ordered(tl.load(scores + entry, mask=entry < seen, other=float("-inf")))
    write_picks(picks, key, entry, K)


@triton.jit
def select_chosen(scores, picks, seen, K: tl.constexpr):
    """From the scores of the groups listed in the row of picks."""
    tl.debug_barrier()  # the list is written by all threads and read by all
    at = tl.arange(0, K * GROUP)
    chosen = tl.load(picks + at // GROUP)
    entry = chosen * GROUP + at % GROUP
    inside = (chosen >= 0) & (entry < seen)
    key = ordered(tl.load(scores + entry, mask=inside, other=float("-inf")))
    tl.debug_barrier()
    write_picks(picks, key, entry, K)


@triton.jit
def count_groups(maxima, groups, threshold, BLOCK: tl.constexpr):
    """Groups with a maximum of at least `threshold`, and the least and the largest maximum, in passes of BLOCK."""
    count = tl.zeros((BLOCK,), tl.int32)
    least = tl.full((BLOCK,), MOST, tl.int32)
    most = tl.full((BLOCK,), LEAST, tl.int32)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        key = ordered(tl.load(maxima + group, mask=group < groups, other=float("-inf")))
        count += (key >= threshold).to(tl.int32)
        least = tl.minimum(least, tl.where(key == LEAST, MOST, key))
        most = tl.maximum(most, key)
    return tl.sum(count, axis=0), tl.min(least, axis=0), tl.max(most, axis=0)


@triton.jit
def list_groups(maxima, picks, groups, K: tl.constexpr, BLOCK: tl.constexpr):
    """The K groups with the highest maxima, ascending, then -1: for rows of any length, reading them once a step."""
    count, least, most = count_groups(maxima, groups, MOST, BLOCK)
    low, high = least.to(tl.int64), most.to(tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        count, least, most = count_groups(maxima, groups, middle.to(tl.int32), BLOCK)
        high = tl.where(count == K, middle, tl.where(count > K, high, middle - 1))
        low = tl.where(count >= K, middle, low)
    threshold = low.to(tl.int32)
    count, least, most = count_groups(maxima, groups, tl.minimum(threshold, MOST - 1) + 1, BLOCK)
    room = K - count
    done = tl.full((), 0, tl.int32)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        key = ordered(tl.load(maxima + group, mask=group < groups, other=float("-inf")))
        above = key > threshold
        equal = (key == threshold) & (key > LEAST)
        both = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
        taken_above, taken_equal = both & 0xFFFF, both >> 16
        taken = above | (equal & (taken_equal <= room))
        place = done + taken_above + tl.minimum(taken_equal, room) - 1
        tl.store(picks + place, group, mask=taken)
        done += tl.sum(taken.to(tl.int32), axis=0)
        room -= tl.minimum(tl.sum(equal.to(tl.int32), axis=0), room)
    at = tl.arange(0, K)
    tl.store(picks + at, tl.full((K,), -1, tl.int32), mask=at >= done)


@triton.jit
def select_rows(
    scores, maxima, positions, picks, entries, first, maxima_at,
    RATIO: tl.constexpr, K: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """picks[first + i] from row i of scores, and of maxima, which begin at `maxima_at`.

    Rows over 2^15 entries are fast if LONG, and right anyway.
    """
    row = tl.program_id(0)
    seen = tl.minimum((tl.load(positions + first + row) + 1) // RATIO, entries).to(tl.int32)
    picks += (first + row).to(tl.int64) * K
    scores += row.to(tl.int64) * entries
    maxima += maxima_at + row.to(tl.int64) * (entries // GROUP)
    if seen <= K:
        at = tl.arange(0, K)
        tl.store(picks + at, tl.where(at < seen, at, -1))
    elif seen <= 2048:
        select_all(scores, picks, seen, K, 2048)
    elif seen <= 8192:
        select_all(scores, picks, seen, K, 8192)
    else:
        groups = tl.cdiv(seen, GROUP)
        if groups <= 2048:
            group = tl.arange(0, 2048)
            key = ordered(tl.load(maxima + group, mask=group < groups, other=float("-inf")))
            write_picks(picks, key, group, K)
        elif LONG and groups <= 16384:
            group = tl.arange(0, 16384)
            key = ordered(tl.load(maxima + group, mask=group < groups, other=float("-inf")))
            write_picks(picks, key, group, K)
        else:
            list_groups(maxima, picks, groups, K, 2048)
        select_chosen(scores, picks, seen, K)


@triton.jit
def group_maxima(scores, positions, maxima, entries, RATIO: tl.constexpr, BLOCK: tl.constexpr):
    """Maxima of the groups of 16 that a row sees, in rows that `select_rows` does not take straight from the scores."""
    row = tl.program_id(0)
    seen = tl.minimum((tl.load(positions + row) + 1) // RATIO, entries).to(tl.int32)
    if seen > 8192:
        scores += row.to(tl.int64) * entries
        maxima += row.to(tl.int64) * (entries // GROUP)
        for start in range(tl.program_id(1) * BLOCK, seen, tl.num_programs(1) * BLOCK):
            entry = start + tl.arange(0, BLOCK)
            x = tl.load(scores + entry, mask=entry < seen, other=float("-inf"))
            x = tl.where(x == x, x, float("-inf"))
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            most = tl.max(tl.reshape(x, (BLOCK // GROUP, GROUP)), axis=1)
            tl.store(maxima + group, most, mask=group < entries // GROUP)
