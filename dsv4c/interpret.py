"""Runs a stitched program on the references of its ops: the slow, sure meaning of a graph at any stage."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dsv4c.program import Program, Value


def run(
    program: Program,
    graph_name: str,
    inputs: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The graph's outputs by name (`logits`, `streams`, `state.<name>`).

    `inputs` are the step's inputs (and `streams` for entry points that take them), `weights` the plain model's
    state dict. Raises KeyError with the name of a value that is missing.
    """
    values: dict[fx.Node, Any] = {}
    graph = program.graphs[graph_name]
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.users:
                values[node] = _given(program, node.meta["value"], inputs, state, weights)
        elif node.op == "output":
            return {k: values[v] for k, v in zip(node.meta["outputs"], node.args[0], strict=True)}
        else:
            args = fx.map_arg(node.args, lambda n: values[n])
            attrs = fx.map_arg(node.kwargs, lambda n: values[n])
            values[node] = operator.getitem(*args) if node.target is operator.getitem else node.target(*args, **attrs)
    raise KeyError(f"graph `{graph_name}` has no output")


def _given(
    program: Program,
    value: Value,
    inputs: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> Tensor:
    if value.kind == "state":
        return state[value.name]
    if value.kind == "constant":
        return program.constants[value.name]
    if value.kind == "weight":
        parts = program.weight_sources.get(value.name, (value.name,))
        return torch.cat([weights[p] for p in parts]) if len(parts) > 1 else weights[parts[0]]
    return inputs[value.name]
