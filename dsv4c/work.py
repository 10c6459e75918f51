"""The least work a program can do at given sizes: kernels, bytes, operations, and seconds by a machine's roofline.

What an op must read and write counts once, whatever schedule will run it: weights and activations whole, of tables
and pools the rows that are touched. So passes can be compared before anything is scheduled; what the chosen schedules
should take is in the plan. Views are free, every other call is one kernel. Before the stitch a program is the sum of
its pieces, each as often as the model has it; an aten call is what plain PyTorch would run.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from dsv4c.config import ModelConfig, StateLayout
from dsv4c.errors import CompileError, ConfigError
from dsv4c.facts import is_noise
from dsv4c.model.state import columns, group_ratios
from dsv4c.ops import DTYPE_BYTES, VIEWS, Op, TensorType
from dsv4c.program import Program, types_of
from dsv4c.schedules._roofline import MACHINES

__all__ = ["Sizes", "Work", "node_work", "work_of"]


@dataclass(frozen=True)
class Sizes:
    """One step: `tokens` tokens of `requests` requests, of which each has `context` tokens when it is over.

    `rows`: tokens whose logits are wanted (None: one a request).
    """

    tokens: int = 64
    requests: int = 64
    context: int = 8192
    rows: int | None = None

    @classmethod
    def decode(cls, requests: int = 64, context: int = 8192) -> Sizes:
        """One new token for each of `requests` requests."""
        return cls(requests, requests, context)

    @classmethod
    def prefill(cls, tokens: int = 2048, requests: int = 1, context: int | None = None) -> Sizes:
        """`tokens` tokens of the prompts of `requests` requests, in all; by default these are their whole context."""
        return cls(tokens, requests, -(-tokens // requests) if context is None else context)

    @classmethod
    def usual(cls, config: ModelConfig) -> Sizes:
        """64 requests that decode with 8,192 tokens each, or as many as the model allows."""
        return cls.decode(context=min(8192, config.max_position_embeddings))

    def symbols(self, config: ModelConfig, layout: StateLayout) -> dict[str, int]:
        """The value of every symbol of a program. Raises ConfigError for sizes that no step can have."""
        if not (1 <= self.requests <= self.tokens <= self.requests * self.context):
            raise ConfigError(f"no step has {self.tokens} tokens of {self.requests} requests with {self.context} each")
        if self.context > config.max_position_embeddings:
            raise ConfigError(
                f"a context of {self.context:,} tokens is more than the model's {config.max_position_embeddings:,}"
            )
        rows = self.requests if self.rows is None else self.rows
        out = {"T": self.tokens, "R": self.requests, "S": rows, "Z": self.requests + 1, "context": self.context}
        out |= {"M": 0, "G": 0}
        for ratio in config.ratios:
            out[f"E_{ratio}"] = -(-self.tokens // ratio)
        for group, ratio in group_ratios(config).items():
            out[f"P_{group}"] = columns(config, layout, group, self.context)
            out[f"N_{group}"] = (1 + self.requests * out[f"P_{group}"]) * layout.entries_per_page(ratio)
        return out


@dataclass(frozen=True)
class Work:
    """Calls that would be launched, bytes read and written, operations (multiply-adds count two), and microseconds."""

    kernels: int = 0
    """Calls that are no views."""
    bytes_moved: float = 0.0
    """Every tensor once; of tables and pools the rows that are touched."""
    flops: float = 0.0
    """Operations of matrix products and what ops count besides; a multiply-add counts two."""
    microseconds: float = 0.0
    """By roofline: the slower of bytes and operations of every kernel, and its launch."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.kernels + other.kernels, self.bytes_moved + other.bytes_moved, self.flops + other.flops,
            self.microseconds + other.microseconds,
        )  # fmt: skip

    def times(self, count: int) -> Work:
        """As much, `count` times."""
        return Work(
            self.kernels * count, self.bytes_moved * count, self.flops * count, self.microseconds * count
        )  # fmt: skip


