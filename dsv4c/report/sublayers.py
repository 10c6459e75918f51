"""Sublayers as small graphs: boxes and arrows of one piece of the model, at one step of the pipeline.

Before its region is raised, a leaf module is one box that says how many aten calls it holds; its op then takes its
place. After stitching a piece is shown by its first instance (`attention.csa` by `L02.attn`). Weights, step inputs
and what the prelude derives are named in a box; streams and state are boxes of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from dsv4c.ops import LEAVES, VIEWS, Op
from dsv4c.program import Program, target_name, types_of
from dsv4c.provenance import origin_of, passes_of
from dsv4c.report.families import family_of
from dsv4c.report.figures import NodeWork
from dsv4c.report.wording import bytes_text, flops_text, origin_text, time_text


@dataclass(frozen=True)
class Box:
    """One op, region or end of a sublayer. `key` is the same in the next step if it is the same thing."""

    key: str
    label: str
    note: str
    """The second line: the type of the result, or how many calls a region holds."""
    family: str
    kind: Literal["op", "view", "region", "end"]
    facts: tuple[tuple[str, str], ...] = ()
    """What there is to say of it: (`weights`, `attn.wq_a.weight`), ..."""


@dataclass(frozen=True)
class Sublayer:
    """Boxes in the order of the program, and arrows between keys."""

    boxes: tuple[Box, ...]
    arrows: tuple[tuple[str, str], ...]

    def changed(self, before: Sublayer | None) -> frozenset[str]:
        """Keys of boxes that the sublayer did not have before, or that say something else now."""
        if before is None:
            return frozenset()
        known = {box.key: box for box in before.boxes}
        said = {(box.label, box.note) for box in before.boxes}
        out = set()
        for box in self.boxes:
            old = known.get(box.key)
            if old is None:
                if (box.label, box.note) not in said:
                    out.add(box.key)
            elif (old.kind, old.label, old.note) != (box.kind, box.label, box.note):
                out.add(box.key)
        return frozenset(out)


def sublayers(program: Program, work: NodeWork) -> dict[str, Sublayer]:
    """Every distinct sublayer by its piece's name; of a stitched program also scopes that no piece made."""
    if program.graphs.keys() != program.recipes.keys():
        return {name: _Sketch(list(graph.nodes), name, work).sublayer() for name, graph in program.graphs.items()}
    pieces: dict[str, str] = {}
    for instance in (i for recipe in program.recipes.values() for i in recipe):
        pieces.setdefault(instance.piece, instance.scope)
    known = {i.scope for recipe in program.recipes.values() for i in recipe}
    out: dict[str, Sublayer] = {}
    for graph in program.graphs.values():
        scopes: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                scopes.setdefault(node.meta.get("scope", ""), []).append(node)
        for piece, scope in pieces.items():
            if scope in scopes and piece not in out:
                out[piece] = _Sketch(scopes[scope], scope, work).sublayer()
        for scope, nodes in scopes.items():
            if scope and scope not in known and scope not in out:
                out[scope] = _Sketch(nodes, scope, work).sublayer()
    return out


@dataclass
class _Group:
    """The calls of one box."""

    label: str
    kind: Literal["op", "view", "region"]
    family: str
    calls: list[fx.Node] = field(default_factory=list)
    given: dict[str, list[str]] = field(default_factory=dict)


