"""Joins the raised pieces into one flat graph for each entry point, following the program's recipe.

    attention.csa(streams, state.window, weight.attn.wq_a.weight)      once for each kind
    ->  L02.attn, L04.attn, ...: the same calls on layers.2.*, layers.4.*, in one graph

The prelude's values are computed once; the streams flow from instance to instance; every state is read and written
by one instance. Only raised pieces can be stitched: a flat graph of aten nodes would be ten times as long.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.errors import PassError
from dsv4c.facts import FAMILIES
from dsv4c.ops import TensorType
from dsv4c.pipeline import Pass
from dsv4c.program import Instance, Program, Value

FLOWING = ("streams", "derived", "state")
"""Kinds of a piece's outputs that the next pieces read; an entry point returns the others of its last piece."""


@dataclass(frozen=True)
class Stitch(Pass):
    name: ClassVar[str] = "stitch"
    needs: ClassVar[frozenset[str]] = frozenset({f"{family}-raised" for family in FAMILIES})
    gives: ClassVar[frozenset[str]] = frozenset({"stitched"})

    def apply(self, program: Program) -> int:
        pieces = program.graphs
        program.graphs = {name: _Joiner(program, pieces).join(name, recipe) for name, recipe in program.recipes.items()}
        return sum(len(recipe) for recipe in program.recipes.values())


class _Joiner:
    def __init__(self, program: Program, pieces: dict[str, fx.Graph]) -> None:
        self.program, self.pieces = program, pieces
        self.graph = fx.Graph()
        self.values: dict[Value, fx.Node] = {}
        self.written: dict[str, fx.Node] = {}
        self.last_placeholder: fx.Node | None = None

    def join(self, entry: str, recipe: tuple[Instance, ...]) -> fx.Graph:
        outputs: dict[str, fx.Node] = {}
        if entry == "mtp":  # goes on from the step's streams
            merge = next(n for n in self.pieces[recipe[1].piece].nodes if self._stands_for(n) == "streams")
            self._placeholder(Value("streams", "streams"), merge.meta["type"])
        for instance in recipe:
            outputs = self._inline(instance)
        results = {name: value for name, value in outputs.items() if name.partition(".")[0] not in FLOWING}
        results.update({f"state.{k}": v for k, v in sorted(self.written.items())})
        if entry in ("step", "mtp"):  # what a drafter reads
            results["streams"] = self.values[Value("streams", "streams")]
        if Value("derived", "tap") in self.values:
            results["tap"] = self.values[Value("derived", "tap")]
        node = self.graph.output(tuple(results.values()))
        node.meta = {"outputs": tuple(results)}
        self._drop_unused()
        return self.graph

    def _drop_unused(self) -> None:
        """What only some entry points read of the prelude, and inputs that nothing reads."""
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users:
                self.graph.erase_node(node)

    def _stands_for(self, node: fx.Node) -> str | None:
        return node.meta["value"].kind if node.op == "placeholder" else None

    def _placeholder(self, value: Value, kind: TensorType) -> fx.Node:
        if value not in self.values:
            first = next(iter(self.graph.nodes), None)
            place = self.last_placeholder.next if self.last_placeholder is not None else first
            with self.graph.inserting_before(place):
                node = self.graph.placeholder(f"{value.kind}_{value.name}".replace(".", "_"))
            node.meta = {"type": kind, "value": value}
            self.values[value] = self.last_placeholder = node
        return self.values[value]

    def _inline(self, instance: Instance) -> dict[str, fx.Node]:
        piece = self.pieces[instance.piece]
        here: dict[fx.Node, fx.Node] = {}
        results: dict[str, fx.Node] = {}
        for node in piece.nodes:
            if node.op == "placeholder":
                if node.users:
                    here[node] = self._resolve(node.meta["value"], node.meta["type"], instance)
            elif node.op == "output":
                named = zip(node.meta["outputs"], node.args[0], strict=True)
                results = {name: here[value] for name, value in named}
            else:
                new = here[node] = self.graph.node_copy(node, lambda n: here[n])
                new.meta = {**copy.copy(node.meta), "scope": instance.scope}
        for name, value in results.items():
            kind, _, rest = name.partition(".")
            if kind == "streams":
                self.values[Value("streams", "streams")] = value
            elif kind == "derived":
                self.values[Value("derived", rest)] = value
            elif kind == "state":
                self.written[instance.prefix + rest] = value
        return results

    def _resolve(self, value: Value, kind: TensorType, instance: Instance) -> fx.Node:
        if value.kind in ("streams", "derived"):
            if value not in self.values:
                raise PassError(f"`{instance.scope}` reads `{value.name}` before anything computes it")
            return self.values[value]
        return self._placeholder(self.program.whole(value, instance.prefix), kind)
