"""RoPE tables and rotations.

aten nodes of one leaf module  ->  dsv4.rope_table, dsv4.entry_rope_table, dsv4.rope
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseRope(Pass):
    name: ClassVar[str] = "raise-rope"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"rope-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["rope"])
