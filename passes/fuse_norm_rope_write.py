"""A KV entry is normalised, rotated and written into its page in one op.

    %1 = dsv4.rms_norm(%kv, w)
    %2 = dsv4.rope(%1, table)
    %3 = dsv4.page_write(%pool, %slots, %2)       ->  %3 = dsv4.norm_rope_write(%pool, %slots, %kv, w, table)

With fake quantisation between rotation and write the pattern does not match, and nothing is fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import norm_rope_write
from dsv4c.passes._rewriting import call_before, erase
from dsv4c.pipeline import Pass
from dsv4c.program import is_op


@dataclass(frozen=True)
class FuseNormRopeWrite(Pass):
    name: ClassVar[str] = "fuse-norm-rope-write"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched"})
    gives: ClassVar[frozenset[str]] = frozenset({"norm-rope-write-fused"})

    def run(self, graph: fx.Graph) -> int:
        count = 0
        for write in [n for n in graph.nodes if is_op(n, "page_write")]:
            found = norm_rope_write(write)
            if found is None:
                continue
            norm, rope = found
            args = (write.args[0], write.args[1], norm.args[0], norm.args[1], rope.args[1])
            fused = call_before(write, "norm_rope_write", args, {"eps": norm.kwargs["eps"]}, write.meta["type"])
            write.replace_all_uses_with(fused)
            erase(write, rope, norm)
            count += 1
        return count
