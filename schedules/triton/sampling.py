"""Sampling on the device: a row's filters by threshold search in registers, then one draw by its inverse distribution.

`cut_rows`: a cluster of blocks holds one row of the vocabulary in registers (read once) as weights p = exp((x - best) /
temperature), at most 1. top_k and top_p both keep the tokens with p >= some cut, so each is a bisection over the bits
of p: a round counts and sums what lies above the middle, over the whole cluster. No sort, no atomics; sums have a
fixed order. It leaves the cut and the kept weight of each segment of 128 tokens.
`draw_rows`: finds the segment, then the token, where the running sum passes a uniform number times the total.

Legend: S rows, V vocabulary, G segments of W tokens.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
GREEDY_BELOW: tl.constexpr = tl.constexpr(1e-5)  # as the reference
MOST: tl.constexpr = tl.constexpr((1 << 14) - 1)  # of a token's count; the bit above marks the prompt's tokens


@triton.jit
def _penalised(x, count, repetition, frequency, presence):
    """The logit of a token that was generated `count & MOST` times."""
    generated = (count & MOST).to(tl.float32)
    repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x = tl.where(count != 0, repeated, x)
    return x - frequency * generated - presence * (generated > 0).to(tl.float32)


@triton.jit
def _weight(x, best, temperature):
    """exp((x - best) / temperature); for a greedy row 1 at the best and 0 elsewhere."""
    p = tl.exp2((x - best) * (LOG2E / tl.maximum(temperature, GREEDY_BELOW)))
    return tl.where(temperature < GREEDY_BELOW, tl.where(x == best, 1.0, p * 0.0), p)


@triton.jit
def _both(count0, mass0, count1, mass1):
    return count0 + count1, mass0 + mass1


@triton.jit
def _above(p, cut):
    """How many weights are at least `cut`, and their sum."""
    over = p >= cut
    return tl.reduce((over.to(tl.int32), tl.where(over, p, 0.0)), 0, _both)


@triton.jit
def _search(p, low, count_low, mass_low, count_wanted, mass_wanted):
    """(cut, count, mass) of the largest cut whose tokens are at least that many, or weigh at least that much.

    `low` is a cut that has enough. Bits of floats that are not negative are ordered as the floats are.
    """
    least = low.to(tl.int32, bitcast=True)
    most = 0x3F800001  # just above 1: no token
    count_most = 0
    while (most - least > 1) & (count_low - count_most > 1) & (count_low != count_wanted):
        middle = least + (most - least) // 2
        count, mass = _above(p, middle.to(tl.float32, bitcast=True))
        if (count >= count_wanted) | (mass >= mass_wanted):
            least = middle
            count_low = count
            mass_low = mass
        else:
            most = middle
            count_most = count
    return least.to(tl.float32, bitcast=True), count_low, mass_low


@triton.jit
def cut_rows(
    logits, temperature, top_k, top_p, min_p, slots, counts, repetition, frequency, presence,
    best_out, cut_out, sums_out,
    V: tl.constexpr, G: tl.constexpr, W: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """best and cut float32 [S], sums float32 [S, G]; a row that is not sound has best NaN. G * W >= V."""
    s = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, G)[:, None] * W + tl.arange(0, W)[None, :]
    live = at < V
    x = tl.load(logits + s * V + at, live, float("-inf"))
    if PENALISED:
        slot = tl.load(slots + s)
        count = tl.load(counts + slot * V + at, live & (slot != 0), 0)
        rate, often, once = tl.load(repetition + s), tl.load(frequency + s), tl.load(presence + s)
        x = tl.where(slot != 0, _penalised(x, count, rate, often, once), x)
    best = tl.max(tl.max(x, 1), 0)
    degree = tl.load(temperature + s)
    p = _weight(x, best, degree)
    p = tl.where(p < tl.load(min_p + s), 0.0, p)
    flat = tl.reshape(p, (G * W,), can_reorder=True)
    # NaN logits, and an infinite best, make the total NaN
    count, mass = tl.reduce(((flat > 0).to(tl.int32), flat), 0, _both)
    k = tl.load(top_k + s)
    share = tl.load(top_p + s)
    cut = 0.0
    if mass == mass:
        if (k > 0) & (k < count):
            cut, count, mass = _search(flat, cut, count, mass, k, float("inf"))
            mass -= (count - k) * cut  # the share is of the first k alone
        if share < 1:
            # no count is enough, so the search ends by weight
            cut, count, mass = _search(flat, cut, count, mass, 0x7FFFFFFF, mass * share)
    tl.store(sums_out + s * G + tl.arange(0, G), tl.sum(tl.where(p >= cut, p, 0.0), 1))
    tl.store(cut_out + s, cut)
    tl.store(best_out + s, tl.where(mass == mass, best, float("nan")))


@triton.jit
def _uniform(key, counter):
    """float64 in [0, 1): SplitMix64's number `counter` of stream `key`."""
    z = key.to(tl.uint64, bitcast=True) + (counter.to(tl.uint64, bitcast=True) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)  # 2^-53


