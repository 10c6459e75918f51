"""Attention over a window, with picked or all compressed entries.

aten nodes of one leaf module  ->  dsv4.attend_window, dsv4.attend_csa, dsv4.attend_hca
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseAttention(Pass):
    name: ClassVar[str] = "raise-attention"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"attention-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["attention"])
