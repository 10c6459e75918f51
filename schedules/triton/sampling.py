"""Sampling on the device without a sort: candidates by histogram, an exact cut by bisection, a draw by a race.

    scan_rows    every chunk of 4096 tokens: its best, the sum of its weights, and which of its tokens arrives first;
                 of rows with filters in place of that how many tokens lie in each quarter nat below the chunk's best,
                 or for a small top_k the best of each 32 tokens
    bound_rows   every row: its best and total; a logit below which no token can survive the row's filters
    list_rows    every chunk: its tokens above that bound, in the order of ids
    draw_rows    every row: the cut, a weight p = exp((x - best) / temperature) that top_k and top_p keep all above,
                 by bisection over the bits of p; then the token above it that arrives first

Token v arrives at E / p, for the noise E of (key, counter, v): noise.py.

Lists hold 1024 tokens a chunk; a row with more in some chunk (a flat distribution) is bisected over all its logits.
Sums have a fixed order and rows do not meet. A NaN, or a best that is not finite, makes a row's total no number.

Legend: T rows, V vocabulary, C chunks of W tokens, B bins, L most listed tokens of a chunk.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4c.schedules.triton.noise import chunk_noise, noise, row_stream

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
GREEDY_BELOW: tl.constexpr = tl.constexpr(1e-5)  # as the reference
MOST: tl.constexpr = tl.constexpr((1 << 14) - 1)  # of a token's count; the bit above marks the prompt's tokens
BIN: tl.constexpr = tl.constexpr(0.25)  # nats; 128 bins reach 32 nats, beyond which 2^17 tokens weigh 2e-9
FEW: tl.constexpr = tl.constexpr(1024)  # tokens to keep, up to which bests of groups bound a row: 4 groups a token
UNSOUND: tl.constexpr = tl.constexpr(0)
WHOLE: tl.constexpr = tl.constexpr(1)  # greedy, or no filter
LISTED: tl.constexpr = tl.constexpr(2)
FLAT: tl.constexpr = tl.constexpr(3)  # no bound found
COUNTED: tl.constexpr = tl.constexpr(1)  # PENALISED: 0 if no row is; tokens drawn are counted
DRAFTED: tl.constexpr = tl.constexpr(2)  # they are not; drafts before a row are seen
SHORT: tl.constexpr = tl.constexpr(64)  # listed tokens of a chunk, up to which a row is 2048 candidates and not 32768


@triton.jit
def _logits(
    logits, slots, counts, repetition, frequency, presence, mask_rows, masks, chain, drafted, s, at,
    V: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """Logits `at` of row s, less what counts of their tokens cost; -inf beyond the vocabulary and where masked.

    If PENALISED is DRAFTED, the chain[s] drafts before the row, drafted[s] and back, count too.
    """
    live = at < V
    x = tl.load(logits + s * V + at, live, float("-inf"))
    if PENALISED:
        ruled = tl.load(mask_rows + s)
        if ruled != 0:  # else no word is read; penalties leave -inf as it is, and so need fewer registers behind
            words = tl.load(masks + ruled * ((V + 31) // 32) + at // 32, live, 0)
            x = tl.where(((words >> (at % 32)) & 1) != 0, x, float("-inf"))
        slot = tl.load(slots + s)
        count = tl.load(counts + slot * V + at, live & (slot != 0), 0)
        if PENALISED == DRAFTED:
            behind = tl.where(slot != 0, tl.load(chain + s), 0)
            for i in range(behind):
                more = (at == tl.load(drafted + s - i)) & ((count & MOST) < MOST)
                count += more.to(count.dtype)
        generated = (count & MOST).to(tl.float32)
        rate = tl.load(repetition + s)
        x = tl.where(count != 0, tl.where(x > 0, tl.div_rn(x, rate), x * rate), x)
        spent = tl.load(frequency + s) * generated + tl.load(presence + s) * (generated > 0).to(tl.float32)
        x = tl.where(generated > 0, x - spent, x)
    return x


@triton.jit
def _rate(temperature):
    return LOG2E / tl.maximum(temperature, GREEDY_BELOW)


@triton.jit
def _weight(x, best, temperature):
    """exp((x - best) / temperature): 1 at the best, NaN for a NaN, exactly 0 for -inf."""
    p = tl.exp2((x - best) * _rate(temperature))
    return tl.where(x == float("-inf"), 0.0, p)


@triton.jit
def _filtered(temperature, top_k, top_p, min_p, V: tl.constexpr):
    some = ((top_k > 0) & (top_k < V)) | (top_p < 1) | (min_p > 0)
    return some & (temperature >= GREEDY_BELOW)


@triton.jit
def scan_rows(
    logits, temperature, top_k, top_p, min_p, keys, counters, slots, counts, repetition, frequency, presence,
    mask_rows, masks, chain, drafted,
    bests, sums, bins, times, firsts,
    V: tl.constexpr, C: tl.constexpr, W: tl.constexpr, B: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """bests, sums and times float32 [T, C], firsts int32 [T, C], bins int32 [T, C, B]."""
    s = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    gdc_wait()
    gdc_launch_dependents()
    at = c * W + tl.arange(0, W)
    x = _logits(
        logits, slots, counts, repetition, frequency, presence, mask_rows, masks, chain, drafted,
        s, at, V, PENALISED,
    )  # fmt: skip
    best = tl.max(x, 0)
    degree = tl.load(temperature + s)
    tl.store(bests + s * C + c, best)
    y = (x - tl.where(best == float("-inf"), 0.0, best)) * _rate(degree)
    tl.store(sums + s * C + c, tl.sum(tl.exp2(y), 0))
    k = tl.load(top_k + s)
    if _filtered(degree, k, tl.load(top_p + s), tl.load(min_p + s), V):
        to = bins + (s * C + c) * B + tl.arange(0, B)
        if (k > 0) & (k <= FEW) & (k < V):
            tl.store(to, tl.max(tl.reshape(x, (B, W // B)), 1).to(tl.int32, bitcast=True))
        else:
            below = (best - x) / (BIN * degree)
            bin = tl.minimum(below, B - 1.0).to(tl.int32)  # NaN rows are not sampled, whatever their bins
            bin = tl.minimum(tl.maximum(bin, 0), B - 1)
            tl.store(to, tl.histogram(bin, B, mask=x > float("-inf")))
    else:
        earliest = 0.0
        if degree < GREEDY_BELOW:
            first = tl.min(tl.where(x == best, at, V - 1), 0)
        else:
            time = chunk_noise(row_stream(keys, counters, s), c, W) * tl.exp2(-y)
            earliest = tl.min(time, 0)
            first = tl.min(tl.where(time == earliest, at, V - 1), 0)
        tl.store(times + s * C + c, earliest)
        tl.store(firsts + s * C + c, first)


@triton.jit
def bound_rows(
    temperature, top_k, top_p, min_p, bests, sums, bins, best_out, total_out, bound_out, mode_out,
    V: tl.constexpr, C: tl.constexpr, PC: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """best, total, bound float32 [T], mode int32 [T]. PC: C as a power of two."""
    s = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, PC)
    gdc_wait()
    gdc_launch_dependents()
    degree, k, share, least = tl.load(temperature + s), tl.load(top_k + s), tl.load(top_p + s), tl.load(min_p + s)
    chunk_best = tl.load(bests + s * C + c, c < C, float("-inf"))
    best = tl.max(chunk_best, 0)
    total = tl.sum(tl.load(sums + s * C + c, c < C, 0.0) * _weight(chunk_best, best, degree), 0)
    mode = tl.where(total > 0, WHOLE, UNSOUND)
    bound = float("-inf")
    if _filtered(degree, k, share, least, V) & (total > 0):
        b = tl.arange(0, B)
        found = tl.load(bins + (s * C + c)[:, None] * B + b[None, :], (c < C)[:, None], 0)
        # bins from the row's best that a chunk's bin ends at; it begins one before
        step = BIN * degree
        number = found.to(tl.float32)
        ends = tl.where(chunk_best > float("-inf"), (best - chunk_best) / step, 1e9)[:, None] + b[None, :] + 1.0
        heaviest = number * tl.exp2((1.0 - ends) * (BIN * LOG2E))
        ends = tl.where(b[None, :] == B - 1, 1e9, ends)  # the last bin has no end
        by_count = (k > 0) & (k < V)
        if (k > 0) & (k <= FEW) & (k < V):
            # the bests of groups are tokens themselves
            group_best = found.to(tl.float32, bitcast=True)
            there = (c < C)[:, None] & (group_best > float("-inf"))
            ends = tl.where(there, (best - group_best) / step, 1e9)
            number = tl.where(there, 1.0, 0.0)
        by_tail = (share < 1) & (least == 0) & (by_count == 0)
        low = 0.0
        high = 512.0  # more than the bins of a row whose chunks differ by up to 384 bins, 96 nats
        if by_count | by_tail:
            mode = LISTED + (FLAT - LISTED) * (
                1 - _enough(ends, number, heaviest, high, by_count, k, (1.0 - share) * total).to(tl.int32)
            )
            while high - low > 1.0:
                middle = (low + high) * 0.5
                if _enough(ends, number, heaviest, middle, by_count, k, (1.0 - share) * total):
                    high = middle
                else:
                    low = middle
            # what rounding of logits and bins may hide
            bound = best - high * step - (0.01 * step + 1e-6 * (tl.abs(best) + high * step))
        else:
            mode = LISTED
        if least > 0:
            lowest = best + degree * tl.log(least)
            bound = tl.maximum(bound, lowest - (1e-3 * degree + 1e-6 * (tl.abs(best) + tl.abs(lowest))))
            mode = LISTED
    tl.store(best_out + s, best)
    tl.store(total_out + s, total)
    tl.store(bound_out + s, bound)
    tl.store(mode_out + s, mode)


@triton.jit
def _enough(ends, number, heaviest, depth, by_count, k, tail):
    """Whether surely k tokens lie within `depth` bins of the best, or surely at most `tail` of the weight below."""
    inside = ends <= depth
    if by_count:
        result = tl.sum(tl.sum(tl.where(inside, number, 0.0), 1), 0) >= k.to(tl.float32)
    else:
        result = tl.sum(tl.sum(tl.where(inside, 0.0, heaviest), 1), 0) <= tail * 0.9999
    return result


@triton.jit
def list_rows(
    logits, slots, counts, repetition, frequency, presence, mask_rows, masks, chain, drafted,
    bounds, modes, listed, places, numbers,
    V: tl.constexpr, C: tl.constexpr, W: tl.constexpr, L: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """listed float32 and places int32 [T, C, L]: logits and ids; numbers int32 [T, C]: how many there are, L or not."""
    s = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    gdc_wait()
    gdc_launch_dependents()
    if tl.load(modes + s) == LISTED:
        at = c * W + tl.arange(0, W)
        x = _logits(
            logits, slots, counts, repetition, frequency, presence, mask_rows, masks, chain, drafted,
            s, at, V, PENALISED,
        )  # fmt: skip
        keep = (x >= tl.load(bounds + s)) & (x > float("-inf"))
        order = tl.cumsum(keep.to(tl.int32), 0)
        to = (s * C + c) * L + order - 1
        fits = keep & (order <= L)
        tl.store(listed + to, x, fits)
        tl.store(places + to, at, fits)
        tl.store(numbers + s * C + c, tl.max(order, 0))


@triton.jit
def _both(count0, mass0, count1, mass1):
    return count0 + count1, mass0 + mass1


@triton.jit
def _above(p, cut):
    """How many weights are at least `cut`, and their sum."""
    over = p >= cut
    return tl.reduce((over.to(tl.int32), tl.where(over, p, 0.0)), 0, _both)


@triton.jit
def _above_all(
    logits, slots, counts, repetition, frequency, presence, mask_rows, masks, chain, drafted,
    s, best, degree, least, cut,
    V: tl.constexpr, C: tl.constexpr, W: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """`_above` of all weights of a row, read again."""
    count = 0
    mass = 0.0
    for first in tl.range(0, C * W, 2 * W, disable_licm=True):  # what stays the same would fill the registers
        at = first + tl.arange(0, 2 * W)
        x = _logits(
            logits, slots, counts, repetition, frequency, presence, mask_rows, masks, chain, drafted,
            s, at, V, PENALISED,
        )  # fmt: skip
        p = _weight(x, best, degree)
        more, weighing = _above(tl.where(p < least, 0.0, p), cut)
        count += more
        mass += weighing
    return count, mass


@triton.jit
def _draw_listed(
    listed, places, many, s, best, total, degree, k, share, least, stream,
    V: tl.constexpr, C: tl.constexpr, PC: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The token of a row whose chunks list `many` candidates each, at most N."""
    c = tl.arange(0, PC)
    i = tl.arange(0, N)
    at = (s * C + c)[:, None] * L + i[None, :]
    cut = 0.0
    p = _weight(tl.load(listed + at, i[None, :] < many[:, None], float("-inf")), best, degree)
    p = tl.where(p < least, 0.0, p)
    flat = tl.reshape(p, (PC * N,))
    count, mass = tl.reduce(((flat > 0).to(tl.int32), flat), 0, _both)
    wanted = tl.where(least > 0, mass, total) * share
    if (k > 0) & (k < V):
        if k < count:
            low = 0
            high = 0x3F800001  # bits just above 1: no token
            beyond = 0
            # bits of floats that are not negative are ordered as the floats are
            while (high - low > 1) & (count - beyond > 1) & (count != k):
                middle = low + (high - low) // 2
                more, weighing = _above(flat, middle.to(tl.float32, bitcast=True))
                if more >= k:
                    low = middle
                    count = more
                    mass = weighing
                else:
                    high = middle
                    beyond = more
            cut = low.to(tl.float32, bitcast=True)
            mass -= (count - k) * cut  # the share is of the first k alone
        wanted = mass * share
    if share < 1:
        low = cut.to(tl.int32, bitcast=True)
        high = 0x3F800001
        beyond = 0
        while (high - low > 1) & (count - beyond > 1):
            middle = low + (high - low) // 2
            more, weighing = _above(flat, middle.to(tl.float32, bitcast=True))
            if weighing >= wanted:
                low = middle
                count = more
            else:
                high = middle
                beyond = more
        cut = low.to(tl.float32, bitcast=True)
    earliest = float("inf")
    token = 0
    for first in range(0, tl.max(many, 0), SHORT):  # read again: registers hold no more than weights
        j = first + tl.arange(0, SHORT)
        live = j[None, :] < many[:, None]
        place = (s * C + c)[:, None] * L + j[None, :]
        weight = _weight(tl.load(listed + place, live, float("-inf")), best, degree)
        v = tl.load(places + place, live, 0)
        keep = (weight >= cut) & (weight >= least) & (weight > 0)
        time = tl.where(keep, noise(stream, v) / weight, float("inf"))
        soonest = tl.min(tl.min(time, 1), 0)
        if soonest < earliest:
            earliest = soonest
            token = tl.min(tl.min(tl.where(time == soonest, v, V - 1), 1), 0)
    return token


