"""Who computes what in the next step: continuous batching with chunked prefill. The policy, in one place:

    1. Every decoding request gets its one token, oldest first.
    2. What is left of the step's token budget goes to prompts being prefilled, oldest first, in chunks.
    3. What is then left admits waiting requests, by priority, and first come first served among equals; nobody
       overtakes the first of them. One is admitted when
       the pages it needs for all its tokens, on top of those its seniors still need for theirs, are free, or idle in
       the prefix cache, which also says where it resumes (reuse.py).
    4. Where pages run out, the newest running request is preempted: it loses its pages and its slot, returns to the
       front of its equals in the queue, and recomputes prompt and generated tokens later. Nobody is admitted in such a
       step.

A waiting request whose state is moved here is admitted by the same rule, but gets no span: it holds its slot and pages
among the holders (holders.py), as do requests that have ended and are kept. Pages of these are nobody's to take: where
they lack to the last running request, it waits, and the plan is empty.

The oldest running request can always preempt the others, and a request that would not fit alone is refused on
submission, so every step makes progress. Age is the order of admission, and preemption keeps it among equals.
Pages move here and only here: `schedule` grows, `commit` evicts, `remove` and preemption release. What one plan has
copied (`copies`) must be under way before its step is launched.

A step may be planned while the one before is in flight. A request whose token in flight is its last gets nothing more;
a preempted one is admitted when its token in flight is known, for the slot that sampled it is no longer its own. If
neither leaves anything to do, the plan is empty although there is work: the step in flight will bring it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dsv4c.errors import ConfigError, EngineError, RequestError
from dsv4c.runtime.checks import check_lengths
from dsv4c.runtime.holders import Holders
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.prefix import Pair
from dsv4c.runtime.request import Request
from dsv4c.runtime.reuse import Match, PrefixCache
from dsv4c.runtime.steplimits import Limits as Limits

_NO_ROWS = range(0)
OVERSHOOT = 8
"""Tokens beyond a block's end at which a snapshot of it can be taken: half of the spare rows of rings."""

DraftLengths = Callable[[int], int]
"""Requests that decode in a step -> the most drafts that it verifies of each."""


def no_drafts(requests: int) -> int:
    """One token a request and step."""
    return 0


def _awaits(request: Request, late_masks: bool) -> bool:
    """Whether nothing can be planned for a request before its tokens in flight are known.

    They are its last, or may be; or the number of its next token decides what is masked, and is not known; or they
    decide it themselves, by a grammar, and masks cannot be late.
    """
    if request.num_inflight and request.params.grammar is not None and not late_masks:
        return True
    if request.num_total + request.num_uncertain >= request.max_tokens_total:
        return True
    return request.num_uncertain > 0 and request.num_sampled < request.params.min_tokens


@dataclass(slots=True)
class Span:
    """Tokens [start, end) of a request, computed in one step. `samples`: they reach its last token, known or in flight.

    `prompt_rows`: positions whose logits are wanted for prompt log-probabilities. The logit rows of a span are
    these, then, if it samples, its last position and before it those that drafts follow.
    """

    request: Request
    start: int
    end: int
    samples: bool
    prompt_rows: range
    drafts: int = 0
    """Of the tokens, the last ones that are guesses: each is sampled again, and the step keeps those that agree."""
    floating: bool = False
    """Whether steps in flight may put it further: `start` and `end` are the least."""
    wanted: int = 0
    """Drafts to make for the next step."""

    @property
    def num_rows(self) -> int:
        """Rows of logits: of the prompt, and one for every token that the step may choose."""
        return len(self.prompt_rows) + (1 + self.drafts if self.samples else 0)

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def decodes(self) -> bool:
        """Whether it is a token and its drafts, each of which chooses the next."""
        return self.samples and self.length == 1 + self.drafts and not self.prompt_rows


class Watcher(Protocol):
    """Hears of slots that requests to be kept get and lose."""

    def admitted(self, request: Request) -> None: ...

    def preempted(self, request: Request) -> None: ...


