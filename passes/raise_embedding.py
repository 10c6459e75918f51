"""Embedding rows into streams, and the choice of the rows whose logits are wanted.

aten nodes of one leaf module  ->  dsv4.embed, dsv4.embed_streams, dsv4.take_rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import FAMILIES
from dsv4c.passes._raising import raise_family
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class RaiseEmbedding(Pass):
    name: ClassVar[str] = "raise-embedding"
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"embedding-raised"})

    def run(self, graph: fx.Graph) -> int:
        return raise_family(graph, FAMILIES["embedding"])
