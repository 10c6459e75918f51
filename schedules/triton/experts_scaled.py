"""A mixture of experts on Blackwell's block-scaled matrix units: FP4 weights, activations in a format of mx_rows.py.

    sort_gather     tokens' rows in the order of their experts, quantised (mx_rows.py)
    grouped_up      weight * swiglu(w1 x, w3 x) of an expert's tokens, quantised again on its way out
    grouped_down    w2 times that, a bfloat16 row a pair
    combine_pairs   the shared expert's row and a token's pairs, summed in float32

The weight is the left operand, 128 of its rows a tile, the tokens are the right one: 16 columns at least, so that a
decoding batch pads to 16 tokens an expert and not to 128. Sums stay in tensor memory. All operands and scales come
through tensor maps. Weights' scales lie as tensor memory takes them (`[rows / 128, C / (4 G), 2, 256]`, see
`scale_layout` in schedules/blackwell/experts.py): they go there straight from shared memory (`tcgen05.cp`), and so do
those of 128 columns; those of fewer pass through registers.

ROLES: who loads, multiplies and finishes. "none": all warps, in software pipelining; "loop": warps of their own for
copies and for products inside one tile's channels; "tiles": across tiles, so that copies and products of the next tile
run while the results of the last one are finished. Two sums (grouped_up) want "loop", one takes "tiles".

With nvfp4 `*_global` holds a float32 factor for each expert, of tokens one for all.

Legend: T tokens, D hidden_size, I moe_intermediate_size, K experts a token, M weight rows and N tokens of a tile,
BK channels of a step, G channels of a scale.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv4c.schedules.triton.mx_rows import (
    e2m1_pair,
    element_of,
    factor_of,
    group_of,
    largest,
    packed,
    scale_place,
    scales_of,
)


@triton.jit
def weight_scale(scale, line, k, C: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BK: tl.constexpr):
    """Scales [M, BK / G] of the weight's rows from `line` on, multiples of 128."""
    block = scale.load([line // 128, k // (4 * G), 0, 0])
    block = tl.permute(tl.reshape(block, (M // 128, BK // G // 4, 32, 4, 4)), (0, 3, 2, 1, 4))
    return tl.reshape(block, (M, BK // G))


@triton.jit
def _row_scale(scale, tile, k, C: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    """Scales [N, BK / G] of a tile's rows."""
    if N == 128:
        return weight_scale(scale, tile * 128, k, C, G, 128, BK)
    else:
        return tl.reshape(scale.load([tile, k // BK, 0, 0]), (N, BK // G))


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns of x [M, N]."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _store_hidden(
    x, data, scale, m, column, live, global_scale,
    C: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, M: tl.constexpr, PIECE: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """Writes float32 x [M channels from `m` on, PIECE rows] as rows of C channels, and their scales."""
    if FORMAT == "bf16":
        at = column[None, :] * C + tl.arange(0, M)[:, None]
        tl.store(data + m + at, x.to(tl.bfloat16), mask=live[None, :])
    else:
        G: tl.constexpr = group_of(FORMAT)
        P: tl.constexpr = packed(FORMAT)
        grouped = tl.reshape(x, (M // G, G, PIECE))
        stored, factor = scales_of(largest(grouped, 1), global_scale, FORMAT)
        group = m // G + tl.arange(0, M // G)
        tl.store(scale + scale_place(column[None, :], group[:, None], G, N, S), stored, mask=live[None, :])
        values = grouped * factor[:, None, :]
        at = column[None, :] * (C // P) + tl.arange(0, M // P)[:, None]
        if FORMAT == "mxfp8":
            tl.store(data + m + at, tl.reshape(values, (M, PIECE)).to(tl.float8e4nv), mask=live[None, :])
        else:
            even, odd = tl.split(tl.permute(tl.reshape(values, (M // 2, 2, PIECE)), (0, 2, 1)))
            tl.store(data + m // 2 + at, e2m1_pair(even, odd, NATIVE), mask=live[None, :])


@triton.jit
def _finish(
    gate, up, gate_factor, up_factor, slot_weight, out, out_scale, m, first, size, global_scale,
    LIMIT: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    PIECE: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """SwiGLU of the columns `first` to first + PIECE of a tile, times the rows' weights."""
    column = first + tl.arange(0, PIECE)
    live = column < size
    if FORMAT == "nvfp4":
        gate *= gate_factor
        up *= up_factor
    gate = tl.minimum(gate, LIMIT, tl.PropagateNan.ALL)
    up = tl.minimum(tl.maximum(up, -LIMIT, tl.PropagateNan.ALL), LIMIT, tl.PropagateNan.ALL)
    weight = tl.load(slot_weight + column, mask=live, other=0.0)
    hidden = gate / (1.0 + tl.exp(-gate)) * up * weight[None, :]
    _store_hidden(hidden, out, out_scale, m, column, live, global_scale, C, FORMAT, NATIVE, M, PIECE, N, S)


@triton.jit
def grouped_up(
    x, x_scale, x_scale_again, w1, s1, w3, s3, w1_global, w3_global, tiles, meta, slot_weight, out, out_scale,
    x_global, out_global,
    LIMIT: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, ROLES: tl.constexpr, D: tl.constexpr,
    I: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PIECE: tl.constexpr, BK: tl.constexpr, S: tl.constexpr,  # noqa: E741
    STAGES: tl.constexpr,
):  # fmt: skip
    """out [rows, I] = quantised row weight * swiglu(w1 x, w3 x) of the rows in meta[0] tiles. S: BK of grouped_down.

    PIECE columns are finished at a time: N, or a half or a quarter of it, which keeps registers few.
    """
    gdc_wait()
    gdc_launch_dependents()
    G: tl.constexpr = group_of(FORMAT)
    P: tl.constexpr = packed(FORMAT)
    E: tl.constexpr = element_of(FORMAT)
    count = tl.load(meta) * (I // M)
    for unit in tl.range(tl.program_id(0), count, tl.num_programs(0), warp_specialize=ROLES == "tiles"):
        tile, m = unit // (I // M), unit % (I // M) * M
        expert = tl.load(tiles + 4 * tile)
        first = tl.load(tiles + 4 * tile + 1)
        line = expert * I + m
        gate = tl.zeros([M, N], tl.float32)
        up = tl.zeros([M, N], tl.float32)
        for k in tl.range(0, D, BK, num_stages=STAGES, warp_specialize=ROLES == "loop"):
            rows = tl.trans(x.load([first, k // P]))
            if FORMAT == "bf16":
                gate_scale = None
                up_scale = None
            else:
                # two loads: what passes through registers may feed one product only where warps have roles
                gate_scale = _row_scale(x_scale, tile, k, D, G, N, BK)
                up_scale = gate_scale if N == 128 else _row_scale(x_scale_again, tile, k, D, G, N, BK)
            a, a_scale = w1.load([line, k // 2]), weight_scale(s1, line, k, D, G, M, BK)
            gate = tl.dot_scaled(a, a_scale, "e2m1", rows, gate_scale, E, gate)
            b, b_scale = w3.load([line, k // 2]), weight_scale(s3, line, k, D, G, M, BK)
            up = tl.dot_scaled(b, b_scale, "e2m1", rows, up_scale, E, up)
        gate_factor = 1.0
        up_factor = 1.0
        if FORMAT == "nvfp4":
            gate_factor = tl.load(w1_global + expert) * tl.load(x_global)
            up_factor = tl.load(w3_global + expert) * tl.load(x_global)
        size = tl.load(tiles + 4 * tile + 2)
        of_out = factor_of(out_global, expert, FORMAT)
        weight = slot_weight + tile * N
        to = out + first.to(tl.int64) * (I // P)
        scale = None if FORMAT == "bf16" else out_scale + tl.cast(tile, tl.int64) * (N * (I // G))
        if PIECE == N:
            _finish(
                gate, up, gate_factor, up_factor, weight, to, scale, m, 0, size, of_out,
                LIMIT, FORMAT, NATIVE, I, M, N, N, S,
            )  # fmt: skip
        else:
            H: tl.constexpr = N // 2
            gates, ups = _halves(gate, M, N), _halves(up, M, N)
            for i in tl.static_range(2):
                if PIECE == H:
                    _finish(
                        gates[i], ups[i], gate_factor, up_factor, weight, to, scale, m, i * H, size, of_out,
                        LIMIT, FORMAT, NATIVE, I, M, H, N, S,
                    )  # fmt: skip
                else:
                    gate_parts, up_parts = _halves(gates[i], M, H), _halves(ups[i], M, H)
                    for j in tl.static_range(2):
                        _finish(
                            gate_parts[j], up_parts[j], gate_factor, up_factor, weight, to, scale, m, i * H + j * PIECE,
                            size, of_out,
                            LIMIT, FORMAT, NATIVE, I, M, PIECE, N, S,
                        )  # fmt: skip


@triton.jit
def _store_rows(acc, factor, out, column, size, FORMAT: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    if FORMAT == "nvfp4":
        acc *= factor
    at = column[None, :] * D + tl.arange(0, M)[:, None]
    tl.store(out + at, acc.to(tl.bfloat16), mask=(column < size)[None, :])


@triton.jit
def grouped_down(
    x, x_scale, w2, s2, w2_global, tiles, meta, out, x_global,
    FORMAT: tl.constexpr, ROLES: tl.constexpr, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [rows, D], bfloat16: w2 times the rows that `grouped_up` wrote."""
    gdc_wait()
    gdc_launch_dependents()
    G: tl.constexpr = group_of(FORMAT)
    P: tl.constexpr = packed(FORMAT)
    E: tl.constexpr = element_of(FORMAT)
    count = tl.load(meta) * (D // M)
    for unit in tl.range(tl.program_id(0), count, tl.num_programs(0), warp_specialize=ROLES == "tiles"):
        tile, m = unit // (D // M), unit % (D // M) * M
        expert = tl.load(tiles + 4 * tile)
        first = tl.load(tiles + 4 * tile + 1)
        line = expert * D + m
        acc = tl.zeros([M, N], tl.float32)
        for k in tl.range(0, I, BK, num_stages=STAGES, warp_specialize=ROLES == "loop"):
            rows = tl.trans(x.load([first, k // P]))
            scale = None if FORMAT == "bf16" else _row_scale(x_scale, tile, k, I, G, N, BK)
            a, a_scale = w2.load([line, k // 2]), weight_scale(s2, line, k, I, G, M, BK)
            acc = tl.dot_scaled(a, a_scale, "e2m1", rows, scale, E, acc)
        factor = 1.0
        if FORMAT == "nvfp4":
            factor = tl.load(w2_global + expert) * tl.load(x_global + expert)
        size = tl.load(tiles + 4 * tile + 2)
        to = out + first.to(tl.int64) * D + m
        column = tl.arange(0, N)
        if N < 128:
            _store_rows(acc, factor, to, column, size, FORMAT, D, M)
        else:
            left, right = _halves(acc, M, N)
            half = tl.arange(0, N // 2)
            _store_rows(left, factor, to, half, size, FORMAT, D, M)
            _store_rows(right, factor, to, half + N // 2, size, FORMAT, D, M)


@triton.jit
def combine_pairs(y, place, shared, out, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """out[token] = shared[token] + the sum of its pairs' rows in y, in float32. Grid: tokens, pieces of BD channels."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = channel < D
    total = tl.load(shared + token * D + channel, mask=inside, other=0.0).to(tl.float32)
    gdc_wait()
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k).to(tl.int64)
        total += tl.load(y + row * D + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + channel, total.to(tl.bfloat16), mask=inside)