class Scheduler:
    """The waiting and the running queue over one KVPool. Not thread-safe; knows no clock and no tensor."""

    def __init__(self, pool: KVPool, limits: Limits, lengths: DraftLengths = no_drafts) -> None:
        if limits.max_requests > pool.sizes.max_requests:
            raise ConfigError(
                f"`max_requests` is {limits.max_requests}, the pools have {pool.sizes.max_requests} slots",
                hint="make the pools larger or `max_requests` smaller",
            )
        self.pool = pool
        self.limits = limits
        self._lengths = lengths
        slack = OVERSHOOT if limits.speculative_tokens else 0
        self.prefix = PrefixCache(pool, slack) if limits.prefix_cache and pool.sizes.snapshots else None
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.holders = Holders(pool)
        self.follower: Watcher | None = None
        self.num_preemptions = 0
        self._wanted = 0
        self._longest = pool.longest()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.holders.arriving)

    def check(self, request: Request, ahead: int = 0) -> None:
        """Raises RequestError if the request can never be served (400, 503) or the queue is full (503).

        Reads nothing but limits and the queue's length, to which `ahead` is added; safe from any thread.
        """
        context, prompt, asked = self.pool.sizes.max_context, request.num_prompt, request.params.max_tokens
        check_lengths(prompt, asked, context, self._longest)
        if request.num_given and request.num_tokens >= (self._longest if asked is None else prompt + asked):
            raise RequestError(
                f"the {request.num_given} tokens generated so far leave none to generate",
                param="generated",
                code="invalid_value",
            )
        if request.scores_prompt and not self.limits.prompt_rows:
            raise RequestError(
                "this artifact computes too few logit rows for log-probabilities of the prompt",
                param="prompt_logprobs",
                code="unsupported",
                hint="lower the number of running requests",
            )
        if len(self.waiting) + ahead >= self.limits.max_waiting:
            raise RequestError(
                f"{self.limits.max_waiting} requests are waiting already",
                status=503,
                code="queue_full",
                hint="try again later",
            )

    def submit(self, request: Request) -> None:
        """Queues a new request. Raises RequestError as `check` does."""
        if request.status != "new":
            raise EngineError(f"request `{request.id}` was submitted before")
        self.check(request)
        asked = request.params.max_tokens
        request.max_tokens_total = request.num_prompt + asked if asked is not None else self._longest
        request.status = "waiting"
        self.waiting.insert(self._place(request.params.priority), request)

    def remove(self, request: Request) -> None:
        """Takes a request out that has not ended; its pages and slot go back. Its status becomes `ended`.

        Those of an arriving request whose transfer has begun stay unsettled.
        """
        if request.status == "waiting":
            self.waiting.remove(request)
        elif request.status == "running":
            self.running.remove(request)
            self._release(request)
        elif request.status == "arriving":
            self._leave(request, busy=request.id not in self.holders.opened)
        else:
            raise EngineError(f"request `{request.id}` is {request.status}, neither waiting nor running")
        request.status = "ended"

    def keep(self, request: Request) -> None:
        """Takes a running request out, which keeps its pages and slot. Its status becomes `ended`."""
        self.running.remove(request)
        if self.prefix is not None:
            self.prefix.leave(request)
        self.holders.keep(request)
        request.status = "ended"

    def arrive(self, request: Request) -> None:
        """The state of an arriving request is there: it runs, as the newest. `Request.append` is due."""
        self.holders.leave(request)
        request.num_computed = request.num_tokens
        request.moving = False
        request.status = "running"
        self.running.append(request)

    def lose(self, request: Request, *, busy: bool) -> None:
        """The state of an arriving request will not come: it goes to the front of its equals, to be computed.

        `busy`: its slot and pages may still be written, and stay unsettled.
        """
        self._leave(request, busy=busy)
        request.status = "waiting"
        request.moving = False
        self.waiting.insert(self._place(request.params.priority, first=True), request)

    def schedule(self) -> list[Span]:
        """The spans of the next step, with their pages in place; at most one a request; empty: nothing to do yet."""
        spans: dict[str, Span] = {}
        preempted, late = self.num_preemptions, self.limits.late_masks
        self._tokens_left = self.limits.max_step_tokens
        self._prompt_rows_left = self.limits.prompt_rows
        if self.prefix is not None:
            for request in self.running:
                if request.num_computed >= request.block_end:
                    self.prefix.advance(request)
        # decoding before prefilling, oldest first in both
        for request in self._decode(spans) + [r for r in self.running if r.pending > 1]:
            if request.status == "running" and self._tokens_left and not _awaits(request, late):
                self._extend(request, spans)
        while self.waiting and self.num_preemptions == preempted:
            first = self.waiting[0]
            count = len(self.running) + len(self.holders.arriving)
            if count == self.limits.max_requests or first.num_inflight or not self.pool.free_slots:
                break
            if not self._tokens_left and not first.moving:
                break
            match = self._match(first)
            if not self._has_room(first, match):
                break
            if first.moving:
                self._open(match)
            else:
                self._extend(self._admit(match), spans)
        if not self.limits.mixed_drafts and not all(s.decodes for s in spans.values()):
            for span in spans.values():
                span.end -= span.drafts
                span.drafts = 0
        return list(spans.values())

    def copies(self) -> Iterator[Sequence[Pair]]:
        """What `copy_states` must do before the next step is launched, call by call, each when the next is asked for.

        A call that fails is due again.
        """
        return iter(()) if self.prefix is None else self.prefix.copies()

    @property
    def copies_due(self) -> bool:
        """Whether `copies` would give any."""
        return self.prefix is not None and self.prefix.tree.has_copies

    def distrust(self) -> None:
        """Forgets what requests have left for others: it may be wrong."""
        if self.prefix is not None:
            self.prefix.clear()

    def commit(self, spans: Sequence[Span]) -> None:
        """Records that the spans were launched, and frees the window pages that no later step can read.

        `Request.append` is due for each span that samples.
        """
        for span in spans:
            span.request.num_computed = computed = span.end - span.drafts
            if span.samples:
                span.request.expect(span.drafts, span.wanted)
            self.pool.evict(span.request.slot, computed)

    def _decode(self, spans: dict[str, Span]) -> list[Request]:
        """Gives every decoding request that lacks no page its token, and drafts. Returns those that lack one.

        What `_extend` does, in few words: with hundreds of requests most of the host's time is spent here.
        """
        covers, lacking, tokens = self.pool.covers, [], 0
        late = self.limits.late_masks
        decoding = [r for r in self.running if r.pending == 1 and not _awaits(r, late)]
        most = self._wanted = self._lengths(max(1, len(decoding)))
        for request in decoding:
            start, end = request.num_computed, request.num_total
            floating = request.num_uncertain > 0
            # the last token that can be chosen is not computed: it ends the request
            wanted = most if self._drafted(request) else 0
            drafts = min(wanted, request.num_drafts, request.max_tokens_total - 1 - end - request.num_uncertain)
            if wanted:
                drafts = self._room_for_drafts(request, end + request.num_uncertain, drafts, wanted)
            if not covers(request.slot, end + request.num_uncertain):
                if not floating:  # else where it stands will be known after this step, and need fewer pages
                    lacking.append(request)
            elif request.params.prompt_logprobs is None or request.num_prompt < end:
                spans[request.id] = Span(request, start, end + drafts, True, _NO_ROWS, drafts, floating, wanted)
                tokens += 1 + (drafts if self.limits.mixed_drafts else 0)
            else:
                lacking.append(request)
        self._tokens_left -= tokens
        return lacking

    def _drafted(self, request: Request) -> bool:
        """Whether drafts are made for a request."""
        return not self.limits.late_masks or request.params.grammar is None

    def _room_for_drafts(self, request: Request, end: int, drafts: int, wanted: int) -> int:
        """Pages for drafts behind `end` tokens, if they are to be had; how many drafts can be verified.

        Those `wanted` for the next step are made on places behind; without pages they would be made from garbage.
        """
        made = min(end + drafts + wanted - 1, self.pool.sizes.max_context)
        if self.pool.covers(request.slot, made) or self.pool.grow(request.slot, made):
            return drafts
        return drafts if drafts and self.pool.grow(request.slot, end + drafts) else 0

    def _extend(self, request: Request, spans: dict[str, Span]) -> None:
        """Gives the request a span: as much as budget, logit rows and pages allow."""
        start = request.num_computed
        end = self._end_within_budget(request, start)
        if end == start:
            return  # this step's logit rows are spent; the first to ask for some always gets them
        if self.prefix is not None and end > start + 1:
            end = self.prefix.chunk_end(request, start, end)
        while (fit := self.pool.fit(request.slot, end)) <= start:
            if self.running == [request]:
                if self.holders:
                    return  # they will let go
                raise EngineError(f"{request} does not fit the empty pools: it should have been refused")
            victim = self.preempt_newest()
            dropped = spans.pop(victim.id, None)
            if dropped is not None:
                self._tokens_left += dropped.length - (0 if self.limits.mixed_drafts else dropped.drafts)
                self._prompt_rows_left += len(dropped.prompt_rows)
            if victim is request:
                return
        if self.prefix is not None:
            self.prefix.make_room(request, fit)
        self.pool.grow(request.slot, fit)
        drafted = self._drafted(request)
        if fit == request.num_total and self.limits.speculative_tokens and drafted:
            self._room_for_drafts(request, fit, 0, self.limits.speculative_tokens)
        rows = request.prompt_logprob_rows(start, fit)
        spans[request.id] = Span(request, start, fit, fit == request.num_total, rows, wanted=self._wanted * drafted)
        self._tokens_left -= fit - start
        self._prompt_rows_left -= len(rows)

    def _end_within_budget(self, request: Request, start: int) -> int:
        end = start + min(request.pending, self._tokens_left)
        rows = request.prompt_logprob_rows(start, end)
        if len(rows) > self._prompt_rows_left:
            end = rows.start + self._prompt_rows_left
        return end

    def _has_room(self, request: Request, match: Match) -> bool:
        """Whether all its tokens and the next fit beside what the running ones still need for theirs."""
        left = self.pool.available_pages()
        held = [(r.slot, self._reach(r)) for r in (*self.running, *self.holders.arriving.values())]
        for slot, tokens in [*held, (None, self._reach(request))]:
            for group, pages in self.pool.claim(slot, tokens).items():
                left[group] -= pages
        if self.prefix is not None:
            for group, pages in self.prefix.shared(match, kept=bool(self.holders)).items():
                left[group] += pages
        return min(left.values(), default=0) >= 0

    def _reach(self, request: Request) -> int:
        """The tokens that a request must be able to have in the pools."""
        budget = self.limits.budget_tokens
        return request.num_total if budget is None else min(request.num_total + budget, request.max_tokens_total)

    def _match(self, request: Request) -> Match:
        if self.prefix is None:
            return Match()
        return self.prefix.known(request) if request.moving else self.prefix.match(request)

    def _next(self) -> Request:
        """The first of the queue, with a slot."""
        request = self.waiting.popleft()
        slot = self.pool.admit()
        if slot is None:
            raise EngineError("no free slot for an admitted request")
        request.slot = slot
        return request

    def _admit(self, match: Match) -> Request:
        request = self._next()
        request.status = "running"
        self.running.append(request)
        if self.prefix is not None:
            self.prefix.admit(request, match)
        if request.keep and self.follower is not None:
            self.follower.admitted(request)
        return request

    def _open(self, match: Match) -> None:
        """Gives the first of the queue, a moving request, the pages of its state."""
        request = self._next()
        pages = {} if self.prefix is None else self.prefix.open(request, match)
        self.pool.open(request.slot, request.num_tokens, pages)
        if self.prefix is not None:
            self.prefix.make_room(request, request.num_tokens)
        if not self.pool.grow(request.slot, request.num_tokens):
            raise EngineError(f"{request} was admitted without room for it")
        self.holders.open(request)

    def _leave(self, request: Request, *, busy: bool) -> None:
        """Ends an arriving request's stay."""
        if self.prefix is not None:
            self.prefix.leave(request)
        self.holders.leave(request, busy=busy)
        if not busy:
            self.pool.release(request.slot)
        request.slot = request.num_computed = 0

    def preempt_newest(self) -> Request:
        """Takes the pages of the newest running request, and puts it back to the front of the queue."""
        request = self.running.pop()
        if request.keep and self.follower is not None:
            self.follower.preempted(request)
        self._release(request)
        request.status = "waiting"
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.insert(self._place(request.params.priority, first=True), request)
        return request

    def _place(self, priority: int, *, first: bool = False) -> int:
        """Where in the queue, which is sorted by priority: behind its equals, or before them."""
        if first:
            return next((i for i, r in enumerate(self.waiting) if r.params.priority >= priority), len(self.waiting))
        if not self.waiting or self.waiting[-1].params.priority <= priority:
            return len(self.waiting)
        return next(i for i, r in enumerate(self.waiting) if r.params.priority > priority)

    def _release(self, request: Request) -> None:
        if self.prefix is not None:
            self.prefix.leave(request)
        self.pool.release(request.slot)
        request.slot = request.num_computed = request.num_drafts = 0
        request.drafts = ()

    def audit(self) -> None:
        """Proves that pages, slots and queues agree. Raises EngineError that names the first fault."""
        if self.prefix is None:
            self.pool.audit()
        else:
            self.prefix.audit([*self.running, *self.holders.arriving.values()])
        self.holders.audit()
        slots = [*(r.slot for r in self.running), *self.holders.slots]
        taken = self.pool.sizes.max_requests - self.pool.free_slots
        if len(set(slots)) != len(slots) or 0 in slots or len(slots) != taken:
            raise EngineError(f"slots {slots} of the requests do not match the pool")
        for request in self.running:
            if request.status != "running" or any(self.pool.pages_needed(request.slot, request.num_computed).values()):
                raise EngineError(f"{request} runs without the pages of its tokens")
        for request in self.waiting:
            if request.status != "waiting" or request.slot or request.num_computed:
                raise EngineError(f"{request} waits with state")
