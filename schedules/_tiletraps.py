"""Products on Blackwell that TileLang compiles without a word and that are wrong: refused before they are lowered.

- Packed FP4 tiles (`float4_e2m1fn`, two values a byte): it issues `f8f6f4` and `mxf8f6f4` alone, which take a byte for
  each value (`float4_e2m1_unpacked`), so packed tiles are multiplied as other numbers.
- A block scale for fewer than 32 channels: `mxf8f6f4` has one for 32; 16 are of `mxf4nvf4`, which it does not issue.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

GROUP = 32  # channels that share a scale in `mxf8f6f4`


def traps(function: Any) -> Iterator[str]:
    """What is wrong with the products of a prim_func for Blackwell, in words."""
    from tvm import tirx
    from tvm.tirx.stmt_functor import post_order_visit

    calls: list[Any] = []
    post_order_visit(function.body, lambda node: calls.append(node) if isinstance(node, tirx.Call) else None)
    for call in calls:
        name = str(getattr(call.op, "name", ""))
        if "gemm" not in name:
            continue
        for operand, region in zip("AB", call.args):
            if any(dtype.startswith("float4_e2m1fn") for dtype in _dtypes(region)):
                yield f"`{name}` is given packed FP4 as {operand}, its instructions take a byte for each value"
        for operand in "ab":
            group = call.annotations.get(f"sf_{operand}_granularity_k") if call.annotations else None
            if group is not None and int(group) % GROUP:
                yield (
                    f"`{name}` has a scale of {operand.upper()} for {int(group)} channels, mxf8f6f4 has one for {GROUP}"
                )


def _dtypes(region: Any) -> set[str]:
    """Dtypes of the buffers that an operand's region names."""
    from tvm import tirx
    from tvm.tirx.stmt_functor import post_order_visit

    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, tirx.BufferLoad):
            found.add(str(node.buffer.dtype))

    post_order_visit(region, visit)
    return found
