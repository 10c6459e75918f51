"""Program -> plan: a schedule for every call, planned buffers, segments, and the weights and state they read.

Buffers live in one arena. Each has a fixed offset, chosen for the largest value of every symbol, so that buffers
that are in use together never overlap; a step uses a prefix of each. Views (`columns`, `split_heads`) become strides.
State that an op updates in place keeps its name: its old value must have no later reader, which is checked.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import fx

from dsv4c import artifact
from dsv4c.arena import Need, place
from dsv4c.checkpoint.names import parameter_sources
from dsv4c.config import ModelConfig
from dsv4c.errors import CompileError
from dsv4c.irfiles import Source
from dsv4c.lanes import Task, settle, tasks_of
from dsv4c.ops import DTYPE_BYTES, VIEWS, Op, TensorType
from dsv4c.overlap import assign
from dsv4c.program import Program, results_of, types_of
from dsv4c.provenance import origin_of, passes_of
from dsv4c.schedules._schedule import Choice, OpNode, Schedule, Value
from dsv4c.schedules._tuned import Tuned
from dsv4c.schedules.select import SCHEDULES, select
from dsv4c.segments import index_ranges, padded_symbols, segments_of
from dsv4c.weights import constant, weight

ALIGNMENT = 64  # one cache line; also the widest vector load of a CPU
DEVICE_ALIGNMENT = 256  # of a GPU's own allocations; tensor maps need 16
LANE_TOKENS = 64  # measured on an H200: 16 tokens gain 80 us of 1,680, 64 gain 20 of 3,600, 128 and 256 lose as much
ROWS = ("T", "S", "D", "T_streams", "D_streams")  # what a program may call the rows of an op; schedules say T
VECTOR = 16  # bytes that a GPU thread loads at once: every argument starts at a multiple


@dataclass(frozen=True)
class Called:
    """A call as it was chosen, what it depends on, and the symbol that its schedule knows as `T`."""

    choice: Choice
    task: Task
    rows: str


@dataclass
class Plan:
    """What `emit` builds and the manifest states: programs by name, and what all of them need."""

    programs: dict[str, artifact.Program]
    choices: dict[str, Choice]
    weights: dict[str, artifact.Weight]
    states: set[str]
    sources: dict[str, tuple[Source, ...]] = field(default_factory=dict)
    """Of each program: where every call comes from, in order."""
    called: dict[str, tuple[Called, ...]] = field(default_factory=dict)
    """Of each program: its calls as they were chosen, in order."""

    @property
    def arena_bytes(self) -> int:
        """Of the one arena that all programs use in turn."""
        return max(program.arena_bytes for program in self.programs.values())

    @classmethod
    def joined(cls, plans: Iterable[Plan]) -> Plan:
        """One plan of several over the same weights. Raises CompileError where they lay one out differently."""
        out = cls({}, {}, {}, set())
        for one in plans:
            for name, found in one.weights.items():
                if out.weights.setdefault(name, found) != found:
                    raise CompileError(
                        f"programs want weight `{name}` in different layouts: {out.weights[name].transforms} and "
                        f"{found.transforms}",
                        hint="a schedule's layout may depend on nothing but its op's static shapes",
                    )
            out.programs.update(one.programs)
            for choice in one.choices.values():
                record(out.choices, choice)
            out.states |= one.states
            out.sources.update(one.sources)
            out.called.update(one.called)
        return out


def record(choices: dict[str, Choice], choice: Choice) -> None:
    """Adds a choice. Raises CompileError where its kernel serves ops of other attributes."""
    known = choices.setdefault(choice.kernel, choice)
    if dict(known.node.attrs) != dict(choice.node.attrs):
        raise CompileError(
            f"kernel `{choice.kernel}` would serve {dict(known.node.attrs)} and {dict(choice.node.attrs)}",
            hint="the manifest says a kernel's attributes once; its key must name them",
        )


@dataclass
class _Buffer:
    name: str
    type: TensorType
    strides: tuple[int, ...]
    uses: set[int]
    """Calls that touch it, or a view of it."""
    of: str | None = None
    element_offset: int = 0
    offset: int | None = None


@dataclass
class _Planner:
    source: Program
    graph: fx.Graph
    target: str
    symbols: Mapping[str, int]
    sources: Mapping[str, tuple[str, ...]]
    tuned: Tuned | None = None
    names: dict[fx.Node, str] = field(default_factory=dict)
    views: Counter[str] = field(default_factory=Counter)
    buffers: dict[str, _Buffer] = field(default_factory=dict)
    calls: list[artifact.Call] = field(default_factory=list)
    ranges: list[tuple[artifact.IndexRange, ...]] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    weights: dict[str, artifact.Weight] = field(default_factory=dict)
    layouts: dict[str, dict[str, str]] = field(default_factory=dict)
    states: set[str] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)
    memo: dict[str, Choice] = field(default_factory=dict)
    costs: list[Choice] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    origins: list[Source] = field(default_factory=list)
    schedules: Sequence[Schedule] = SCHEDULES
    order: Mapping[fx.Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = {node: place for place, node in enumerate(self.graph.nodes)}

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function" and node.target is not operator.getitem:
                self._call(node)

    def _placeholder(self, node: fx.Node) -> None:
        value = node.meta["value"]
        self.names[node] = value.name
        if value.kind in ("input", "streams") and node.users:  # the MTP block's prelude makes more than it reads
            self.inputs.add(value.name)
        elif value.kind == "state":
            self.states.add(value.name)

    def _call(self, node: fx.Node) -> None:
        op = node.target
        assert isinstance(op, Op)
        if op.name in VIEWS:
            self._view(node)
            return
        mutates = tuple(sorted(op.parameters.index(p) for p in op.in_place.values()))
        inputs = tuple(self._operand(a) for a in node.args)
        types = types_of(node)
        written = [i for i in range(op.outputs) if i not in op.in_place]
        outputs = tuple(Value(types[i].shape, types[i].dtype) for i in written)
        described = OpNode(op.name, dict(node.kwargs), inputs, outputs, mutates)
        choice = self._choose(described)
        record(self.choices, choice)
        place = len(self.calls)
        args = [self._argument(a, i, choice) for i, a in enumerate(node.args)]
        args += [self._new(f"{place}.work{i}", v.shape, v.dtype, place) for i, v in enumerate(choice.workspace)]
        results = {i: self._new(f"{place}.{i}", types[i].shape, types[i].dtype, place) for i in written}
        for index, parameter in op.in_place.items():
            state = node.args[op.parameters.index(parameter)]
            assert isinstance(state, fx.Node)
            self._check_in_place(state, node)
            results[index] = self.names[state]
        self._name_results(node, op, results)
        args += [results[i] for i in written]
        self.ranges.append(self._ranges(op, node, results))
        self.calls.append(artifact.Call(choice.kernel, tuple(args), len(written), node.meta.get("scope", "")))
        self.costs.append(choice)
        self.rows.append(_rows(described))
        self.origins.append(Source(origin_of(node), passes_of(node)))

    def _ranges(self, op: Op, node: fx.Node, results: Mapping[int, str]) -> tuple[artifact.IndexRange, ...]:
        operands = [(self.names[a], self._type(a)) if isinstance(a, fx.Node) else None for a in node.args]
        named = dict(zip(op.parameters, operands, strict=False))
        changing = {*self.inputs, *self.buffers}
        return tuple(r for r in index_ranges(op, named, results, node.kwargs) if r.value in changing)

    @staticmethod
    def _type(node: fx.Node) -> TensorType:
        kind: TensorType = node.meta["type"] if node.target is operator.getitem else types_of(node)[0]
        return kind

    def _choose(self, node: OpNode) -> Choice:
        """The choice for a node, by schedules that know rows as `T` whatever the program calls them."""
        key = repr(node)
        if key not in self.memo:
            size = _rows(node)
            if size != "T":
                symbols = {**self.symbols, "T": self.symbols[size]}
                choice = select(_renamed(node, size, "T"), self.target, symbols, self.tuned, self.schedules)
                workspace = tuple(_resized(value, "T", size) for value in choice.workspace)
                self.memo[key] = replace(choice, workspace=workspace)
            else:
                self.memo[key] = select(node, self.target, self.symbols, self.tuned, self.schedules)
        return self.memo[key]

    def _operand(self, arg: Any) -> Value | None:
        if not isinstance(arg, fx.Node):
            return None
        kind, name = self._type(arg), self.names[arg]
        role: Any = "activation"
        if arg.op == "placeholder":
            role = {"weight": "weight", "constant": "weight", "state": "pool"}.get(arg.meta["value"].kind, "input")
        elif name in self.states:
            role = "pool"
        buffer = self.buffers.get(name)
        strides = buffer.strides if buffer is not None and buffer.strides != _dense(kind.shape) else None
        stored = set(arg.meta.get("stored", "").split("+"))
        exact = "bfloat16" if role == "weight" and stored <= {"fp4", "fp8", "bf16"} else None
        return Value(kind.shape, kind.dtype, role, strides, exact)

    def _argument(self, arg: Any, index: int, choice: Choice) -> str | None:
        if not isinstance(arg, fx.Node):
            return None
        name = self.names[arg]
        place = len(self.calls)
        buffer = self.buffers.get(name)
        while buffer is not None:
            buffer.uses.add(place)
            buffer = self.buffers.get(buffer.of) if buffer.of else None
        if arg.op != "placeholder" or arg.meta["value"].kind not in ("weight", "constant"):
            return name
        return self._weight(arg, index, choice)

    def _weight(self, arg: fx.Node, index: int, choice: Choice) -> str:
        value, layout = arg.meta["value"], tuple(choice.layouts.get(index, ()))
        known = self.layouts.setdefault(value.name, {})
        key = repr(layout)
        if key in known:
            return known[key]
        name = value.name if not known else f"{value.name}#{len(known)}"
        laid = choice.inputs[index]
        assert laid is not None
        shape = tuple(int(s) for s in laid.shape)
        if value.kind == "constant":
            self.weights[name] = constant(self.source, value.name, layout)
        else:
            self.weights[name] = weight(self.source, self.sources, value.name, name, layout, shape, laid.dtype)
        known[key] = name
        return name

    def _check_in_place(self, state: fx.Node, writer: fx.Node) -> None:
        reader = next((node for node in state.users if self.order[node] > self.order[writer]), None)
        if reader is not None:
            raise CompileError(
                f"`{writer.format_node()}` overwrites `{self.names[state]}`, which `{reader.name}` still reads"
            )

    def _name_results(self, node: fx.Node, op: Op, results: Mapping[int, str]) -> None:
        if op.outputs == 1:
            self.names[node] = results[0]
            return
        for user in node.users:
            self.names[user] = results[int(str(user.args[1]))]

    def _new(self, name: str, shape: artifact.Shape, dtype: str, place: int) -> str:
        self.buffers[name] = _Buffer(name, TensorType(shape, dtype), _dense(shape), {place})
        return name

    def _view(self, node: fx.Node) -> None:
        base_node = node.args[0]
        assert isinstance(base_node, fx.Node) and isinstance(node.target, Op)
        base = self.buffers[self.names[base_node]]
        kind: TensorType = node.meta["type"]
        offset, strides = base.element_offset, base.strides
        if node.target.name == "columns":
            offset += int(str(node.kwargs["start"])) * strides[-1]
        elif node.target.name in ("stream_rows", "row_streams"):
            if strides != _dense(base.type.shape):
                raise CompileError(f"`{node.format_node()}` is a view of `{base.name}`, which is not dense")
            strides = _dense(kind.shape)
        else:
            strides = (*strides[:-1], int(kind.shape[-1]) * strides[-1], strides[-1])
        if self.target != "cpu" and offset * DTYPE_BYTES[kind.dtype] % VECTOR:
            raise CompileError(
                f"`{node.format_node()}` is a view at byte {offset * DTYPE_BYTES[kind.dtype]}, kernels of "
                f"`{self.target}` read from multiples of {VECTOR}"
            )
        root = base.of or base.name
        name = f"{root}.view{self.views[root]}"
        self.views[root] += 1
        self.buffers[name] = _Buffer(name, kind, strides, set(), root, offset)
        self.names[node] = name

    def allocate(self, before: Sequence[int]) -> int:
        """Offsets for all owning buffers, and the bytes of the arena."""
        owners = [b for b in self.buffers.values() if b.of is None]
        offsets, top = place([Need(b.name, self._bytes(b), frozenset(b.uses)) for b in owners], before)
        for buffer in owners:
            buffer.offset = offsets[buffer.name]
        return top

    def _bytes(self, buffer: _Buffer) -> int:
        size = buffer.type.numel(self.symbols) * DTYPE_BYTES[buffer.type.dtype]
        align = ALIGNMENT if self.target == "cpu" else DEVICE_ALIGNMENT
        return -(-size // align) * align


def _symbols(node: OpNode) -> set[str]:
    values = (*node.inputs, *node.outputs)
    return {size for value in values if value is not None for size in value.shape if isinstance(size, str)}


def _rows(node: OpNode) -> str:
    """The one symbol that counts its rows; `T` where several do."""
    rows = [size for size in ROWS if size in _symbols(node)]
    return rows[0] if len(rows) == 1 else "T"


def _resized(value: Value, old: str, new: str) -> Value:
    return replace(value, shape=tuple(new if size == old else size for size in value.shape))


def _renamed(node: OpNode, old: str, new: str) -> OpNode:
    inputs = tuple(v if v is None else _resized(v, old, new) for v in node.inputs)
    return replace(node, inputs=inputs, outputs=tuple(_resized(v, old, new) for v in node.outputs))


def _dense(shape: artifact.Shape) -> tuple[int, ...]:
    """Strides of a dense tensor; none where a size behind the first is known only when a step runs."""
    if any(isinstance(size, str) for size in shape[1:]):
        return ()
    strides, step = [], 1
    for size in reversed(shape[1:]):
        strides.append(step)
        step *= int(size)
    return tuple(reversed([*strides, step])) if shape else ()


@functools.lru_cache(maxsize=2)
def _sources(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """Every program of a plan asks for the same: 34,000 names for `flash`."""
    return parameter_sources(config)


def plan(
    program: Program,
    graph_name: str,
    name: str,
    phase: Literal["mixed", "draft", "decode", "prefill"],
    target: str,
    symbols: Mapping[str, int],
    inputs: tuple[artifact.Input, ...],
    schedules: Sequence[Schedule] = SCHEDULES,
    *,
    hidden: bool = False,
) -> Plan:
    """Plans a lowered program's graph as the program `name`. `symbols`: the largest (GPU: the) value of every symbol.

    `schedules` are those to choose from; `hidden`: whether the program gives what a drafter reads. Raises
    ScheduleError if no schedule accepts an op.
    """
    tuned = None if target == "cpu" else Tuned.of(target)
    sources = _sources(program.config)
    planner = _Planner(program, program.graphs[graph_name], target, symbols, sources, tuned, schedules=schedules)
    planner.run()
    results = results_of(planner.graph)
    outputs: dict[str, str] = {
        key: planner.names[results[key]]
        for key in ("logits", "tokens", "replaced", "accepted", "drafts", "confidences")
        if key in results
    }
    if hidden:
        outputs["hidden"] = planner.names[results.get("tap", results["streams"])]
    for value in outputs.values():
        root = planner.buffers[value].of or value
        planner.buffers[root].uses.add(len(planner.calls))
    kept = (*planner.states, *(item.name for item in inputs))  # some inputs are completed in place
    tasks = tasks_of(planner.calls, planner.costs, planner.buffers.values(), kept)
    beside = target != "cpu" and phase == "decode" and symbols["T"] <= LANE_TOKENS
    settled = assign(tasks) if beside else settle(tasks, [0] * len(tasks))
    for i, (lane, waits) in enumerate(zip(settled.lanes, settled.waits, strict=True)):
        planner.calls[i] = replace(planner.calls[i], lane=lane, waits=waits)
    arena = planner.allocate(settled.before)
    buffers = tuple(
        artifact.Buffer(b.name, b.type.shape, b.type.dtype, b.strides, b.offset, b.of, b.element_offset)
        for b in planner.buffers.values()
    )
    used = tuple(i for i in inputs if i.name in planner.inputs)
    padded = () if phase in ("mixed", "draft") else tuple(sorted(padded_symbols(used, symbols)))
    segments = segments_of(planner.calls, planner.ranges, planner.choices, buffers, padded)
    made = artifact.Program(phase, dict(symbols), used, buffers, segments, outputs, arena)
    if not made.any_size:
        spent = sum(choice.seconds if choice.measured is None else choice.measured for choice in planner.costs)
        made = replace(made, predicted_us=round(1e6 * spent, 1))
    called = tuple(map(Called, planner.costs, tasks, planner.rows))
    return Plan(
        {name: made}, planner.choices, planner.weights, planner.states, {name: tuple(planner.origins)}, {name: called}
    )