@triton.jit
def draw_rows(
    logits, temperature, top_k, top_p, min_p, keys, counters, slots, counts, repetition, frequency, presence,
    mask_rows, masks, chain, drafted,
    bests, times, firsts, best_in, total_in, modes, listed, places, numbers, out,
    V: tl.constexpr, C: tl.constexpr, PC: tl.constexpr, W: tl.constexpr, L: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """out int64 [T]: the token of each row, -1 if it is not sound; its count in `counts` grows by one if COUNTED."""
    s = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, PC)
    gdc_wait()
    gdc_launch_dependents()
    mode = tl.load(modes + s)
    best, total = tl.load(best_in + s), tl.load(total_in + s)
    degree, k, share, least = tl.load(temperature + s), tl.load(top_k + s), tl.load(top_p + s), tl.load(min_p + s)
    stream = row_stream(keys, counters, s)
    cut = 0.0
    token = -1
    if mode == WHOLE:
        chunk_best = tl.load(bests + s * C + c, c < C, float("-inf"))
        time = tl.load(times + s * C + c, c < C, float("inf"))
        time *= tl.exp2((best - chunk_best) * _rate(degree))
        if degree < GREEDY_BELOW:
            time = tl.where(chunk_best == best, 0.0, float("inf"))
        token = tl.load(firsts + s * C + tl.argmin(time, 0))
    if mode == LISTED:
        many = tl.load(numbers + s * C + c, c < C, 0)
        if tl.max(many, 0) > L:
            mode = FLAT
        else:
            if tl.max(many, 0) <= SHORT:
                token = _draw_listed(listed, places, many, s, best, total, degree, k, share, least, stream,
                                     V, C, PC, L, SHORT)  # fmt: skip
            else:
                token = _draw_listed(listed, places, many, s, best, total, degree, k, share, least, stream,
                                     V, C, PC, L, L)  # fmt: skip
    if mode == FLAT:
        count, mass = _above_all(
            logits,
            slots,
            counts,
            repetition,
            frequency,
            presence,
            mask_rows,
            masks,
            chain,
            drafted,
            s,
            best,
            degree,
            least,
            1e-45,
            V,
            C,
            W,
            PENALISED,
        )
        if (k > 0) & (k < count):
            low = 1
            high = 0x3F800001
            beyond = 0
            while (high - low > 1) & (count - beyond > 1) & (count != k):
                middle = low + (high - low) // 2
                cut = middle.to(tl.float32, bitcast=True)
                more, weighing = _above_all(
                    logits, slots, counts, repetition, frequency, presence, mask_rows, masks, chain, drafted,
                    s, best, degree, least, cut,
                    V, C, W, PENALISED,
                )  # fmt: skip
                if more >= k:
                    low = middle
                    count = more
                    mass = weighing
                else:
                    high = middle
                    beyond = more
            cut = low.to(tl.float32, bitcast=True)
            mass -= (count - k) * cut
        if share < 1:
            wanted = mass * share
            low = cut.to(tl.int32, bitcast=True)
            high = 0x3F800001
            beyond = 0
            while (high - low > 1) & (count - beyond > 1):
                middle = low + (high - low) // 2
                cut = middle.to(tl.float32, bitcast=True)
                more, weighing = _above_all(
                    logits, slots, counts, repetition, frequency, presence, mask_rows, masks, chain, drafted,
                    s, best, degree, least, cut,
                    V, C, W, PENALISED,
                )  # fmt: skip
                if weighing >= wanted:
                    low = middle
                    count = more
                else:
                    high = middle
                    beyond = more
            cut = low.to(tl.float32, bitcast=True)
        earliest = float("inf")
        i = tl.arange(0, W)
        for chunk in tl.range(0, C, disable_licm=True):
            x = _logits(
                logits, slots, counts, repetition, frequency, presence, mask_rows, masks, chain, drafted,
                s, chunk * W + i, V, PENALISED,
            )  # fmt: skip
            p = _weight(x, best, degree)
            noise = chunk_noise(stream, chunk, W)
            time = tl.where((p >= cut) & (p >= least) & (p > 0), noise / p, float("inf"))
            soonest = tl.min(time, 0)
            if soonest < earliest:
                earliest = soonest
                token = chunk * W + tl.min(tl.where(time == soonest, i, W - 1), 0)
    tl.store(out + s, token.to(tl.int64))
    if PENALISED == COUNTED:
        slot = tl.load(slots + s)
        to = counts + slot * V + token
        counting = (token >= 0) & (slot != 0)
        old = tl.load(to, counting, 0)
        tl.store(to, old + 1, counting & ((old & MOST) < MOST))


