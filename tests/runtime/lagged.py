"""A runner of lag 1 that behaves as a device with a stream does, at its slowest: nothing runs before it is waited for.

Inputs and sampling states are taken at `launch`, so whatever the host changes afterwards must not matter. A token -1
is fed from a table with one row a slot that sampling writes; where a device would read a stale row unknowingly, this
one raises. Results must be collected oldest first, each once.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv4c.runtime.request import Request
from dsv4c.runtime.runner import Chosen, HostRunner
from dsv4c.runtime.sampler import SamplerState
from dsv4c.runtime.scheduler import Span


@dataclass
class Row:
    """What a slot sampled last: token `position` of a request, in step number `step`."""

    step: int
    request: Request
    position: int
    token: int


@dataclass
class Launch:
    """A step on the stream. `slots` and `states` are those at launch; `fed[i]`: sampling span i starts in flight."""

    number: int
    spans: list[Span]
    inputs: dict[str, torch.Tensor]
    slots: list[int]
    states: list[SamplerState]
    fed: list[bool]
    chosen: Chosen | None = None
    error: Exception | None = None


@dataclass
class Faults:
    """Numbers of launches that raise in `launch`, and in `collect` though they ran; and with what."""

    launch: set[int] = field(default_factory=set)
    collect: set[int] = field(default_factory=set)
    error: Exception = field(default_factory=lambda: RuntimeError("stream exploded"))


class LaggedRunner(HostRunner):
    """See above. `faults` may be changed at any time."""

    lag = 1

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.faults = Faults()
        self.launched = 0
        self.most_in_flight = 0
        self._uncollected: deque[Launch] = deque()
        self._stream: deque[Callable[[], None]] = deque()
        self._table: dict[int, Row] = {}

    def launch(self, spans: Sequence[Span], /) -> Launch:
        self.launched += 1
        if self.launched in self.faults.launch:
            raise self.faults.error
        sampling = [s for s in spans if s.samples]
        assert all(s.request.num_inflight in (0, 1) for s in spans)
        assert all(s.request.num_inflight == 0 or s.start == s.request.num_tokens for s in spans)
        step = Launch(
            self.launched,
            [copy.copy(s) for s in spans],
            self._batch.build(spans),
            [s.request.slot for s in spans],
            [copy.deepcopy(s.request.sampler) for s in sampling],
            [s.request.num_inflight == 1 for s in sampling],
        )
        for state, fed, span in zip(step.states, step.fed, sampling, strict=True):
            assert state.generated + fed == span.request.num_sampled
        self._uncollected.append(step)
        self.most_in_flight = max(self.most_in_flight, len(self._uncollected))
        self._stream.append(lambda: self._run(step))
        return step

    def collect(self, ticket: Launch, /) -> Chosen:
        assert self._uncollected.popleft() is ticket, "collected out of order, or twice"
        while ticket.chosen is None and ticket.error is None:
            self._stream.popleft()()
        if ticket.error is not None:
            raise ticket.error
        if ticket.number in self.faults.collect:
            raise self.faults.error
        assert ticket.chosen is not None
        return ticket.chosen

    def copy_states(self, pairs: Sequence[tuple[int, int]], /) -> None:
        taken = list(pairs)
        self._stream.append(lambda: HostRunner.copy_states(self, taken))

    def _run(self, step: Launch) -> None:
        try:
            self._feed(step)
            step.chosen = self.compute(step.spans, step.inputs, step.states)
        except Exception as error:  # noqa: BLE001  a device tells of its errors when it is waited for
            step.error = error
            return
        sampled = [(slot, s) for slot, s in zip(step.slots, step.spans, strict=True) if s.samples]
        for (slot, span), token in zip(sampled, step.chosen.tokens, strict=True):
            self._table[slot] = Row(step.number, span.request, span.end, 0 if token is None else token)

    def _feed(self, step: Launch) -> None:
        """Puts the tokens in flight where the inputs say -1, and into the sampling states of their requests."""
        tokens = step.inputs["token_ids"]
        rows = step.inputs["request_rows"]
        at = (tokens < 0).nonzero()[:, 0].tolist()
        for row in at:
            span, slot = step.spans[rows[row]], int(step.inputs["state_slots"][rows[row]])
            tokens[row] = self._row(step, span, slot, int(step.inputs["positions"][row])).token
        assert len(at) == sum(step.fed) and all(s.samples for s in (step.spans[rows[row]] for row in at))
        sampled = [(slot, s) for slot, s in zip(step.slots, step.spans, strict=True) if s.samples]
        for state, fed, (slot, span) in zip(step.states, step.fed, sampled, strict=True):
            if fed:
                state.accept(self._row(step, span, slot, span.start).token)

    def _row(self, step: Launch, span: Span, slot: int, position: int) -> Row:
        row = self._table.get(slot)
        if row is None or row.request is not span.request or (row.step, row.position) != (step.number - 1, position):
            raise AssertionError(f"step {step.number}: slot {slot} holds {row}, not token {position} of {span}")
        return row
