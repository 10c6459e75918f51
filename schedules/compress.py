"""compress: softmax pooling of completed entries and the ring update, in place; bound by memory."""

from __future__ import annotations

from dsv4c.schedules._cpp import CPU, LANES, cost, float_rows
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule


def _accepts(node: OpNode) -> str | None:
    k = node.inputs[0]
    assert k is not None
    if node.attrs["overlap"] and int(k.shape[1]) // 2 % LANES:
        return f"halves of {k.shape[1]} channels are no multiple of {LANES}"
    return float_rows(0, 1, 2, 3, 4)(node)


def _build(node: OpNode, config: Config) -> Build:
    return Build("cpp", "compress.cc", {"RATIO": node.attrs["ratio"], "OVERLAP": int(node.attrs["overlap"])})


SCHEDULES = (Schedule("compress.cpp_channels", "compress", CPU, _build, cost(0.1), _accepts, tolerance=5e-6),)
