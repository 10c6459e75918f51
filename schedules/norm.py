"""Norms, RoPE and their fusions with the write into a page: one pass over each row, all bound by memory."""

from __future__ import annotations

from dsv4c.schedules._cpp import CPU, LANES, cost
from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, dense_rows

_OPS = {  # op: norm (1 with weight, 2 without), whether it rotates, whether it writes
    "rms_norm": (1, False, False),
    "head_norm": (2, False, False),
    "rope": (0, True, False),
    "head_norm_rope": (2, True, False),
    "split_heads_rope": (0, True, False),
    "norm_rope_write": (1, True, True),
    "page_write": (0, False, True),
}


def _build(node: OpNode, config: Config) -> Build:
    norm, rotates, writes = _OPS[node.op]
    x = node.inputs[2 if writes else 0]
    assert x is not None
    heads = int(node.attrs.get("num_heads", x.shape[1] if len(x.shape) == 3 else 1))
    rotation = (2 if node.attrs.get("inverse") else 1) if rotates else 0
    defines = {"NORM": norm, "ROPE": rotation, "WRITE": int(writes), "HEADS": heads, "EPS": node.attrs.get("eps", 0.0)}
    return Build("cpp", "norm.cc", defines)


def _accepts(node: OpNode) -> str | None:
    """Rows are read one by one and copied as they are; only a norm works in whole vectors."""
    norm, _, writes = _OPS[node.op]
    if any(v is not None and v.dtype not in ("float32", "int64") for v in (*node.inputs, *node.outputs)):
        return "a tensor that is neither float32 nor int64"
    x = node.inputs[2 if writes else 0]
    assert x is not None
    channels = int(x.shape[-1]) // int(node.attrs.get("num_heads", 1))
    if norm and channels % LANES:
        return f"rows of {channels} channels are no multiple of {LANES}"
    return None if dense_rows(x) else "a tensor strided within its rows"


SCHEDULES = tuple(
    Schedule(
        f"{op}.cpp_rows", op, CPU, _build, cost(0.1), _accepts, tolerance=2e-6 if norm or rotates else 0.0
    )
    for op, (norm, rotates, _) in _OPS.items()
)  # fmt: skip
