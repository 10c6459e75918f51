"""Runs an artifact's program: inputs in, logits out, pools and states updated in place.

    step(inputs) --check--> sizes of every symbol --> binding of these sizes --copy inputs, run--> logits

A binding is every call with its arguments resolved to views of the arena: it is made once for a combination of sizes
and kept, so a step of known sizes creates no tensor but copies a few integers. Nothing is captured or compiled here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4c.artifact import Call, Program
from dsv4c.errors import ArtifactError, EngineError
from dsv4c.runtime.buffers import Arena, sizes_of
from dsv4c.runtime.kernels import Binder, Run
from dsv4c.runtime.marks import calls_to_marks

MAX_BINDINGS = 256  # about 0.2 MB each; decoding 32 requests meets some dozens (rows times completed windows)


@dataclass
class _Binding:
    """The calls of a program at given sizes. `inputs` are where a step's inputs are copied to."""

    inputs: dict[str, Tensor]
    values: dict[str, Tensor]
    runs: list[Run]
    outputs: dict[str, Tensor]
    marked: list[list[Run]] = field(default_factory=list)
    """The runs up to each mark, and those behind the last; made when first wanted."""


class ArtifactExecutor:
    """Executes one program over its weights and state. Not safe to call from two threads at once."""

    def __init__(
        self,
        program: Program,
        kernels: Binder,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        device: torch.device | None = None,
    ) -> None:
        """`weights` and `states` by value name, on `device` (default: the CPU); all are used in place."""
        self.program = program
        self._device = device
        self.states = dict(states)
        self._kernels = kernels
        self.weights = dict(weights)
        self._arena = Arena(program, device)
        self._calls = [call for segment in program.segments for call in segment.calls]
        self._bindings: OrderedDict[tuple[int, ...], _Binding] = OrderedDict()
        self._last: dict[str, Tensor] = {}
        self._marks = calls_to_marks(program, self.states)
        self._symbols = _input_symbols(program)
        _check_buffer_sizes(program)
        if "logits" not in program.outputs and program.phase != "draft":
            raise ArtifactError(f"program `{program.phase}` has no `logits`", hint="compile the artifact again")

    def beside(self, program: Program) -> ArtifactExecutor:
        """An executor of the same kind for another program over the same weights and state."""
        return ArtifactExecutor(program, self._kernels, self.weights, self.states, self._device)

    def step(self, inputs: Mapping[str, Tensor], on_mark: Callable[[int], None] | None = None) -> Tensor:
        """Logits [S, vocab_size] float32 of one step, valid until the next. `inputs` as the manifest's Inputs say.

        `on_mark` is called behind each of the program's marks (marks.py), with its number. Raises EngineError if an
        input is missing, of a wrong dtype or shape, or larger than the program is made for.
        """
        return self.outputs(inputs, on_mark)["logits"]

    def outputs(
        self, inputs: Mapping[str, Tensor], on_mark: Callable[[int], None] | None = None
    ) -> Mapping[str, Tensor]:  # fmt: skip
        """All that one step gives, by meaning, valid until the next. Raises EngineError as `step` does."""
        torch.get_num_threads()  # gives this thread's OpenMP, which our kernels use, the count torch was set to
        binding = self._binding(self._sizes(inputs))
        for name, to in binding.inputs.items():
            to.copy_(inputs[name])
        if on_mark is None:
            for run in binding.runs:
                run()
        else:
            self._run_marked(binding, on_mark)
        self._last = binding.outputs
        return binding.outputs

    def _run_marked(self, binding: _Binding, on_mark: Callable[[int], None]) -> None:
        ends = self._marks
        if not binding.marked:
            cuts = zip([0, *ends], [*ends, len(self._calls)], strict=True)
            binding.marked = [self._kernels.bind_calls(self.program, self._calls[a:b], binding.values) for a, b in cuts]
        for number, runs in enumerate(binding.marked):
            for run in runs:
                run()
            if number < len(ends):
                on_mark(number)

    @property
    def hidden(self) -> Tensor:
        """[T, ...] what a drafter reads of the last step's rows, valid until the next. For programs that give it."""
        return self._last["hidden"]

    def run(self, inputs: Mapping[str, Tensor], want: Sequence[str]) -> dict[str, Tensor]:
        """One step, call by call: copies of the values `want`, each taken right after the call that wrote it."""
        binding = self._binding(self._sizes(inputs))
        for name, to in binding.inputs.items():
            to.copy_(inputs[name])
        found: dict[str, Tensor] = {}
        of = {buffer.name: buffer.of or buffer.name for buffer in self.program.buffers}
        for call in self._calls:
            for run in self._kernels.bind_calls(self.program, [call], binding.values):
                run()
            written = set(call.args[len(call.args) - call.outputs :])
            found.update({n: binding.values[n].clone() for n in want if of.get(n) in written})
        missing = sorted(set(want) - set(found))
        if missing:
            raise EngineError(f"no call writes `{missing[0]}`", hint="see the program's buffers in the manifest")
        return found

    def bound_calls(self, inputs: Mapping[str, Tensor]) -> list[tuple[Call, Callable[[], object]]]:
        """Every call of a step of these sizes, with a function that makes it alone: for measuring and comparing.

        The values that it reads are those of the last step or call.
        """
        binding = self._binding(self._sizes(inputs))
        out: list[tuple[Call, Callable[[], object]]] = []
        for call in self._calls:
            (run,) = self._kernels.bind_calls(self.program, [call], binding.values) or [_nothing]
            out.append((call, run))
        return out

    def _sizes(self, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The value of every symbol, in the order of `_symbols`; checks every input on the way."""
        sizes = dict.fromkeys(self._symbols, -1)
        for item in self.program.inputs:
            tensor = inputs.get(item.name)
            if tensor is None:
                raise EngineError(f"the step lacks input `{item.name}`")
            if tensor.dtype != getattr(torch, item.dtype) or tensor.dim() != len(item.shape):
                raise EngineError(
                    f"input `{item.name}` is {tensor.dtype} {list(tensor.shape)}, expected {item.dtype} "
                    f"{list(item.shape)}"
                )
            for size, expected in zip(tensor.shape, item.shape, strict=True):
                known = sizes[expected] if isinstance(expected, str) else expected
                if known not in (-1, size):
                    raise EngineError(f"input `{item.name}` has {size} for `{expected}`, others have {known}")
                if isinstance(expected, str):
                    sizes[expected] = size
        for name, size in sizes.items():
            if size > self.program.symbols[name]:
                raise EngineError(
                    f"the step has {size} for `{name}`, the artifact was compiled for {self.program.symbols[name]}",
                    hint="compile with larger `--max-tokens`, `--max-requests` or `--max-context`",
                )
        return tuple(sizes.values())

    def _binding(self, sizes: tuple[int, ...]) -> _Binding:
        found = self._bindings.get(sizes)
        if found is None:
            found = self._bind(dict(zip(self._symbols, sizes, strict=True)))
            if len(self._bindings) >= MAX_BINDINGS:
                self._bindings.popitem(last=False)
            self._bindings[sizes] = found
        else:
            self._bindings.move_to_end(sizes)
        return found

    def _bind(self, symbols: dict[str, int]) -> _Binding:
        inputs = {
            item.name: torch.empty(sizes_of(item.shape, symbols), dtype=getattr(torch, item.dtype), device=self._device)
            for item in self.program.inputs
        }
        values = {**self._arena.views(symbols), **self.weights, **self.states, **inputs}
        outputs = {meaning: values[value] for meaning, value in self.program.outputs.items()}
        return _Binding(inputs, values, self._kernels.bind_calls(self.program, self._calls, values), outputs)


def _nothing() -> None:
    """A call without work: its kernels have empty grids."""


def _input_symbols(program: Program) -> tuple[str, ...]:
    """Symbols that the inputs' shapes give, in order of appearance."""
    names = dict.fromkeys(size for item in program.inputs for size in item.shape if isinstance(size, str))
    for name in names:
        if name not in program.symbols:
            raise ArtifactError(f"symbol `{name}` has no largest value", hint="compile the artifact again")
    return tuple(names)


def _check_buffer_sizes(program: Program) -> None:
    """No buffer's size may depend on anything but the inputs."""
    given = set(_input_symbols(program))
    for buffer in program.buffers:
        for size in buffer.shape:
            if isinstance(size, str) and size not in given:
                raise ArtifactError(
                    f"buffer `{buffer.name}` depends on `{size}`, which no input gives",
                    hint="compile the artifact again",
                )
