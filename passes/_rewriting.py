"""Helpers of the fusing passes: replacing calls by one fused call, in place."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from dsv4c.ops import OPS, TensorType


def call_before(place: fx.Node, name: str, args: tuple[Any, ...], attrs: dict[str, Any], kind: Any) -> fx.Node:
    """A call of op `name` before `place`, of type (or types) `kind`, with the scope of `place`."""
    with place.graph.inserting_before(place):
        node = place.graph.call_function(OPS[name], args, attrs)
    node.meta = {"type": kind, "scope": place.meta.get("scope", "")}
    return node


def output_of(call: fx.Node, index: int, place: fx.Node) -> fx.Node:
    """Output `index` of a call with several, read before `place`."""
    with place.graph.inserting_before(place):
        node = place.graph.call_function(operator.getitem, (call, index))
    types: tuple[TensorType, ...] = call.meta["type"]
    node.meta = {"type": types[index], "scope": place.meta.get("scope", "")}
    return node


def outputs(call: fx.Node) -> dict[int, fx.Node]:
    """The `getitem` users of a call by index."""
    return {int(u.args[1]): u for u in call.users if u.target is operator.getitem}  # type: ignore[arg-type]


def erase(*nodes: fx.Node) -> None:
    """Erases nodes that nothing uses any more, users first."""
    for node in nodes:
        node.graph.erase_node(node)
