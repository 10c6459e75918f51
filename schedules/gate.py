"""The MoE gates: scores, the choice of experts and their weights; a few hundred operations a token."""

from __future__ import annotations

from dsv4c.schedules._cpp import CPU, cost
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule


def _build(node: OpNode, config: Config) -> Build:
    return Build("cpp", "gate.cc", {"HASH": int(node.op == "gate_hash"), "SCALING": node.attrs["scaling"]})


SCHEDULES = tuple(
    Schedule(f"{op}.cpp_scan", op, CPU, _build, cost(0.05), tolerance=2e-6) for op in ("gate_bias", "gate_hash")
)
