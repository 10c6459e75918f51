"""Runs a program on the references of its ops: what a graph means, at any stage, stitched or in pieces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from dsv4c.artifact import Weight
from dsv4c.checkpoint.names import parameter_sources
from dsv4c.checkpoint.source import WeightSource
from dsv4c.facts import COUNTS, LAST_TOKENS
from dsv4c.ops import TensorType
from dsv4c.passes.append_sampling import EDIT_INPUTS, ROW_INPUTS
from dsv4c.program import Instance, Program, Value
from dsv4c.runtime.weights import load_weights
from dsv4c.weights import weight

Watch = Callable[[str, fx.Node, tuple[Any, ...], Any], Any]
"""Told the scope, the node, the arguments and the value of every call, in order; returns the value to go on with."""


def run(
    program: Program,
    entry: str,
    inputs: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """The outputs of an entry point (`step`, `mtp`) by name: `logits`, `streams` (of `step`), `state.<name>`.

    `inputs` are the step's inputs (and `streams` for entry points that take them), `weights` the plain model's
    state dict, or the program's own weights by name (`program_weights`). A program in pieces runs as its recipe says.
    Raises KeyError with the name of a value that is missing.
    """
    given = {"input": inputs, "state": state, "weight": weights, "derived": {}, "streams": inputs}
    if program.stitched:
        return _graph(program, program.graphs[entry], "", given, "", watch)
    out: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for instance in program.recipes[entry]:
        results = _graph(program, program.graphs[instance.piece], instance.prefix, given, instance.scope, watch)
        for name, value in results.items():
            kind, _, rest = name.partition(".")
            if kind == "derived":
                given["derived"] = {**given["derived"], rest: value}
            elif kind == "streams":
                given["streams"] = {"streams": value}
                if entry == "step":
                    out["streams"] = value
            elif kind == "state":
                found[f"state.{instance.prefix}{rest}"] = value
            else:
                found[name] = value
    return {**found, **out}


def _graph(
    program: Program, graph: fx.Graph, prefix: str, given: Mapping[str, Mapping[str, Tensor]], scope: str,
    watch: Watch | None,
) -> dict[str, Tensor]:  # fmt: skip
    device = next(iter(given["input"].values())).device

    values: dict[fx.Node, Any] = {}

    def here(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return values[argument]
        return device if isinstance(argument, torch.device) else argument  # graphs are captured on no device

    for node in graph.nodes:
        if node.op == "placeholder":
            if node.users:
                values[node] = _given(program, program.whole(node.meta["value"], prefix), given)
        elif node.op == "output":
            return {k: values[v] for k, v in zip(node.meta["outputs"], node.args[0], strict=True)}
        else:
            args, attrs = map_aggregate(node.args, here), map_aggregate(node.kwargs, here)
            value = operator.getitem(*args) if node.target is operator.getitem else node.target(*args, **attrs)
            value = _as_declared(value, node.meta.get("type"))
            values[node] = watch(scope or node.meta.get("scope", ""), node, args, value) if watch else value
    raise KeyError("a graph has no output")


def _as_declared(value: Any, kind: Any) -> Any:
    """A result in the float dtype that its node declares, as a kernel would write it."""
    if isinstance(value, (tuple, list)) and isinstance(kind, tuple):
        return tuple(_as_declared(v, k) for v, k in zip(value, kind, strict=True))
    if not isinstance(kind, TensorType) or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(getattr(torch, kind.dtype))


def placeholders(program: Program) -> Iterator[tuple[Value, fx.Node]]:
    """What a program reads: values as the whole names them, once for every use of a piece, and their placeholders."""
    one = Instance("", "", "")
    for entry, recipe in program.recipes.items():
        for instance in (one,) if program.stitched else recipe:
            for node in program.graphs[instance.piece or entry].nodes:
                if node.op == "placeholder" and node.users:
                    yield program.whole(node.meta["value"], instance.prefix), node


def read_weights(program: Program) -> tuple[Weight, ...]:
    """Every weight that the program reads, for kernels without layouts."""
    sources = parameter_sources(program.config)
    made = {}
    for value, node in placeholders(program):
        if value.kind == "weight":
            kind = node.meta["type"]
            shape = tuple(int(s) for s in kind.shape)
            made[value.name] = weight(program, sources, value.name, value.name, (), shape, kind.dtype)
    return tuple(made.values())


def program_weights(program: Program, source: WeightSource) -> dict[str, Tensor]:
    """The weights of `read_weights` by name, as a runtime would load them."""
    return load_weights(read_weights(program), source)[0]


def program_state(program: Program, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeroed state with as many rows as the plain model's state, in the formats that the program stores."""
    types = {value.name: node.meta["type"] for value, node in placeholders(program) if value.kind == "state"}
    return {
        name: torch.zeros(tensor.shape[0], *types[name].shape[1:], dtype=getattr(torch, types[name].dtype))
        for name, tensor in plain.items()
        if name in types
    }


def greedy_sampling(program: Program, rows: int, slots: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Step inputs and state of a program that samples: `rows` greedy rows without edits or penalties, for nobody."""
    values = {value.name: node.meta for value, node in placeholders(program)}
    inputs = {}
    for name in (*ROW_INPUTS, *EDIT_INPUTS):
        if name in values:
            size = rows if name in ROW_INPUTS else 0
            inputs[name] = torch.zeros(size, dtype=getattr(torch, values[name]["type"].dtype))
    if "masks" in values:
        inputs["masks"] = torch.zeros(1, values["masks"]["type"].shape[1], dtype=torch.int32)
    for name in ("top_p", "repetition"):
        if name in inputs:
            inputs[name].fill_(1.0)
    state = {
        name: torch.zeros(slots, *meta["type"].shape[1:], dtype=getattr(torch, meta["type"].dtype))
        for name, meta in values.items()
        if name in (COUNTS, LAST_TOKENS)
    }
    return inputs, state


def _given(program: Program, value: Value, given: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    if value.kind == "constant":
        return program.constants[value.name]
    if value.kind != "weight":
        return given[value.kind][value.name]
    weights = given["weight"]
    if value.name in weights:
        return weights[value.name]
    parts = program.weight_sources.get(value.name, (value.name,))
    return torch.cat([weights[p] for p in parts]) if len(parts) > 1 else weights[parts[0]]
