"""What the C++ schedules share: their usual cost, and the checks that their kernels rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dsv4c.ops import OPS, TensorType
from dsv4c.schedules._schedule import Config, OpNode, Value, Work, dense_rows

LANES = 16  # floats of one vector in schedules/cpp/dsv4c.h; channel counts must be multiples
CPU = frozenset({"cpu"})


def channels(value: Value) -> int:
    """Elements of one row of dimension 0."""
    out = 1
    for size in value.shape[1:]:
        out *= int(size)
    return out


def flops(node: OpNode, symbols: Mapping[str, int]) -> float:
    """Arithmetic of the logical op, where it counts any."""
    count = OPS[node.op].flops
    types = [TensorType(v.shape, v.dtype) for v in node.inputs if v is not None]
    return float(count(types, node.attrs, symbols)) if count else 0.0


def moved(values: Sequence[Value | None], symbols: Mapping[str, int]) -> float:
    """Bytes of these tensors, each touched once; pools are touched in a few rows only and count nothing."""
    return float(sum(v.bytes(symbols) for v in values if v is not None and v.role != "pool"))


def cost(efficiency: float) -> Callable[[OpNode, Mapping[str, int], Config], Work]:
    """Cost of a kernel that moves inputs and outputs once and reaches this share of the peak arithmetic."""

    def work(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
        return Work(moved((*node.inputs, *node.outputs), symbols), flops(node, symbols), "cpp", efficiency)

    return work


def float_rows(*indices: int) -> Callable[[OpNode], str | None]:
    """Accepts if these inputs (all by default) and all outputs are float32 or int64, with dense rows of whole vectors.

    The vector check holds for float tensors with a row, that is of two dimensions and more, and for weights.
    """

    def accepts(node: OpNode) -> str | None:
        chosen = indices or range(len(node.inputs))
        for value in (*(node.inputs[i] for i in chosen), *node.outputs):
            if value is None:
                continue
            if value.dtype not in ("float32", "int64"):
                return f"{value.dtype} tensors"
            if not dense_rows(value):
                return "a tensor strided within its rows"
            if value.dtype == "float32" and isinstance(value.shape[-1], int) and value.shape[-1] % LANES:
                return f"{value.shape[-1]} channels are no multiple of {LANES}"
        return None

    return accepts
