"""Kernels of KV compression: pool the tokens of finished windows, then norm, turn, pack and write, and keep the rings.

One launch does it all without an order between programs, because every element of a ring belongs to one program:
an entry's program takes a ring element it reads (a token of before this step, in one half of the channels) and, if
this step also overwrites it, writes the new value after reading. The tokens' programs write all other elements.
`read_by_entry` is the one place that says which is which.

The first programs take BE entries each, the others BT tokens each. Rows whose state slot is 0 and entries whose pool
row lies in the null page are padding: they are skipped.

Legend: E entries, T tokens, C channels of an entry, D channels of a projected row (2 C with overlap), Z request slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4c.schedules.triton.rows import (
    e2m1_byte,
    e4m3_byte,
    inverse_power,
    normed,
    pack_plain,
    power,
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
def hadamard(x):
    """The orthonormal Walsh-Hadamard transform of rows x [N, C], rounded to bfloat16; sums in the reference's order."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    HALF: tl.constexpr = C // 2
    for stage in tl.static_range(10):  # of up to 1024 channels
        if (1 << stage) < C:
            pairs = tl.permute(tl.reshape(x, [N, HALF >> stage, 2, 1 << stage]), (0, 1, 3, 2))
            left, right = tl.split(pairs)
            x = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 1, 3, 2)), [N, C])
    return rounded(x * C**-0.5)


@triton.jit
def e2m1_code(x):
    """The nibble of x rounded to E2M1, ties to even; |x| <= 6."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75) + (size > 1.25) + (size >= 1.75)
    code += (size > 2.5).to(tl.int32) + (size >= 3.5) + (size > 5.0)
    return code + ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def pack_index(pool, slot, live, v, C: tl.constexpr, FP4: tl.constexpr, ENTRIES: tl.constexpr):
    """Index keys v [N, C] in the pool's rows `slot` (formats.pack_index, formats.write_entries)."""
    N: tl.constexpr = v.shape[0]
    DATA: tl.constexpr = C // 2 if FP4 else C
    page = pool + slot // ENTRIES * (ENTRIES * (DATA + 4))
    at = page + slot % ENTRIES * DATA
    scales = page + ENTRIES * DATA + slot % ENTRIES * 4
    c = tl.arange(0, DATA)
    if FP4:
        GROUP: tl.constexpr = 32 if C > 32 else C
        K: tl.constexpr = C // GROUP
        groups = tl.reshape(v, [N, K, GROUP])
        byte = e2m1_byte(tl.max(tl.abs(groups), 2))
        code = e2m1_code(tl.reshape(groups * inverse_power(byte)[:, :, None], [N, C]))
        low, high = tl.split(tl.reshape(code, [N, DATA, 2]))
        tl.store(at[:, None] + c[None, :], (low | (high << 4)).to(tl.uint8), mask=live[:, None])
        k = tl.arange(0, K)
        tl.store(scales[:, None] + k[None, :], byte.to(tl.uint8), mask=live[:, None])
        if K < 4:
            k = tl.arange(0, 4)
            tl.store(scales[:, None] + k[None, :], tl.zeros([N, 4], tl.uint8), mask=live[:, None] & (k >= K)[None, :])
    else:
        byte = e4m3_byte(tl.max(tl.abs(v), 1))
        small = (v * inverse_power(byte)[:, None]).to(tl.float8e4nv)
        tl.store(at[:, None] + c[None, :], small.to(tl.uint8, bitcast=True), mask=live[:, None])
        tl.store(scales.to(tl.pointer_type(tl.float32), bitcast=True), power(byte), mask=live)


