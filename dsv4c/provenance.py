"""Where every call comes from: the model's lines and the passes, kept through every rewrite without a pass's help.

    node.meta["origin"]  sorted places in the model, such as "attention.py:Attention.forward `latent = ...`": file,
                         function, text of the line, and no line number, so that it outlives changes elsewhere.
                         Of what a pass adds to the model: "pass append-sampling"
    node.meta["passes"]  names of the passes that made or changed it, in the order in which they ran

A pass replaces nodes as it likes (`replace_all_uses_with`, `replace_input_with`, `erase_node`, or a graph made anew);
`Watch` sees that. A new node comes from the nodes whose uses it took over, and from those that only they used.
"""

from __future__ import annotations

import linecache
import operator
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx

from dsv4c.program import Program

Origin = tuple[str, ...]
_TORCH = Path(torch.__file__).parent


def calling_place() -> str:
    """The place in the innermost frame below torch that called the module whose hook is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "torch":
        frame = frame.f_back
    assert frame is not None, "a hook runs below some call"
    return _place(frame.f_code.co_filename, frame.f_code.co_qualname, frame.f_lineno)


def traced_place(stack_trace: str | None) -> Origin:
    """The place in the innermost frame of a `stack_trace` that torch.export left on a node; none if it is torch's own.

    It has calls of modules only, and no class beside the function.
    """
    found = re.findall(r'File "(.+)", line (\d+), in (\S+)', stack_trace or "")
    if not found:
        return ()
    file, line, function = found[-1]
    if not Path(file).is_absolute() or Path(file).is_relative_to(_TORCH):  # it writes its own as `torch/fx/...`
        return ()
    return (_place(file, function, int(line)),)


def _place(file: str, function: str, line: int) -> str:
    return f"{Path(file).name}:{function} `{linecache.getline(file, line).strip()}`"


def is_call(node: fx.Node) -> bool:
    """Whether the node has a provenance: anything that is computed, outputs of calls with several included."""
    return node.op == "call_function"


def origin_of(node: fx.Node) -> Origin:
    """Places that this node comes from."""
    return tuple(node.meta.get("origin", ()))


def passes_of(node: fx.Node) -> tuple[str, ...]:
    """Passes that made or changed this node, in order."""
    return tuple(node.meta.get("passes", ()))


@dataclass(frozen=True)
class _Was:
    """A node before the pass: what it was, who used it, and where it came from."""

    form: tuple[Any, ...]
    users: tuple[fx.Node, ...]
    origin: Origin
    passes: tuple[str, ...]


class _Owner:
    """Stands for a graph's module while a pass runs: torch.fx tells it what replaces what."""

    def __init__(self, graph: fx.Graph, replaced: dict[fx.Node, set[tuple[fx.Graph, str]]]) -> None:
        def replace(old: fx.Node, new: str, user: fx.Node) -> None:
            replaced.setdefault(old, set()).add((graph, new))

        self._replace_hooks = [replace]


class Watch:
    """Watches one pass rewrite a program: made before it runs, and asked to `mark` what it made when it has run."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._was = {
            node: _Was(_form(node), tuple(node.users), origin_of(node), passes_of(node)) for node in program.nodes()
        }
        self._replaced: dict[fx.Node, set[tuple[fx.Graph, str]]] = {}
        self._watched = list(program.graphs.values())
        for graph in self._watched:
            graph.owning_module = _Owner(graph, self._replaced)  # type: ignore[assignment]
        self._images: dict[fx.Node, frozenset[fx.Node]] = {}

    def close(self) -> None:
        """Lets go of the graphs."""
        for graph in self._watched:
            graph.owning_module = None

    def mark(self, name: str, ran: Iterable[str]) -> None:
        """Writes `origin` and `passes` of what the pass `name` made or changed. `ran`: all passes, in order."""
        order = {one: i for i, one in enumerate(ran)}
        now = [node for node in self._program.nodes() if is_call(node)]
        made = [node for node in now if node not in self._was]
        for node in now:
            was = self._was.get(node)
            if was is not None:
                added = (name,) if was.form != _form(node) else ()
                node.meta.update(origin=was.origin, passes=(*was.passes, *added))
        sources = self._sources(made)
        found = {}
        for node in made:
            from_nodes = [self._was[old] for old in sources[node]]
            origin = {*origin_of(node), *(place for was in from_nodes for place in was.origin)}
            passes = {name, *passes_of(node), *(one for was in from_nodes for one in was.passes)}
            in_order = sorted(passes, key=lambda one: order.get(one, len(order)))
            found[node] = (tuple(sorted(origin)) or (f"pass {name}",), tuple(in_order))
        for node, (places, names) in found.items():
            node.meta.update(origin=places, passes=names)

    def _sources(self, made: list[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
        """Made node -> the gone nodes that it stands for."""
        self._made = frozenset(made)
        self._there = frozenset(self._program.nodes())
        self._by_name = {(old.graph, old.name): old for old in self._replaced}
        self._by_name.update({(graph, node.name): node for graph in self._watched for node in graph.nodes})
        direct: dict[fx.Node, set[fx.Node]] = {node: set() for node in made}
        for old in self._was:
            if is_call(old) and old not in self._there:
                for new in self._image(old):
                    direct[new].add(old)
        out: dict[fx.Node, set[fx.Node]] = {}
        for node in reversed(made):  # users first: what took over no use itself serves those that did
            users = (u for u in node.users if u in self._made)
            out[node] = direct[node] or set().union(*(out.get(user, set()) for user in users))
        return out

    def _image(self, old: fx.Node) -> frozenset[fx.Node]:
        """The made nodes that took over the uses of a gone node, or, where nothing did, those of its users."""
        if old in self._made:
            return frozenset({old})
        if old in self._there:
            return frozenset()
        if old not in self._images:
            self._images[old] = frozenset()  # a graph has no cycles, but replacements may
            new = [self._by_name[key] for key in self._replaced.get(old, ()) if key in self._by_name]
            users = self._was[old].users if old in self._was else ()
            self._images[old] = frozenset().union(*(self._image(node) for node in (new or users)))
        return self._images[old]


def _form(node: fx.Node) -> tuple[Any, ...]:
    """What makes a node another one, its inputs apart."""
    if node.target is operator.getitem:
        return ("getitem", node.args[1], node.meta.get("type"))
    return (node.op, node.target, dict(node.kwargs), node.meta.get("type"))
