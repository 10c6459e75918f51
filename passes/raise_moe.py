"""Gates, SwiGLU and the routed experts.

aten nodes of one leaf module  ->  dsv4.gate_bias, dsv4.gate_hash, dsv4.swiglu, dsv4.experts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseMoe(Pass):
    name: ClassVar[str] = "raise-moe"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"moe-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["moe"])
