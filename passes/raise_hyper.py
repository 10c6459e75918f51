"""mHC: mixing the streams before and after a sublayer, and the final collapse.

aten nodes of one leaf module  ->  dsv4.hc_pre, dsv4.hc_post, dsv4.hc_head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseHyper(Pass):
    name: ClassVar[str] = "raise-hyper"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"hyper-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["hyper"])
