"""The sum that joins the next token's embedding with the streams.

aten nodes of one leaf module  ->  dsv4.add_embedding
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseMtp(Pass):
    name: ClassVar[str] = "raise-mtp"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"mtp-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["mtp"])
