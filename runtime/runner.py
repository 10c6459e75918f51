"""Who computes a step: spans in, chosen tokens out, in halves so that a device can work while the host plans.

    launch(spans) -> ticket     the step is on its way; launched steps and copies run in the order they were given
    finish(ticket)              all of it is, once the step before was collected
    collect(ticket) -> Chosen   waits for it and reads it; every ticket once, oldest first

`lag` is how many steps the host may be ahead. 0: `launch` computes. 1: step n + 1 is launched before the tokens of
step n are known to the host. They are fed on the device: a span then starts at a token that `Request.tokens` gives as
-1, the one that its slot (`state_slots`) sampled in the step launched just before. A row whose logits are no numbers
feeds any valid token: its request ends when it is collected. What a step reads and writes is settled at `launch`;
pages and slots may change hands while it is in flight, because whoever gets them writes later in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dsv4c.artifact import Input
from dsv4c.errors import EngineError
from dsv4c.runtime.batch import BatchBuilder
from dsv4c.runtime.drafts import Drafter
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.grammar import Masking
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.request import Request
from dsv4c.runtime.sampler import SamplerState, TokenLogprob, logprobs_of, sample, width_of
from dsv4c.runtime.scheduler import Span

Ticket = Any
"""What a runner gives for a launched step; nobody else looks inside."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tokens and their log-probabilities for each span that samples; entries for prompts, by request id.

    A span has one token, and one more for every draft that agreed. A token is None where the logits were no numbers,
    a log-probability where none was asked for. The entries of a request are those of its span's `prompt_rows`.
    """

    tokens: Sequence[Sequence[int | None]]
    logprobs: Sequence[Sequence[TokenLogprob | None]]
    prompt: Mapping[str, Sequence[TokenLogprob]]
    drafts: Sequence[tuple[int, ...]] = ()
    """Guesses of what follows, for each span that samples; empty where the host has none."""


class StepRunner(Protocol):
    """See the file's docstring. Raises RunnerBroken when it can never compute again.

    Any other exception of `launch` means that the step has no ticket, of `collect` that no result in flight is to be
    trusted: the engine then ends the requests of these steps and collects the other tickets before it launches again.
    """

    @property
    def lag(self) -> int:
        """Steps that the host may be ahead: 0 or 1."""

    def check(self, request: Request, /) -> None:
        """Raises RequestError (400) for what it can never sample. Safe from any thread."""

    def launch(self, spans: Sequence[Span], /) -> Ticket:
        """Starts a step of at least one span; at most one a request."""

    def finish(self, ticket: Ticket, /) -> None:
        """Launches what `launch` may have left out as it depends on tokens of the step before: masks, and sampling.

        Called after that step was collected, before the next is launched.
        """

    def collect(self, ticket: Ticket, /) -> Chosen:
        """Waits for the step and returns what it chose."""

    def copy_states(self, pairs: Sequence[tuple[int, int]], /) -> None:
        """Copies rows (source slot, target slot) of the state pools, after all launched so far and before all later.

        All sources are read before any target is written.
        """

    def synchronize(self) -> None:
        """Waits until all that was launched and copied has run. Raises RunnerBroken as `collect` does."""


class Executor(Protocol):
    """Runs one step of the model and updates the pools it owns, of the sizes it was made with."""

    @property
    def states(self) -> Mapping[str, torch.Tensor]:
        """Pools and states by value name, in place."""

    def step(self, inputs: Mapping[str, torch.Tensor], /) -> torch.Tensor:
        """Logits [S, vocab_size] float32 of the wanted rows, S = 0 included. `inputs`: by Input.name, int64."""


class HostRunner:
    """Steps computed where they are launched: inputs built, executor run, tokens sampled on the host. Lag 0.

    `states`: names of the executor's state pools, one row a slot, that `copy_states` copies. `drafter`: guesses what
    follows, for the next step to verify.
    """

    lag = 0

    def __init__(
        self,
        executor: Executor,
        inputs: Iterable[Input],
        pool: KVPool,
        symbols: Mapping[str, int] | None = None,
        *,
        vocab_size: int,
        states: Sequence[str] = (),
        drafter: Drafter | None = None,
    ) -> None:
        self.executor = executor
        self.drafter = drafter
        self.vocab_size = vocab_size
        self.states = tuple(states)
        self.on_mark: Callable[[int], None] | None = None
        """Told how far a step is (marks.py), if it computes a request that is to be kept. For ArtifactExecutors."""
        self._batch = BatchBuilder(inputs, pool, symbols)
        self._masking = Masking()

    def check(self, request: Request, /) -> None:
        """Everything that SamplingParams allows can be sampled. Raises EngineError for another model's grammar."""
        grammar = request.params.grammar
        if grammar is not None and grammar.vocab_size > self.vocab_size:
            raise EngineError(f"the grammar knows {grammar.vocab_size} tokens, the model {self.vocab_size}")

    def launch(self, spans: Sequence[Span], /) -> Chosen:
        states = [s.request.sampler for s in spans if s.samples and s.request.sampler is not None]
        return self.compute(spans, self._batch.build(spans), states)

    def finish(self, ticket: Chosen, /) -> None:
        """Nothing is left out."""

    def collect(self, ticket: Chosen, /) -> Chosen:
        return ticket

    def copy_states(self, pairs: Sequence[tuple[int, int]], /) -> None:
        sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
        for name in self.states:
            rows = self.executor.states[name]
            rows[targets] = rows[sources]  # indexing copies the sources first

    def synchronize(self) -> None:
        """Everything runs where it is launched."""

    def compute(
        self, spans: Sequence[Span], inputs: Mapping[str, torch.Tensor], states: Sequence[SamplerState]
    ) -> Chosen:
        """What the model says to these inputs; `states` are those of the sampling spans. No request changes."""
        guesses = _guesses(spans, inputs["token_ids"].tolist()) if any(s.drafts for s in spans) else [[]] * len(states)
        each = [s.ahead(g[:i]) if i else s for s, g in zip(states, guesses, strict=True) for i in range(1 + len(g))]
        filling = self._masking.begin([s.grammar for s in each], width_of(each))
        try:
            logits_SV = self._step(spans, inputs)
        finally:
            masks = filling.result() if filling is not None else None  # nobody may touch a cursor before
        rows = sum(s.num_rows for s in spans)
        if tuple(logits_SV.shape) != (rows, self.vocab_size):
            raise EngineError(f"the executor gave logits {list(logits_SV.shape)}, not {[rows, self.vocab_size]}")
        prompt: dict[str, list[TokenLogprob]] = {}
        if any(s.prompt_rows for s in spans):
            logits_SV, prompt = _split_rows(spans, logits_SV)
        tokens, logprobs = sample(logits_SV, each, masks) if each else ([], [])
        kept = _kept(tokens, guesses)
        chosen = [tokens[rows] for rows in kept]
        drafts = self.drafter.draft(spans, inputs, chosen, states) if self.drafter is not None else ()
        return Chosen(chosen, [logprobs[rows] for rows in kept], prompt, drafts)

    def _step(self, spans: Sequence[Span], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        on_mark, executor = self.on_mark, self.executor
        if on_mark is not None and isinstance(executor, ArtifactExecutor) and any(s.request.keep for s in spans):
            return executor.step(inputs, on_mark)
        return executor.step(inputs)


def _guesses(spans: Sequence[Span], token_ids: Sequence[int]) -> list[list[int]]:
    """The drafts of each span that samples, as the step was given them."""
    out, first = [], 0
    for span in spans:
        first += span.length
        if span.samples:
            out.append(list(token_ids[first - span.drafts : first]))
    return out


def _kept(tokens: Sequence[int | None], guesses: Sequence[Sequence[int]]) -> list[slice]:
    """The rows of each span whose tokens count: the first, and on as long as the row's draft was what was sampled."""
    out, first = [], 0
    for drafts in guesses:
        count = next((i for i, draft in enumerate(drafts) if tokens[first + i] != draft), len(drafts))
        out.append(slice(first, first + 1 + count))
        first += 1 + len(drafts)
    return out


def _split_rows(spans: Sequence[Span], logits_SV: torch.Tensor) -> tuple[torch.Tensor, dict[str, list[TokenLogprob]]]:
    """The rows to sample from, and by request the log-probabilities of the prompt's tokens."""
    sample_rows: list[int] = []
    prompt: dict[str, list[TokenLogprob]] = {}
    row = 0
    for span in spans:
        count = len(span.prompt_rows)
        if count:
            request = span.request
            targets = [request.token(p + 1) for p in span.prompt_rows]
            top = [request.params.prompt_logprobs or 0] * count
            prompt[request.id] = logprobs_of(logits_SV[row : row + count], targets, top)
        row += count
        sample_rows += range(row, row + span.num_rows - count)
        row += span.num_rows - count
    return logits_SV[sample_rows], prompt
