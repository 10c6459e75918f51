"""KV compression from a running softmax: three rows of state a request, for decoding in which every token is final.

An entry's program that needs the state of before this step also leaves the new one; the program of a request's last
token does it otherwise. So no two programs touch one state.

Legend: C channels of an entry, Z request slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4c.schedules.triton.compress import finish
from dsv4c.schedules.triton.rows import fast_exp, row_angles


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
    gdc_wait()
    gdc_launch_dependents()
    token_programs = tl.cdiv(tokens, BT)
    if tl.program_id(0) >= token_programs:
        program = tl.program_id(0) - token_programs
        slot = tl.load(slots + program)
        last = tl.load(ends + program)
        if (slot >= ENTRIES) & (last >= 0):
            request = tl.load(request_rows + last)
            position = tl.load(positions + last)
            start = tl.load(seq_starts + request)
            end = tl.load(seq_ends + request)
            held = tl.load(state_slots + request)
            weight = tl.load(norm_weight + tl.arange(0, C))
            one = tl.arange(0, 1)
            cos, sin, turns = row_angles(table, program + one, one == 0, C, R)
            _, total, mixed = running_softmax(k_gate, ape, state, last, position, start, held, RATIO, C, STRIDE, ROWS)
            finish(pool, slot, mixed / total, weight, cos, sin, turns, C, R, EPS, ENTRIES, "kv", GROUP)
            if (position - (RATIO - 1) < start) & (end % RATIO > 0):
                tl.debug_barrier()  # every thread has the old state: it may go
                leave_state(k_gate, ape, state, last + end - 1 - position, start, end, held, RATIO, C, STRIDE, ROWS)
    else:
        first = tl.program_id(0) * BT
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
        fade = fast_exp(top - peak)
        weight = fast_exp(z - peak[:, None])
        total = total * fade + tl.sum(weight, 1)
        mixed = mixed * fade + tl.sum(weight * k, 1)
        top = peak
    return top, total, mixed