def work_of(program: Program, sizes: Sizes | None = None, machine: str = "cpu", entry: str = "step") -> Work:
    """The work of one run of `program` from `entry` (`step`, `mtp`) on.

    `machine`: `cpu` (one core), `sm_90a` (one H200) or another target. `sizes`: by default `Sizes.usual`. Raises
    ConfigError for an unknown machine or entry point, or impossible sizes.
    """
    if entry not in program.recipes:
        raise ConfigError(f"no entry point `{entry}`", hint=f"there are {', '.join(program.recipes)}")
    symbols = (sizes or Sizes.usual(program.config)).symbols(program.config, program.layout)
    if "stitched" in program.facts:
        return _graph_work(program.graphs[entry], symbols, machine)
    pieces = [instance.piece for instance in program.recipes[entry]]
    total = Work()
    for piece in dict.fromkeys(p for p in pieces if p in program.graphs):
        total += _graph_work(program.graphs[piece], symbols, machine).times(pieces.count(piece))
    return total


def _graph_work(graph: fx.Graph, symbols: Mapping[str, int], machine: str) -> Work:
    return sum((node_work(node, symbols, machine) for node in graph.nodes), Work())


def node_work(node: fx.Node, symbols: Mapping[str, int], machine: str = "cpu") -> Work:
    """The work of one `node` of a program on `machine` (`cpu`, `sm_90a`).

    Nothing for placeholders, views and what computes nothing. `symbols` as `Sizes.symbols` gives them. Raises
    ConfigError for an unknown machine.
    """
    if machine not in MACHINES:
        raise ConfigError(f"unknown machine `{machine}`", hint=f"machines are {', '.join(MACHINES)}")
    if node.op != "call_function" or "type" not in node.meta or node.target is operator.getitem:
        return Work()
    if isinstance(node.target, Op):
        if node.target.name in VIEWS:
            return Work()
        moved, flops, unit = _op_work(node, node.target, symbols)
        launch = "cpp" if machine == "cpu" else "gpu"
    else:
        if is_noise(node) or str(node.target).split(".")[1] in _ATEN_VIEWS:
            return Work()
        moved, flops, unit = _aten_work(node, symbols)
        launch = "aten"
    rates = MACHINES[machine]
    rate = rates.flops_per_s[unit if unit in rates.flops_per_s else "fp32"]
    seconds = max(moved / rates.bytes_per_s, flops / rate) + rates.launch_s[launch]
    return Work(1, moved, flops, seconds * 1e6)


