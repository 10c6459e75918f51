"""mHC's mixing and the norm that follows it become one op: the mixed row is normalised before it is stored.

%1, %post, %comb = dsv4.hc_pre(%x, fn, base, scale)
%2 = dsv4.rms_norm(%1, w)                     ->  %2, %post, %comb = dsv4.hc_pre_norm(%x, fn, base, scale, w)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import only_use, reads
from dsv4c.passes._rewriting import call_before, erase, output_of, outputs
from dsv4c.pipeline import Pass
from dsv4c.program import is_op


@dataclass(frozen=True)
class FuseHcNorm(Pass):
    name: ClassVar[str] = "fuse-hc-norm"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched"})
    gives: ClassVar[frozenset[str]] = frozenset({"hc-norm-fused"})

    def run(self, graph: fx.Graph) -> int:
        found = [n for n in graph.nodes if is_op(n, "rms_norm") and reads(n, 0, "hc_pre", 0) and only_use(n.args[0])]
        for norm in found:
            pre = reads(norm, 0, "hc_pre", 0)
            assert pre is not None
            types = (norm.meta["type"], *pre.meta["type"][1:])
            attrs = {**pre.kwargs, "out_eps": norm.kwargs["eps"]}
            fused = call_before(norm, "hc_pre_norm", (*pre.args, norm.args[1]), attrs, types)
            old = outputs(pre)
            norm.replace_all_uses_with(output_of(fused, 0, norm))
            for index in (1, 2):
                old[index].replace_all_uses_with(output_of(fused, index, norm))
            erase(norm, *old.values(), pre)
        return len(found)
