"""A runner of lag 1 that behaves as a device with a stream does, at its slowest: nothing runs before it is waited for.

Requests, page tables and sampling states are taken at `launch`, so whatever the host changes afterwards must not
matter. Tokens in flight, drafts, and where a span that floats stands come from a table with one row a slot that
sampling writes; where a device would read a stale row unknowingly, this one raises. Results must be collected oldest
first, each once.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from dsv4c.artifact import Input
from dsv4c.runtime.batch import BatchBuilder
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.request import Request
from dsv4c.runtime.runner import Chosen, HostRunner
from dsv4c.runtime.sampler import SamplerState
from dsv4c.runtime.scheduler import Span


@dataclass
class Row:
    """What a slot sampled last, in step number `step`: the newest token stands at `position`, drafts behind it."""

    step: int
    request: Request
    position: int
    tokens: list[int]
    drafts: tuple[int, ...]


@dataclass
class Launch:
    """A step on the stream, as the host knew it at launch. `fed[i]`: span i starts at a token in flight."""

    number: int
    spans: list[Span]
    owners: list[Request]
    batch: BatchBuilder
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

    def __init__(self, executor: Any, inputs: Iterable[Input], pool: KVPool, *args: Any, **options: Any) -> None:
        super().__init__(executor, inputs, pool, *args, **options)
        self._pool = pool
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
        for span in spans:
            request = span.request
            assert request.num_inflight in (0, 1)
            assert request.num_inflight == 0 or (span.start, span.length) == (request.num_tokens, 1 + span.drafts)
            assert span.floating == (request.num_uncertain > 0) and span.drafts <= request.num_drafts
            highest = span.end + request.num_uncertain
            assert self._pool.covers(request.slot, highest), f"no pages for token {highest} of {span}"
        sampling = [s for s in spans if s.samples]
        step = Launch(
            self.launched,
            [replace(s, request=_frozen(s.request)) for s in spans],
            [s.request for s in spans],
            self._frozen_batch(),
            [copy.deepcopy(s.request.sampler) for s in sampling],
            [s.request.num_inflight == 1 for s in spans],
        )
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
        return replace(ticket.chosen, drafts=())  # the host never sees them

    def copy_states(self, pairs: Sequence[tuple[int, int]], /) -> None:
        taken = list(pairs)
        self._stream.append(lambda: HostRunner.copy_states(self, taken))

    def synchronize(self) -> None:
        while self._stream:
            self._stream.popleft()()

    def _frozen_batch(self) -> BatchBuilder:
        """A builder that reads the page tables as they are now."""
        out = copy.copy(self._batch)
        tables = {name: table.copy() for name, table in self._pool.tables.items()}
        out._pool = SimpleNamespace(groups=self._pool.groups, tables=tables)  # type: ignore[assignment]
        return out

    def _run(self, step: Launch) -> None:
        try:
            self._feed(step)
            step.chosen = self.compute(step.spans, step.batch.build(step.spans), step.states)
        except Exception as error:  # noqa: BLE001  a device tells of its errors when it is waited for
            step.error = error
            return
        sampled = [(owner, s) for owner, s in zip(step.owners, step.spans, strict=True) if s.samples]
        drafts = step.chosen.drafts or [()] * len(sampled)
        for (owner, span), tokens, more in zip(sampled, step.chosen.tokens, drafts, strict=True):
            position = span.end - span.drafts + len(tokens) - 1
            known = [0 if t is None else t for t in tokens]
            self._table[span.request.slot] = Row(step.number, owner, position, known, more)

    def _feed(self, step: Launch) -> None:
        """Puts spans where they stand, and tokens in flight and drafts into their requests and sampling states."""
        states = iter(step.states)
        for span, owner, fed in zip(step.spans, step.owners, step.fed, strict=True):
            state = next(states) if span.samples else None
            if not fed and not span.drafts:
                continue
            assert span.samples
            request, row = span.request, self._table.get(span.request.slot)
            if row is None or row.request is not owner or (fed and row.step != step.number - 1):
                raise AssertionError(f"step {step.number}: slot {request.slot} holds {row}, not what {span} needs")
            if fed:
                for token in row.tokens:
                    request.append(token)
                    state.accept(token)
                assert state.generated == request.num_generated
                assert len(row.tokens) == 1 or span.floating
                span.start += len(row.tokens) - 1
                span.end += len(row.tokens) - 1
            if row.position != span.start:
                raise AssertionError(f"step {step.number}: {row} does not stand where {span} starts")
            request.drafts = (*row.drafts, *(0 for _ in range(span.drafts)))[: span.drafts]


def _frozen(request: Request) -> Request:
    """The request as it is now, tokens in flight left out."""
    out = copy.copy(request)
    out._tokens = request._tokens.copy()
    out.num_total = out.num_tokens
    return out
