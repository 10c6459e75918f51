"""Norms and linears of whole streams become those of rows: four times as many, of two dimensions, as kernels take them.

    %1, %2 = rms_norm_quantise(%0: bf16[T, 4, D])     ->  %1 = stream_rows(%0) : bf16[T_streams, D]
    %3 = linear_fp8(%1, %2) : bf16[T, 4, N]               %2, %3 = rms_norm_quantise(%1)
                                                          %4 = linear_fp8(%2, %3) : bf16[T_streams, N]
                                                          %5 = row_streams(%4) : bf16[T, 4, N]

Only the MTP block has them. Views, so nothing is computed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import fx

from dsv4c.facts import STREAM_ROWS, of_streams
from dsv4c.ops import TensorType
from dsv4c.passes._rewriting import call_before
from dsv4c.pipeline import Pass
from dsv4c.program import is_op, types_of


@dataclass(frozen=True)
class FlattenStreams(Pass):
    name: ClassVar[str] = "flatten-streams"
    needs: ClassVar[frozenset[str]] = frozenset({"activations-narrow"})
    gives: ClassVar[frozenset[str]] = frozenset({"streams-flat"})

    def run(self, graph: fx.Graph) -> int:
        found = [n for n in graph.nodes if of_streams(n)]
        for node in found:
            _flatten(node)
        return len(found)


def _flatten(node: fx.Node) -> None:
    kind = types_of(node)
    node.args = tuple(_flat(arg, node) for arg in node.args)
    rows = tuple(TensorType((STREAM_ROWS, *t.shape[2:]), t.dtype) for t in kind)
    node.meta["type"] = rows[0] if isinstance(node.meta["type"], TensorType) else rows
    results = [u for u in node.users if u.target is operator.getitem] if len(kind) > 1 else [node]
    for result in results:
        at = int(str(result.args[1])) if len(kind) > 1 else 0
        result.meta["type"] = rows[at]
        place = result.next
        back = call_before(place, "row_streams", (result,), {"streams": int(kind[at].shape[1])}, kind[at])
        back.meta = {**result.meta, "type": kind[at]}
        result.replace_all_uses_with(back, delete_user_cb=partial(operator.is_not, back))


def _flat(arg: Any, node: fx.Node) -> Any:
    """A tensor of streams as rows; everything else as it is."""
    if not isinstance(arg, fx.Node) or (arg.op == "placeholder" and arg.meta["value"].kind != "streams"):
        return arg
    kind = types_of(arg)[0] if arg.target is not operator.getitem else arg.meta["type"]
    if len(kind.shape) < 3:
        return arg
    if is_op(arg, "row_streams"):
        return arg.args[0]
    flat = call_before(node, "stream_rows", (arg,), {}, TensorType((STREAM_ROWS, *kind.shape[2:]), kind.dtype))
    flat.meta = {**arg.meta, "type": flat.meta["type"], "scope": node.meta.get("scope", "")}
    flat.meta.pop("value", None)
    return flat