class _Sketch:
    def __init__(self, nodes: list[fx.Node], scope: str, work: NodeWork) -> None:
        self.work = work
        self.scope = scope
        self.calls = [n for n in nodes if _is_call(n)]
        self.inside = set(self.calls)
        self.key: dict[fx.Node, str] = {}
        self.groups: dict[str, _Group] = {}
        self.ends: dict[str, Box] = {}
        self.arrows: dict[tuple[str, str], None] = {}

    def sublayer(self) -> Sublayer:
        for node in self.calls:
            self._group(node)
        for node in self.calls:
            for source in _sources(node):
                self._arrow_in(source, node)
        for node in self.calls:
            for user in _users(node):
                self._arrow_out(node, user)
        sources = [box for key, box in self.ends.items() if any(a == key for a, _ in self.arrows)]
        sinks = [box for key, box in self.ends.items() if box not in sources]
        boxes = [_box(key, group, self.work) for key, group in self.groups.items()]
        return Sublayer((*sources, *boxes, *sinks), tuple(self.arrows))

    def _group(self, node: fx.Node) -> None:
        leaf, path = node.meta.get("leaf"), node.meta.get("path", "")
        if isinstance(node.target, Op):
            key, label = path or node.name, node.target.name
            kind = "view" if label in VIEWS else "op"
            family = family_of(node.target)
            key = node.name if key in self.groups else key
        elif leaf is not None:
            op = LEAVES[leaf.class_name]
            key, label, kind, family = leaf.path, op, "region", family_of(op)
        else:
            key, label, kind, family = node.name, target_name(node.target).removesuffix(".default"), "op", "aten"
        self.key[node] = key
        group = self.groups.setdefault(key, _Group(label, kind, family))  # type: ignore[arg-type]
        group.calls.append(node)

    def _arrow_in(self, source: fx.Node, node: fx.Node) -> None:
        key = self.key[node]
        if source in self.inside:
            self._arrow(self.key[source], key)
            return
        if source.op == "placeholder":
            value = source.meta["value"]
            if value.kind not in ("streams", "state"):
                name = "weights" if value.kind in ("weight", "constant") else "reads"
                _add(self.groups[key].given, name, value.name)
                return
            name = f"{value.kind} {value.name}" if value.kind == "state" else "streams"
            self._end(f"in {value.name}", _local(name), str(source.meta["type"]), key)
            return
        scope = source.meta.get("scope", "")
        if scope == "prelude":
            _add(self.groups[key].given, "reads", f"{target_name(source.target).removeprefix('dsv4.')} of prelude")
            return
        self._end(f"in {source.name}", f"from {scope or '?'}", _name(source), key)

    def _end(self, end: str, label: str, note: str, key: str) -> None:
        self.ends.setdefault(end, Box(end, label, note, "ends", "end"))
        self._arrow(end, key)

    def _arrow_out(self, node: fx.Node, user: fx.Node) -> None:
        if user in self.inside:
            return
        if user.op == "output":
            names = [k for k, v in zip(user.meta["outputs"], user.args[0], strict=True) if _base(v) is node]  # type: ignore[arg-type]
            for name in names:
                if not name.startswith("state.") and not name.startswith("derived."):
                    self._sink(node, f"out {name}", name, str(types_of(node)[0]))
            return
        if not _is_call(user):
            return
        scope = user.meta.get("scope", "")
        if self.scope != "prelude":
            self._sink(node, f"out {scope}", f"to {scope}", _name(user))

    def _sink(self, node: fx.Node, end: str, label: str, note: str) -> None:
        self.ends.setdefault(end, Box(end, label, note, "ends", "end"))
        self._arrow(self.key[node], end)

    def _arrow(self, source: str, target: str) -> None:
        if source != target:
            self.arrows[source, target] = None


def _box(key: str, group: _Group, work: NodeWork) -> Box:
    last = group.calls[-1]
    types = ", ".join(map(str, types_of(last)))
    facts = [("module", key)] if key != last.name else []
    if group.kind == "region":
        note = f"{len(group.calls)} aten call{'s' * (len(group.calls) != 1)}"
        facts.append(("calls", _counted(target_name(n.target).removeprefix("aten.") for n in group.calls)))
    else:
        note = _short(last)
        facts.append(("attributes", ", ".join(f"{k}={v}" for k, v in sorted(last.kwargs.items()))))
    facts.append(("gives", types))
    facts += [(name, ", ".join(values)) for name, values in sorted(group.given.items(), reverse=True)]
    done = work.of(group.calls)
    if done.kernels:
        figures = f"{bytes_text(done.bytes_moved)}, {flops_text(done.flops)}, {time_text(done.microseconds)}"
        facts.append((f"work: {work.step}", figures))
    facts.append(("from", origin_text(place for call in group.calls for place in origin_of(call))))
    facts.append(("passes", ", ".join(passes_of(last))))
    return Box(key, group.label, note, group.family, group.kind, tuple(f for f in facts if f[1]))


def _short(node: fx.Node) -> str:
    """The type of the first result, and how many more there are."""
    first, *more = types_of(node)
    return f"{first}{f' +{len(more)}' if more else ''}"


def _counted(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(name if count == 1 else f"{name} x{count}" for name, count in counts.items())


def _add(given: dict[str, list[str]], name: str, value: str) -> None:
    held = given.setdefault(name, [])
    if value not in held:
        held.append(value)


def _is_call(node: fx.Node) -> bool:
    """A call that makes tensors: no `getitem`, no arithmetic of sizes, no assertion."""
    return node.op == "call_function" and node.target is not operator.getitem and "type" in node.meta


def _base(value: Any) -> Any:
    """The call behind a `getitem`."""
    while isinstance(value, fx.Node) and value.target is operator.getitem:
        value = value.args[0]
    return value


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    for source in node.all_input_nodes:
        base = _base(source)
        if base.op == "placeholder" or _is_call(base):
            yield base


def _users(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if user.target is operator.getitem:
            yield from _users(user)
        else:
            yield user


def _name(node: fx.Node) -> str:
    return target_name(node.target).removeprefix("dsv4.")


def _local(name: str) -> str:
    """A value's name without its layer."""
    kind, _, rest = name.partition(" ")
    parts = rest.split(".")
    return f"{kind} {'.'.join(parts[2:])}" if parts[0] in ("layers", "mtp") and len(parts) > 2 else name


def pieces_of(program: Program) -> Mapping[str, str]:
    """Scope -> the piece it is an instance of."""
    return {i.scope: i.piece for recipe in program.recipes.values() for i in recipe}
