"""The engine: requests in, events out, one synchronous step at a time.

    Engine(executor, inputs, pool sizes, groups, vocab_size, limits, eos ids)    or Engine.for_manifest(...)
    engine.submit(request)      RequestError if it cannot be served; else it waits
    engine.step() -> [Event]    schedule -> build inputs -> executor -> sample -> events
    engine.cancel(id) -> Event  pages back at once

A request ends exactly once: finished (`stop`, `length`), `cancelled`, or `failed` with an error. Whatever the
executor raises fails the requests of that step, each with the same clear error; the others go on. Stop strings
are a hook of the request (`TextStop`), called in the step that chose the token: nothing after a stop is computed
here. An executor that overlaps steps will compute at most one token more, and none is ever delivered.
Not thread-safe: `EngineLoop` (loop.py) drives an Engine in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from dsv4c.artifact import Input, KVGroup, Manifest
from dsv4c.errors import ConfigError, Dsv4cError, EngineError, RequestError
from dsv4c.runtime.batch import BatchBuilder, step_inputs
from dsv4c.runtime.kvpool import KVPool, PoolSizes
from dsv4c.runtime.request import Event, FinishReason, Request
from dsv4c.runtime.sampler import SamplerState, TokenLogprob, logprobs_of, sample
from dsv4c.runtime.scheduler import Limits, Scheduler, Span


class Executor(Protocol):
    """Runs one step of the model and updates the pools it owns, of the sizes it was made with."""

    def step(self, inputs: Mapping[str, torch.Tensor], /) -> torch.Tensor:
        """Logits [S, vocab_size] float32 of the wanted rows, S = 0 included. `inputs`: by Input.name, int64."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot: what is queued and held now, and totals since the engine was made. Seconds are wall time."""

    running: int = 0
    waiting: int = 0
    pages_used: Mapping[str, int] = field(default_factory=dict)
    pages_total: Mapping[str, int] = field(default_factory=dict)
    preemptions: int = 0
    steps: int = 0
    step_tokens: int = 0
    """Tokens computed, recomputed ones included."""
    prompt_tokens: int = 0
    """Tokens of the prompts of requests that were accepted."""
    generated_tokens: int = 0
    step_s: float = 0.0
    """Seconds in steps, executor included."""
    executor_s: float = 0.0
    last_step_s: float = 0.0
    ended: Mapping[str, int] = field(default_factory=dict)
    """Requests ended, by reason."""


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Tokens and their log-probabilities, one for each span that samples; entries for prompts, by request."""

    tokens: list[int | None]
    logprobs: list[TokenLogprob | None]
    prompt: dict[str, list[TokenLogprob]]


class Engine:
    """Continuous batching over one executor. `sizes` must be those the executor's pools were made with."""

    def __init__(
        self,
        executor: Executor,
        *,
        inputs: Iterable[Input],
        groups: Sequence[KVGroup],
        sizes: PoolSizes,
        vocab_size: int,
        limits: Limits | None = None,
        eos_token_ids: Sequence[int] = (),
        symbols: Mapping[str, int] | None = None,
    ) -> None:
        self.executor = executor
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.pool = KVPool(groups, sizes)
        self.scheduler = Scheduler(self.pool, limits or Limits(max_requests=sizes.max_requests))
        self._batch = BatchBuilder(inputs, self.pool, symbols)
        self._requests: dict[str, Request] = {}
        self._ended: dict[str, int] = {"stop": 0, "length": 0, "cancelled": 0, "failed": 0}
        self._steps = self._step_tokens = self._prompt_tokens = self._generated = 0
        self._step_s = self._executor_s = self._last_step_s = 0.0

    @classmethod
    def for_manifest(
        cls,
        executor: Executor,
        manifest: Manifest,
        sizes: PoolSizes,
        *,
        limits: Limits | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> Engine:
        """An engine for an artifact: inputs, groups and vocabulary are the manifest's, and so are default limits.

        Raises ConfigError if limits or sizes exceed what its programs were made for.
        """
        inputs, symbols = step_inputs(manifest)
        largest = {i.kind: symbols.get(str(i.shape[0]), 2**62) for i in inputs}
        tokens, rows = largest.get("token_ids", 2**62), largest.get("logit_rows", 2**62)
        requests = min(largest.get("seq_starts", 2**62), sizes.max_requests, tokens, rows)
        limits = limits or Limits(requests, min(512, tokens), max_logit_rows=min(512, tokens, rows))
        for name, asked, most in (
            ("max_requests", limits.max_requests, requests),
            ("max_step_tokens", limits.max_step_tokens, tokens),
            ("max_logit_rows", limits.logit_rows, rows),
            ("max_context", sizes.max_context, manifest.max_context),
        ):
            if asked > most:
                raise ConfigError(
                    f"`{name}` is {asked}, the artifact and its pools allow {most}",
                    hint=f"lower `{name}`, or compile for more",
                )
        return cls(
            executor,
            inputs=inputs,
            groups=manifest.kv_groups,
            sizes=sizes,
            vocab_size=manifest.vocab_size,
            limits=limits,
            eos_token_ids=eos_token_ids,
            symbols=symbols,
        )

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.pool.sizes.max_context

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check(self, request: Request, ahead: int = 0) -> None:
        """Raises RequestError if the request can never be served, or if the queue (and `ahead` more) is full.

        Changes nothing; safe from any thread.
        """
        request.params.check_vocab(self.vocab_size)
        if request.params.n != 1:
            raise RequestError("one request makes one choice", param="n", hint="expand it into `n` requests")
        tokens = request.tokens()
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
            raise RequestError(
                f"the prompt has token {wrong}, the vocabulary has {self.vocab_size}",
                param="prompt",
                code="invalid_value",
            )
        self.scheduler.check(request, ahead)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises RequestError as `check` does, and if its id is in use."""
        if request.id in self._requests:
            raise RequestError(f"request id `{request.id}` is in use", param="request_id", code="invalid_value")
        self.check(request)
        params = request.params
        request.stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.eos_token_ids)
        request.sampler = SamplerState(params, request.tokens(), sorted(request.stop_ids), request.choice)
        self.scheduler.submit(request)
        self._requests[request.id] = request
        self._prompt_tokens += request.num_prompt

    def cancel(self, request_id: str) -> Event | None:
        """Ends a request in whatever state it is and frees its pages; None if it has ended already."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, "cancelled")

    def fail_all(self, error: Dsv4cError) -> list[Event]:
        """Ends every request with this error."""
        return [self._end(request, "failed", error=error) for request in list(self._requests.values())]

    def step(self) -> list[Event]:
        """Computes one step and returns its events, at most one a request; nothing to do gives none."""
        began = time.perf_counter()
        spans = self.scheduler.schedule()
        if not spans:
            if self.has_work:
                raise EngineError("requests wait, but the scheduler gives none of them a token")
            return []
        try:
            chosen = self._choose(spans, self._execute(spans))
        except Exception as error:  # noqa: BLE001  the border to kernels: what they raise ends this step's requests
            events = self._fail_step(spans, error)
        else:
            events = self._record(spans, chosen)
        self._steps += 1
        self._step_tokens += sum(s.length for s in spans)
        self._last_step_s = time.perf_counter() - began
        self._step_s += self._last_step_s
        return events

    def _execute(self, spans: Sequence[Span]) -> torch.Tensor:
        inputs = self._batch.build(spans)
        began = time.perf_counter()
        logits_SV = self.executor.step(inputs)
        self._executor_s += time.perf_counter() - began
        rows = sum(s.samples + len(s.prompt_rows) for s in spans)
        if tuple(logits_SV.shape) != (rows, self.vocab_size):
            raise EngineError(f"the executor gave logits {list(logits_SV.shape)}, not {[rows, self.vocab_size]}")
        return logits_SV

    def _choose(self, spans: Sequence[Span], logits_SV: torch.Tensor) -> _Chosen:
        """What the logits say, with no request changed: all that can fail for the whole step fails here."""
        prompt: dict[str, list[TokenLogprob]] = {}
        if any(s.prompt_rows for s in spans):
            logits_SV, prompt = self._split_rows(spans, logits_SV)
        states = [s.request.sampler for s in spans if s.samples and s.request.sampler is not None]
        tokens, logprobs = sample(logits_SV, states) if states else ([], [])
        return _Chosen(tokens, logprobs, prompt)

    def _record(self, spans: Sequence[Span], chosen: _Chosen) -> list[Event]:
        self.scheduler.commit(spans)
        for span in spans:
            span.request.prompt_logprobs.extend(chosen.prompt.get(span.request.id, ()))
        sampling = [s.request for s in spans if s.samples]
        return [self._accept(*item) for item in zip(sampling, chosen.tokens, chosen.logprobs, strict=True)]

    @staticmethod
    def _split_rows(
        spans: Sequence[Span], logits_SV: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, list[TokenLogprob]]]:
        """The rows to sample from, and by request the log-probabilities of the prompt's tokens."""
        sample_rows, prompt, row = [], {}, 0
        for span in spans:
            count = len(span.prompt_rows)
            if count:
                request = span.request
                targets = [request.token(p + 1) for p in span.prompt_rows]
                top = [request.params.prompt_logprobs or 0] * count
                prompt[request.id] = logprobs_of(logits_SV[row : row + count], targets, top)
            row += count
            if span.samples:
                sample_rows.append(row)
                row += 1
        return logits_SV[sample_rows], prompt

    def _accept(self, request: Request, token: int | None, logprob: TokenLogprob | None) -> Event:
        """Adds a sampled token to its request and ends the request if it must; None: the logits were no numbers."""
        if token is None:
            error = EngineError(f"the logits after {request.num_tokens} tokens hold NaN or infinity")
            return self._end(request, "failed", error=error)
        first = request.num_generated == 0
        request.append(token)
        self._generated += 1
        if request.sampler is not None:
            request.sampler.accept(token)
        given = Event(
            request.id,
            (token,),
            () if logprob is None else (logprob,),
            tuple(request.prompt_logprobs) if first else (),
        )
        if token in request.stop_ids:
            return self._end(request, "stop", given, stop_token=token)
        try:
            stopped = request.text_stop is not None and request.text_stop.push(token)
        except Exception as error:  # noqa: BLE001  a hook is foreign code: its failure ends its own request only
            return self._end(request, "failed", given, error=EngineError(f"the stop hook failed: {error}"))
        if stopped and request.num_generated >= request.params.min_tokens:
            return self._end(request, "stop", given)
        if request.num_tokens >= request.max_tokens_total:
            return self._end(request, "length", given)
        return given

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        given: Event | None = None,
        *,
        stop_token: int | None = None,
        error: Dsv4cError | None = None,
    ) -> Event:
        self.scheduler.remove(request)
        del self._requests[request.id]
        self._ended[reason] += 1
        end = request.ended(reason, stop_token=stop_token, error=error)
        return replace(given or Event(request.id), end=end)

    def _fail_step(self, spans: Sequence[Span], error: Exception) -> list[Event]:
        if isinstance(error, Dsv4cError):
            clear: Dsv4cError = error
        else:
            clear = EngineError(f"the step failed: {type(error).__name__}: {error}")
        return [self._end(s.request, "failed", error=clear) for s in spans if s.request.status == "running"]

    def stats(self, ahead: int = 0) -> EngineStats:
        """A snapshot for metrics; safe from any thread. `ahead` more requests wait outside."""
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + ahead,
            pages_used=self.pool.used_pages(),
            pages_total=self.pool.total_pages(),
            preemptions=self.scheduler.num_preemptions,
            steps=self._steps,
            step_tokens=self._step_tokens,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            step_s=self._step_s,
            executor_s=self._executor_s,
            last_step_s=self._last_step_s,
            ended=dict(self._ended),
        )

    def audit(self) -> None:
        """Proves that every page, slot and request is accounted for. Raises EngineError."""
        self.scheduler.audit()
        known = [*self.scheduler.running, *self.scheduler.waiting]
        if {r.id for r in known} != set(self._requests) or len(known) != len(self._requests):
            raise EngineError("the queues and the requests of the engine differ")
