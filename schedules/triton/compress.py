"""Kernels of KV compression: pool the tokens of finished windows, then norm, turn, pack and write, and keep the rings.

One launch does it all without an order between programs, because every element of a ring belongs to one program:
an entry's program takes a ring element it reads (a token of before this step, in one half of the channels) and, if
this step also overwrites it, writes the new value after reading. The tokens' programs write all other elements.
`read_by_entry` is the one place that says which is which.

The first programs take BT tokens each, the others an entry each. Rows whose state slot is 0 and entries whose pool row
lies in the null page are padding: they are skipped.

Legend: E entries, T tokens, C channels of an entry, D channels of a projected row (2 C with overlap), Z request slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4c.schedules.triton.rows import (
    fast_exp,
    hadamard,
    normed,
    pack_index,
    pack_plain,
    rounded,
    row_angles,
    turn,
    turned_at,
)


@triton.jit
def read_by_entry(position, start, end, RATIO: tl.constexpr, OVERLAP: tl.constexpr, FIRST: tl.constexpr):
    """Whether an entry that ends in this step, [start, end), reads the row of the earlier token `position`.

    Of the first half of the channels (FIRST; the window after the token's own) or of the second (its own window).
    Without overlap there is only the second.
    """
    own_end = position // RATIO * RATIO + RATIO
    if OVERLAP and FIRST:
        own_end += RATIO
    return (position >= 0) & (position < start) & (own_end > start) & (own_end <= end)


@triton.jit
def old_token(position, start, RING: tl.constexpr):
    """The token of before this step whose ring row the token `position` of this step takes."""
    return position - ((position - start) // RING + 1) * RING


@triton.jit
def new_token(position, end, RING: tl.constexpr):
    """The last token before `end` that shares the ring row of `position`."""
    return position + (end - 1 - position) // RING * RING


@triton.jit
def finish(
    pool, slot, entry, weight, cos, sin, turns,
    C: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A pooled entry [C] (float32) to its row of the pool, by norm weight [C] and angles [1, C / 2]."""
    c = tl.arange(0, C)
    one = tl.arange(0, 1)
    v = normed(rounded(entry)[None, :], weight, C, EPS)
    v = rounded(turn(v, cos, sin, turns, False))
    if FORMAT == "kv":
        pack_plain(pool, slot + one, one == 0, v, C, R, GROUP, ENTRIES)
        to = turned_at(pool, slot + one, C, R, ENTRIES)[:, None] + (c - (C - R))[None, :]
        tl.store(to, v.to(tl.bfloat16), mask=(c >= C - R)[None, :])
    else:
        pack_index(pool, slot + one, one == 0, hadamard(v), C, FORMAT == "fp4", ENTRIES)


@triton.jit
def keep_tokens(
    k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, first, tokens,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    RING: tl.constexpr, BT: tl.constexpr, SUB: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Writes the ring rows of tokens [first, first + BT) that no entry of this step reads; SUB tokens at a time."""
    if BT == SUB:
        keep_rows(
            k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, first, tokens,
            RATIO, OVERLAP, C, D, STRIDE, RING, SUB, PART,
        )  # fmt: skip
    elif any_kept(positions, request_rows, seq_ends, first, tl.minimum(first + BT, tokens) - 1, RING):
        for sub in range(first, tl.minimum(first + BT, tokens), SUB):
            if any_kept(positions, request_rows, seq_ends, sub, tl.minimum(sub + SUB, tokens) - 1, RING):
                keep_rows(
                    k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, sub,
                    tokens, RATIO, OVERLAP, C, D, STRIDE, RING, SUB, PART,
                )  # fmt: skip


@triton.jit
def any_kept(positions, request_rows, seq_ends, first, last, RING: tl.constexpr):
    """Whether a ring keeps any of the tokens [first, last]: always, if a request ends before the last of them."""
    request = tl.load(request_rows + last)
    same = tl.load(request_rows + first) == request
    return (same == 0) | (tl.load(positions + last) >= tl.load(seq_ends + request) - RING)


@triton.jit
def keep_rows(
    k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, first, tokens,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    RING: tl.constexpr, SUB: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """SUB tokens, PART channels of all of them at a time."""
    row = first + tl.arange(0, SUB)
    live = row < tokens
    position = tl.load(positions + row, mask=live, other=0)
    request = tl.load(request_rows + row, mask=live, other=0)
    start = tl.load(seq_starts + request, mask=live, other=0)
    end = tl.load(seq_ends + request, mask=live, other=0)
    state = tl.load(state_slots + request, mask=live, other=0)
    kept = live & (state > 0) & (position >= end - RING)
    old = old_token(position, start, RING)
    c = tl.arange(0, PART)[None, :]
    to = ((state * RING + position % RING) * D)[:, None] + c
    source = (row.to(tl.int64) * STRIDE)[:, None] + c
    bias = (position % RATIO * D)[:, None] + c
    for at in tl.static_range(0, D, PART):
        mask = (kept & (read_by_entry(old, start, end, RATIO, OVERLAP, at < C) == 0))[:, None]
        k = tl.load(k_gate + source + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(k_gate + source + at + D, mask=mask, other=0.0).to(tl.float32)
        z += tl.load(ape + bias + at, mask=mask, other=0.0)
        tl.store(ring_k + to + at, k, mask=mask)
        tl.store(ring_z + to + at, z, mask=mask)


@triton.jit
def replace_rows(
    k_gate, ape, ring_k, ring_z, last, position, at, start, end, state, c,
    RATIO: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Overwrites the ring rows of earlier tokens `at`, now read, with the tokens of this step that take their place.

    The tokens and the channels `c` broadcast to the tile that was read.
    """
    new = new_token(at, end, RING)
    mask = (c >= 0) & (at >= 0) & (at < start) & (new >= start) & (state > 0)
    source = (last + new - position) * STRIDE + c
    k = tl.load(k_gate + source, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(k_gate + source + D, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(ape + new % RATIO * D + c, mask=mask, other=0.0)
    to = (state * RING + at % RING) * D + c
    tl.store(ring_k + to, k, mask=mask)
    tl.store(ring_z + to, z, mask=mask)


@triton.jit
def token_row(
    k_gate, ape, ring_k, ring_z, row, at, start, state, c,
    RATIO: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Key and score of the token `at`, in batch row `row` if it is of this step, else in the ring; -inf before 0."""
    fresh = at >= start
    source = row * STRIDE + c
    held = (state * RING + at % RING) * D + c
    if k_gate.dtype.element_ty == tl.float32:  # one load of either place
        mask = (at >= 0) & (c >= 0)
        k = tl.load(tl.where(fresh, k_gate + source, ring_k + held), mask=mask, other=0.0)
        z = tl.load(tl.where(fresh, k_gate + source + D, ring_z + held), mask=mask, other=float("-inf"))
    else:
        old, new = (at >= 0) & (at < start) & (c >= 0), fresh & (c >= 0)
        k = tl.load(ring_k + held, mask=old, other=0.0)
        z = tl.load(ring_z + held, mask=old, other=float("-inf"))
        k = tl.where(new, tl.load(k_gate + source, mask=new, other=0.0).to(tl.float32), k)
        z = tl.where(new, tl.load(k_gate + source + D, mask=new, other=0.0).to(tl.float32), z)
    # a ring's scores hold ape already
    return k, z + tl.load(ape + at % RATIO * D + c, mask=fresh & (c >= 0), other=0.0)


@triton.jit
def compress_overlap(
    k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts, seq_ends,
    state_slots, ends, tokens, count,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BT: tl.constexpr, SUB: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Entries of two windows of RATIO tokens; every row of a window is in registers, so nothing is read twice."""
    gdc_wait()
    gdc_launch_dependents()
    program = tl.program_id(0)
    token_programs = tl.cdiv(tokens, BT)
    if program < token_programs:
        keep_tokens(
            k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, program * BT,
            tokens, RATIO, True, C, 2 * C, STRIDE, RING, BT, SUB, PART,
        )  # fmt: skip
    else:
        overlap_entry(
            k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts,
            seq_ends, state_slots, ends, program - token_programs,
            RATIO, C, R, STRIDE, RING, EPS, ENTRIES, FORMAT, GROUP,
        )  # fmt: skip


@triton.jit
def overlap_entry(
    k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts, seq_ends,
    state_slots, ends, index,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * C
    WIDTH: tl.constexpr = 2 * RATIO
    slot = tl.load(slots + index)
    last = tl.load(ends + index)
    if (slot >= ENTRIES) & (last >= 0):
        c = tl.arange(0, C)
        weight = tl.load(norm_weight + c)
        one = tl.arange(0, 1)
        cos, sin, turns = row_angles(table, index + one, one == 0, C, R)
        # as if all tokens were of this step, before that is known: no wait for the request's bounds
        inside = last >= WIDTH - 1
        source = k_gate + (last - (WIDTH - 1)) * STRIDE + c
        ks, zs = (), ()
        for w in tl.static_range(WIDTH):
            half = C if w >= RATIO else 0
            ks += (tl.load(source + w * STRIDE + half, mask=inside).to(tl.float32),)
            z = tl.load(source + w * STRIDE + half + D, mask=inside).to(tl.float32)
            zs += (z + tl.load(ape + (w % RATIO) * D + half + c),)
        request = tl.load(request_rows + last)
        position = tl.load(positions + last)
        start = tl.load(seq_starts + request)
        end = tl.load(seq_ends + request)
        state = tl.load(state_slots + request)
        first = position - (WIDTH - 1)
        if first < start:
            other_ks, other_zs = (), ()
            for w in tl.static_range(WIDTH):
                k, z = token_row(
                    k_gate, ape, ring_k, ring_z, last - (WIDTH - 1) + w, first + w, start, state,
                    c + (C if w >= RATIO else 0), RATIO, D, STRIDE, RING,
                )  # fmt: skip
                other_ks += (k,)
                other_zs += (z,)
            ks = other_ks
            zs = other_zs
        top = zs[0]
        for w in tl.static_range(1, WIDTH):
            top = tl.maximum(top, zs[w])
        total = tl.zeros_like(top)
        mixed = tl.zeros_like(top)
        for w in tl.static_range(WIDTH):
            share = fast_exp(zs[w] - top)
            total += share
            mixed += share * ks[w]
        finish(pool, slot, mixed / total, weight, cos, sin, turns, C, R, EPS, ENTRIES, FORMAT, GROUP)
        oldest = tl.maximum(first, 0)
        if (oldest < start) & (oldest + RING < end):
            tl.debug_barrier()  # every thread has its old values: they may go
            for w in tl.static_range(WIDTH):
                replace_rows(
                    k_gate, ape, ring_k, ring_z, last, position, first + w, start, end, state,
                    c + (C if w >= RATIO else 0), RATIO, D, STRIDE, RING,
                )  # fmt: skip


@triton.jit
def compress_window(
    k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts, seq_ends,
    state_slots, ends, tokens, count,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BT: tl.constexpr, SUB: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Entries of one window of RATIO tokens, tiles of ROWS of them; a cluster may share an entry."""
    gdc_wait()
    gdc_launch_dependents()
    program = tl.program_id(0)
    token_programs = tl.cdiv(tokens, BT)
    if program < token_programs:
        keep_tokens(
            k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, program * BT,
            tokens, RATIO, False, C, C, STRIDE, RING, BT, SUB, PART,
        )  # fmt: skip
    else:
        window_entry(
            k_gate, ape, ring_k, ring_z, norm_weight, table, pool, pool, slots, positions, request_rows, seq_starts,
            seq_ends, state_slots, ends, program - token_programs, 0,
            RATIO, C, R, STRIDE, RING, EPS, ENTRIES, FORMAT, GROUP, ROWS, C,
        )  # fmt: skip


@triton.jit
def merge(top_a, total_a, mixed_a, top_b, total_b, mixed_b):
    """The running softmax of two sets of tokens."""
    top = tl.maximum(top_a, top_b)
    fade_a, fade_b = fast_exp(top_a - top), fast_exp(top_b - top)
    return top, total_a * fade_a + total_b * fade_b, mixed_a * fade_a + mixed_b * fade_b


@triton.jit
def window_entry(
    k_gate, ape, ring_k, ring_z, norm_weight, table, pool, pooled, slots, positions, request_rows, seq_starts,
    seq_ends, state_slots, ends, index, at,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Pools SLICE channels from `at` on; all of them are finished here, a slice is left in `pooled` [E, C]."""
    TILES: tl.constexpr = RATIO // ROWS
    slot = tl.load(slots + index)
    last = tl.load(ends + index)
    if (slot >= ENTRIES) & (last >= 0):
        one = tl.arange(0, 1)
        if SLICE == C:
            weight = tl.load(norm_weight + tl.arange(0, C))
            cos, sin, turns = row_angles(table, index + one, one == 0, C, R)
        c = at + tl.arange(0, SLICE)[:, None]  # channels first: a cluster shares them out
        w = tl.arange(0, ROWS)[None, :]
        # as if all tokens were of this step, before that is known: no wait for the request's bounds
        inside = (last >= RATIO - 1) & (c >= 0)
        source = k_gate + (last - (RATIO - 1)) * STRIDE + (w * STRIDE + c)
        bias = ape + (w * C + c)
        ks, zs = (), ()
        for tile in tl.static_range(TILES):
            ks += (tl.load(source + tile * ROWS * STRIDE, mask=inside).to(tl.float32),)
            z = tl.load(source + tile * ROWS * STRIDE + C, mask=inside).to(tl.float32)
            zs += (z + tl.load(bias + tile * ROWS * C),)
        request = tl.load(request_rows + last)
        position = tl.load(positions + last)
        start = tl.load(seq_starts + request)
        end = tl.load(seq_ends + request)
        state = tl.load(state_slots + request)
        first = position - (RATIO - 1)
        if first < start:
            other_ks, other_zs = (), ()
            for tile in tl.static_range(TILES):
                k, z = token_row(
                    k_gate, ape, ring_k, ring_z, last - (RATIO - 1) + tile * ROWS + w, first + tile * ROWS + w, start,
                    state, c, RATIO, C, STRIDE, RING,
                )  # fmt: skip
                other_ks += (k,)
                other_zs += (z,)
            ks = other_ks
            zs = other_zs
        top = zs[0]
        for tile in tl.static_range(1, TILES):
            top = tl.maximum(top, zs[tile])
        total = tl.zeros_like(top)
        mixed = tl.zeros_like(top)
        for tile in tl.static_range(TILES):
            share = fast_exp(zs[tile] - top)
            total += share
            mixed += share * ks[tile]
        top, total, mixed = tl.reduce((top, total, mixed), 1, merge)
        if SLICE == C:
            finish(pool, slot, mixed / total, weight, cos, sin, turns, C, R, EPS, ENTRIES, FORMAT, GROUP)
        else:
            tl.store(pooled + index.to(tl.int64) * C + at + tl.arange(0, SLICE), mixed / total)
        if (first < start) & (first + RING < end):
            tl.debug_barrier()  # every thread has its old values: they may go
            for tile in tl.static_range(TILES):
                replace_rows(
                    k_gate, ape, ring_k, ring_z, last, position, first + tile * ROWS + w, start, end, state, c,
                    RATIO, C, STRIDE, RING,
                )  # fmt: skip


@triton.jit
def pool_window(
    k_gate, ape, ring_k, ring_z, norm_weight, table, pool, pooled, slots, positions, request_rows, seq_starts,
    seq_ends, state_slots, ends, tokens, count,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BT: tl.constexpr, SUB: tl.constexpr, PART: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """`compress_window` but for the finish: programs of tokens, then of SLICE channels of an entry."""
    gdc_wait()
    gdc_launch_dependents()
    program = tl.program_id(0)
    token_programs = tl.cdiv(tokens, BT)
    if program < token_programs:
        keep_tokens(
            k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, program * BT,
            tokens, RATIO, False, C, C, STRIDE, RING, BT, SUB, PART,
        )  # fmt: skip
    else:
        work = program - token_programs
        window_entry(
            k_gate, ape, ring_k, ring_z, norm_weight, table, pool, pooled, slots, positions, request_rows,
            seq_starts, seq_ends, state_slots, ends, work // (C // SLICE), work % (C // SLICE) * SLICE,
            RATIO, C, R, STRIDE, RING, EPS, ENTRIES, FORMAT, GROUP, ROWS, SLICE,
        )  # fmt: skip


@triton.jit
def finish_entries(
    pooled, norm_weight, table, pool, slots, ends,
    C: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The second launch after `pool_window`: an entry a program."""
    gdc_wait()
    gdc_launch_dependents()
    index = tl.program_id(0)
    slot = tl.load(slots + index)
    c = tl.arange(0, C)
    one = tl.arange(0, 1)
    weight = tl.load(norm_weight + c)
    cos, sin, turns = row_angles(table, index + one, one == 0, C, R)
    if (slot >= ENTRIES) & (tl.load(ends + index) >= 0):
        entry = tl.load(pooled + index.to(tl.int64) * C + c)
        finish(pool, slot, entry, weight, cos, sin, turns, C, R, EPS, ENTRIES, FORMAT, GROUP)
