"""Checks what programs and their inputs promise, call by call: `--debug-contracts`.

    every step: inputs as check_step wants them; then each call twice, over two arenas of different bytes, and
    live rows compared bit for bit, floats no NaN, integers in the ranges of the segment's contract

What nobody may read is poisoned before a step, in one run with 0xFF (NaN, -1) and in the other with 0x7E (huge values):
the whole arena, the null page and the null slot, padded token ids, unused edits and masks. A kernel that reads padding,
or what no call of the step has written, gives different live rows, and is named. The first run's results are the
step's. Twice the memory of arena and state, and a wait for the device at every call: for debugging.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsv4c.artifact import IndexRange, Manifest, Program
from dsv4c.errors import ContractError
from dsv4c.runtime.buffers import sizes_of
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.kernels import Binder, Run
from dsv4c.runtime.live import declared_shapes, live_part, live_sizes
from dsv4c.runtime.step_check import StepBounds, check_step

POISONS = (0xFF, 0x7E)
_TWIN_INPUTS = frozenset({"token_ids", "edit_tokens", "edit_values", "masks"})
"""Inputs whose padding may hold anything valid."""


@dataclass(frozen=True)
class _Checked:
    """A call over both arenas: the buffers it writes, the states it names, and what its segment says of the former."""

    where: str
    runs: tuple[list[Run], list[Run]]
    written: tuple[str, ...]
    states: tuple[str, ...]
    ranges: tuple[IndexRange, ...]


class ContractExecutor(GraphExecutor):
    """A GraphExecutor that captures nothing and raises ContractError for the first promise that a step breaks.

    The message names segment, call, value, row, and what was found.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        kernels: Binder,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        device: torch.device,
        *,
        rows: Mapping[str, int],
        breaks: Sequence[str] = (),
        manifest: Manifest,
    ) -> None:
        super().__init__(programs, kernels, weights, states, device, rows=rows, breaks=breaks)
        self._null = null_rows(manifest)
        self._twin_arena = self._new_arena()
        self._twin_states = {name: torch.empty_like(state) for name, state in states.items()}
        pools = {g.name: states[g.pools[0].name].shape[0] for g in manifest.kv_groups}
        pages = {g.name: pools[g.name] // g.entries_per_page for g in manifest.kv_groups}
        sizes = {**self.rows, **{f"N_{name}": count for name, count in pools.items()}}
        self._bounds = StepBounds(manifest.kv_groups, pages, rows["R"], manifest.max_context, manifest.vocab_size)
        self._twins: dict[str, dict[str, Tensor]] = {}
        self._checked: dict[str, list[_Checked]] = {}
        self._symbols = {name: {**program.symbols, **sizes} for name, program in programs.items()}
        for name, program in programs.items():
            values, twins = self._bound[name].values, self._tensors(name, self._twin_arena, self._twin_states)
            twins |= {i.name: torch.empty_like(twins[i.name]) for i in program.inputs if i.kind in _TWIN_INPUTS}
            _check_strides(name, program, values, self._symbols[name])
            self._twins[name] = twins
            self._checked[name] = list(self._calls(program, manifest, values, twins))

    def _calls(
        self, program: Program, manifest: Manifest, values: Mapping[str, Tensor], twins: Mapping[str, Tensor]
    ) -> Iterator[_Checked]:
        for number, segment in enumerate(program.segments):
            for i, call in enumerate(segment.calls):
                written = tuple(str(arg) for arg in call.args[len(call.args) - call.outputs :])
                yield _Checked(
                    f"segment {number} ({segment.kind}), call {i}, `{manifest.kernels[call.kernel].op}` of "
                    f"`{call.scope}`",
                    (
                        self._kernels.bind_calls(program, [call], values),
                        self._kernels.bind_calls(program, [call], twins),
                    ),
                    written,
                    tuple(dict.fromkeys(str(arg) for arg in call.args if arg in self.states)),
                    tuple(r for r in segment.contract.ranges if r.value in written),
                )

    def launch(self, name: str) -> dict[str, Tensor]:
        """Runs one step whole."""
        return self.finish(name)

    def begin(self, name: str) -> None:
        """Nothing: a step runs whole, once its masks are there."""

    def finish(self, name: str) -> dict[str, Tensor]:
        """Runs one step, checked. Raises ContractError."""
        program, bound, twins = self.programs[name], self._bound[name], self._twins[name]
        given = {i.name: bound.values[i.name].cpu().numpy() for i in program.inputs}
        check_step(program, given, self._bounds, self._lengths())
        live, shapes = live_sizes(program, bound.values), declared_shapes(program)
        for number, segment in enumerate(program.segments):
            for wanted in segment.contract.ranges:
                if wanted.value in given:
                    part = live_part(bound.values[wanted.value], shapes[wanted.value], live)
                    _check_range(f"segment {number} ({segment.kind})", wanted, part, self._symbols[name])
        self._poison(program, bound.values, twins, live)
        for call in self._checked[name]:
            for runs in call.runs:
                for run in runs:
                    run()
            for value in call.written:
                a, b = (live_part(values[value], shapes[value], live) for values in (bound.values, twins))
                _check_same(call.where, value, a, b)
                for wanted in call.ranges:
                    if wanted.value == value:
                        _check_range(call.where, wanted, a, self._symbols[name])
            for value in call.states:
                first = self._null[value]
                _check_same(call.where, value, bound.values[value][first:], twins[value][first:], first)
        for meaning, value in program.outputs.items():
            a, b = (live_part(values[value], shapes[value], live) for values in (bound.values, twins))
            _check_same(f"the step's `{meaning}`", value, a, b)
        return bound.outputs

    def _lengths(self) -> npt.NDArray[np.int64] | None:
        """Tokens of each slot, where the device keeps them."""
        lengths = self.states.get("sampling.length")
        return None if lengths is None else lengths.cpu().numpy()

    def _poison(
        self, program: Program, values: Mapping[str, Tensor], twins: Mapping[str, Tensor], live: Mapping[str, int]
    ) -> None:
        for name, state in self.states.items():
            self._twin_states[name].copy_(state)
        for poison, arena, states in zip(
            POISONS, (self.arena, self._twin_arena), (self.states, self._twin_states), strict=True
        ):
            arena.fill_(poison)
            for name, state in states.items():
                state[: self._null[name]].view(torch.uint8).fill_(poison)
        for item in program.inputs:
            if item.kind in _TWIN_INPUTS:
                padding = twins[item.name].copy_(values[item.name])[live[str(item.shape[0])] :]
                if item.kind == "token_ids":
                    padding.fill_(self._bounds.vocab_size - 1)
                elif padding.numel():
                    padding.view(torch.uint8).fill_(POISONS[1])


def null_rows(manifest: Manifest) -> dict[str, int]:
    """State -> its first rows that are nobody's: those of the null page, or of the null slot."""
    pools = {pool.name: group.entries_per_page for group in manifest.kv_groups for pool in group.pools}
    return {**pools, **{pool.name: 1 for group in manifest.state_groups for pool in group.pools}}


def _check_strides(name: str, program: Program, values: Mapping[str, Tensor], symbols: Mapping[str, int]) -> None:
    """Every tensor has the shape and strides that the manifest says; those of inputs, weights and states are dense."""
    strided = {n: s for segment in program.segments for n, s in segment.contract.strides.items()}
    for buffer in program.buffers:
        tensor, sizes = values[buffer.name], sizes_of(buffer.shape, symbols)
        dense = tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
        wanted = strided.get(buffer.name) or buffer.strides or dense
        if tuple(tensor.shape) != sizes or tensor.stride() != wanted:
            raise ContractError(
                f"buffer `{buffer.name}` of `{name}` has shape {list(tensor.shape)} and strides "
                f"{list(tensor.stride())}, planned are {list(sizes)} and {list(wanted)}"
            )
    owned = {buffer.name for buffer in program.buffers}
    for value, tensor in values.items():
        if value not in owned and not tensor.is_contiguous():
            raise ContractError(f"`{value}` of `{name}` is not dense: strides {list(tensor.stride())}")


def _check_range(where: str, wanted: IndexRange, part: Tensor, symbols: Mapping[str, int]) -> None:
    below = math.prod(sizes_of(wanted.below, symbols))
    wrong = (part < wanted.low) | (part >= below)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise ContractError(
            f"{where}: `{wanted.value}` row {at[0]} holds {int(part[at])}, outside [{wanted.low}, {below})"
        )


def _check_same(where: str, value: str, a: Tensor, b: Tensor, first: int = 0) -> None:
    """`a` is `b` bit for bit and, if it is of floats, holds no NaN. `first`: the row of `value` where they begin."""
    if not a.numel():
        return
    a, b = a.contiguous(), b.contiguous()
    differs = a.view(torch.uint8) != b.view(torch.uint8)
    if bool(differs.any()):
        row = int(differs.flatten(1).any(1).nonzero()[0])
        at = int((a[row] != b[row]).flatten().nonzero()[0]) if bool((a[row] != b[row]).any()) else 0
        x, y = a[row].flatten()[at].item(), b[row].flatten()[at].item()
        raise ContractError(
            f"{where}: `{value}` row {first + row} depends on what nobody may read: element {at} is {x} over bytes "
            f"{POISONS[0]:#x} and {y} over {POISONS[1]:#x}"
        )
    if a.is_floating_point():
        wrong = a.float().isnan().flatten(1) if a.dim() > 1 else a.float().isnan().unsqueeze(1)
        if bool(wrong.any()):
            row, at = wrong.nonzero()[0].tolist()
            raise ContractError(f"{where}: `{value}` row {first + row} holds NaN, at element {at}")
