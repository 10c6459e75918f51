"""Runs a stitched program on the references of its ops: the slow, sure meaning of a graph at any stage."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dsv4c.artifact import Weight
from dsv4c.checkpoint.names import parameter_sources
from dsv4c.checkpoint.source import WeightSource
from dsv4c.facts import COUNTS, LAST_TOKENS
from dsv4c.passes.append_sampling import EDIT_INPUTS, ROW_INPUTS
from dsv4c.program import Program, Value
from dsv4c.runtime.weights import load_weights
from dsv4c.weights import weight


def run(
    program: Program,
    graph_name: str,
    inputs: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The graph's outputs by name (`logits`, `streams`, `state.<name>`).

    `inputs` are the step's inputs (and `streams` for entry points that take them), `weights` the plain model's
    state dict, or the program's own weights by name (`program_weights`). Raises KeyError with the name of a value that
    is missing.
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


def read_weights(program: Program) -> tuple[Weight, ...]:
    """Every weight that the program's graphs read, for kernels without layouts."""
    sources = parameter_sources(program.config)
    made = {}
    for node in program.nodes():
        if node.op == "placeholder" and node.users and node.meta["value"].kind == "weight":
            name, kind = node.meta["value"].name, node.meta["type"]
            made[name] = weight(program, sources, name, name, (), tuple(int(s) for s in kind.shape), kind.dtype)
    return tuple(made.values())


def program_weights(program: Program, source: WeightSource) -> dict[str, Tensor]:
    """The weights of `read_weights` by name, as a runtime would load them."""
    return load_weights(read_weights(program), source)[0]


def program_state(program: Program, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeroed state with as many rows as the plain model's state, in the formats that the program stores."""
    types = {n.meta["value"].name: n.meta["type"] for n in program.nodes() if n.op == "placeholder"}
    return {
        name: torch.zeros(tensor.shape[0], *types[name].shape[1:], dtype=getattr(torch, types[name].dtype))
        for name, tensor in plain.items()
        if name in types
    }


def greedy_sampling(program: Program, rows: int, slots: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Step inputs and state of a program that samples: `rows` greedy rows without edits or penalties, for nobody."""
    graph = program.graphs["step"]
    values = {n.meta["value"].name: n.meta for n in graph.nodes if n.op == "placeholder"}
    inputs = {}
    for name in (*ROW_INPUTS, *EDIT_INPUTS):
        if name in values:
            size = rows if name in ROW_INPUTS else 0
            inputs[name] = torch.zeros(size, dtype=getattr(torch, values[name]["type"].dtype))
    for name in ("top_p", "repetition"):
        if name in inputs:
            inputs[name].fill_(1.0)
    state = {
        name: torch.zeros(slots, *meta["type"].shape[1:], dtype=getattr(torch, meta["type"].dtype))
        for name, meta in values.items()
        if name in (COUNTS, LAST_TOKENS)
    }
    return inputs, state


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
    if value.name in weights:
        return weights[value.name]
    if value.kind == "weight":
        parts = program.weight_sources.get(value.name, (value.name,))
        return torch.cat([weights[p] for p in parts]) if len(parts) > 1 else weights[parts[0]]
    return inputs[value.name]
