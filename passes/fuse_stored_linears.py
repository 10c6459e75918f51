"""Linear maps of one input that are stored alike become one map: FP8 with FP8, BF16 with BF16.

%1 = dsv4.linear(%x, a)  stored fp8            %0 = dsv4.linear(%x, a+b)  stored fp8
%2 = dsv4.linear(%x, b)  stored fp8        ->  %1, %2 = dsv4.columns(%0)
%3 = dsv4.linear(%x, c)  stored bf16           %3 = dsv4.linear(%x, c)

For targets that compute on stored formats; where everything is widened `fuse-linears` joins more. An FP8 weight can
only be followed by another if its rows fill whole blocks of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import stored_linear_groups
from dsv4c.passes.fuse_linears import concatenate, pair_swiglu
from dsv4c.pipeline import Pass
from dsv4c.program import Program, is_op


@dataclass(frozen=True)
class FuseStoredLinears(Pass):
    name: ClassVar[str] = "fuse-stored-linears"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched", "quantised"})
    gives: ClassVar[frozenset[str]] = frozenset({"stored-linears-fused"})
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-6
    why: ClassVar[str] = "a library may block a wider matrix product differently, in float32"

    def apply(self, program: Program) -> int:
        count = 0
        for graph in program.graphs.values():
            for nodes in stored_linear_groups(graph):
                concatenate(graph, program, nodes)
                count += 1
            count += _pairs(graph)
        return count


def _pairs(graph: fx.Graph) -> int:
    return sum(pair_swiglu(node) for node in [n for n in graph.nodes if is_op(n, "swiglu")])
