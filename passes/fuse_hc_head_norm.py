"""The final collapse of the streams and the final norm become one op.

%1 = dsv4.hc_head(%x, fn, base, scale)
%2 = dsv4.rms_norm(%1, w)                     ->  %2 = dsv4.hc_head_norm(%x, fn, base, scale, w)
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
class FuseHcHeadNorm(Pass):
    name: ClassVar[str] = "fuse-hc-head-norm"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched"})
    gives: ClassVar[frozenset[str]] = frozenset({"hc-head-norm-fused"})

    def run(self, graph: fx.Graph) -> int:
        found = [n for n in graph.nodes if is_op(n, "rms_norm") and reads(n, 0, "hc_head") and only_use(n.args[0])]
        for norm in found:
            head = reads(norm, 0, "hc_head")
            assert head is not None
            attrs = {**head.kwargs, "out_eps": norm.kwargs["eps"]}
            fused = call_before(norm, "hc_head_norm", (*head.args, norm.args[1]), attrs, norm.meta["type"])
            norm.replace_all_uses_with(fused)
            erase(norm, head)
        return len(found)
