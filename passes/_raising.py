"""How regions are raised: a leaf module's nodes are compared, as text, with a fresh trace of its op's reference.

Inputs are numbered by first use on both sides, so equal texts also say which value is which parameter. Anything
else is a RaiseError that names the module and the first line that differs: nothing is skipped.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import Dim

from dsv4c.errors import RaiseError
from dsv4c.exporting import export
from dsv4c.ops import LEAVES, OPS, Op, TensorType
from dsv4c.passes.canonicalize import canonicalize
from dsv4c.program import Leaf


@dataclass(frozen=True)
class Region:
    """A run of nodes as text, with its inputs and nodes in the order in which the text numbers them."""

    lines: tuple[str, ...]
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


def raise_family(graph: fx.Graph, names: frozenset[str]) -> int:
    """Replaces the region of every leaf module whose op is in `names` by that op; the number of regions."""
    regions: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        leaf = node.meta.get("leaf")
        if leaf is not None and LEAVES[leaf.class_name] in names and "size" not in node.meta:
            regions.setdefault(leaf.path, []).append(node)
    for nodes in regions.values():
        _raise_region(graph, nodes)
    return len(regions)


def _raise_region(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    leaf: Leaf = nodes[0].meta["leaf"]
    op = OPS[LEAVES[leaf.class_name]]
    region = describe(nodes)
    pattern, parameters, outputs = _pattern(op, leaf.types, tuple(sorted(leaf.attrs.items())))
    _compare(leaf, op, region, pattern)
    args = dict(zip(parameters, region.inputs, strict=True))
    inside, results = set(nodes), [region.nodes[i] for i in outputs]
    leaked = [n for n in nodes if n not in results and any(u not in inside for u in n.users)]
    if leaked:
        raise RaiseError(f"module `{leaf.path}`: a value inside `{op.__name__}` is used outside: `{leaked[0].name}`")
    with graph.inserting_after(nodes[-1]):
        call = graph.call_function(op, tuple(args[p] for p in op.parameters), dict(leaf.attrs))
    call.meta = {"scope": nodes[0].meta["scope"], "path": leaf.path}
    types = tuple(n.meta["type"] for n in results)
    call.meta["type"] = types if op.outputs > 1 else types[0]
    place = call
    for i, old in enumerate(results):
        new = call
        if op.outputs > 1:
            with graph.inserting_after(place):
                new = place = graph.call_function(operator.getitem, (call, i))
            new.meta = {"scope": call.meta["scope"], "type": types[i]}
        for user in [u for u in old.users if u not in inside]:
            user.replace_input_with(old, new)
    for node in reversed(nodes):
        graph.erase_node(node)


def describe(nodes: list[fx.Node]) -> Region:
    """The text of a region: sizes by their expression, inputs by first use, nodes by position."""
    local = {n: i for i, n in enumerate(nodes)}
    inputs: dict[fx.Node, int] = {}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            if value in local:
                return f"%{local[value]}"
            if "size" in value.meta:
                return f"<{value.meta['size']}>"
            return f"${inputs.setdefault(value, len(inputs))}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(text, value)) + "]"
        return "device" if isinstance(value, torch.device) else repr(value)

    lines = []
    for node in nodes:
        args = ", ".join([*map(text, node.args), *(f"{k}={text(v)}" for k, v in sorted(node.kwargs.items()))])
        kind = node.meta.get("type")
        types = ", ".join(map(str, kind)) if isinstance(kind, tuple) else str(kind)
        name = "getitem" if node.target is operator.getitem else str(node.target)
        lines.append(f"%{local[node]} = {name}({args}) : {types}")
    return Region(tuple(lines), tuple(inputs), tuple(nodes))


def _compare(leaf: Leaf, op: Op, region: Region, pattern: Region) -> None:
    if region.lines == pattern.lines:
        return
    for i in range(max(len(region.lines), len(pattern.lines))):
        found = region.lines[i] if i < len(region.lines) else "the end of the module"
        expected = pattern.lines[i] if i < len(pattern.lines) else "the end of the op"
        if found != expected:
            raise RaiseError(
                f"module `{leaf.path}` ({leaf.class_name}) is not `{op.__name__}`: step {i + 1} is `{found}`, "
                f"expected `{expected}`",
                hint="the module was changed; change the op's reference and its schedules with it, or undo it",
            )


@functools.lru_cache(maxsize=512)
def _pattern(
    op: Op, types: tuple[TensorType, ...], attrs: tuple[tuple[str, Any], ...]
) -> tuple[Region, tuple[str, ...], tuple[int, ...]]:
    """The op's reference traced at these types: its region, its parameters by first use, and its output nodes."""
    graph = trace(functools.partial(op.module or op.reference, **dict(attrs)), types)
    canonicalize(graph)
    graph.eliminate_dead_code()
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    nodes = [n for n in graph.nodes if n.op == "call_function" and "size" not in n.meta]
    region = describe(nodes)
    parameter = dict(zip(placeholders, op.parameters, strict=True))
    returned: Any = graph.output_node().args[0]
    outputs = tuple(nodes.index(n) for n in returned)
    if len(region.inputs) != len(placeholders):
        raise RaiseError(f"`{op.__name__}` does not use every parameter, so its region cannot be matched")
    return region, tuple(parameter[n] for n in region.inputs), outputs


class _Function(torch.nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.run(*tensors)


def trace(run: Callable[..., Any], types: tuple[TensorType, ...]) -> fx.Graph:
    """torch.export of a plain function of tensors, its nodes typed with the symbols of `types`."""
    names = sorted({d for t in types for d in t.shape if isinstance(d, str)})
    if any(not d.isidentifier() for d in names):
        raise RaiseError(f"an input has a computed size: {', '.join(d for d in names if not d.isidentifier())}")
    example = {d: 2 * i + 1031 for i, d in enumerate(names)}
    dims = {d: Dim(d, min=512 if d.startswith("P_") else 0) for d in names}
    args = tuple(
        torch.empty([example[d] if isinstance(d, str) else d for d in t.shape], dtype=getattr(torch, t.dtype),
                    device="meta") for t in types
    )  # fmt: skip
    shapes = tuple({i: dims[d] for i, d in enumerate(t.shape) if isinstance(d, str)} for t in types)
    exported = export(_Function(run), args, shapes)
    known: dict[Any, Any] = {}
    out = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    inputs = iter(types)
    for node in exported.graph.nodes:
        new = copied[node] = out.node_copy(node, lambda n: copied[n])
        value = node.meta.get("val")
        if node.op == "placeholder":
            for size, name in zip(value.shape, next(inputs).shape, strict=True):
                if isinstance(name, str):
                    known[size.node.expr] = sympy.Symbol(name, integer=True)
        new.meta = _typed(value, known)
    return out


def _typed(value: Any, known: Mapping[Any, Any]) -> dict[str, Any]:
    def size(v: Any) -> int | str:
        if isinstance(v, torch.SymInt):
            expression = v.node.expr.xreplace(known)
            return int(expression) if expression.is_number else str(expression)
        return int(v)

    def kind(t: torch.Tensor) -> TensorType:
        return TensorType(tuple(size(s) for s in t.shape), str(t.dtype).removeprefix("torch."))

    if isinstance(value, torch.Tensor):
        return {"type": kind(value)}
    if isinstance(value, (list, tuple)):
        return {"type": tuple(kind(v) for v in value)}
    if isinstance(value, (torch.SymInt, int)):
        return {"size": size(value)}
    return {}
