"""Where entries live, and their writes.

aten nodes of one leaf module  ->  dsv4.token_slots, dsv4.entry_slots, dsv4.page_write
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaisePaging(Pass):
    name: ClassVar[str] = "raise-paging"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"paging-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["paging"])
