"""Routed experts compute on FP4 weights as they are stored, and gates choose from the router's sums in one op.

%1 = dsv4.experts(%x, %ids, %w, w1, w3, w2, %shared)
    ->  %1 = dsv4.experts_fp4(%x, %ids, %w, w1.data, w1.scale, w3.data, w3.scale, w2.data, w2.scale, %shared)
NVFP4:
    ->  %1 = dsv4.experts_nvfp4(%x, %ids, %w, w1.data, w1.weight_scale, w1.weight_scale_2, (w3, w2 alike),
                                w1+w3.input_scale, w2.input_scale, %shared) {activations=bf16}
%1 = dsv4.linear_mixed(%x, gate); dsv4.gate_bias(%1, b)   ->  dsv4.gate_linear_bias(%x, gate, b)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.errors import PassError
from dsv4c.facts import reads
from dsv4c.ops import TensorType
from dsv4c.passes._rewriting import call_before, erase, output_of, outputs
from dsv4c.passes._storing import input_scales, stored_nvfp4, stored_pair
from dsv4c.pipeline import Pass
from dsv4c.program import Program, is_op, op_name, types_of


@dataclass(frozen=True)
class StoreExperts(Pass):
    name: ClassVar[str] = "store-experts"
    needs: ClassVar[frozenset[str]] = frozenset({"linears-stored"})
    gives: ClassVar[frozenset[str]] = frozenset({"experts-stored", "gate-fused"})
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 2.0**-6  # BF16 is off by 2^-9 at most; the sum with the shared expert may cancel
    why: ClassVar[str] = "the experts' result is rounded to BF16, and summed expert by expert"

    def apply(self, program: Program) -> int:
        count = 0
        for graph in program.graphs.values():
            for node in [n for n in graph.nodes if is_op(n, "gate_bias") or is_op(n, "gate_hash")]:
                _gate(node)
                count += 1
            for node in [n for n in graph.nodes if is_op(n, "experts")]:
                _experts(program, graph, node)
                count += 1
        return count


def _gate(node: fx.Node) -> None:
    router = reads(node, 0, "linear_mixed")
    if router is None or len(router.users) > 1:
        raise PassError(f"`{node.format_node()}` does not choose from a router of its own")
    chosen, weight = types_of(node)
    name = op_name(node).replace("gate_", "gate_linear_")
    types = (TensorType(chosen.shape, "int32"), weight)
    fused = call_before(node, name, (*router.args, *node.args[1:]), dict(node.kwargs), types)
    for index, old in outputs(node).items():
        old.replace_all_uses_with(output_of(fused, index, node))
        erase(old)
    erase(node, router)


def _experts(program: Program, graph: fx.Graph, node: fx.Node) -> None:
    x, chosen, weight, w1, w3, w2, shared = node.args
    pairs: list[fx.Node] = []
    if isinstance(w1, fx.Node) and w1.meta["stored"] == "nvfp4":
        _nvfp4_experts(program, graph, node)
        return
    for one in (w1, w3, w2):
        assert isinstance(one, fx.Node)
        if one.meta["stored"] != "fp4":
            raise PassError(
                f"`{one.meta['value'].name}` is stored as {one.meta['stored']}, expected fp4",
                hint="checkpoints with FP8 experts have no GPU schedule yet",
            )
        pairs += stored_pair(program, graph, one, "fp4")
    args = (x, chosen, weight, *pairs, shared)
    result = TensorType(types_of(node)[0].shape, "bfloat16")
    node.replace_all_uses_with(call_before(node, "experts_fp4", args, dict(node.kwargs), result))
    erase(node)


def _nvfp4_experts(program: Program, graph: fx.Graph, node: fx.Node) -> None:
    x, chosen, weight, w1, w3, w2, shared = node.args
    assert isinstance(w1, fx.Node) and isinstance(w3, fx.Node) and isinstance(w2, fx.Node)
    parts = [part for one in (w1, w3, w2) for part in stored_nvfp4(program, graph, one)]
    scales = (input_scales(program, graph, w1, w3), input_scales(program, graph, w2))
    attrs = {**node.kwargs, "activations": "bf16"}
    result = TensorType(types_of(node)[0].shape, "bfloat16")
    args = (x, chosen, weight, *parts, *scales, shared)
    node.replace_all_uses_with(call_before(node, "experts_nvfp4", args, attrs, result))
    erase(node)