def sizes_of(kind: TensorType, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with every symbol at its value."""
    return tuple(size if isinstance(size, int) else _value(size, symbols) for size in kind.shape)


def _value(text: str, symbols: Mapping[str, int]) -> int:
    return symbols[text] if text in symbols else _evaluate(_parsed(text), symbols)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


_BINARY: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip
_CALLS: dict[str, Callable[..., int]] = {"Max": max, "Min": min}


def _evaluate(tree: ast.expr, symbols: Mapping[str, int]) -> int:
    """An expression of sizes, as torch.export writes them."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name) and tree.id in symbols:
        return symbols[tree.id]
    if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
        return _BINARY[type(tree.op)](_evaluate(tree.left, symbols), _evaluate(tree.right, symbols))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _CALLS:
        return _CALLS[tree.func.id](*(_evaluate(arg, symbols) for arg in tree.args))
    raise CompileError(f"cannot tell the size `{ast.unparse(tree)}`", hint=f"symbols are {', '.join(symbols)}")


def _bytes(kind: TensorType, symbols: Mapping[str, int]) -> int:
    return math.prod(sizes_of(kind, symbols)) * DTYPE_BYTES[kind.dtype]


def _row_bytes(kind: TensorType, symbols: Mapping[str, int]) -> int:
    return math.prod(sizes_of(kind, symbols)[1:]) * DTYPE_BYTES[kind.dtype]


def _op_work(node: fx.Node, op: Op, symbols: Mapping[str, int]) -> tuple[float, float, str]:
    """(bytes, operations, unit of arithmetic) of one op of the dialect."""
    given = {
        name: types_of(arg)[0] for name, arg in zip(op.parameters, node.args, strict=False) if isinstance(arg, fx.Node)
    }
    moved = sum(_touched(op, name, kind, given, dict(node.kwargs), symbols) for name, kind in given.items())
    kinds = types_of(node)
    moved += sum(_bytes(kinds[i], symbols) for i in range(op.outputs) if i not in op.in_place)
    flops = op.flops([given[p] for p in op.parameters if p in given], node.kwargs, symbols) if op.flops else 0
    return moved, float(flops), _unit(op, given)


def _touched(
    op: Op,
    name: str,
    kind: TensorType,
    given: Mapping[str, TensorType],
    attrs: Mapping[str, Any],
    symbols: Mapping[str, int],
) -> float:
    """Bytes of a parameter that are read or, in place, written."""
    whole, row = _bytes(kind, symbols), _row_bytes(kind, symbols)
    if name.startswith(("pool", "entry_pool")) and name not in op.in_place.values():
        return min(whole, _entries_read(op, name, given, attrs, symbols) * row)
    if name.startswith(("ring", "state_Z")):
        channels = row // int(kind.shape[1])
        read = symbols[f"E_{attrs['ratio']}"] * int(kind.shape[1]) * channels
        return min(2 * whole, read + symbols["T"] * channels)
    if op.name.startswith("experts") and len(kind.shape) == 3 and isinstance(kind.shape[0], int):
        count, chosen = kind.shape[0], math.prod(sizes_of(list(given.values())[1], symbols))
        return whole * (1 - (1 - 1 / count) ** chosen)  # experts that somebody chose, if choices are even
    rows = [
        sizes_of(given[key], symbols)
        for key, index in op.indices.items()
        if isinstance(key, str) and key in given and index.of == name and index.dims == (0,)
    ]
    return min(whole, math.prod(rows[0]) * row) if rows else whole


def _entries_read(
    op: Op, name: str, given: Mapping[str, TensorType], attrs: Mapping[str, Any], symbols: Mapping[str, int]
) -> int:
    """Entries of a pool that the tokens of a step see: of one request's tokens together, at most what it has."""
    tokens, requests, context = symbols["T"], symbols["R"], symbols["context"]
    each = -(-tokens // requests)
    if not name.startswith("entry_pool") and "window" in attrs:
        return requests * min(context, int(attrs["window"]) + each - 1)
    if "picks_TK" in given:
        return requests * min(each * int(given["picks_TK"].shape[1]), context // 4)
    return requests * (context // int(attrs["ratio"]))


_FP8 = frozenset({"linear_fp8", "grouped_linear_fp8", "index_topk_packed", "index_scores"})


def _unit(op: Op, given: Mapping[str, TensorType]) -> str:
    """The matrix units where operands are narrow (FP4 is widened to bfloat16), else the vector units."""
    if op.name in _FP8:
        return "fp8"
    narrow = op.flops is not None and any(t.dtype in ("bfloat16", "uint8") for t in given.values())
    return "bf16" if narrow else "fp32"


_ATEN_VIEWS = frozenset({
    "slice", "unsqueeze", "squeeze", "unflatten", "flatten", "select", "split_with_sizes", "split", "chunk", "unbind",
    "expand", "view", "reshape", "transpose", "permute", "t", "alias", "detach", "sym_size",
})  # fmt: skip
_ATEN_GATHERS = frozenset({"index", "index_select", "embedding", "gather"})


def _aten_work(node: fx.Node, symbols: Mapping[str, int]) -> tuple[float, float, str]:
    """(bytes, operations, unit) of one call of plain PyTorch."""
    name = str(node.target).split(".")[1]
    inputs = [types_of(arg)[0] for arg in node.all_input_nodes if "type" in arg.meta]
    out = sum(_bytes(kind, symbols) for kind in types_of(node))
    moved = float(out + sum(_bytes(kind, symbols) for kind in inputs))
    if name in _ATEN_GATHERS:
        source = _bytes(inputs[0 if name != "embedding" else _largest(inputs, symbols)], symbols)
        moved += min(out, source) - source
    return moved, _aten_flops(name, node, symbols), "bf16" if inputs and inputs[0].dtype == "bfloat16" else "fp32"


def _largest(kinds: Sequence[TensorType], symbols: Mapping[str, int]) -> int:
    return max(range(len(kinds)), key=lambda i: _bytes(kinds[i], symbols))


def _aten_flops(name: str, node: fx.Node, symbols: Mapping[str, int]) -> float:
    def shape(arg: Any) -> tuple[int, ...]:
        return sizes_of(types_of(arg)[0], symbols)

    if name == "linear":
        return 2.0 * math.prod(shape(node.args[0])) * shape(node.args[1])[0]
    if name in ("mm", "bmm", "matmul"):
        return 2.0 * math.prod(shape(node.args[0])) * shape(node.args[1])[-1]
    if name == "einsum":
        equation, tensors = node.args[0], node.args[1]
        assert isinstance(equation, str) and isinstance(tensors, (list, tuple))
        terms = equation.split("->")[0].replace(" ", "").split(",")
        extent = {letter: size for term, t in zip(terms, tensors, strict=True) for letter, size in zip(term, shape(t))}
        return 2.0 * math.prod(extent.values())
    return 0.0
