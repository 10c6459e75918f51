"""The way of every request through workers, from the queue to its end: what router.py's docstring says, step by step.

Everything here happens under the router's lock; messages leave by links that write in threads of their own.
"""

from __future__ import annotations

import bisect
import dataclasses
import secrets
from collections import Counter
from collections.abc import Callable, Sequence

from dsv4c.errors import Dsv4cError, EngineError, RequestError
from dsv4c.runtime.cluster import wire
from dsv4c.runtime.cluster.lifecycle import Attempt, Policy, State, Task
from dsv4c.runtime.cluster.placement import Member, Need, Place, place
from dsv4c.runtime.outputs import outputs_of
from dsv4c.runtime.request import Event
from dsv4c.runtime.service import Output

MOST_LOSSES = 5  # workers that one request may lose: it may well be what ends them
_REFUSED_S = 0.25  # a worker that refused what it should hold is given nothing for so long


def send(member: Member, message: wire.ToWorker) -> None:
    """Tells a worker something."""
    member.wire.send(wire.encode(message))


class Journeys:
    """All requests of a router, and the workers that they may be on. Not thread-safe."""

    def __init__(self, policy: Policy, block: int, longest: int, clock: Callable[[], float]) -> None:
        """`block`: tokens of a block of the prefix cache; `longest`: tokens that any request can reach."""
        self.policy = policy
        self.longest = longest
        self.members: list[Member] = []
        self.tasks: dict[int, Task] = {}
        self.queue: list[Task] = []
        self.attempts: dict[str, Attempt] = {}
        self.ended: Counter[State] = Counter()
        self.retried = self.placed_tokens = self.placed_cached_tokens = 0
        """Attempts that were taken back; tokens of prompts that were placed, and those found where they were placed."""
        self._block = block
        self._clock = clock
        self._session = secrets.token_hex(4)

    def add(self, task: Task) -> None:
        """Queues a new request."""
        self.tasks[task.number] = task
        bisect.insort(self.queue, task, key=_rank)
        self.place()

    def place(self) -> None:
        """Sends what waits on its way, first come first served: nobody overtakes the first."""
        now = self._clock()
        while self.queue:
            task = self.queue[0]
            held = task.held_tokens(self.policy.budget_tokens, self.longest)
            found = place(self.members, Need(task.num_tokens, held, task.hashes, self._block), now)
            if found is None:
                return
            del self.queue[0]
            self._begin(task, found, held, now)

    def _begin(self, task: Task, found: Place, held: int, now: float) -> None:
        """The next attempt of a request, on these workers."""
        task.attempts += 1
        name = f"{self._session}-{task.number}-{task.attempts}"
        attempt = Attempt(name, task, found.decode, found.prefill, now - task.made_s)
        task.attempt = self.attempts[name] = attempt
        self.placed_tokens += task.num_tokens
        self.placed_cached_tokens += found.cached_tokens
        uncomputed = task.num_tokens - found.cached_tokens
        if found.prefill is None:
            found.decode.give(name, found.decode.claim_of(held), uncomputed)
            attempt.granted, attempt.phase = True, "decoding"
            send(found.decode, wire.Decode(self._job(attempt)))
        else:
            found.decode.give(name, found.decode.claim_of(held))
            found.prefill.give(name, found.prefill.claim_of(task.num_tokens + 1), uncomputed)
            send(found.prefill, wire.Prefill(self._job(attempt)))

    def _job(self, attempt: Attempt) -> wire.Job:
        task = attempt.task
        params = task.params if not task.delivered else dataclasses.replace(task.params, prompt_logprobs=None)
        generated, grammar = wire.packed(task.delivered), wire.structure_of(params.grammar)
        return wire.Job(attempt.id, task.prompt, wire.sampling_of(params), generated, grammar)

    def granted(self, member: Member, message: wire.Granted) -> None:
        attempt = self.attempts.get(message.id)
        if attempt is None or attempt.prefill is not member or attempt.granted:
            return  # it was taken back meanwhile, of which the worker hears
        attempt.granted = True
        send(attempt.decode, wire.Decode(self._job(attempt), message.handle))

    def handed_over(self, member: Member, message: wire.Handover) -> None:
        attempt = self.attempts.get(message.id)
        if attempt is None or attempt.prefill is not member:
            return
        attempt.phase = "transferring"
        member.uncomputed.pop(attempt.id, None)
        send(attempt.decode, wire.Handed(message))

    def said(self, member: Member, spoken: wire.Spoken) -> None:
        attempt = self.attempts.get(spoken.id)
        if attempt is None:
            return
        if member is attempt.decode:
            self._deliver(attempt, spoken)
        elif member is attempt.prefill and spoken.end is not None:
            self._prefill_failed(attempt, wire.end_of(spoken.end).error)

    def _deliver(self, attempt: Attempt, spoken: wire.Spoken) -> None:
        """Hands what a decode worker gave to the client."""
        task = attempt.task
        if attempt.prefill is not None or attempt.phase != "decoding" or not task.delivered:
            self._arrived(attempt)
        end = None if spoken.end is None else wire.end_of(spoken.end)
        again = end is not None and (end.reason == "cancelled" or _passing(end.error))  # by the worker, for its reasons
        if task.delivered and end is None and not spoken.logprobs:  # most of all: in few words
            outputs = [Output(token) for token in spoken.tokens]
        else:
            event = _first_time(wire.event_of(spoken), attempt)
            outputs = outputs_of(dataclasses.replace(event, end=None) if again else event)
        task.delivered.extend(spoken.tokens)
        if not again or spoken.tokens:
            self._give(task, outputs)
        if end is None:
            self._rebook(attempt)
        elif again:
            attempt.decode.refuses_until_s = self._clock() + _REFUSED_S
            self._retry(attempt, end.error)
        else:
            self.finish(task, "failed" if end.reason == "failed" else "finished")
            self.place()

    def _arrived(self, attempt: Attempt) -> None:
        """The decode worker has the prompt: what the prefill worker keeps of it is needed no more."""
        attempt.phase = "decoding"
        attempt.decode.uncomputed.pop(attempt.id, None)
        if attempt.prefill is not None:
            send(attempt.prefill, wire.Cancel(attempt.id))
            attempt.prefill.take(attempt.id)
            attempt.prefill = None
            self.place()

    def _give(self, task: Task, outputs: Sequence[Output]) -> None:
        try:
            for output in outputs:
                task.sink(output)
        except Exception:  # noqa: BLE001  a reader that fails has gone: its request ends, the others go on
            self.finish(task, "cancelled")

    def _rebook(self, attempt: Attempt) -> None:
        """Its claim moves along with the tokens it has, if it was given room for some of them only."""
        budget, task, member = self.policy.budget_tokens, attempt.task, attempt.decode
        if budget is not None and len(task.delivered) % 32 == 0 and attempt.id in member.given:
            member.rebook(attempt.id, member.claim_of(task.held_tokens(budget, self.longest)))

    def _prefill_failed(self, attempt: Attempt, error: Dsv4cError | None) -> None:
        """A prefill worker ended a prompt before it was computed."""
        prefill = attempt.prefill
        assert prefill is not None
        prefill.take(attempt.id)
        attempt.prefill = None
        if error is not None and not _passing(error):
            self.finish(attempt.task, "failed", error)
        elif attempt.granted:
            send(attempt.decode, wire.Alone(attempt.id, "the prefill worker gave it up"))
        else:
            prefill.refuses_until_s = self._clock() + _REFUSED_S
            self._retry(attempt, error)
        self.place()

    def survive(self, attempt: Attempt, lost: Member) -> None:
        """One of the workers of an attempt is lost."""
        if lost is attempt.prefill and attempt.granted:
            attempt.prefill = None
            send(attempt.decode, wire.Alone(attempt.id, "the prefill worker is lost"))
        else:
            self._retry(attempt, None)

    def _retry(self, attempt: Attempt, error: Dsv4cError | None) -> None:
        """Ends an attempt; its request comes back to the front of the queue, unless it has lost too many workers."""
        task = attempt.task
        if task.attempt is not attempt:
            return  # its client has gone with the last output
        self._withdraw(attempt)
        task.losses += 1
        self.retried += 1
        bisect.insort(self.queue, task, key=_rank)
        if task.losses > MOST_LOSSES:
            why = f": {error.message}" if error is not None else ""
            self.finish(task, "failed", EngineError(f"the request was given up after {task.losses} attempts{why}"))

    def _withdraw(self, attempt: Attempt) -> None:
        """Takes an attempt back from its workers."""
        del self.attempts[attempt.id]
        attempt.task.attempt = None
        for member in (attempt.decode, attempt.prefill):
            if member is not None:
                member.take(attempt.id)
                if not member.lost:
                    send(member, wire.Cancel(attempt.id))

    def finish(self, task: Task, state: State, error: Dsv4cError | None = None) -> None:
        """Forgets a request, which has ended in one way or another; with an error, which its client is told."""
        if self.tasks.pop(task.number, None) is None:
            return
        self.ended[state] += 1
        if task.attempt is not None:
            self._withdraw(task.attempt)
        else:
            self.queue.remove(task)
        if error is not None:
            self._give(task, [Output(finish_reason="error", error=error)])


def _rank(task: Task) -> tuple[int, int]:
    return task.rank


def _passing(error: Dsv4cError | None) -> bool:
    """Whether another worker, or the same one later, may well do what failed."""
    return isinstance(error, RequestError) and error.status == 503


def _first_time(event: Event, attempt: Attempt) -> Event:
    """The event with what only a request's first token brings."""
    if attempt.task.delivered:
        return dataclasses.replace(event, prompt_logprobs=(), cached_tokens=0, queued_s=0.0)
    return dataclasses.replace(event, queued_s=event.queued_s + attempt.queued_s if event.tokens else 0.0)
