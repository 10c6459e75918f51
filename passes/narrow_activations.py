"""Activations between ops are BF16, as the model was trained; coefficients, sums, gates and logits stay float32.

    %8 = dsv4.embed_streams(...) : f32[T, 4, 256]    ->  bf16[T, 4, 256]
    %9 = dsv4.hc_pre_norm(...) : f32[T, 256], f32[T, 4], f32[T, 4, 4]    ->  bf16[T, 256], f32[T, 4], f32[T, 4, 4]

No op changes, only the types of results: every op computes in float32 inside and rounds what it stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.facts import narrow_types
from dsv4c.passes._storing import retype
from dsv4c.pipeline import Pass
from dsv4c.program import Program, is_op, types_of


@dataclass(frozen=True)
class NarrowActivations(Pass):
    name: ClassVar[str] = "narrow-activations"
    needs: ClassVar[frozenset[str]] = frozenset({"experts-stored", "quantise-fused"})
    gives: ClassVar[frozenset[str]] = frozenset({"activations-narrow", "formats-chosen"})
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = (
        2.0**-5
    )  # an input is off by 2^-9 at most; where a row's sums cancel, it counts for more
    why: ClassVar[str] = "streams and rows between ops are rounded to BF16 (8 bits of mantissa), as in training"

    def apply(self, program: Program) -> int:
        count = 0
        for graph in program.graphs.values():
            for node in graph.nodes:
                if is_op(node, "embed") or is_op(node, "embed_streams"):
                    retype(program, node.args[1], "bfloat16")
                found = narrow_types(node)
                if found is not None and found != types_of(node):
                    node.meta["type"] = found if len(found) > 1 else found[0]
                    count += 1
        return count
