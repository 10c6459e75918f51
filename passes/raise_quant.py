"""Fake quantisation of KV entries and index vectors.

aten nodes of one leaf module  ->  dsv4.quantise_kv, dsv4.quantise_index
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseQuant(Pass):
    name: ClassVar[str] = "raise-quant"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["quant"])
