"""Helpers of the passes that let kernels read weights as the checkpoint stores them."""

from __future__ import annotations

from typing import Literal

from torch import fx

from dsv4c.facts import BLOCK
from dsv4c.ops import TensorType
from dsv4c.program import Program, Stored, Value

FP4_GROUP = 32  # input channels of an expert's row that share a scale


def retype(program: Program, weight: fx.Node, dtype: str) -> fx.Node:
    """The weight's placeholder, its values given in a dtype that holds them exactly."""
    kind = TensorType(weight.meta["type"].shape, dtype)
    weight.meta["type"] = program.weight_types[weight.meta["value"].name] = kind
    return weight


def stored_pair(
    program: Program, graph: fx.Graph, weight: fx.Node, stored: Literal["fp8", "fp4"]
) -> tuple[fx.Node, fx.Node]:
    """Placeholders of a weight's data and scales as stored, made once; they replace the weight's own."""
    name = weight.meta["value"].name
    *lead, n, k = (int(s) for s in weight.meta["type"].shape)
    if stored == "fp8":
        data = TensorType((*lead, n, k), "float8_e4m3fn")
        scale = TensorType((*lead, -(-n // BLOCK), -(-k // BLOCK)), "float32")
    else:
        data = TensorType((*lead, n, k // 2), "uint8")
        scale = TensorType((*lead, n, k // FP4_GROUP), "uint8")
    return (
        _part(program, graph, weight, f"{name}.data", data, Stored(name, "data")),
        _part(program, graph, weight, f"{name}.scale", scale, Stored(name, "scale")),
    )


def _part(program: Program, graph: fx.Graph, weight: fx.Node, name: str, kind: TensorType, stored: Stored) -> fx.Node:
    known = [n for n in graph.nodes if n.op == "placeholder" and n.meta["value"].name == name]
    if known:
        found: fx.Node = known[0]
        return found
    with graph.inserting_after(weight):
        node = graph.placeholder("weight_" + name.replace(".", "_").replace("+", "_"))
    node.meta = {"type": kind, "value": Value("weight", name), "stored": weight.meta["stored"]}
    program.stored[name] = stored
    program.weight_types[name] = kind
    return node
