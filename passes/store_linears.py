"""Linear maps compute on weights as they are stored: FP8 with its block scales, BF16 with float32 sums.

%1 = dsv4.linear(%x, w)  stored fp8          %0 = dsv4.quantise_rows(%x)
                                         ->  %1 = dsv4.linear_fp8(%0.0, %0.1, w.data, w.scale)
%1 = dsv4.linear(%x, w)  stored bf16     ->  %1 = dsv4.linear_mixed(%x, w)
%1 = dsv4.rope(%o, table) {inverse}          %0 = dsv4.rope_quantise(%o, table)
%2 = dsv4.grouped_linear(%1, w)          ->  %2 = dsv4.grouped_linear_fp8(%0.0, %0.1, w.data, w.scale)

Activations are rounded to E4M3 with a power-of-two scale for each 128 channels, as in training (model.md 2.11).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.errors import PassError
from dsv4c.facts import BLOCK, reads
from dsv4c.ops import TensorType
from dsv4c.passes._rewriting import call_before, erase, output_of
from dsv4c.passes._storing import retype, stored_pair
from dsv4c.pipeline import Pass
from dsv4c.program import Program, is_op, types_of


@dataclass(frozen=True)
class StoreLinears(Pass):
    name: ClassVar[str] = "store-linears"
    needs: ClassVar[frozenset[str]] = frozenset({"stored-linears-fused", "state-packed"})
    gives: ClassVar[frozenset[str]] = frozenset({"linears-stored"})
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 0.25  # a channel is off by 2^-4 at most; where a row's sums cancel, it counts for more
    why: ClassVar[str] = "inputs of FP8 weights are rounded to FP8 in groups of 128 channels, as in training"

    def apply(self, program: Program) -> int:
        count = 0
        for graph in program.graphs.values():
            rows: dict[fx.Node, fx.Node] = {}
            for node in [n for n in graph.nodes if is_op(n, "linear")]:
                _linear(program, graph, node, rows)
                count += 1
            for node in [n for n in graph.nodes if is_op(n, "grouped_linear")]:
                _grouped(program, graph, node)
                count += 1
            _follow(graph)
        return count


_FOLLOWERS = frozenset({
    "columns", "split_heads", "rms_norm", "head_norm", "head_norm_rope", "rope", "swiglu", "swiglu_pair",
    "attend_window_packed", "attend_csa_packed", "attend_hca_packed",
})  # fmt: skip
"""Ops whose result has the dtype of their first argument: rows within a sublayer. The streams stay what they are."""


def _follow(graph: fx.Graph) -> None:
    """Types of what is computed from BF16 rows."""
    for node in graph.nodes:
        if any(is_op(node, name) for name in _FOLLOWERS):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.meta["type"] = TensorType(types_of(node)[0].shape, types_of(source)[0].dtype)


def _linear(program: Program, graph: fx.Graph, node: fx.Node, rows: dict[fx.Node, fx.Node]) -> None:
    x, weight = node.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    shape = types_of(node)[0].shape
    if weight.meta["stored"] == "bf16":
        narrow = retype(program, weight, "bfloat16")
        new = call_before(node, "linear_mixed", (x, narrow), {}, TensorType(shape, "float32"))
    elif weight.meta["stored"] == "fp8":
        if x not in rows:
            kind = types_of(x)[0]
            _check_blocks(node, int(kind.shape[-1]))
            scales = TensorType((*kind.shape[:-1], int(kind.shape[-1]) // BLOCK), "float32")
            types = (TensorType(kind.shape, "float8_e4m3fn"), scales)
            rows[x] = call_before(node, "quantise_rows", (x,), {"group": BLOCK}, types)
        quantised = (output_of(rows[x], 0, node), output_of(rows[x], 1, node))
        pair = stored_pair(program, graph, weight, "fp8")
        new = call_before(node, "linear_fp8", (*quantised, *pair), {}, TensorType(shape, "bfloat16"))
    else:
        raise PassError(f"`{node.format_node()}` has a weight stored as {weight.meta['stored']}")
    node.replace_all_uses_with(new)
    erase(node)


def _grouped(program: Program, graph: fx.Graph, node: fx.Node) -> None:
    rope, weight = node.args
    assert isinstance(weight, fx.Node)
    rotation = reads(node, 0, "rope")
    if rotation is None or len(rotation.users) > 1 or weight.meta["stored"] != "fp8":
        raise PassError(f"`{node.format_node()}` is no FP8 map of rows that only it rotates back")
    assert isinstance(rope, fx.Node)
    kind, groups = types_of(rotation)[0], int(str(node.kwargs["groups"]))
    channels = int(kind.shape[1]) * int(kind.shape[2]) // groups
    _check_blocks(node, channels)
    types = (
        TensorType((kind.shape[0], groups, channels), "float8_e4m3fn"),
        TensorType((kind.shape[0], groups, channels // BLOCK), "float32"),
    )
    quantised = call_before(node, "rope_quantise", rotation.args, {"groups": groups, "group": BLOCK}, types)
    args = (output_of(quantised, 0, node), output_of(quantised, 1, node), *stored_pair(program, graph, weight, "fp8"))
    result = TensorType(types_of(node)[0].shape, "bfloat16")
    node.replace_all_uses_with(call_before(node, "grouped_linear_fp8", args, dict(node.kwargs), result))
    erase(node, rotation)


def _check_blocks(node: fx.Node, channels: int) -> None:
    if channels % BLOCK:
        raise PassError(
            f"`{node.format_node()}` has {channels} input channels, FP8 rows are quantised in groups of {BLOCK}"
        )
