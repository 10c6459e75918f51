"""The engine: requests in, events out, one synchronous step at a time.

    Engine(runner, pool, vocab_size, limits, eos ids)    or Engine.for_manifest(executor, ...) on the host
    engine.submit(request)      RequestError if it cannot be served; else it waits
    engine.step() -> [Event]    schedule -> launch step n + 1 -> collect step n -> tokens, events
    engine.cancel(id) -> Event  pages back at once

A request ends exactly once: finished (`stop`, `length`), `cancelled`, or `failed` with an error. Stop strings are a
hook of the request (`TextStop`), called when the token is collected.

The runner says how far the host may be ahead (runner.py). With lag 0 a step is collected as soon as it is launched.
With lag 1 the host learns a step's tokens while the next step runs. What it can know ahead, it does: lengths. A
request that ends otherwise may have one more token in flight, which is dropped when it is collected: nothing after a
stop is ever delivered. A token belongs to the request object of its span, at the position behind that span; since a
preempted request is admitted again only when none of its tokens is in flight, tokens of two lives never mix.

Failures: what `launch` raises fails the requests of that step, what `collect` raises those of every step in flight,
each with the same clear error; the others go on, and the prefix cache forgets what it holds. RunnerBroken fails all
there are, and sets `failure`.
Not thread-safe: `EngineLoop` (loop.py) drives an Engine in a thread of its own.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dsv4c.artifact import Manifest
from dsv4c.errors import Dsv4cError, EngineError, RequestError, RunnerBroken
from dsv4c.runtime.batch import step_inputs
from dsv4c.runtime.blocks import BlockDrafter
from dsv4c.runtime.drafts import Drafter, MtpDrafter
from dsv4c.runtime.executor import ArtifactExecutor
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.limits import limits_for
from dsv4c.runtime.poolsizes import PoolSizes, snapshot_states
from dsv4c.runtime.request import Event, FinishReason, Request
from dsv4c.runtime.runner import Chosen, Executor, HostRunner, StepRunner, Ticket
from dsv4c.runtime.sampler import SamplerState, TokenLogprob
from dsv4c.runtime.scheduler import Limits, Scheduler, Span
from dsv4c.runtime.speculation import Speculation, SpeculationStats


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot: what is queued and held now, and totals since the engine was made. Seconds are wall time."""

    running: int = 0
    waiting: int = 0
    max_waiting: int = 0
    """How many may wait; more are refused. 0: not said."""
    pages_used: Mapping[str, int] = field(default_factory=dict)
    pages_total: Mapping[str, int] = field(default_factory=dict)
    pages_cached: Mapping[str, int] = field(default_factory=dict)
    """Pages that no request uses now, kept by the prefix cache until somebody needs the room."""
    preemptions: int = 0
    steps: int = 0
    step_tokens: int = 0
    """Tokens computed, recomputed ones included."""
    prompt_tokens: int = 0
    """Tokens of the prompts of requests that were accepted."""
    prefix_queried_tokens: int = 0
    """Tokens of prompts that were looked up in the prefix cache, once a request."""
    prefix_hit_tokens: int = 0
    """Of these, tokens that were found and not computed."""
    generated_tokens: int = 0
    failed_steps: int = 0
    """Steps that raised, whether or not any request was left to tell."""
    step_s: float = 0.0
    """Seconds in `Engine.step`."""
    launch_s: float = 0.0
    """Of these, in the runner's `launch`: with lag 0 the computation itself."""
    wait_s: float = 0.0
    """Of these, in the runner's `collect`: waiting for the device."""
    last_step_s: float = 0.0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    ended: Mapping[str, int] = field(default_factory=dict)
    """Requests ended, by reason."""

    @property
    def host_s(self) -> float:
        """Seconds in steps outside waiting; divided by `steps`, what the host spends on one."""
        return self.step_s - self.wait_s


