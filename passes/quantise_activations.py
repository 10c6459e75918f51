"""Routed experts round their activations to what the matrix units of Blackwell multiply with FP4 weights.

%1 = dsv4.experts_fp4(%x, ...)   ->   %1 = dsv4.experts_mx(%x, ...) {activations=mxfp8}

`mxfp8` is W4A8, `mxfp4` W4A4. Calls whose scope matches a pattern of `keep` (`L00.*`) stay W4A16: their weights are
widened to BF16, at a quarter to an eighth of the rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from torch import fx

from dsv4c.errors import PassError
from dsv4c.passes._rewriting import call_before, erase
from dsv4c.pipeline import Pass
from dsv4c.program import Program, is_op, types_of


@dataclass(frozen=True)
class QuantiseActivations(Pass):
    name: ClassVar[str] = "quantise-activations"
    needs: ClassVar[frozenset[str]] = frozenset({"experts-stored"})
    gives: ClassVar[frozenset[str]] = frozenset({"expert-activations-chosen"})
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 0.25  # a channel of mxfp4 is off by 2^-3 at most, twice in a row; terms may cancel
    why: ClassVar[str] = "activations of routed experts are rounded to MXFP8 or MXFP4 in groups of 32 channels"

    experts: Literal["mxfp8", "mxfp4"] = "mxfp8"
    keep: tuple[str, ...] = ()
    """Patterns of scopes whose experts take BF16 activations. One that matches nothing is an error."""

    def apply(self, program: Program) -> int:
        calls = [
            (graph, node) for graph in program.graphs.values() for node in graph.nodes if is_op(node, "experts_fp4")
        ]
        scopes = [str(node.meta.get("scope", "")) for _, node in calls]
        for pattern in self.keep:
            if not any(fnmatchcase(scope, pattern) for scope in scopes):
                raise PassError(
                    f"`{pattern}` matches no routed experts", hint=f"their scopes are {', '.join(sorted(set(scopes)))}"
                )
        count = 0
        for (_, node), scope in zip(calls, scopes, strict=True):
            if any(fnmatchcase(scope, pattern) for pattern in self.keep):
                continue
            self._quantise(node)
            count += 1
        return count

    def _quantise(self, node: fx.Node) -> None:
        attrs = {**node.kwargs, "activations": self.experts}
        node.replace_all_uses_with(call_before(node, "experts_mx", node.args, attrs, types_of(node)[0]))
        erase(node)
