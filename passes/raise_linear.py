"""Linear maps, plain and grouped.

aten nodes of one leaf module  ->  dsv4.linear, dsv4.grouped_linear
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseLinear(Pass):
    name: ClassVar[str] = "raise-linear"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"linear-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["linear"])