def _drafter(executor: ArtifactExecutor, manifest: Manifest) -> Drafter:
    """The drafter of an artifact that is run on the host."""
    assert manifest.drafter is not None
    programs = manifest.programs
    if manifest.drafter.kind == "mtp":
        return MtpDrafter(executor, executor.beside(programs["mtp"]), programs["mtp"].inputs)
    absorb, draft = (programs[f"dspark.{name}"] for name in ("absorb", "draft"))
    inputs = {item.name: item for item in (*absorb.inputs, *draft.inputs)}.values()
    absorbing, drafting = executor.beside(absorb).outputs, executor.beside(draft).outputs
    return BlockDrafter(executor, absorbing, drafting, inputs, manifest.drafter)


class _Flight(NamedTuple):
    """A step that was launched and not collected yet."""

    spans: Sequence[Span]
    ticket: Ticket


class Engine:
    """Continuous batching over one runner. `pool` must be the one whose tables the runner reads."""

    def __init__(
        self,
        runner: StepRunner,
        *,
        pool: KVPool,
        vocab_size: int,
        limits: Limits | None = None,
        eos_token_ids: Sequence[int] = (),
        speculation: Speculation | None = None,
    ) -> None:
        self.runner = runner
        self.pool = pool
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        limits = limits or Limits(max_requests=pool.sizes.max_requests)
        self.speculation = speculation or Speculation(limits.speculative_tokens)
        self.scheduler = Scheduler(pool, limits, self.speculation.length)
        self.failure: RunnerBroken | None = None
        """Why nothing can be computed any more, or None while the runner is well."""
        self._flights: deque[_Flight] = deque()
        self._requests: dict[str, Request] = {}
        self._ended: dict[str, int] = {"stop": 0, "length": 0, "cancelled": 0, "failed": 0}
        self._steps = self._step_tokens = self._failed_steps = self._prompt_tokens = self._generated = 0
        self._step_s = self._launch_s = self._wait_s = self._last_step_s = 0.0

    @classmethod
    def for_manifest(
        cls,
        executor: Executor,
        manifest: Manifest,
        sizes: PoolSizes,
        *,
        limits: Limits | None = None,
        eos_token_ids: Sequence[int] = (),
        speculation: Speculation | None = None,
    ) -> Engine:
        """An engine for an artifact run on the host: inputs, groups, vocabulary and default limits are the manifest's.

        `sizes` must be those the executor's pools were made with. Raises ConfigError if limits or sizes exceed what
        its programs were made for.
        """
        limits = limits_for(manifest, sizes, limits)
        inputs, symbols = step_inputs(manifest)
        pool = KVPool(manifest.kv_groups, sizes)
        states = [p.name for group in snapshot_states(manifest.state_groups, pool.groups) for p in group.pools]
        drafter = None
        if limits.speculative_tokens:
            assert isinstance(executor, ArtifactExecutor)
            drafter = _drafter(executor, manifest)
        runner = HostRunner(
            executor, inputs, pool, symbols, vocab_size=manifest.vocab_size, states=states, drafter=drafter
        )
        return cls(
            runner, pool=pool, vocab_size=manifest.vocab_size, limits=limits, eos_token_ids=eos_token_ids,
            speculation=speculation,
        )  # fmt: skip

    def renewed(self) -> Engine:
        """A new engine over the same runner and pool that has counted nothing yet. This one must have no work left."""
        if self.has_work:
            raise EngineError("an engine with requests cannot be renewed")
        limits, stops = self.scheduler.limits, self.eos_token_ids
        return Engine(
            self.runner, pool=self.pool, vocab_size=self.vocab_size, limits=limits, eos_token_ids=stops,
            speculation=self.speculation.renewed(),
        )  # fmt: skip

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.pool.sizes.max_context

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or a step is in flight, if only to be dropped."""
        return self.scheduler.has_work or bool(self._flights)

    def check(self, request: Request, ahead: int = 0) -> None:
        """Raises RequestError if the request can never be served, or if the queue (and `ahead` more) is full.

        Changes nothing; safe from any thread.
        """
        if self.failure is not None:
            raise RequestError(self.failure.message, status=503, code="unavailable", hint=self.failure.hint)
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
        self.runner.check(request)
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
        """Launches one step, and collects the oldest in flight if more are than the runner's lag, or none was launched.

        Returns what was collected or failed, at most one event a request; nothing to do gives none.
        """
        began = time.perf_counter()
        spans = self.scheduler.schedule()
        if not spans and not self._flights:
            if self.has_work:
                raise EngineError("requests wait, but the scheduler gives none of them a token")
            return []
        events = self._launch(spans) if spans else []
        if len(self._flights) > (self.runner.lag if spans else 0):
            events += self._collect()
        self._last_step_s = time.perf_counter() - began
        if spans and self.speculation.max_tokens and all(s.decodes for s in spans):
            self.speculation.observe(len(spans), max(s.drafts for s in spans), self._last_step_s)
        self._step_s += self._last_step_s
        return events

    def _launch(self, spans: Sequence[Span]) -> list[Event]:
        self._steps += 1
        self._step_tokens += sum(s.length for s in spans)
        began = time.perf_counter()
        try:
            for pairs in self.scheduler.copies():
                self.runner.copy_states(pairs)
            ticket = self.runner.launch(spans)
        except Exception as error:  # noqa: BLE001  the border to kernels: what they raise ends this step's requests
            return self._fail_steps([spans], error)
        finally:
            self._launch_s += time.perf_counter() - began
        for span in spans:
            if not span.request.first_step_s:
                span.request.first_step_s = began
        self.scheduler.commit(spans)
        self._flights.append(_Flight(spans, ticket))
        return []

    def _collect(self) -> list[Event]:
        spans, ticket = self._flights.popleft()
        chosen = self._wait(ticket)
        if not isinstance(chosen, Exception):
            return self._record(spans, chosen)
        events = self._fail_steps([spans, *(f.spans for f in self._flights)], chosen)
        while self._flights:  # to be dropped, before new requests share a step's fate with them
            events += self._collect()
        return events

    def _wait(self, ticket: Ticket) -> Chosen | Exception:
        began = time.perf_counter()
        try:
            return self.runner.collect(ticket)
        except Exception as error:  # noqa: BLE001  as in _launch; the steps in flight read what this one wrote
            return error
        finally:
            self._wait_s += time.perf_counter() - began

    def _record(self, spans: Sequence[Span], chosen: Chosen) -> list[Event]:
        """Hands a step's results to its requests; those of requests that have ended meanwhile are dropped."""
        for span in spans if chosen.prompt else ():
            span.request.gather_prompt(span.prompt_rows, chosen.prompt.get(span.request.id, ()))
        sampling = [s for s in spans if s.samples]
        if any(s.drafts for s in sampling):
            self.speculation.record([(s.drafts, len(t) - 1) for s, t in zip(sampling, chosen.tokens, strict=True)])
        for span, drafts in zip(sampling, chosen.drafts, strict=True) if chosen.drafts else ():
            span.request.drafts, span.request.num_drafts = drafts, len(drafts)
        found = zip(sampling, chosen.tokens, chosen.logprobs, strict=True)
        return [self._accept(*item) for item in found if item[0].request.status != "ended"]

    def _fail_steps(self, steps: Iterable[Sequence[Span]], error: Exception) -> list[Event]:
        """Ends the requests of these steps, or all of them and the engine if the runner is broken."""
        self._failed_steps += 1
        self.scheduler.distrust()
        if isinstance(error, RunnerBroken):
            self.failure = error
            self._flights.clear()
            return self.fail_all(error)
        if isinstance(error, Dsv4cError):
            clear: Dsv4cError = error
        else:
            clear = EngineError(f"the step failed: {type(error).__name__}: {error}")
        requests = {s.request.id: s.request for spans in steps for s in spans if s.request.status != "ended"}
        return [self._end(request, "failed", error=clear) for request in requests.values()]

    def _accept(
        self, span: Span, tokens: Sequence[int | None], logprobs: Sequence[TokenLogprob | None]
    ) -> Event:  # fmt: skip
        """Adds what a step chose to its request, up to the token that ends it; None: the logits were no numbers."""
        request = span.request
        if not span.floating and span.end - span.drafts != request.num_tokens:
            raise EngineError(f"{request} got token {span.end - span.drafts}, which is not its next")
        if not 1 <= len(tokens) <= 1 + span.drafts:
            raise EngineError(f"{request} got {len(tokens)} tokens of a step with {span.drafts} drafts")
        request.arrive(len(tokens), span.drafts)
        first = request.num_generated == 0
        event = Event(
            request.id,
            prompt_logprobs=tuple(request.prompt_logprobs) if first else (),
            cached_tokens=request.num_cached if first else 0,
            queued_s=request.first_step_s - request.made_s if first else 0.0,
        )
        for token, logprob in zip(tokens, logprobs, strict=True):
            if token is None:
                what = " or its grammar lets nothing follow" if request.params.grammar is not None else ""
                error = EngineError(f"the logits after {request.num_tokens} tokens hold NaN or infinity{what}")
                self.scheduler.distrust()
                return self._end(request, "failed", event if event.tokens else None, error=error)
            request.append(token)
            self._generated += 1
            if request.sampler is not None:
                request.sampler.accept(token)
            more = event.logprobs if logprob is None else (*event.logprobs, logprob)
            event = replace(event, tokens=(*event.tokens, token), logprobs=more)
            ended = self._ends(request, token, event)
            if ended is not None:
                return ended
        return event

    def _ends(self, request: Request, token: int, given: Event) -> Event | None:
        """The last event of the request if its newest token ends it."""
        if token in request.stop_ids:
            return self._end(request, "stop", given, stop_token=token)
        try:
            stopped = request.text_stop is not None and request.text_stop.push(token)
        except Exception as error:  # noqa: BLE001  a hook is foreign code: its failure ends its own request only
            return self._end(request, "failed", given, error=EngineError(f"the stop hook failed: {error}"))
        if stopped and request.num_generated >= request.params.min_tokens:
            return self._end(request, "stop", given)
        cursor = None if request.sampler is None else request.sampler.grammar
        if cursor is not None and cursor.over:
            if cursor.fault is None:
                return self._end(request, "stop", given)
            return self._end(request, "failed", given, error=cursor.fault)
        if request.num_tokens >= request.max_tokens_total:
            return self._end(request, "length", given)
        return None

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

    def stats(self, ahead: int = 0) -> EngineStats:
        """A snapshot for metrics; safe from any thread. `ahead` more requests wait outside."""
        prefix = self.scheduler.prefix
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + ahead,
            max_waiting=self.scheduler.limits.max_waiting,
            pages_used=self.pool.used_pages(),
            pages_total=self.pool.total_pages(),
            pages_cached=self.pool.idle_pages(),
            preemptions=self.scheduler.num_preemptions,
            steps=self._steps,
            step_tokens=self._step_tokens,
            prompt_tokens=self._prompt_tokens,
            prefix_queried_tokens=0 if prefix is None else prefix.num_queried,
            prefix_hit_tokens=0 if prefix is None else prefix.num_hit,
            generated_tokens=self._generated,
            failed_steps=self._failed_steps,
            step_s=self._step_s,
            launch_s=self._launch_s,
            wait_s=self._wait_s,
            last_step_s=self._last_step_s,
            speculation=self.speculation.stats(),
            ended=dict(self._ended),
        )

    def audit(self) -> None:
        """Proves that every page, slot, request and token in flight is accounted for. Raises EngineError."""
        self.scheduler.audit()
        known = [*self.scheduler.running, *self.scheduler.waiting]
        if {r.id for r in known} != set(self._requests) or len(known) != len(self._requests):
            raise EngineError("the queues and the requests of the engine differ")
        if len(self._flights) > self.runner.lag:
            raise EngineError(f"{len(self._flights)} steps are in flight, the runner's lag is {self.runner.lag}")
        inflight = Counter(id(s.request) for flight in self._flights for s in flight.spans if s.samples)
        for request in known:
            if request.num_inflight != inflight[id(request)]:
                raise EngineError(f"{request} expects {request.num_inflight} tokens, not {inflight[id(request)]}")
