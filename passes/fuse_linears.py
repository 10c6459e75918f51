"""Linear maps of one input become one map, whose result the others read as columns.

%1 = dsv4.linear(%x, a)                       %0 = dsv4.linear(%x, a+b)      weight a+b: rows of a, then of b
%2 = dsv4.linear(%x, b)                   ->  %1 = dsv4.columns(%0) {start=0}      a view
                                              %2 = dsv4.columns(%0) {start=len(a)}
dsv4.swiglu(%1, %2) of neighbours         ->  dsv4.swiglu_pair(dsv4.columns(%0))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.facts import linear_group
from dsv4c.ops import TensorType
from dsv4c.passes._rewriting import call_before, erase
from dsv4c.pipeline import Pass
from dsv4c.program import Program, Value, is_op


@dataclass(frozen=True)
class FuseLinears(Pass):
    name: ClassVar[str] = "fuse-linears"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched"})
    gives: ClassVar[frozenset[str]] = frozenset({"linears-fused", "formats-chosen"})
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-6
    why: ClassVar[str] = "a library may block a wider matrix product differently, in float32"

    def apply(self, program: Program) -> int:
        return sum(self._fuse(graph, program) for graph in program.graphs.values())

    def _fuse(self, graph: fx.Graph, program: Program) -> int:
        groups: dict[tuple[object, bool], list[fx.Node]] = {}
        for node in graph.nodes:
            if is_op(node, "linear"):
                groups.setdefault(linear_group(node), []).append(node)
        fused = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in fused:
            concatenate(graph, program, nodes)
        for node in [n for n in graph.nodes if is_op(n, "swiglu")]:
            pair_swiglu(node)
        return len(fused)


def concatenate(graph: fx.Graph, program: Program, nodes: list[fx.Node]) -> None:
    """One linear map with the rows of all these maps' weights, and a view of its columns for each."""
    weights: list[fx.Node] = [n.args[1] for n in nodes]  # type: ignore[misc]
    names = [w.meta["value"].name for w in weights]
    name = "+".join([names[0], *(n.removeprefix(_shared(names)) for n in names[1:])])
    rows = [int(w.meta["type"].shape[0]) for w in weights]
    kind = TensorType((sum(rows), weights[0].meta["type"].shape[1]), weights[0].meta["type"].dtype)
    first = nodes[0]
    with graph.inserting_after(weights[-1]):
        weight = graph.placeholder("weight_" + name.replace(".", "_").replace("+", "_"))
    weight.meta = {"type": kind, "value": Value("weight", name)}
    stored = [w.meta["stored"] for w in weights if "stored" in w.meta]
    if stored:
        weight.meta["stored"] = "+".join(dict.fromkeys(stored))
    program.weight_types[name] = kind
    program.weight_sources[name] = tuple(names)
    result = first.meta["type"]
    wide = TensorType((*result.shape[:-1], sum(rows)), result.dtype)
    whole = call_before(first, "linear", (first.args[0], weight), dict(first.kwargs), wide)
    start = 0
    for node, count in zip(nodes, rows, strict=True):
        part = call_before(first, "columns", (whole,), {"start": start, "length": count}, node.meta["type"])
        node.replace_all_uses_with(part)
        start += count
    erase(*nodes)
    erase(*(w for w in weights if not w.users))


def _shared(names: list[str]) -> str:
    parts = [n.split(".") for n in names]
    keep = 0
    while all(len(p) > keep + 1 and p[keep] == parts[0][keep] for p in parts):
        keep += 1
    return ".".join(parts[0][:keep]) + "." if keep else ""


def pair_swiglu(node: fx.Node) -> bool:
    """Makes a `swiglu` of neighbouring columns a `swiglu_pair` of both; whether it did."""
    gate, up = node.args
    if not (is_op(gate, "columns") and is_op(up, "columns")):
        return False
    assert isinstance(gate, fx.Node) and isinstance(up, fx.Node)
    size = int(str(gate.kwargs["length"]))
    start = int(str(gate.kwargs["start"]))
    if up.args[0] is not gate.args[0] or up.kwargs["start"] != start + size:
        return False
    kind = gate.meta["type"]
    wide = TensorType((*kind.shape[:-1], 2 * size), kind.dtype)
    both = call_before(node, "columns", (gate.args[0],), {"start": start, "length": 2 * size}, wide)
    node.replace_all_uses_with(call_before(node, "swiglu_pair", (both,), dict(node.kwargs), node.meta["type"]))
    erase(node, *(n for n in (gate, up) if not n.users or set(n.users) == {node}))
    return True
