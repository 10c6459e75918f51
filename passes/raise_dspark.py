"""What drafting with DSpark reads of the main model, and the choice of the drafts.

aten nodes of one leaf module  ->  dsv4.mean_streams, dsv4.extend_tap, dsv4.markov_draft
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseDspark(Pass):
    name: ClassVar[str] = "raise-dspark"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"dspark-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["dspark"])
