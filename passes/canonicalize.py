"""Removes what computes nothing, so that a module's region reads the same wherever it was traced.

%1 = aten._assert_tensor_metadata(%0)      (gone)
%2 = aten.to.dtype(%0, torch.float32)      %0, if it is float32 already
%3 = aten.slice(%2, 0, 0, max)             %2, if nothing is cut off
%4 = aten.add(%2, %size)                   %size is a node: its users get the size's text instead
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import is_noise
from dsv4c.pipeline import Pass


@dataclass(frozen=True)
class Canonicalize(Pass):
    name: ClassVar[str] = "canonicalize"
    gives: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, graph: fx.Graph) -> int:
        return canonicalize(graph)


def canonicalize(graph: fx.Graph) -> int:
    """Removes noise from one graph; the number of nodes removed."""
    removed = 0
    for node in list(graph.nodes):
        if not is_noise(node) or str(node.target) == "aten.contiguous.default":
            continue
        if node.users:
            node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
        removed += 1
    return removed
