"""Hyper-connections: one kernel text for mixing, coefficients, collapse and the following norm.

At batch 1 a call reads fn (24 x 4 D floats) once and waits for 20 Sinkhorn steps, about 0.4 us; for many tokens the
projection is 2 x 24 x 4 D operations a token, 4 tokens x 6 rows in registers, and one token a lane does the rest.
"""

from __future__ import annotations

from dsv4c.schedules._cpp import CPU, LANES, cost
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule

_OPS = {  # op: post, pre, head, norm
    "hc_pre": (0, 1, 0, 0),
    "hc_post": (1, 0, 0, 0),
    "hc_head": (0, 0, 1, 0),
    "hc_pre_norm": (0, 1, 0, 1),
    "hc_post_pre_norm": (1, 1, 0, 1),
    "hc_head_norm": (0, 0, 1, 1),
}


def _streams(node: OpNode) -> tuple[int, ...]:
    value = node.inputs[1] if _OPS[node.op][0] else node.inputs[0]
    assert value is not None
    return tuple(int(s) for s in value.shape[1:])


def _accepts(node: OpNode) -> str | None:
    if any(v is not None and v.dtype != "float32" for v in node.inputs):
        return "a tensor that is not float32"
    n, dim = _streams(node)
    if dim % LANES:
        return f"{dim} channels are no multiple of {LANES}"
    return None if n <= 4 else f"{n} streams do not fit the registers"


def _build(node: OpNode, config: Config) -> Build:
    post, pre, head, norm = _OPS[node.op]
    attrs = node.attrs
    defines = {
        "POST": post, "PRE": pre, "HEAD": head, "NORM": norm, "N": _streams(node)[0],
        "ITERS": attrs.get("iters", 0), "HC_EPS": attrs.get("eps", 0.0),
        "NORM_EPS": attrs.get("norm_eps", 0.0), "OUT_EPS": attrs.get("out_eps", 0.0),
    }  # fmt: skip
    return Build("cpp", "hyper.cc", defines)


SCHEDULES = tuple(
    Schedule(f"{op}.cpp_lanes", op, CPU, _build, cost(0.4), _accepts, tolerance=1e-5)  # 40 roundings of Sinkhorn
    for op in _OPS
)
