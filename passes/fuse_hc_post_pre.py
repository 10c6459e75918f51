"""The end of one sublayer and the start of the next become one op: the streams are read once and written once.

    %x1 = dsv4.hc_post(%y, %x0, %post, %comb)
    %2, %post2, %comb2 = dsv4.hc_pre_norm(%x1, fn, base, scale, w)
    ->  %x1, %2, %post2, %comb2 = dsv4.hc_post_pre_norm(%y, %x0, %post, %comb, fn, base, scale, w)

The streams stay an output: the next sublayer's own `hc_post` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import reads
from dsv4c.passes._rewriting import call_before, erase, output_of, outputs
from dsv4c.pipeline import Pass
from dsv4c.program import is_op


@dataclass(frozen=True)
class FuseHcPostPre(Pass):
    name: ClassVar[str] = "fuse-hc-post-pre"
    needs: ClassVar[frozenset[str]] = frozenset({"hc-norm-fused"})
    gives: ClassVar[frozenset[str]] = frozenset({"hc-post-pre-fused"})

    def run(self, graph: fx.Graph) -> int:
        found = [n for n in graph.nodes if is_op(n, "hc_pre_norm") and reads(n, 0, "hc_post")]
        for pre in found:
            post = reads(pre, 0, "hc_post")
            assert post is not None
            types = (post.meta["type"], *pre.meta["type"])
            # where `hc_post` stands: others may read the streams before the next sublayer does
            fused = call_before(post, "hc_post_pre_norm", (*post.args, *pre.args[1:]), dict(pre.kwargs), types)
            fused.meta["scope"] = pre_scope = pre.meta["scope"]
            old = outputs(pre)
            for index, value in old.items():
                value.replace_all_uses_with(output_of(fused, index + 1, pre))
            erase(*old.values(), pre)
            streams = output_of(fused, 0, fused.next)
            streams.meta["scope"] = pre_scope
            post.replace_all_uses_with(streams)
            erase(post)
        return len(found)
