"""The MoE gates: scores of all experts, the choice by bias or by a token's hash, and the weights of the chosen.

A row is one warp's work: its logits stay in registers, the K best are taken one after another. A NaN score ranks
as infinity, so it is chosen and makes the row's weights NaN; the chosen experts are always K distinct ones.

Legend: T tokens, E experts, K chosen experts.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice


@triton.jit
def _score(x):
    """sqrt(softplus(x)); beyond 20 softplus is x in float32."""
    return tl.sqrt_rn(tl.where(x > 20.0, x, libdevice.log1p(tl.exp(x))))


@triton.jit
def _logits(parts, at, live, tokens, E: tl.constexpr, PARTS: tl.constexpr):
    """Elements `at` of the sum of PARTS tensors [T, E], in order."""
    total = tl.load(parts + at, live, 0.0)
    for s in tl.static_range(1, PARTS):
        total += tl.load(parts + s * tokens.to(tl.int64) * E + at, live, 0.0)
    return total


@triton.jit
def gate_bias(
    logits, bias, ids, weight, tokens,
    E: tl.constexpr, K: tl.constexpr, SCALING: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """logits float32 [PARTS, T, E]; ids int32 and weight float32 [T, K]. BE and BK: E and K as powers of two."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    k = tl.arange(0, BK)
    live = (t < tokens)[:, None] & (e < E)[None, :]
    biases = tl.load(bias + e, e < E, 0.0)
    gdc_wait()
    gdc_launch_dependents()
    scores = _score(_logits(logits, t[:, None] * E + e[None, :], live, tokens, E, PARTS))
    rank = scores + biases[None, :]
    rank = tl.where(rank == rank, rank, float("inf"))
    rank = tl.where(live, rank, float("-inf"))
    chosen = tl.zeros((BT, BK), tl.int32)
    gains = tl.zeros((BT, BK), tl.float32)
    for i in tl.static_range(K):
        best = tl.argmax(rank, 1, tie_break_left=True)
        hit = e[None, :] == best[:, None]
        gain = tl.sum(tl.where(hit, scores, 0.0), 1)
        chosen = tl.where((k == i)[None, :], best[:, None], chosen)
        gains = tl.where((k == i)[None, :], gain[:, None], gains)
        rank = tl.where(hit, float("-inf"), rank)
    _write(ids, weight, chosen, gains, t, k, tokens, K, SCALING)


@triton.jit
def gate_hash(
    logits, token_ids, table, ids, weight, tokens,
    E: tl.constexpr, K: tl.constexpr, SCALING: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As `gate_bias`, with the experts of table [V, K] (int64) for each token id."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    live = (t < tokens)[:, None] & (k < K)[None, :]
    gdc_wait()
    gdc_launch_dependents()
    token = tl.load(token_ids + t, t < tokens, 0)
    chosen = tl.load(table + token[:, None] * K + k[None, :], live, 0)
    gains = tl.where(live, _score(_logits(logits, t[:, None] * E + chosen, live, tokens, E, PARTS)), 0.0)
    _write(ids, weight, chosen.to(tl.int32), gains, t, k, tokens, K, SCALING)


@triton.jit
def _write(ids, weight, chosen, gains, t, k, tokens, K: tl.constexpr, SCALING: tl.constexpr):
    """The chosen experts, and their gains divided by the gains' sum."""
    live = (t < tokens)[:, None] & (k < K)[None, :]
    to = t[:, None] * K + k[None, :]
    tl.store(ids + to, chosen, live)
    total = tl.sum(gains, 1) + 1e-20
    tl.store(weight + to, gains / total[:, None] * SCALING, live)
