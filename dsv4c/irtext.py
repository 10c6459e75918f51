"""The stable text form of a graph: one printer, values numbered in order, no paths and no addresses.

If two commits print the same text, they compile the same thing.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

from torch import fx

from dsv4c.ops import Op


def graph_text(graph: fx.Graph, name: str) -> str:
    """`%n = op(args) {attrs} : types  # scope`, one line a call; placeholders are named after their value."""
    names: dict[fx.Node, str] = {}
    numbers = itertools.count()
    lines = [f"graph {name} {{"]
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%{node.meta['value'].kind}.{node.meta['value'].name}"
            if node.users:
                stored = f" stored {node.meta['stored']}" if "stored" in node.meta else ""
                lines.append(f"  {names[node]} : {node.meta['type']}{stored}")
        elif node.op == "output":
            parts = (f"{k}={_argument(v, names)}" for k, v in zip(node.meta["outputs"], node.args[0], strict=True))
            lines.append(f"  return {', '.join(parts)}")
        elif node.target is operator.getitem:
            names[node] = f"{names[node.args[0]]}.{node.args[1]}"
        else:
            names[node] = f"%{next(numbers)}"
            lines.append(f"  {names[node]} = {_call(node, names)}")
    return "\n".join([*lines, "}"])


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    target = node.target
    label = target.__name__ if isinstance(target, Op) else str(target)
    args = ", ".join(_argument(a, names) for a in node.args)
    attrs = ", ".join(f"{k}={_argument(v, names)}" for k, v in sorted(node.kwargs.items()))
    kind = node.meta.get("type")
    types = ", ".join(map(str, kind)) if isinstance(kind, tuple) else str(kind)
    scope = node.meta.get("scope", "")
    return f"{label}({args})" + (f" {{{attrs}}}" if attrs else "") + f" : {types}" + (f"  # {scope}" if scope else "")


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value] if value in names else str(value.meta.get("size", value.name))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v, names) for v in value) + "]"
    return repr(value)
