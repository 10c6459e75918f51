"""Exact top-k of scores: no sort, one read. What is picked does not depend on the order in which anything runs.

Entries are taken in groups of 16. The k entries with the highest scores lie in the k groups with the highest maxima
(a group outside them has k entries before all of its own; groups and entries are in one order, so ties agree), so

    group_maxima   reads the scores once and writes the maximum of every group (the score kernels write it themselves)
    select_rows    finds the k groups with the highest maxima, and the k highest of their 16 k scores

The k highest keys of a set in registers are found by counting them in 2048 bins between the lowest and the highest,
and again within the bin of the k-th, until it is taken whole or all its keys are equal: two or three rounds. Bins are
intervals of the order of the keys, and counts do not depend on who counts first.

Scores: float32 [T, E]; maxima: int32 [T, E / 16], in the order of the scores (`ordered`).
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP = tl.constexpr(16)  # entries: 64 bytes, two sectors of a cache line
LEAST = gl.constexpr(-(2**31) + (1 << 23) - 1)  # `ordered` of -inf
MOST = gl.constexpr(2**31 - 1)
BINS = gl.constexpr(2048)  # 8 KB of shared memory; 8 bins a thread to scan


@gluon.jit
def ordered(x):
    """int32 in the order of the float32 values: -0 equals 0, and NaN and -inf are LEAST."""
    bits = (x + 0.0).to(gl.int32, bitcast=True)
    return gl.where(x > float("-inf"), gl.where(bits < 0, bits ^ MOST, bits), LEAST)


@gluon.jit
def value_of(key):
    """The float32 value of a key that is not LEAST."""
    return gl.where(key < 0, key ^ MOST, key).to(gl.float32, bitcast=True)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def bin_of_kth(bins, need, count, NUM_WARPS: gl.constexpr):
    """(the bin with the `need`-th highest of `count` keys, how many lie in higher bins, how many in it)."""
    layout: gl.constexpr = gl.BlockedLayout([BINS // (32 * NUM_WARPS)], [32], [NUM_WARPS], [0])
    inside = bins.slice(0, BINS).load(layout)
    above = count - gl.associative_scan(inside, 0, _add)
    found = (above < need) & (above + inside >= need)
    at = gl.arange(0, BINS, layout=layout)
    # one sum for both: fewer than 2^16 keys lie above
    packed = gl.sum(gl.where(found, (at << 16) | above, 0), axis=0)
    return packed >> 16, packed & 0xFFFF, gl.sum(gl.where(found, inside, 0), axis=0)


@gluon.jit
def threshold(key, bins, K: gl.constexpr, NUM_WARPS: gl.constexpr):
    """(t, room, bound): the K highest keys are those above t, and `room` of those equal to it; none is below `bound`.

    LEAST counts as no key. With fewer than K keys all are taken, and the bound says nothing.
    """
    clear: gl.constexpr = gl.BlockedLayout([BINS // (32 * NUM_WARPS)], [32], [NUM_WARPS], [0])
    low = gl.min(gl.where(key == LEAST, MOST, key), axis=0)
    high = gl.max(key, axis=0)
    count = gl.sum((key != LEAST).to(gl.int32), axis=0)
    enough = count >= K
    need = gl.minimum(count, K)
    linear = True
    while (low < high) & (count > need):
        inside = (key >= low) & (key <= high)
        if linear:
            # equal steps of the value: most scores lie around 0, where steps of the key are far too fine
            bottom = value_of(low)
            step = BINS / (value_of(high) - bottom)
            place = (value_of(key) - bottom) * step
        else:
            # equal steps of the key: the lowest and the highest never share a bin, so each round gains
            width = (high.to(gl.int64) - low.to(gl.int64)).to(gl.float32)
            place = (key - low).to(gl.uint32, bitcast=True).to(gl.float32) * (BINS / (width + 1.0))
        where = gl.minimum(gl.maximum(gl.where(inside, place, 0.0), 0.0), BINS - 1.0).to(gl.int32)
        where = gl.where(inside, where, BINS)  # a bin that nobody reads: cheaper than a branch for each key
        bins.slice(0, BINS).store(gl.zeros([BINS], gl.int32, clear))
        gl.barrier()
        bins.atomic_scatter_add(gl.full_like(key, 1), where, 0)
        gl.barrier()
        chosen, above, count = bin_of_kth(bins, need, count, NUM_WARPS)
        gl.barrier()
        need -= above
        inside = inside & (where == chosen)
        low = gl.min(gl.where(inside, key, MOST), axis=0)
        high = gl.max(gl.where(inside, key, LEAST), axis=0)
        linear = False
    whole = count == need
    return gl.where(whole & (count > 0), low - 1, low), gl.where(whole, 0, need), gl.where(enough, low, LEAST + 1)


@gluon.jit
def places(key, t, room):
    """(whether a key is taken, its place among the taken in the order of positions, how many are taken)."""
    above = key > t
    equal = (key == t) & (key > LEAST)
    # one scan for both counts: at most 2^14 keys, so they fit the halves of an int32
    counts = above.to(gl.int32) + (equal.to(gl.int32) << 16)
    both = gl.associative_scan(counts, 0, _add)
    total = gl.sum(counts, axis=0)
    taken_above, taken_equal = both & 0xFFFF, both >> 16
    taken = above | (equal & (taken_equal <= room))
    place = taken_above + gl.minimum(taken_equal, room) - 1
    return taken, place, (total & 0xFFFF) + gl.minimum(total >> 16, room)


@gluon.jit
def list_groups(maxima, chosen, bins, groups, K: gl.constexpr, BLOCK: gl.constexpr, NUM_WARPS: gl.constexpr):
    """The K of at most BLOCK groups with the highest maxima, ascending, into `chosen`: (how many, a bound)."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    group = gl.arange(0, BLOCK, layout=layout)
    key = gl.load(maxima + group, mask=group < groups, other=LEAST)
    t, room, bound = threshold(key, bins, K, NUM_WARPS)
    taken, place, total = places(key, t, room)
    chosen.scatter(group, gl.where(taken, place, K), 0)  # what is not taken goes behind the list
    gl.barrier()
    return total, bound


