"""Norms, RoPE and their fusions with the write into a page: one pass over each row, all bound by memory."""

from __future__ import annotations

from dsv4c.schedules._cpp import CPU, cost, float_rows
from dsv4c.schedules._schedule import Build, OpNode, Schedule

_OPS = {  # op: norm (1 with weight, 2 without), whether it rotates, whether it writes
    "rms_norm": (1, False, False),
    "head_norm": (2, False, False),
    "rope": (0, True, False),
    "head_norm_rope": (2, True, False),
    "split_heads_rope": (0, True, False),
    "norm_rope_write": (1, True, True),
    "page_write": (0, False, True),
}


def _build(node: OpNode) -> Build:
    norm, rotates, writes = _OPS[node.op]
    x = node.inputs[2 if writes else 0]
    assert x is not None
    heads = int(node.attrs.get("num_heads", x.shape[1] if len(x.shape) == 3 else 1))
    rotation = (2 if node.attrs.get("inverse") else 1) if rotates else 0
    defines = {"NORM": norm, "ROPE": rotation, "WRITE": int(writes), "HEADS": heads, "EPS": node.attrs.get("eps", 0.0)}
    return Build("cpp", "norm.cc", defines)


def _accepts(node: OpNode) -> str | None:
    refusal = float_rows()(node)
    x = node.inputs[2 if _OPS[node.op][2] else 0]
    assert x is not None
    heads = int(node.attrs.get("num_heads", 1))
    if refusal is None and int(x.shape[-1]) // heads % 16:
        return f"heads of {int(x.shape[-1]) // heads} channels are no multiple of 16"
    return refusal


def _accepts_rotation(node: OpNode) -> str | None:
    """RoPE tables may be narrower than a vector: only x needs whole vectors, and only if it is normed."""
    norm, _, writes = _OPS[node.op]
    x_index = 2 if writes else 0
    x = node.inputs[x_index]
    assert x is not None
    if any(v is not None and v.dtype not in ("float32", "int64") for v in (*node.inputs, *node.outputs)):
        return "a tensor that is neither float32 nor int64"
    channels = int(x.shape[-1]) // int(node.attrs.get("num_heads", 1))
    if norm and channels % 16:
        return f"rows of {channels} channels are no multiple of 16"
    return None if float_rows(x_index)(node) is None or not norm else float_rows(x_index)(node)


SCHEDULES = tuple(
    Schedule(
        f"{op}.cpp_rows", op, CPU, _build, cost(0.1), _accepts_rotation if rotates else _accepts,
        tolerance=2e-6 if norm or rotates else 0.0,
    )
    for op, (norm, rotates, _) in _OPS.items()
)  # fmt: skip
