"""The stable text form of a program: one printer, values numbered in order, no paths and no addresses.

If two commits print the same text, they compile the same thing. It says all that the program computes: what joined and
stored weights are made of, the values of constants, the recipes of pieces. `dsv4c.irread` reads it back.
"""

from __future__ import annotations

import itertools
import operator
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from dsv4c.ops import Op

if TYPE_CHECKING:
    from dsv4c.program import Program, Value


def program_text(program: Program) -> str:
    """Every graph; of a program in pieces also its constants and the recipes that join the pieces."""
    parts = [graph_text(graph, name, program) for name, graph in program.graphs.items()]
    if not program.stitched:
        parts.append("\n".join(["constants {", *(f"  {n}{_values(t)}" for n, t in program.constants.items()), "}"]))
        for entry, recipe in program.recipes.items():
            uses = (f"  {i.scope} = {i.piece}({i.prefix})" for i in recipe)
            parts.append("\n".join([f"recipe {entry} {{", *uses, "}"]))
    return "\n".join(parts)


def graph_text(graph: fx.Graph, name: str, program: Program) -> str:
    """`%n = op(args) {attrs} : types  # scope`, one line a call; placeholders are named after their value."""
    names: dict[fx.Node, str] = {}
    numbers = itertools.count()
    lines = [f"graph {name} {{"]
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%{node.meta['value'].kind}.{node.meta['value'].name}"
            if node.users:
                stored = f" stored {node.meta['stored']}" if "stored" in node.meta else ""
                lines.append(f"  {names[node]} : {node.meta['type']}{stored}{_made_of(node.meta['value'], program)}")
        elif node.op == "output":
            parts = (f"{k}={_argument(v, names)}" for k, v in zip(node.meta["outputs"], node.args[0], strict=True))
            lines.append(f"  return {', '.join(parts)}")
        elif node.target is operator.getitem:
            names[node] = f"{names[node.args[0]]}.{node.args[1]}"
        else:
            names[node] = f"%{next(numbers)}"
            lines.append(f"  {names[node]} = {_call(node, names)}")
    return "\n".join([*lines, "}"])


def _made_of(value: Value, program: Program) -> str:
    """What a placeholder's value is: ` data of a+b from a, b`, or a constant's numbers."""
    if value.kind == "constant":
        return _values(program.constants[value.name])
    if value.kind != "weight":
        return ""
    stored = program.stored.get(value.name)
    parts = program.weight_sources.get(stored.of if stored else value.name, ())
    of = f" {stored.part} of {stored.of}" if stored else ""
    return of + (f" from {', '.join(parts)}" if parts else "")


def _values(tensor: Tensor) -> str:
    return f" = [{', '.join(repr(float(v)) for v in tensor.flatten())}]"


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    target = node.target
    label = label_of(target)
    args = ", ".join(_argument(a, names) for a in node.args)
    attrs = ", ".join(f"{k}={_argument(v, names)}" for k, v in sorted(node.kwargs.items()))
    kind = node.meta.get("type")
    types = ", ".join(map(str, kind)) if isinstance(kind, tuple) else str(kind)
    scope = node.meta.get("scope", "")
    return f"{label}({args})" + (f" {{{attrs}}}" if attrs else "") + f" : {types}" + (f"  # {scope}" if scope else "")


def label_of(target: Any) -> str:
    """`dsv4.hc_pre`, `aten.linear.default`, or `operator.mul` of sizes."""
    if isinstance(target, Op):
        return target.__name__
    return f"operator.{target.__name__}" if isinstance(target, BuiltinFunctionType) else str(target)


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value] if value in names else str(value.meta.get("size", value.name))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v, names) for v in value) + "]"
    return repr(value)
