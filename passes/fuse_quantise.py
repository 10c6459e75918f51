"""What makes rows quantises them too: mHC's norm, the latent's norm with the KV entry beside it, and SwiGLU.

%1 = dsv4.hc_pre_norm(...);  dsv4.quantise_rows(%1.0)   ->  dsv4.hc_pre_norm_quantise: rows, and their FP8 form
%1 = dsv4.swiglu_pair(%gu);  dsv4.quantise_rows(%1)     ->  dsv4.swiglu_quantise(%gu)
%1 = dsv4.rms_norm(%q, w);   dsv4.quantise_rows(%1)     ->  dsv4.rms_norm_quantise(%q, w)
... and dsv4.norm_rope_pack of the columns behind %q    ->  dsv4.qkv_norm_rope_pack, one op for both
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from dsv4c.facts import QUANTISED_OUTPUT, quantise_source
from dsv4c.ops import TensorType
from dsv4c.passes._rewriting import call_before, erase, output_of, outputs
from dsv4c.pipeline import Pass
from dsv4c.program import is_op, op_name, types_of


@dataclass(frozen=True)
class FuseQuantise(Pass):
    name: ClassVar[str] = "fuse-quantise"
    needs: ClassVar[frozenset[str]] = frozenset({"linears-stored", "hc-post-pre-fused"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantise-fused"})

    def run(self, graph: fx.Graph) -> int:
        count = 0
        for node in [n for n in graph.nodes if is_op(n, "quantise_rows")]:
            source = quantise_source(node)
            if source is None:
                continue
            _fuse(node, source)
            count += 1
        for node in [n for n in graph.nodes if is_op(n, "rms_norm_quantise")]:
            count += _with_entry(node)
        return count


def _fuse(node: fx.Node, source: fx.Node) -> None:
    name = op_name(source)
    attrs = {**source.kwargs, "group": node.kwargs["group"]}
    made = types_of(node)
    if QUANTISED_OUTPUT[name] is None:
        new = {"rms_norm": "rms_norm_quantise", "swiglu_pair": "swiglu_quantise"}[name]
        fused = call_before(node, new, source.args, attrs, made)
        _take(node, fused, 0)
        erase(node, source)
        return
    kinds = types_of(source)
    fused = call_before(source, f"{name}_quantise", source.args, attrs, (*kinds, *made))
    _take(node, fused, len(kinds))
    for index, old in outputs(source).items():
        old.replace_all_uses_with(output_of(fused, index, source))
    erase(node, *outputs(source).values(), source)


def _take(node: fx.Node, fused: fx.Node, start: int) -> None:
    """Every read of `node`'s outputs becomes a read of `fused`'s, from `start` on."""
    for index, old in outputs(node).items():
        old.replace_all_uses_with(output_of(fused, start + index, old))
        erase(old)


def _with_entry(node: fx.Node) -> int:
    """Joins the latent's norm with the KV entry's, if both are neighbouring columns of one map."""
    q, q_weight = node.args
    if not is_op(q, "columns"):
        return 0
    assert isinstance(q, fx.Node)
    start, length = int(str(q.kwargs["start"])), int(str(q.kwargs["length"]))
    for kv in [u for u in q.args[0].users if is_op(u, "columns")]:  # type: ignore[union-attr]
        pack = next((u for u in kv.users if is_op(u, "norm_rope_pack")), None)
        if pack is None or int(str(kv.kwargs["start"])) != start + length or pack.kwargs["eps"] != node.kwargs["eps"]:
            continue
        pool, slots, _, kv_weight, table = pack.args
        whole = length + int(str(kv.kwargs["length"]))
        kind = types_of(q)[0]
        both: Any = q.args[0]
        if whole != int(types_of(both)[0].shape[-1]):
            wide = TensorType((*kind.shape[:-1], whole), kind.dtype)
            both = call_before(node, "columns", (both,), {"start": start, "length": whole}, wide)
        attrs = {"eps": node.kwargs["eps"], "group": node.kwargs["group"],
                 "entries_per_page": pack.kwargs["entries_per_page"]}  # fmt: skip
        types = (pack.meta["type"], *types_of(node))
        fused = call_before(node, "qkv_norm_rope_pack", (pool, slots, both, q_weight, kv_weight, table), attrs, types)
        _take(node, fused, 1)
        pack.replace_all_uses_with(output_of(fused, 0, node))
        erase(node, pack)
        return 1
    return 0