@gluon.jit
def list_many_groups(maxima, chosen, groups, K: gl.constexpr, BLOCK: gl.constexpr, NUM_WARPS: gl.constexpr):
    """The same for rows of any length: by bisection, reading the maxima once a step."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    slot = gl.arange(0, BLOCK, layout=layout)
    low = gl.full((), LEAST, gl.int32).to(gl.int64)
    high = gl.full((), MOST, gl.int32).to(gl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        counts = gl.zeros([BLOCK], gl.int32, layout)
        for start in range(0, groups, BLOCK):
            key = gl.load(maxima + start + slot, mask=start + slot < groups, other=LEAST)
            counts += (key >= middle.to(gl.int32)).to(gl.int32)
        count = gl.sum(counts, axis=0)
        high = gl.where(count == K, middle, gl.where(count > K, high, middle - 1))
        low = gl.where(count >= K, middle, low)
    t = low.to(gl.int32)
    counts = gl.zeros([BLOCK], gl.int32, layout)
    for start in range(0, groups, BLOCK):
        key = gl.load(maxima + start + slot, mask=start + slot < groups, other=LEAST)
        counts += (key > t).to(gl.int32)
    room = K - gl.sum(counts, axis=0)
    done = 0
    for start in range(0, groups, BLOCK):
        key = gl.load(maxima + start + slot, mask=start + slot < groups, other=LEAST)
        taken, place, total = places(key, t, room)
        chosen.scatter(start + slot, gl.where(taken, done + place, K), 0)
        done += total
        room -= gl.minimum(gl.sum(((key == t) & (key > LEAST)).to(gl.int32), axis=0), room)
    gl.barrier()
    return done, gl.where(done < K, LEAST + 1, gl.maximum(t, LEAST + 1))


@gluon.jit
def write_picks(key, entry, picks, bins, K: gl.constexpr, NUM_WARPS: gl.constexpr):
    """The entries of the K highest keys, in the order of their positions; returns how many they are."""
    t, room, _ = threshold(key, bins, K, NUM_WARPS)
    taken, place, total = places(key, t, room)
    gl.store(picks + place, entry, mask=taken)
    return total


@gluon.jit
def write_picks_over(
    key, bound, picks, bins, chosen, groups, ROWS: gl.constexpr, K: gl.constexpr, NUM_WARPS: gl.constexpr
):
    """The same where none of the K is below `bound`: usually few keys are not, and those are brought together first."""
    FEW: gl.constexpr = 4 * ROWS
    keep = key >= bound
    rank = gl.associative_scan(keep.to(gl.int32), 0, _add)
    total = gl.sum(keep.to(gl.int32), axis=0)
    if total <= FEW:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        few: gl.constexpr = gl.BlockedLayout([FEW // (32 * NUM_WARPS)], [32], [NUM_WARPS], [0])
        kept_keys = gl.allocate_shared_memory(gl.int32, [2 * FEW], plain)
        kept_entries = gl.allocate_shared_memory(gl.int32, [2 * FEW], plain)
        to = gl.where(keep, rank - 1, FEW)  # the others behind the list
        kept_keys.scatter(key, to, 0)
        # found again here and below: the entries would stay in registers that the counting wants
        again, _ = entries_of(chosen, groups, ROWS, K, NUM_WARPS)
        kept_entries.scatter(flat_of(again, ROWS, NUM_WARPS), to, 0)
        gl.barrier()
        slot = gl.arange(0, FEW, layout=few)
        key_few = gl.where(slot < total, kept_keys.slice(0, FEW).load(few), LEAST)
        written = write_picks(key_few, kept_entries.slice(0, FEW).load(few), picks, bins, K, NUM_WARPS)
    else:
        t, room, _ = threshold(key, bins, K, NUM_WARPS)
        taken, place, written = places(key, t, room)
        again, _ = entries_of(chosen, groups, ROWS, K, NUM_WARPS)
        gl.store(picks + place, flat_of(again, ROWS, NUM_WARPS), mask=taken)
    return written


@gluon.jit
def entries_of(chosen, groups, ROWS: gl.constexpr, K: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Entries [ROWS, GROUP] of the chosen groups, or of the first where all fit, and their slots."""
    EACH: gl.constexpr = ROWS // (32 * NUM_WARPS)
    tile: gl.constexpr = gl.BlockedLayout([EACH, GROUP], [32, 1], [NUM_WARPS, 1], [1, 0])
    slot = gl.arange(0, ROWS, layout=gl.SliceLayout(1, tile))
    group = slot
    if groups > ROWS:
        group = chosen.gather(gl.minimum(slot, K - 1), 0)
    within = gl.arange(0, GROUP, layout=gl.SliceLayout(0, tile))
    return gl.expand_dims(group, 1) * GROUP + gl.expand_dims(within, 0), slot


