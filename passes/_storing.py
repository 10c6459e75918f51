"""What passes share that let kernels read weights as the checkpoint stores them."""

from __future__ import annotations

from typing import Literal

from torch import fx

from dsv4c.errors import PassError
from dsv4c.facts import BLOCK
from dsv4c.nvfp4 import NVFP4_GROUP
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


def stored_nvfp4(program: Program, graph: fx.Graph, weight: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Placeholders of NVFP4 experts [E, N, K]: data, the scales of 16 channels, and a factor for each expert."""
    name = weight.meta["value"].name
    count, n, k = (int(s) for s in weight.meta["type"].shape)
    if k % NVFP4_GROUP:
        raise PassError(f"`{name}` has {k} input channels, no multiple of the {NVFP4_GROUP} that share a scale")
    data, scale = TensorType((count, n, k // 2), "uint8"), TensorType((count, n, k // NVFP4_GROUP), "float8_e4m3fn")
    factor = TensorType((count,), "float32")
    return (
        _part(program, graph, weight, f"{name}.data", data, Stored(name, "data")),
        _part(program, graph, weight, f"{name}.weight_scale", scale, Stored(name, "weight_scale")),
        _part(program, graph, weight, f"{name}.weight_scale_2", factor, Stored(name, "weight_scale_2")),
    )


def input_scales(program: Program, graph: fx.Graph, *weights: fx.Node) -> fx.Node:
    """The placeholder of what NVFP4 experts' inputs are divided by: of one weight, for each expert [E]; of several,
    which multiply one input, the largest of all [1].
    """
    names = [weight.meta["value"].name for weight in weights]
    whole = names[0]
    if len(names) > 1:
        prefix = whole.rpartition(".")[0]
        whole = f"{prefix}." + "+".join(name.rpartition(".")[2] for name in names)
        program.weight_sources[whole] = tuple(names)
    size = 1 if len(names) > 1 else int(weights[0].meta["type"].shape[0])
    kind = TensorType((size,), "float32")
    return _part(program, graph, weights[0], f"{whole}.input_scale", kind, Stored(whole, "input_scale"))


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
