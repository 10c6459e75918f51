"""Reads a program back from its text (`dsv4c.irtext`), to run it: an artifact's `ir/` is enough to verify it.

What is read computes the same and prints the same. It knows no facts, no history and no provenance, and no pass can
raise it: those are not in the text.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor, fx

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.errors import ArtifactError
from dsv4c.ops import OPS, TensorType
from dsv4c.ops._op import LONG
from dsv4c.program import Instance, Program, Stored, StoredPart, Value

_BLOCK = re.compile(r"^(graph|recipe|constants)(?: (\S+))? \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_PLACEHOLDER = re.compile(r"%(\w+)\.(\S+) : (\w+\[[^\]]*\])(?: stored (\S+))?(.*)")
_CALL = re.compile(r"%(\d+) = ([\w.]+)\((.*?)\)(?: \{(.*?)\})? : ((?:\w+\[[^\]]*\](?:, )?)+|None)(?:  # (\S+))?")
_TYPE = re.compile(r"(\w+)\[([^\]]*)\]")
_REFERENCE = re.compile(r"%([^\s,()\[\]{}]+)")
_USE = re.compile(r"(\S+) = (\S+)\((\S*)\)")


def read_program(text: str, config: ModelConfig, layout: StateLayout | None = None) -> Program:
    """The program of this text. Raises ArtifactError that names the first line that is none."""
    program = Program(config, layout or StateLayout(), {}, {}, {}, {}, {})
    blocks = _BLOCK.findall(text)
    if not any(kind == "graph" for kind, _, _ in blocks):
        raise ArtifactError("the text holds no graph of a program", hint="compile the artifact again")
    for kind, name, body in blocks:
        lines = [line.strip() for line in body.splitlines()]
        if kind == "graph":
            program.graphs[name] = _Graph(program).read(lines)
        elif kind == "recipe":
            program.recipes[name] = tuple(_use(line) for line in lines)
        else:
            program.constants.update((line.partition(" = ")[0], _constant(line)) for line in lines)
    if not program.recipes:
        program.recipes = dict.fromkeys(program.graphs, ())
    for instance in (instance for recipe in program.recipes.values() for instance in recipe):
        if instance.piece not in program.graphs:
            raise _broken(f"{instance.scope} = {instance.piece}({instance.prefix})", instance.piece)
    for value, node in _weights(program):
        program.weight_types[value.name] = node.meta["type"]
    return program


def _weights(program: Program) -> Iterator[tuple[Value, fx.Node]]:
    for recipe in program.recipes.values():
        for instance in recipe:
            for node in program.graphs[instance.piece].nodes:
                if node.op == "placeholder" and node.meta["value"].kind == "weight":
                    yield program.whole(node.meta["value"], instance.prefix), node
    if program.stitched:
        for node in program.nodes():
            if node.op == "placeholder" and node.meta["value"].kind == "weight":
                yield node.meta["value"], node


def _broken(line: str, what: str = "") -> ArtifactError:
    said = f"`{what}` means nothing in `{line[:80]}`" if what else f"`{line[:120]}` is no line of a program"
    return ArtifactError(said, hint="compile the artifact again")


def _use(line: str) -> Instance:
    found = _USE.fullmatch(line)
    if found is None:
        raise _broken(line)
    return Instance(found[2], found[1], found[3])


def _constant(line: str) -> Tensor:
    """`name = [1.0, 0.5]`"""
    try:
        return torch.tensor(ast.literal_eval(line.partition(" = ")[2]), dtype=torch.float32)
    except (SyntaxError, TypeError, ValueError) as error:
        raise _broken(line) from error


def _size(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _types(text: str) -> tuple[TensorType, ...]:
    return tuple(
        TensorType(tuple(_size(s.strip()) for s in sizes.split(", ") if s.strip()), LONG.get(dtype, dtype))
        for dtype, sizes in _TYPE.findall(text)
    )


class _Graph:
    """Reads the lines of one graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}

    def read(self, lines: list[str]) -> fx.Graph:
        for line in lines:
            if line.startswith("return "):
                self._return(line)
            elif found := _CALL.fullmatch(line):
                self._call(line, *found.groups())
            elif found := _PLACEHOLDER.fullmatch(line):
                self._placeholder(*found.groups(""))
            else:
                raise _broken(line)
        if not lines or not lines[-1].startswith("return "):
            raise _broken(lines[-1] if lines else "graph {}")
        return self.graph

    def _placeholder(self, kind: str, name: str, type_: str, stored: str, made_of: str) -> None:
        node = self.graph.placeholder(f"{kind}_{name}".replace(".", "_").replace("+", "_"))
        value = Value(kind, name)  # type: ignore[arg-type]
        node.meta = {"type": _types(type_)[0], "value": value, **({"stored": stored} if stored else {})}
        self.nodes[f"{kind}.{name}"] = node
        if kind == "constant":
            found, shape = _constant(f"{name}{made_of}"), node.meta["type"].shape
            if found.numel() != math.prod(int(size) if str(size).isdigit() else -1 for size in shape):
                raise _broken(f"{kind}.{name} : {type_}{made_of}")
            self.program.constants[name] = found.reshape([int(size) for size in shape])
            return
        whole, _, parts = made_of.partition(" from ")
        of = name
        if whole:
            part, _, of = whole.partition(" of ")
            if part.strip() not in get_args(StoredPart) or not of:
                raise _broken(f"{kind}.{name} : {type_}{made_of}", whole)
            self.program.stored[name] = Stored(of, part.strip())  # type: ignore[arg-type]
        if parts:
            self.program.weight_sources[of] = tuple(parts.split(", "))

    def _call(self, line: str, number: str, label: str, args: str, attrs: str | None, types: str, scope: str) -> None:
        node = self.graph.call_function(_target(label, line), self._tuple(args, line), self._attrs(attrs, line))
        made = _types(types)
        node.meta = {"scope": scope or ""}
        if made:
            node.meta["type"] = made if len(made) > 1 or getattr(node.target, "outputs", 1) > 1 else made[0]
        self.nodes[number] = node

    def _return(self, line: str) -> None:
        named = [part.split("=", 1) for part in line.removeprefix("return ").split(", ")]
        node = self.graph.output(tuple(self._value(f"%{value.removeprefix('%')}", line) for _, value in named))
        node.meta = {"outputs": tuple(name for name, _ in named)}

    def _tuple(self, text: str, line: str) -> tuple[Any, ...]:
        return tuple(self._value(f"[{text}]", line))

    def _attrs(self, text: str | None, line: str) -> dict[str, Any]:
        if not text:
            return {}
        call = _parsed(f"_({_REFERENCE.sub(_quoted, text)})", line)
        assert isinstance(call, ast.Call)
        return {str(k.arg): self._literal(k.value, line) for k in call.keywords}

    def _value(self, text: str, line: str) -> Any:
        return self._literal(_parsed(_REFERENCE.sub(_quoted, text), line), line)

    def _literal(self, tree: ast.expr, line: str) -> Any:
        """Numbers, texts, lists, `torch.float32`, `device(type='meta')`, `inf`, and references."""
        if isinstance(tree, ast.Constant):
            return tree.value
        if isinstance(tree, (ast.List, ast.Tuple)):
            return [self._literal(item, line) for item in tree.elts]
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            return -self._literal(tree.operand, line)
        if isinstance(tree, ast.Name) and tree.id in ("inf", "nan"):
            return getattr(math, tree.id)
        if isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name) and tree.value.id == "torch":
            return getattr(torch, tree.attr)
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            if tree.func.id == "device":
                return torch.device(*(self._literal(k.value, line) for k in tree.keywords))
            if tree.func.id == "ref" and isinstance(tree.args[0], ast.Constant):
                return self._reference(str(tree.args[0].value), line)
        raise _broken(line, ast.unparse(tree))

    def _reference(self, name: str, line: str) -> fx.Node:
        """`3`, `3.1` (an output), `weight.layers.0...`."""
        if name not in self.nodes:
            source, _, index = name.rpartition(".")
            if source not in self.nodes or not index.isdigit():
                raise _broken(line, f"%{name}")
            call = self.nodes[source]
            node = self.nodes[name] = self.graph.call_function(operator.getitem, (call, int(index)))
            types = call.meta.get("type", ())
            node.meta = {"scope": call.meta.get("scope", "")}
            if isinstance(types, tuple) and int(index) < len(types):
                node.meta["type"] = types[int(index)]
        return self.nodes[name]


def _quoted(found: re.Match[str]) -> str:
    return f"ref({found[1]!r})"


def _parsed(text: str, line: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise _broken(line, text[:80]) from error


def _target(label: str, line: str) -> Any:
    kind, _, rest = label.partition(".")
    if kind == "dsv4" and rest in OPS:
        return OPS[rest]
    if kind == "operator" and hasattr(operator, rest):
        return getattr(operator, rest)
    if kind == "aten":
        name, _, overload = rest.partition(".")
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None and overload in packet.overloads():
            return getattr(packet, overload)
    raise _broken(line, label)