@gluon.jit
def flat_of(x, ROWS: gl.constexpr, NUM_WARPS: gl.constexpr):
    """[ROWS, GROUP] of whole groups a thread as a line, in place."""
    flat: gl.constexpr = gl.BlockedLayout([ROWS // (32 * NUM_WARPS) * GROUP], [32], [NUM_WARPS], [0])
    return gl.convert_layout(gl.reshape(x, [ROWS * GROUP]), flat, assert_trivial=True)


@gluon.jit
def select_rows(
    scores, maxima, positions, picks, entries, first, maxima_at,
    RATIO: gl.constexpr, K: gl.constexpr, LONG: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """picks[first + i] from row i of scores, and of maxima, which begin at `maxima_at`.

    Picks are ascending, then -1. Rows over 2^15 entries are fast if LONG, and right anyway.
    """
    gl.inline_asm("griddepcontrol.wait;", "~{memory}")
    gl.inline_asm("griddepcontrol.launch_dependents;", "~{memory}")
    ROWS: gl.constexpr = K if K > 512 else 512  # groups whose scores fit the registers
    line: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row = gl.program_id(0)
    seen = gl.minimum((gl.load(positions + first + row) + 1) // RATIO, entries).to(gl.int32)
    picks += (first + row).to(gl.int64) * K
    scores += row.to(gl.int64) * entries
    maxima += maxima_at + row.to(gl.int64) * (entries // GROUP)
    place = gl.arange(0, K, layout=line)
    if seen <= K:
        gl.store(picks + place, gl.where(place < seen, place, -1))
    else:
        bins = gl.allocate_shared_memory(gl.int32, [2 * BINS], plain)
        chosen = gl.allocate_shared_memory(gl.int32, [2 * K], plain)
        groups = gl.cdiv(seen, GROUP)
        listed = groups
        bound = LEAST + 1
        if groups > ROWS:
            if groups <= 2048:
                listed, bound = list_groups(maxima, chosen, bins, groups, K, 2048, NUM_WARPS)
            elif LONG and groups <= 16384:
                listed, bound = list_groups(maxima, chosen, bins, groups, K, 16384, NUM_WARPS)
            else:
                listed, bound = list_many_groups(maxima, chosen, groups, K, 2048, NUM_WARPS)
        entry, slot = entries_of(chosen, groups, ROWS, K, NUM_WARPS)
        inside = (gl.expand_dims(slot, 1) < listed) & (entry < seen)
        key = ordered(gl.load(scores + entry, mask=inside, other=float("-inf")))
        key = flat_of(key, ROWS, NUM_WARPS)
        if groups <= ROWS:
            # straight from the scores: the maxima of fours bound the K-th highest as those of groups do
            fours = gl.max(gl.reshape(key, [ROWS * 4, GROUP // 4]), axis=1)
            _, _, bound = threshold(fours, bins, K, NUM_WARPS)
        total = write_picks_over(key, bound, picks, bins, chosen, groups, ROWS, K, NUM_WARPS)
        gl.store(picks + place, gl.full_like(place, -1), mask=place >= total)


@triton.jit
def group_maxima(scores, positions, maxima, entries, RATIO: tl.constexpr, BLOCK: tl.constexpr):
    """Maxima of the groups of 16 that a row sees, in rows that `select_rows` does not take straight from the scores."""
    gdc_wait()
    gdc_launch_dependents()
    row = tl.program_id(0)
    seen = tl.minimum((tl.load(positions + row) + 1) // RATIO, entries).to(tl.int32)
    if seen > 8192:
        scores += row.to(tl.int64) * entries
        maxima += row.to(tl.int64) * (entries // GROUP)
        for start in range(tl.program_id(1) * BLOCK, seen, tl.num_programs(1) * BLOCK):
            entry = start + tl.arange(0, BLOCK)
            x = tl.load(scores + entry, mask=entry < seen, other=float("-inf"))
            most = tl.max(tl.reshape(tl.where(x == x, x, float("-inf")), (BLOCK // GROUP, GROUP)), axis=1)
            bits = (most + 0.0).to(tl.int32, bitcast=True)
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(maxima + group, bits ^ ((bits >> 31) & 0x7FFFFFFF), mask=group < entries // GROUP)
