"""Index scores and top-k over compressed entries.

aten nodes of one leaf module  ->  dsv4.index_topk, dsv4.split_heads
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseIndexer(Pass):
    name: ClassVar[str] = "raise-indexer"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"indexer-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["indexer"])
