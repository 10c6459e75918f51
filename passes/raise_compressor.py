"""Softmax pooling of tokens into entries, with its ring.

aten nodes of one leaf module  ->  dsv4.compress
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseCompressor(Pass):
    name: ClassVar[str] = "raise-compressor"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"compressor-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["compressor"])
