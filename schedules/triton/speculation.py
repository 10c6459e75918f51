"""What a step that verifies drafts keeps on the device: a few kilobytes, so each kernel is a launch and little else.

One thread a token, row or request. See dsv4c/ops/speculation.py for what each op means.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST: tl.constexpr = tl.constexpr((1 << 14) - 1)  # of a token's count; the bit above marks the prompt's tokens


@triton.jit
def feed_drafts(
    token_ids, positions, seats, pending, length, out_ids, out_positions, count, K1: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()
    t = tl.program_id(0) * N + tl.arange(0, N)
    live = t < count
    token = tl.load(token_ids + t, live, 0)
    at = tl.load(positions + t, live, 0)
    seat = tl.load(seats + t, live, 0)
    kept = tl.load(pending + seat * K1 + (-1 - token), live & (token < 0), 0)
    begin = tl.load(length + seat, live & (at < 0), 0)
    tl.store(out_ids + t, tl.maximum(tl.where(token < 0, kept, token), 0), live)
    tl.store(out_positions + t, tl.where(at < 0, begin - 1 - at, at), live)


@triton.jit
def feed_spans(starts, ends, length, out_starts, out_ends, count, N: tl.constexpr):
    gdc_wait()
    gdc_launch_dependents()
    r = tl.program_id(0) * N + tl.arange(0, N)
    live = r < count
    start = tl.load(starts + r, live, 0)
    end = tl.load(ends + r, live, 0)
    begin = tl.load(length + r, live, 0)
    tl.store(out_starts + r, tl.where(start < 0, begin, start), live)
    tl.store(out_ends + r, tl.where(end < 0, begin - end, end), live)


@triton.jit
def feed_ends(ends, positions, seats, starts, stops, out, count, RATIO: tl.constexpr, N: tl.constexpr):
    gdc_wait()
    gdc_launch_dependents()
    e = tl.program_id(0) * N + tl.arange(0, N)
    live = e < count
    end = tl.load(ends + e, live, -1)
    loose = live & (end < -1)
    first = tl.where(loose, -2 - end, 0)
    seat = tl.load(seats + first, loose, 0)
    size = tl.load(stops + seat, loose, 0) - tl.load(starts + seat, loose, 0)
    more = RATIO - 1 - tl.load(positions + first, loose, 0) % RATIO
    tl.store(out + e, tl.where(loose, tl.where(more < size, first + more, -1), end), live)


@triton.jit
def row_facts(token_ids, positions, rows, shifts, drafted, counters, count, N: tl.constexpr):
    gdc_wait()
    gdc_launch_dependents()
    s = tl.program_id(0) * N + tl.arange(0, N)
    live = s < count
    row = tl.load(rows + s, live, 0)
    tl.store(drafted + s, tl.load(token_ids + row, live, 0), live)
    tl.store(counters + s, tl.load(positions + row, live, 0) + tl.load(shifts + s, live, 0), live)


@triton.jit
def accept_drafts(
    tokens, drafted, rows, positions, counters, starts, limits, seats, penalty_seats, pending, length, counts,
    accepted, out_rows, next_positions, next_counters, count, V: tl.constexpr, K1: tl.constexpr, END: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """A thread walks the rows of its request: N threads, so that no request has two."""
    gdc_wait()
    gdc_launch_dependents()
    d = tl.program_id(0) * N + tl.arange(0, N)
    live = d < count
    first = tl.load(starts + d, live, 0)
    limit = tl.load(limits + d, live, 0)
    seat = tl.load(seats + d, live, 0)
    counted = tl.load(penalty_seats + first, live & (seat != 0), 0)  # nobody's first row is somebody else's
    kept = tl.zeros([N], tl.int64)
    same = live
    for i in tl.static_range(K1 - 1):
        there = same & (i < limit)
        token = tl.load(tokens + first + i, there, -1)
        draft = tl.load(drafted + first + i + 1, there, -2)
        same = there & (token == draft)
        kept += same.to(tl.int64)
    last = first + kept
    row = tl.load(rows + last, live, 0)
    at = tl.load(positions + row, live, 0) + 1
    tl.store(accepted + d, kept + 1, live)
    tl.store(out_rows + d, row, live)
    tl.store(next_positions + d, tl.minimum(at, END - 1), live)
    tl.store(next_counters + d, tl.load(counters + last, live, 0) + 1, live)
    somebody = live & (seat != 0)
    tl.store(pending + seat * K1, tl.load(tokens + last, live, 0), somebody)
    tl.store(length + seat, at, somebody)
    for i in tl.static_range(K1):
        token = tl.load(tokens + first + i, live & (i <= kept) & (counted != 0), -1)
        counting = token >= 0
        to = counts + counted * V + token
        old = tl.load(to, counting, 0)
        tl.store(to, old + 1, counting & ((old & MOST) < MOST))


@triton.jit
def place_tokens(next_ids, rows, seats, tokens, count, N: tl.constexpr):
    gdc_wait()
    gdc_launch_dependents()
    s = tl.program_id(0) * N + tl.arange(0, N)
    live = s < count
    somebody = live & (tl.load(seats + s, live, 0) != 0)
    tl.store(next_ids + tl.load(rows + s, live, 0), tl.maximum(tl.load(tokens + s, live, 0), 0), somebody)


@triton.jit
def advance_rows(
    positions, counters, out_positions, out_counters, count, BY: tl.constexpr, END: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()
    d = tl.program_id(0) * N + tl.arange(0, N)
    live = d < count
    tl.store(out_positions + d, tl.minimum(tl.load(positions + d, live, 0) + BY, END - 1), live)
    tl.store(out_counters + d, tl.load(counters + d, live, 0) + BY, live)


@triton.jit
def keep_draft(pending, seats, drafts, count, K1: tl.constexpr, AT: tl.constexpr, N: tl.constexpr):
    gdc_wait()
    gdc_launch_dependents()
    d = tl.program_id(0) * N + tl.arange(0, N)
    live = d < count
    seat = tl.load(seats + d, live, 0)
    tl.store(pending + seat * K1 + AT, tl.maximum(tl.load(drafts + d, live, 0), 0), live & (seat != 0))


@triton.jit
def add_embedding(embedding, streams, out, D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out[t, n] = embedding[t] + streams[t, n] for the N streams of token t, BLOCK channels at a time."""
    gdc_wait()
    gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < D
    added = tl.load(embedding + t * D + at, live, 0.0).to(tl.float32)
    for n in tl.static_range(N):
        to = (t * N + n) * D + at
        total = added + tl.load(streams + to, live, 0.0).to(tl.float32)
        tl.store(out + to, total.to(tl.bfloat16), live)