@triton.jit
def edit_rows(logits, starts, stops, tokens, values, replaced, V: tl.constexpr, BLOCK: tl.constexpr):
    """Adds values[m] to token tokens[m] of row s, for starts[s] <= m < stops[s], and keeps what was there."""
    s = tl.program_id(0).to(tl.int64)
    gdc_wait()
    gdc_launch_dependents()
    end = tl.load(stops + s)
    for first in range(tl.load(starts + s), end, BLOCK):
        m = first + tl.arange(0, BLOCK)
        token = tl.load(tokens + m, m < end, 0)
        at = logits + s * V + token
        live = (m < end) & (token >= 0) & (token < V)
        old = tl.load(at, live, 0.0)
        tl.store(replaced + m, old, live)
        tl.store(at, old + tl.load(values + m, live, 0.0), live)


@triton.jit
def feed(token_ids, last_tokens, seats, out, count, N: tl.constexpr):
    """Token ids, or the last token of the seat where an id is negative; never below 0."""
    gdc_wait()
    gdc_launch_dependents()
    t = tl.program_id(0) * N + tl.arange(0, N)
    live = t < count
    token = tl.load(token_ids + t, live, 0)
    seat = tl.load(seats + t, live, 0)
    last = tl.load(last_tokens + seat, live & (token < 0), 0)
    tl.store(out + t, tl.maximum(tl.where(token < 0, last, token), 0), live)


@triton.jit
def keep(last_tokens, seats, tokens, count, N: tl.constexpr):
    """Leaves the token of every row with its seat."""
    gdc_wait()
    gdc_launch_dependents()
    s = tl.program_id(0) * N + tl.arange(0, N)
    live = s < count
    seat = tl.load(seats + s, live, 0)
    tl.store(last_tokens + seat, tl.load(tokens + s, live, 0), live)
