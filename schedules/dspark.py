"""The choice of a DSpark block's drafts: bound by reading the Markov head's w2 once for every draft of the block.

w2 is packed in panels as a linear map's weight (schedules/linear.py): a draft is one matrix product for all requests,
whose result is added to the logits and reduced as it leaves the registers.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.schedules._cpp import CPU, LANES, flops, moved
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Transforms, Value, Work, dense_rows
from dsv4c.schedules.linear import packed, panel


def _weights(node: OpNode) -> tuple[Value, Value]:
    w1, w2 = node.inputs[4:6]
    assert w1 is not None and w2 is not None
    return w1, w2


def _layouts(node: OpNode) -> dict[int, Transforms]:
    w1, w2 = _weights(node)
    narrow: dict[int, Transforms] = {4: (("narrow", w1.exact),)} if w1.exact else {}
    return {**narrow, 5: packed(w2)}


def _accepts(node: OpNode) -> str | None:
    w1, w2 = _weights(node)
    x = node.inputs[1]
    assert x is not None
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype not in ("float32", "int64"):
            return f"{value.dtype} tensors"
        if not dense_rows(value):
            return "a tensor strided within its rows"
    channels = {
        "tokens": int(w2.shape[0]),
        "channels": int(x.shape[1]),
        "channels of the Markov head": int(w1.shape[1]),
    }
    for what, count in channels.items():
        if count % LANES:
            return f"{count} {what} are no multiple of {LANES}"
    return None


def _build(node: OpNode, config: Config) -> Build:
    w1, w2 = _weights(node)
    defines = {
        "BF16": int(w2.exact == "bfloat16"), "BF16_W1": int(w1.exact == "bfloat16"),
        "PANEL": panel(int(w2.shape[0])), "BLOCK": node.attrs["block"],
    }  # fmt: skip
    return Build("cpp", "markov.cc", defines)


def _cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    _, w2 = _weights(node)
    rows = [value for i, value in enumerate(node.inputs) if i not in (4, 5)]
    weights = int(node.attrs["block"]) * w2.bytes(symbols) / (2 if w2.exact else 1)
    return Work(moved((*rows, *node.outputs), symbols) + weights, flops(node, symbols), "cpp", 0.5)


SCHEDULES = (
    Schedule(
        "markov_draft.cpp_packed", "markov_draft", CPU, _build, _cost, _accepts, _layouts, tolerance=5e-6
    ),
)  # fmt: skip