@triton.jit
def draw_rows(
    logits, temperature, min_p, keys, counters, slots, counts, repetition, frequency, presence, bests, cuts, sums, out,
    V: tl.constexpr, G: tl.constexpr, W: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """out int64 [S]: the token of each row, -1 if it is not sound; its count in `counts` grows by one."""
    s = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, G)
    kept = tl.load(sums + s * G + g)
    running = tl.cumsum(kept.to(tl.float64), 0)
    target = _uniform(tl.load(keys + s), tl.load(counters + s)) * tl.max(running, 0)
    last = tl.max(tl.where(kept > 0, g, 0), 0)
    segment = tl.minimum(tl.sum((running <= target).to(tl.int32), 0), last)  # the product may round up to the total
    before = tl.max(tl.where(g < segment, running, 0.0), 0)
    best = tl.load(bests + s)
    w = tl.arange(0, W)
    at = segment * W + w
    live = at < V
    x = tl.load(logits + s * V + at, live, float("-inf"))
    if PENALISED:
        slot = tl.load(slots + s)
        count = tl.load(counts + slot * V + at, live & (slot != 0), 0)
        rate, often, once = tl.load(repetition + s), tl.load(frequency + s), tl.load(presence + s)
        x = tl.where(slot != 0, _penalised(x, count, rate, often, once), x)
    p = _weight(x, best, tl.load(temperature + s))
    p = tl.where((p >= tl.load(min_p + s)) & (p >= tl.load(cuts + s)), p, 0.0)
    running = before + tl.cumsum(p.to(tl.float64), 0)
    last = tl.max(tl.where(p > 0, w, 0), 0)
    token = segment * W + tl.minimum(tl.sum((running <= target).to(tl.int32), 0), last)
    sound = best == best
    tl.store(out + s, tl.where(sound, token, -1).to(tl.int64))
    if PENALISED:
        to = counts + slot * V + token
        counting = sound & (slot != 0)
        old = tl.load(to, counting, 0)
        tl.store(to, old + 1, counting & ((old & MOST) < MOST))


@triton.jit
def edit_rows(logits, starts, tokens, values, V: tl.constexpr, BLOCK: tl.constexpr):
    """Adds values[m] to token tokens[m] of row s, for starts[s] <= m < starts[s + 1]; tokens of a row are distinct."""
    s = tl.program_id(0).to(tl.int64)
    end = tl.load(starts + s + 1)
    for first in range(tl.load(starts + s), end, BLOCK):
        m = first + tl.arange(0, BLOCK)
        token = tl.load(tokens + m, m < end, 0)
        at = logits + s * V + token
        live = (m < end) & (token >= 0) & (token < V)
        tl.store(at, tl.load(at, live, 0.0) + tl.load(values + m, live, 0.0), live)
