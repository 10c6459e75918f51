"""When the transfer of an arriving request may begin, and what it brings.

Its slot and pages were somebody else's until just now. A step in flight may still write them, for a request that has
ended meanwhile, and so may copies of states that are queued or on their way. What is launched later is ordered behind
by the runner; a transfer is not. So it begins when every step that was launched before has been collected, and with it
the copies in front of it; or, where nothing is in flight, once the copies have run.
"""

from __future__ import annotations

import time

from dsv4c.errors import EngineError
from dsv4c.runtime.moving import Arrival, First, Transfers
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.runner import StepRunner
from dsv4c.runtime.scheduler import Scheduler


class Arrivals:
    """Of one engine, which counts the steps that it has `launched` and `collected`."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner) -> None:
        self.transfers: Transfers | None = None
        self.launched = 0
        self.collected = 0
        self._scheduler = scheduler
        self._runner = runner
        self._behind: dict[Request, int] = {}
        """The number of the step behind which a request's transfer begins."""

    def ready(self, flights: int, launching: bool) -> list[Request]:
        """Takes out those that can begin. `flights`: steps in flight; `launching`: one more is about to be launched.

        What it raises is the runner's, and leaves all of them.
        """
        opened = self._scheduler.holders.opened
        if not flights:
            for pairs in self._scheduler.copies():
                self._runner.copy_states(pairs)
            self._runner.synchronize()
        out = []
        for request in list(opened.values()):
            behind = self._behind.setdefault(request, self.launched + launching)
            if not flights or (behind <= self.collected and not self._scheduler.copies_due):
                out.append(opened.pop(request.id))
        self._behind = {request: self._behind[request] for request in opened.values()}
        return out

    def begin(self, request: Request) -> None:
        """Tells `transfers` where its state belongs."""
        if self.transfers is None:
            raise EngineError(f"{request} moves, and the engine has no transfers")
        if not request.first_step_s:
            request.first_step_s = time.perf_counter()
        tables = self._scheduler.pool.columns_of(request.slot)
        arrival = Arrival(request, request.slot, request.num_computed, request.num_tokens, tables)
        self.transfers.begin(arrival)

    def take(self, request_id: str, *, settle: bool = True) -> Request | None:
        """The arriving request whose transfer is over; None if it has ended meanwhile, and is settled then."""
        holders = self._scheduler.holders
        request = holders.arriving.get(request_id)
        if request is not None and request_id not in holders.opened:
            return request
        if request is not None or request_id not in holders.unsettled:
            raise EngineError(f"request `{request_id}` is not on its way in")
        if settle:
            holders.settle(request_id)
        return None


def first_event(request: Request, first: First) -> Event:
    """The event of a moved request's first tokens, without them."""
    request.prompt_logprobs = list(first.prompt_logprobs)
    return Event(
        request.id,
        prompt_logprobs=tuple(first.prompt_logprobs),
        cached_tokens=first.cached_tokens,
        queued_s=request.first_step_s - request.made_s,
    )


def check_first(request: Request, first: First, vocab_size: int) -> EngineError | None:
    """What is wrong with the first tokens of a moved request."""
    if not first.tokens or not 0 <= min(first.tokens) <= max(first.tokens) < vocab_size:
        return EngineError(f"the tokens that came with {request} are no tokens: {list(first.tokens)[:8]}")
    wanted = len(first.tokens) if request.params.logprobs is not None else 0
    if len(first.logprobs) != wanted:
        return EngineError(f"{request} came with {len(first.logprobs)} log-probabilities, not {wanted}")
    wanted = request.num_prompt if request.scores_prompt else 0
    if len(first.prompt_logprobs) != wanted:
        return EngineError(f"{request} came with {len(first.prompt_logprobs)} log-probabilities of its prompt")
    return None
