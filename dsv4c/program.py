"""Program: graphs of typed values, and everything the compiler knows about them. Every arrow of the compiler is one.

Before stitching a program holds one graph for each distinct piece of the model (`prelude`, `attention.csa`, ...)
and the recipe by which they make the whole; after it, one graph for each entry point (`step`, `mtp`).

A node carries in `meta`: `type` (a TensorType, or a tuple of them), `scope` (where in the model), `line` (the model's
source line) and, on aten nodes of a leaf module, `leaf`. A placeholder carries `value`: what it stands for.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, fx

from dsv4c.artifact import PassRecord
from dsv4c.config import ModelConfig, StateLayout
from dsv4c.irdiff import unified
from dsv4c.irtext import label_of, program_text
from dsv4c.ops import Op, TensorType

if TYPE_CHECKING:
    from dsv4c.inputs import Inputs

StoredPart = Literal["data", "scale", "weight_scale", "weight_scale_2", "input_scale"]
"""`scale` is that of FP8 and MXFP4, the last three are NVFP4's, by their names in a checkpoint."""
ValueKind = Literal["input", "derived", "streams", "state", "weight", "constant"]


@dataclass(frozen=True)
class Value:
    """What a placeholder stands for: a step input, a value of the prelude, the streams, state or a weight."""

    kind: ValueKind
    name: str


@dataclass(frozen=True)
class Leaf:
    """One leaf module of the plain model: where it is, what it is, and the types of its op's parameters."""

    path: str
    class_name: str
    attrs: Mapping[str, Any]
    types: tuple[TensorType, ...]


@dataclass(frozen=True)
class Instance:
    """One use of a piece: its scope in the whole (`L07.attn`) and the prefix of its weights and state."""

    piece: str
    scope: str
    prefix: str


@dataclass(frozen=True)
class Symbol:
    """A size unknown until a step runs, between `low` and `high`."""

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class Stored:
    """A program weight that is one part of another, or of several, as the checkpoint stores it: its data or scales."""

    of: str
    part: StoredPart


@dataclass
class Program:
    """Graphs, the recipe that joins them, symbols, the facts that hold, and the passes that ran.

    `config` and `layout` are the model's and its state's.
    """

    config: ModelConfig
    layout: StateLayout
    graphs: dict[str, fx.Graph]
    """By piece (`attention.csa`, `ffn.bias`, ...); when stitched, by entry point (`step`, `mtp`)."""
    recipes: dict[str, tuple[Instance, ...]]
    """Entry point -> the pieces that make it, in order, each with its place in the model."""
    symbols: dict[str, Symbol]
    """Sizes unknown until a step runs: `T` tokens, `R` requests, `S` rows of logits, ..."""
    constants: dict[str, Tensor]
    """Values that are no weights, by name."""
    weight_types: dict[str, TensorType]
    """Shape and dtype of every weight, by name."""
    facts: frozenset[str] = frozenset()
    """Names of checked properties that hold, see dsv4c/facts.py."""
    history: tuple[PassRecord, ...] = ()
    """A record of every pass that ran."""
    weight_sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Weights made by passes: name -> the weights it concatenates along dim 0."""
    stored: dict[str, Stored] = field(default_factory=dict)
    """Weights that kernels read as they are stored: name -> whose data or scales they are."""

    def clone(self) -> Program:
        """An independent copy: passes rewrite in place."""
        graphs = {}
        for name, graph in self.graphs.items():
            new = fx.Graph()
            val_map: dict[fx.Node, fx.Node] = {}
            out = new.graph_copy(graph, val_map)
            source = graph.output_node()
            node = new.output(out)
            node.meta = copy.copy(source.meta)
            for old, copied in val_map.items():
                copied.meta = copy.copy(old.meta)
            graphs[name] = new
        return Program(
            self.config, self.layout, graphs, dict(self.recipes), dict(self.symbols), dict(self.constants),
            dict(self.weight_types), self.facts, self.history, dict(self.weight_sources), dict(self.stored),
        )  # fmt: skip

    @property
    def stitched(self) -> bool:
        """Whether there is one graph for each entry point, and no longer one for each piece."""
        return set(self.graphs) == set(self.recipes)

    def whole(self, value: Value, prefix: str) -> Value:
        """What a value of a piece is in the whole, where the piece's weights and state begin with `prefix`."""
        if value.kind not in ("weight", "state"):
            return value
        name = prefix + value.name
        return Value("constant" if value.kind == "weight" and name in self.constants else value.kind, name)

    def nodes(self) -> Iterator[fx.Node]:
        """All nodes of all graphs."""
        for graph in self.graphs.values():
            yield from graph.nodes

    def num_nodes(self) -> int:
        """Calls (not placeholders, outputs or `getitem`) in all graphs."""
        return sum(n.op == "call_function" and n.target is not operator.getitem for n in self.nodes())

    def find(self, name: str) -> list[fx.Node]:
        """Every call of an op by its printed name, e.g. `dsv4.hc_pre` or `aten.linear.default`."""
        return [n for n in self.nodes() if n.op == "call_function" and target_name(n.target) == name]

    def run(self, inputs: Inputs | None = None, seed: int = 0) -> dict[str, Tensor]:
        """What the program computes, on the references of its ops: logits, streams, state, by name.

        `inputs`: token ids and weights; by default seeded random ones. A program in pieces runs as its recipes say.
        """
        from dsv4c.numerics import results_of_program  # it knows every stage, this file none

        return results_of_program(self, inputs, seed)

    def dump(self) -> str:
        """The whole program as stable text."""
        return program_text(self)

    def diff(self, other: Program) -> str:
        """Unified diff of the two programs' text, from self to other; a value's new number is no change."""
        return unified(self.dump(), other.dump())


def target_name(target: Any) -> str:
    """How a call's target is printed."""
    return label_of(target)


def results_of(graph: fx.Graph) -> dict[str, fx.Node]:
    """The values a graph returns, by name."""
    output = graph.output_node()
    values: Any = output.args[0]
    return dict(zip(output.meta["outputs"], values, strict=True))


def types_of(node: fx.Node) -> tuple[TensorType, ...]:
    """The types of a node's outputs."""
    kind = node.meta["type"]
    return (kind,) if isinstance(kind, TensorType) else tuple(kind)


def op_name(node: fx.Node) -> str:
    """The name of the op that this node calls."""
    assert isinstance(node.target, Op)
    return node.target.name


def is_op(node: Any, name: str | None = None) -> bool:
    """Whether `node` calls an op of the dialect (of this name)."""
    return isinstance(node, fx.Node) and isinstance(node.target, Op) and (name is None or node.target.name == name)