@triton.jit
def finish(
    pool, slot, live, entry, index, norm_weight, table,
    C: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Pooled entries [N, C] (float32) to their rows of the pool; `index` numbers them in the table."""
    c = tl.arange(0, C)
    cos, sin, turns = row_angles(table, index, live, C, R)
    v = rounded(turn(normed(rounded(entry), norm_weight, c, C, EPS), cos, sin, turns, False))
    if FORMAT == "kv":
        pack_plain(pool, slot, live, v, C, R, GROUP, ENTRIES)
        to = turned_at(pool, slot, C, R, ENTRIES)[:, None] + (c - (C - R))[None, :]
        tl.store(to, v.to(tl.bfloat16), mask=live[:, None] & (c >= C - R)[None, :])
    else:
        pack_index(pool, slot, live, hadamard(v), C, FORMAT == "fp4", ENTRIES)


@triton.jit
def keep_tokens(
    k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, first, tokens,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    RING: tl.constexpr, BT: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Writes the ring rows of tokens [first, first + BT) that no entry of this step reads; SUB tokens at a time."""
    if BT == SUB:
        keep_rows(
            k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, first, tokens,
            RATIO, OVERLAP, C, D, STRIDE, RING, SUB,
        )  # fmt: skip
    else:
        _, kept, _, _, _ = kept_tokens(
            positions, request_rows, seq_starts, seq_ends, state_slots, first + tl.arange(0, BT), tokens, RING
        )
        if tl.max(kept.to(tl.int32), 0) > 0:
            for sub in range(0, BT, SUB):
                keep_rows(
                    k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots,
                    first + sub, tokens, RATIO, OVERLAP, C, D, STRIDE, RING, SUB,
                )  # fmt: skip


@triton.jit
def keep_rows(
    k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots, first, tokens,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    RING: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, SUB)
    position, kept, start, end, state = kept_tokens(
        positions, request_rows, seq_starts, seq_ends, state_slots, row, tokens, RING
    )
    if tl.max(kept.to(tl.int32), 0) > 0:
        old = old_token(position, start, RING)
        c = tl.arange(0, C)[None, :]
        to = ((state * RING + position % RING) * D)[:, None] + c
        source = (row.to(tl.int64) * STRIDE)[:, None] + c
        bias = (position % RATIO * D)[:, None] + c
        for half in tl.static_range(D // C):
            mask = (kept & (read_by_entry(old, start, end, RATIO, OVERLAP, half == 0) == 0))[:, None]
            k = tl.load(k_gate + source + half * C, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(k_gate + source + half * C + D, mask=mask, other=0.0).to(tl.float32)
            z += tl.load(ape + bias + half * C, mask=mask, other=0.0)
            tl.store(ring_k + to + half * C, k, mask=mask)
            tl.store(ring_z + to + half * C, z, mask=mask)


@triton.jit
def kept_tokens(
    positions, request_rows, seq_starts, seq_ends, state_slots, row, tokens, RING: tl.constexpr
):  # fmt: skip
    """Position, whether the ring keeps it, chunk start and end, and state slot of the tokens `row`."""
    live = row < tokens
    position = tl.load(positions + row, mask=live, other=0)
    request = tl.load(request_rows + row, mask=live, other=0)
    start = tl.load(seq_starts + request, mask=live, other=0)
    end = tl.load(seq_ends + request, mask=live, other=0)
    state = tl.load(state_slots + request, mask=live, other=0)
    return position, live & (state > 0) & (position >= end - RING), start, end, state


@triton.jit
def compress_overlap(
    k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts, seq_ends,
    state_slots, ends, tokens, count,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BE: tl.constexpr, BT: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Entries of two windows of RATIO tokens; every row of a window is a register, so nothing is read twice."""
    program = tl.program_id(0)
    entry_programs = tl.cdiv(count, BE)
    if program < entry_programs:
        _overlap_entries(
            k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts,
            seq_ends, state_slots, ends, program * BE + tl.arange(0, BE), count,
            RATIO, C, R, STRIDE, RING, EPS, ENTRIES, FORMAT, GROUP,
        )  # fmt: skip
    else:
        keep_tokens(
            k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots,
            (program - entry_programs) * BT, tokens, RATIO, True, C, 2 * C, STRIDE, RING, BT, SUB,
        )  # fmt: skip


@triton.jit
def _overlap_entries(
    k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts, seq_ends,
    state_slots, ends, index, count,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * C
    WIDTH: tl.constexpr = 2 * RATIO
    slot = tl.load(slots + index, mask=index < count, other=0)
    last = tl.load(ends + index, mask=index < count, other=-1)
    live = (slot >= ENTRIES) & (last >= 0)
    if tl.max(live.to(tl.int32), 0) > 0:
        request = tl.load(request_rows + last, mask=live, other=0)
        position = tl.load(positions + last, mask=live, other=0)
        start = tl.load(seq_starts + request, mask=live, other=0)
        end = tl.load(seq_ends + request, mask=live, other=0)
        state = tl.load(state_slots + request, mask=live, other=0)
        c = tl.arange(0, C)[None, :]
        ks, zs = (), ()
        for w in tl.static_range(WIDTH):
            # loaded as if the token were of this step, before that is known: no wait for the request's bounds
            row = tl.maximum(last - (WIDTH - 1 - w), 0) * STRIDE + (C if w >= RATIO else 0)
            ks += (tl.load(k_gate + row[:, None] + c).to(tl.float32),)
            z = tl.load(k_gate + row[:, None] + c + D).to(tl.float32)
            zs += (z + tl.load(ape + (w % RATIO) * D + (C if w >= RATIO else 0) + c),)
        first = position - (WIDTH - 1)
        if tl.max((live & (first < start)).to(tl.int32), 0) > 0:
            old_ks, old_zs = (), ()
            for w in tl.static_range(WIDTH):
                at = first + w
                fresh = (at >= start)[:, None]
                stale = (live & (at >= 0))[:, None] & (fresh == 0)
                kept = ((state * RING + at % RING) * D + (C if w >= RATIO else 0))[:, None] + c
                old_ks += (tl.where(fresh, ks[w], tl.load(ring_k + kept, mask=stale, other=0.0)),)
                old_zs += (tl.where(fresh, zs[w], tl.load(ring_z + kept, mask=stale, other=float("-inf"))),)
            ks = old_ks
            zs = old_zs
        top = zs[0]
        for w in tl.static_range(1, WIDTH):
            top = tl.maximum(top, zs[w])
        total = tl.zeros_like(top)
        mixed = tl.zeros_like(top)
        for w in tl.static_range(WIDTH):
            weight = tl.exp(zs[w] - top)
            total += weight
            mixed += weight * ks[w]
        finish(pool, slot, live, mixed / total, index, norm_weight, table, C, R, EPS, ENTRIES, FORMAT, GROUP)
        oldest = tl.maximum(first, 0)
        if tl.max((live & (oldest < start) & (oldest + RING < end)).to(tl.int32), 0) > 0:
            tl.debug_barrier()  # every thread has its old values: they may go
            for w in tl.static_range(WIDTH):
                replace_rows(
                    k_gate, ape, ring_k, ring_z, live[:, None], last[:, None], position[:, None], first[:, None] + w,
                    start[:, None], end[:, None], state[:, None], c + (C if w >= RATIO else 0), RATIO, D, STRIDE, RING,
                )  # fmt: skip


@triton.jit
def replace_rows(
    k_gate, ape, ring_k, ring_z, live, last, position, at, start, end, state, c,
    RATIO: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Overwrites the ring rows of earlier tokens `at`, now read, with the tokens of this step that take their place.

    The tokens and the channels `c` broadcast to the tile that was read.
    """
    new = new_token(at, end, RING)
    mask = live & (at >= 0) & (at < start) & (new >= start) & (state > 0)
    source = (last + new - position) * STRIDE + c
    k = tl.load(k_gate + source, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(k_gate + source + D, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(ape + new % RATIO * D + c, mask=mask, other=0.0)
    to = (state * RING + at % RING) * D + c
    tl.store(ring_k + to, k, mask=mask)
    tl.store(ring_z + to, z, mask=mask)


@triton.jit
def compress_window(
    k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts, seq_ends,
    state_slots, ends, tokens, count,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BT: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Entries of one window of RATIO tokens, ROWS of them at a time; a cluster may share an entry."""
    program = tl.program_id(0)
    if program < count:
        _window_entry(
            k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts,
            seq_ends, state_slots, ends, program, RATIO, C, R, STRIDE, RING, EPS, ENTRIES, FORMAT, GROUP, ROWS,
        )  # fmt: skip
    else:
        keep_tokens(
            k_gate, ape, ring_k, ring_z, positions, request_rows, seq_starts, seq_ends, state_slots,
            (program - count) * BT, tokens, RATIO, False, C, C, STRIDE, RING, BT, SUB,
        )  # fmt: skip


@triton.jit
def window_rows(
    k_gate, ape, ring_k, ring_z, w, c, last, first, start, state,
    RATIO: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Keys and scores [C, ROWS] of the tokens first + w, of this step or from the ring."""
    at = first + w
    # loaded as if all tokens were of this step, before that is known: no wait for the request's bounds
    source = tl.maximum(last - (RATIO - 1) + w, 0) * STRIDE + c
    k = tl.load(k_gate + source).to(tl.float32)
    z = tl.load(k_gate + source + D).to(tl.float32) + tl.load(ape + w * D + c)
    if first < start:
        fresh = at >= start
        kept = (state * RING + at % RING) * D + c
        k = tl.where(fresh, k, tl.load(ring_k + kept, mask=fresh == 0, other=0.0))
        z = tl.where(fresh, z, tl.load(ring_z + kept, mask=fresh == 0, other=0.0))
    return k, z


@triton.jit
def _window_entry(
    k_gate, ape, ring_k, ring_z, norm_weight, table, pool, slots, positions, request_rows, seq_starts, seq_ends,
    state_slots, ends, index,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    EPS: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    slot = tl.load(slots + index)
    last = tl.load(ends + index)
    if (slot >= ENTRIES) & (last >= 0):
        request = tl.load(request_rows + last)
        position = tl.load(positions + last)
        start = tl.load(seq_starts + request)
        end = tl.load(seq_ends + request)
        state = tl.load(state_slots + request)
        first = position - (RATIO - 1)
        c = tl.arange(0, C)[:, None]  # channels first: a cluster shares them out
        w = tl.arange(0, ROWS)[None, :]
        k, top = window_rows(k_gate, ape, ring_k, ring_z, w, c, last, first, start, state, RATIO, C, STRIDE, RING)
        total = tl.full([C, ROWS], 1.0, tl.float32)
        for done in tl.static_range(ROWS, RATIO, ROWS):
            more_k, z = window_rows(
                k_gate, ape, ring_k, ring_z, w + done, c, last, first, start, state, RATIO, C, STRIDE, RING
            )
            peak = tl.maximum(top, z)
            fade, weight = tl.exp(top - peak), tl.exp(z - peak)
            total = total * fade + weight
            k = k * fade + weight * more_k
            top = peak
        weight = tl.exp(top - tl.max(top, 1)[:, None])
        entry = tl.sum(weight * k, 1) / tl.sum(weight * total, 1)
        one = tl.arange(0, 1)
        finish(
            pool,
            slot + one,
            one == 0,
            entry[None, :],
            index + one,
            norm_weight,
            table,
            C,
            R,
            EPS,
            ENTRIES,
            FORMAT,
            GROUP,
        )
        if (first < start) & (first + RING < end):
            tl.debug_barrier()  # every thread has its old values: they may go
            for done in tl.static_range(0, RATIO, ROWS):
                replace_rows(
                    k_gate, ape, ring_k, ring_z, c >= 0, last, position, first + done + w, start, end, state, c,
                    RATIO, C, STRIDE, RING,
                )  # fmt: skip


@triton.jit
def compress_online(
    k_gate, ape, state, norm_weight, table, pool, slots, positions, request_rows, seq_starts, seq_ends, state_slots,
    ends, tokens, count,
    RATIO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, EPS: tl.constexpr,
    ENTRIES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Entries from a running softmax: state [Z, 3, C] holds maximum, sum and weighted sum of an unfinished window.

    An entry that needs the state of before this step also leaves the new one; a request without such an entry has
    its state updated by the program of its last token.
    """
    program = tl.program_id(0)
    if program < count:
        slot = tl.load(slots + program)
        last = tl.load(ends + program)
        if (slot >= ENTRIES) & (last >= 0):
            request = tl.load(request_rows + last)
            position = tl.load(positions + last)
            start = tl.load(seq_starts + request)
            end = tl.load(seq_ends + request)
            held = tl.load(state_slots + request)
            _, total, mixed = running_softmax(k_gate, ape, state, last, position, start, held, RATIO, C, STRIDE, ROWS)
            one = tl.arange(0, 1)
            finish(
                pool, slot + one, one == 0, (mixed / total)[None, :], program + one, norm_weight, table,
                C, R, EPS, ENTRIES, "kv", GROUP,
            )  # fmt: skip
            if (position - (RATIO - 1) < start) & (end % RATIO > 0):
                tl.debug_barrier()  # every thread has the old state: it may go
                leave_state(k_gate, ape, state, last + end - 1 - position, start, end, held, RATIO, C, STRIDE, ROWS)
    else:
        first = (program - count) * BT
        row = first + tl.arange(0, BT)
        if tl.max(leaves_state(positions, request_rows, seq_starts, seq_ends, state_slots, row, tokens, RATIO), 0) > 0:
            for i in range(first, tl.minimum(first + BT, tokens)):
                request = tl.load(request_rows + i)
                start = tl.load(seq_starts + request)
                end = tl.load(seq_ends + request)
                held = tl.load(state_slots + request)
                position = tl.load(positions + i)
                if state_is_ours(position, start, end, held, RATIO):
                    leave_state(k_gate, ape, state, i, start, end, held, RATIO, C, STRIDE, ROWS)


@triton.jit
def state_is_ours(position, start, end, held, RATIO: tl.constexpr):
    """Whether a token's program updates the state: a request's last token, unless an entry of this step does it."""
    window = (end - 1) // RATIO * RATIO
    by_entry = (start % RATIO > 0) & (window >= start)
    return (position == end - 1) & (end % RATIO > 0) & (held > 0) & (by_entry == 0)


@triton.jit
def leaves_state(
    positions, request_rows, seq_starts, seq_ends, state_slots, row, tokens, RATIO: tl.constexpr
):  # fmt: skip
    live = row < tokens
    request = tl.load(request_rows + row, mask=live, other=0)
    position = tl.load(positions + row, mask=live, other=-1)
    start = tl.load(seq_starts + request, mask=live, other=0)
    end = tl.load(seq_ends + request, mask=live, other=0)
    held = tl.load(state_slots + request, mask=live, other=0)
    return state_is_ours(position, start, end, held, RATIO).to(tl.int32)


@triton.jit
def leave_state(
    k_gate, ape, state, last, start, end, held,
    RATIO: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    top, total, mixed = running_softmax(k_gate, ape, state, last, end - 1, start, held, RATIO, C, STRIDE, ROWS)
    tl.debug_barrier()  # every thread has the old state: it may go
    to = state + held * 3 * C + tl.arange(0, C)
    tl.store(to, top)
    tl.store(to + C, total)
    tl.store(to + 2 * C, mixed)


@triton.jit
def running_softmax(
    k_gate, ape, state, last, position, start, held,
    RATIO: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and weighted sum [C] of the window of `position` up to it, in batch row `last`."""
    window = position // RATIO * RATIO
    kept = state + held * 3 * C + tl.arange(0, C)
    stale = window < start
    top = tl.load(kept, mask=stale, other=float("-inf"))
    total = tl.load(kept + C, mask=stale, other=0.0)
    mixed = tl.load(kept + 2 * C, mask=stale, other=0.0)
    c = tl.arange(0, C)[:, None]  # channels first: a cluster shares them out
    begin = tl.maximum(window, start)
    for at in range(begin, position + 1, ROWS):
        token = at + tl.arange(0, ROWS)[None, :]
        mask = (token <= position) & (c >= 0)
        source = (last - position + token) * STRIDE + c
        k = tl.load(k_gate + source, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(k_gate + source + C, mask=mask, other=float("-inf")).to(tl.float32)
        z += tl.load(ape + (token - window) * C + c, mask=mask, other=0.0)
        peak = tl.maximum(top, tl.max(z, 1))
        fade = tl.exp(top - peak)
        weight = tl.exp(z - peak[:, None])
        total = total * fade + tl.sum(weight, 1)
        mixed = mixed * fade + tl.sum(weight * k, 1)
        top = peak
    return top, total, mixed
