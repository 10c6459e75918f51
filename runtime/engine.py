"""The engine: requests in, events out, one synchronous step at a time.

    Engine(runner, pool, vocab_size, limits, eos ids)    or Engine.for_manifest(executor, ...) on the host
    engine.submit(request)      RequestError if it cannot be served; else it waits
    engine.step() -> [Event]    schedule -> launch step n + 1 -> collect step n -> tokens, events
    engine.cancel(id) -> Event  pages back at once
    engine.connect(...)         hooks for requests whose state is moved in or out (moving.py, arrivals.py)

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
from dataclasses import replace
from typing import NamedTuple

from dsv4c.artifact import Manifest
from dsv4c.errors import Dsv4cError, EngineError, RequestError, RunnerBroken
from dsv4c.runtime.arrivals import Arrivals, check_first, first_event
from dsv4c.runtime.batch import step_inputs
from dsv4c.runtime.blockkeys import KVEvent
from dsv4c.runtime.checks import check_tokens
from dsv4c.runtime.drafters import drafter_of
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.follower import Follower, Stage
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.limits import limits_for
from dsv4c.runtime.moving import First, Progress, Transfers
from dsv4c.runtime.poolsizes import PoolSizes, snapshot_states
from dsv4c.runtime.request import Event, FinishReason, Request, with_ends
from dsv4c.runtime.runner import Chosen, Executor, HostRunner, StepRunner, Ticket
from dsv4c.runtime.sampler import TokenLogprob
from dsv4c.runtime.scheduler import Limits, Scheduler, Span
from dsv4c.runtime.speculation import Speculation
from dsv4c.runtime.takeover import begin_sampling


class _Flight(NamedTuple):
    """A step that was launched and not collected yet."""

    spans: Sequence[Span]
    ticket: Ticket
    followed: Sequence[Stage]
    """Of the requests that are to be kept."""


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
        self._arrivals = Arrivals(self.scheduler, runner)
        self._follower: Follower | None = None
        self._stalled = False
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
        drafter = drafter_of(executor, manifest) if limits.speculative_tokens else None
        runner = HostRunner(
            executor, inputs, pool, symbols, vocab_size=manifest.vocab_size, states=states, drafter=drafter
        )
        return cls(
            runner, pool=pool, vocab_size=manifest.vocab_size, limits=limits, eos_token_ids=eos_token_ids,
            speculation=speculation,
        )  # fmt: skip

    def renewed(self) -> Engine:
        """A new engine over the same runner and pool that has counted nothing yet. This one must have no work left."""
        if self.has_work or self.scheduler.holders:
            raise EngineError("an engine with requests cannot be renewed")
        limits, stops = self.scheduler.limits, self.eos_token_ids
        return Engine(
            self.runner, pool=self.pool, vocab_size=self.vocab_size, limits=limits, eos_token_ids=stops,
            speculation=self.speculation.renewed(),
        )  # fmt: skip

    def connect(self, *, transfers: Transfers | None = None, progress: Progress | None = None) -> None:
        """Sets the hooks for moving requests and for those to be kept; before the first request."""
        if self.has_work or self.scheduler.holders:
            raise EngineError("hooks are set before the first request")
        self._arrivals.transfers = transfers
        self._follower = self.scheduler.follower = None if progress is None else Follower(progress)
        if isinstance(self.runner, HostRunner):
            self.runner.on_mark = None if progress is None else progress.mark

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.pool.sizes.max_context

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or a step is in flight, if only to be dropped."""
        return self.scheduler.has_work or bool(self._flights)

    @property
    def idle(self) -> bool:
        """Whether a step has nothing to do until somebody calls: requests arrive, or wait for what holders have."""
        return not self._flights and (self._stalled or not (self.scheduler.waiting or self.scheduler.running))

    @property
    def kept(self) -> Mapping[str, Request]:
        """Requests that have ended and still have their slots and pages, by id."""
        return self.scheduler.holders.kept

    @property
    def arriving(self) -> Mapping[str, Request]:
        """Requests whose state is on its way in, by id."""
        return self.scheduler.holders.arriving

    @property
    def unsettled(self) -> Mapping[str, int]:
        """Slots that a transfer may still write though no request wants it any more, by request id."""
        return self.scheduler.holders.unsettled

    def check(self, request: Request, ahead: int = 0) -> None:
        """Raises RequestError if the request can never be served, or if the queue (and `ahead` more) is full.

        Changes nothing; safe from any thread.
        """
        if self.failure is not None:
            raise RequestError(self.failure.message, status=503, code="unavailable", hint=self.failure.hint)
        check_tokens(request.tokens(), request.params, self.vocab_size)
        if request.moving and (request.keep or self._arrivals.transfers is None):
            raise EngineError(f"{request} moves: to an engine that has transfers, and not to be kept")
        self.runner.check(request)
        self.scheduler.check(request, ahead)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises RequestError as `check` does, and if its id is in use."""
        if request.id in self._requests or request.id in self.scheduler.holders:
            raise RequestError(f"request id `{request.id}` is in use", param="request_id", code="invalid_value")
        self.check(request)
        begin_sampling(request, self.eos_token_ids)
        self.scheduler.submit(request)
        self._stalled = False
        self._requests[request.id] = request
        self._prompt_tokens += request.num_prompt

    def cancel(self, request_id: str) -> Event | None:
        """Ends a request in whatever state it is and frees its pages; None if it has ended already."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, "cancelled")

    def let_go(self, request_id: str) -> bool:
        """Gives back what a request that has ended keeps; False if that is nothing (any more)."""
        self._stalled = False
        return self.scheduler.holders.let_go(request_id)

    def arrived(self, request_id: str, first: First) -> list[Event]:
        """The state of a moving request is there: it goes on behind its `first` tokens, which its event brings.

        If it has ended meanwhile, what it held goes back. Raises EngineError if it was not moving.
        """
        self._stalled = False
        request = self._arrivals.take(request_id)
        if request is None:
            return []
        self.scheduler.arrive(request)
        error = check_first(request, first, self.vocab_size)
        if error is not None:
            return [self._end(request, "failed", error=error)]
        logprobs = first.logprobs or (None,) * len(first.tokens)
        return [self._take(request, first_event(request, first), first.tokens, logprobs)]

    def lost(self, request_id: str, *, busy: bool = False) -> list[Event]:
        """The state of a moving request will not come: it waits again, first of its equals, and is computed here.

        `busy`: its pages may still be written, until `settle`. If the request has ended meanwhile, what it held goes
        back, unless `busy`. Raises EngineError if it was not moving.
        """
        self._stalled = False
        request = self._arrivals.take(request_id, settle=not busy)
        if request is not None:
            self.scheduler.lose(request, busy=busy)
        return []

    def settle(self, request_id: str) -> None:
        """No transfer can write any more what a request left unsettled. Raises EngineError if it left nothing."""
        self._stalled = False
        self.scheduler.holders.settle(request_id)

    def fail_all(self, error: Dsv4cError) -> list[Event]:
        """Ends every request with this error."""
        return [self._end(request, "failed", error=error) for request in list(self._requests.values())]

    def step(self) -> list[Event]:
        """Launches one step, and collects the oldest in flight if more are than the runner's lag, or none was launched.

        Returns what was collected or failed, at most one event a request; nothing to do gives none.
        """
        began = time.perf_counter()
        preemptions, holders = self.scheduler.num_preemptions, self.scheduler.holders
        spans = self.scheduler.schedule()
        events = self._open(len(spans) > 0) if holders.opened else []
        if not spans and not self._flights:
            if self.scheduler.has_work and not holders:
                raise EngineError("requests wait, but the scheduler gives none of them a token")
            self._stalled = self.scheduler.num_preemptions == preemptions and not events
            return events
        if spans:
            events += self._launch(spans)
        if len(self._flights) > (self.runner.lag if spans else 0):
            events += self._collect()
            if spans and self._flights:
                events = self._finish(events)
            if holders.opened:
                events += self._open()
        self._last_step_s = time.perf_counter() - began
        if spans and self.speculation.max_tokens and all(s.decodes for s in spans):
            self.speculation.observe(len(spans), max(s.drafts for s in spans), self._last_step_s)
        self._step_s += self._last_step_s
        return events

    def _open(self, launching: bool = False) -> list[Event]:
        """Begins the transfers of arriving requests whose pages nothing in flight can write."""
        try:
            ready = self._arrivals.ready(len(self._flights), launching)
        except Exception as error:  # noqa: BLE001  the border to kernels, as in _launch
            return self._fail(list(self.scheduler.holders.opened.values()), error)
        for request in ready:
            self._arrivals.begin(request)
        return []

    def _launch(self, spans: Sequence[Span]) -> list[Event]:
        self._steps += 1
        self._step_tokens += sum(s.length for s in spans)
        followed = () if self._follower is None else self._follower.launching(spans, self.runner.lag)
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
        self._flights.append(_Flight(spans, ticket, followed))
        self._arrivals.launched += 1
        return []

    def _finish(self, events: list[Event]) -> list[Event]:
        """Launches what the newest step lacks; `collect` tries again if it fails. The events, with what went wrong."""
        began, flight = time.perf_counter(), self._flights[-1]
        try:
            self.runner.finish(flight.ticket)
            return events
        except Exception as error:  # noqa: BLE001  as in _launch
            return with_ends(events, self._fail_steps([flight.spans], error))
        finally:
            self._launch_s += time.perf_counter() - began

    def _collect(self) -> list[Event]:
        spans, ticket, followed = self._flights.popleft()
        self._arrivals.collected += 1
        chosen = self._wait(ticket)
        if not isinstance(chosen, Exception):
            if self._follower is not None:
                self._follower.computed(followed)
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
        """Ends the requests of these steps, or all there are and the engine if the runner is broken."""
        return self._fail([s.request for spans in steps for s in spans], error)

    def _fail(self, requests: Iterable[Request], error: Exception) -> list[Event]:
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
        alive = {r.id: r for r in requests if r.status != "ended"}
        return [self._end(request, "failed", error=clear) for request in alive.values()]

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
        first = request.num_generated == request.num_given
        event = Event(
            request.id,
            prompt_logprobs=tuple(request.prompt_logprobs) if first else (),
            cached_tokens=request.num_cached if first else 0,
            queued_s=request.first_step_s - request.made_s if first else 0.0,
        )
        return self._take(request, event, tokens, logprobs)

    def _take(
        self, request: Request, event: Event, tokens: Sequence[int | None], logprobs: Sequence[TokenLogprob | None]
    ) -> Event:  # fmt: skip
        """Adds tokens to a request and to its event, up to the one that ends it."""
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
        cursor = None if request.sampler is None else request.sampler.grammar
        if cursor is not None and cursor.fault is not None:  # even if its token ends the request: that was all left
            return self._end(request, "failed", given, error=cursor.fault)
        if token in request.stop_ids:
            return self._end(request, "stop", given, stop_token=token)
        try:
            stopped = request.text_stop is not None and request.text_stop.push(token)
        except Exception as error:  # noqa: BLE001  a hook is foreign code: its failure ends its own request only
            return self._end(request, "failed", given, error=EngineError(f"the stop hook failed: {error}"))
        if stopped and request.num_generated >= request.params.min_tokens:
            return self._end(request, "stop", given)
        if cursor is not None and cursor.over:
            return self._end(request, "stop", given)
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
        begun = request.status == "arriving" and request.id not in self.scheduler.holders.opened
        # one that was preempted with its last token in flight has ended well, and has nothing to keep
        keeps = request.keep and request.status == "running" and reason in ("stop", "length")
        if keeps:
            self.scheduler.keep(request)
        else:
            self.scheduler.remove(request)
        del self._requests[request.id]
        self._stalled = False
        self._ended[reason] += 1
        if request.keep and self._follower is not None:
            self._follower.ended(request, kept=keeps)
        if begun and self._arrivals.transfers is not None:
            self._arrivals.transfers.ended(request.id)
        end = request.ended(reason, stop_token=stop_token, error=error)
        return replace(given or Event(request.id), end=end)

    def track_blocks(self) -> None:
        """Has the prefix tree log what it stores and removes; what it has stored so far comes first."""
        if self.scheduler.prefix is not None:
            self.scheduler.prefix.tree.track()

    def block_events(self) -> list[KVEvent]:
        """What the prefix tree has stored and removed since the last call, in order. Empty if it is not tracked."""
        return [] if self.scheduler.prefix is None else self.scheduler.prefix.tree.events()

    def known_blocks(self) -> list[int]:
        """The hashes of all blocks that the prefix tree has, parents first. Empty if it is not tracked."""
        return [] if self.scheduler.prefix is None else self.scheduler.prefix.tree.hashes()

    def stats(self, ahead: int = 0) -> EngineStats:
        """A snapshot for metrics; safe from any thread. `ahead` more requests wait outside."""
        prefix = self.scheduler.prefix
        return EngineStats(
            running=len(self.scheduler.running), waiting=len(self.scheduler.waiting) + ahead,
            arriving=len(self.arriving), kept=len(self.kept), unsettled=len(self.unsettled),
            max_waiting=self.scheduler.limits.max_waiting, pages_used=self.pool.used_pages(),
            pages_total=self.pool.total_pages(), pages_cached=self.pool.idle_pages(),
            preemptions=self.scheduler.num_preemptions, steps=self._steps, step_tokens=self._step_tokens,
            prompt_tokens=self._prompt_tokens, prefix_queried_tokens=0 if prefix is None else prefix.num_queried,
            prefix_hit_tokens=0 if prefix is None else prefix.num_hit, generated_tokens=self._generated,
            failed_steps=self._failed_steps, step_s=self._step_s, launch_s=self._launch_s, wait_s=self._wait_s,
            last_step_s=self._last_step_s, speculation=self.speculation.stats(), ended=dict(self._ended),
        )  # fmt: skip

    def audit(self) -> None:
        """Proves that every page, slot, request and token in flight is accounted for. Raises EngineError."""
        self.scheduler.audit()
        known = [*self.scheduler.running, *self.scheduler.waiting, *self.arriving.values()]
        if {r.id for r in known} != set(self._requests) or len(known) != len(self._requests):
            raise EngineError("the queues and the requests of the engine differ")
        if len(self._flights) > self.runner.lag:
            raise EngineError(f"{len(self._flights)} steps are in flight, the runner's lag is {self.runner.lag}")
        inflight = Counter(id(s.request) for flight in self._flights for s in flight.spans if s.samples)
        for request in known:
            if request.num_inflight != inflight[id(request)]:
                raise EngineError(f"{request} expects {request.num_inflight} tokens, not {inflight[id(request)]}")
