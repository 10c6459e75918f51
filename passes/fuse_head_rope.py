"""Queries are split into heads, normalised and rotated in one op.

%1 = dsv4.head_norm(%q);   %2 = dsv4.rope(%1, table)   ->  %2 = dsv4.head_norm_rope(%q, table)
%1 = dsv4.split_heads(%q); %2 = dsv4.rope(%1, table)   ->  %2 = dsv4.split_heads_rope(%q, table)   (indexer)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import only_use, reads
from dsv4c.passes._rewriting import call_before, erase
from dsv4c.pipeline import Pass
from dsv4c.program import is_op


@dataclass(frozen=True)
class FuseHeadRope(Pass):
    name: ClassVar[str] = "fuse-head-rope"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched"})
    gives: ClassVar[frozenset[str]] = frozenset({"head-rope-fused"})

    def run(self, graph: fx.Graph) -> int:
        count = 0
        for rope in [n for n in graph.nodes if is_op(n, "rope") and not n.kwargs["inverse"]]:
            for first in ("head_norm", "split_heads"):
                heads = reads(rope, 0, first)
                if heads is None or not only_use(heads):
                    continue
                args = (heads.args[0], rope.args[1])
                rope.replace_all_uses_with(
                    call_before(rope, f"{first}_rope", args, dict(heads.kwargs), rope.meta["type"])
                )
                erase(rope, heads)
                count += 1
        return count
