"""The routed experts as a sorted grouped GEMM, clamp, SwiGLU and routing weight included.

Tokens are grouped by expert; each weight panel that somebody needs is read once a call. At batch 1 that is 6 D I
weights for each chosen expert, in bfloat16 where exact; for many tokens the register-blocked GEMM of `linear`.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.schedules._cpp import CPU, LANES, float_rows, flops, moved
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Transforms, Value, Work
from dsv4c.schedules.linear import packed, panel


def _weights(node: OpNode) -> tuple[Value, Value, Value]:
    w1, w3, w2 = node.inputs[3:6]
    assert w1 is not None and w3 is not None and w2 is not None
    return w1, w3, w2


def _panel(node: OpNode) -> int:
    """One panel width for all three: it divides both the inner and the model's channels."""
    w1, _, w2 = _weights(node)
    return min(panel(int(w1.shape[1])), panel(int(w2.shape[1])))


def _layouts(node: OpNode) -> dict[int, Transforms]:
    return {3 + i: packed(w, _panel(node)) for i, w in enumerate(_weights(node))}


def _accepts(node: OpNode) -> str | None:
    if not _panel(node):
        return f"expert channels are no multiple of {LANES}"
    if len({w.exact for w in _weights(node)}) > 1:
        return "expert weights of different stored formats"
    return float_rows(0, 6)(node)


def _workspace(node: OpNode, config: Config) -> tuple[Value, ...]:
    x, chosen = node.inputs[0], node.inputs[1]
    w1, _, w2 = _weights(node)
    assert x is not None and chosen is not None
    tokens, k = chosen.shape
    return Value((tokens, k, w1.shape[1]), "float32"), Value((tokens, k, w2.shape[1]), "float32")


def _build(node: OpNode, config: Config) -> Build:
    narrow = int(_weights(node)[0].exact == "bfloat16")
    return Build("cpp", "experts.cc", {"BF16": narrow, "PANEL": _panel(node), "LIMIT": node.attrs["limit"]})


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    rows = (node.inputs[0], node.inputs[6], *_workspace(node, config), *node.outputs)
    chosen, w1 = node.inputs[1], _weights(node)[0]
    assert chosen is not None
    pairs = 1
    for size in chosen.sizes(symbols):
        pairs *= size
    busy = min(pairs, int(w1.shape[0]))
    weights = 3 * busy * int(w1.shape[1]) * int(w1.shape[2]) * (2 if w1.exact else 4)
    return Work(moved(rows, symbols) + weights, flops(node, symbols), "cpp", 0.7)


SCHEDULES = (
    Schedule("experts.cpp_sorted", "experts", CPU, _build, _cost, _accepts, _layouts, _workspace, tolerance=5e-6),
)
