"""RMSNorm and the weightless norm of every query head.

aten nodes of one leaf module  ->  dsv4.rms_norm, dsv4.head_norm
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseNorm(Pass):
    name: ClassVar[str] = "raise-norm"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"norm-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["norm"])
