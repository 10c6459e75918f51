"""What the router knows of a request: its `Task`, from arrival to end, and its `Attempt`, a life on certain workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dsv4c.runtime.cluster.placement import Member
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.service import Sink

Phase = Literal["prefilling", "transferring", "decoding"]
State = Literal["queued", "prefilling", "transferring", "decoding", "finished", "cancelled", "failed"]
PRESENT: tuple[State, ...] = ("queued", "prefilling", "transferring", "decoding")
ENDS: tuple[State, ...] = ("finished", "cancelled", "failed")


@dataclass(frozen=True)
class Policy:
    """How the router treats workers and requests. Seconds."""

    max_waiting: int = 512
    silence_s: float = 5.0
    patience_s: float = 30.0
    """How long requests wait for a worker that can serve them to be there at all."""
    budget_tokens: int | None = None
    """Tokens beside those a request has that a decode worker must hold; None: to its end."""


@dataclass(eq=False)
class Attempt:
    """A request on its way through workers. `id` is its name there; outputs for any other id are ignored.

    `queued_s`: what the request has waited for it. `granted`: the decode worker knows of it.
    """

    id: str
    task: Task
    decode: Member
    prefill: Member | None
    queued_s: float
    phase: Phase = "prefilling"
    granted: bool = False


@dataclass(eq=False)
class Task:
    """A request of a client. `delivered`: tokens that its sink has been given, which no attempt gives again."""

    number: int
    prompt: bytes
    num_prompt: int
    params: SamplingParams
    sink: Sink
    hashes: Sequence[int]
    made_s: float
    delivered: list[int] = field(default_factory=list)
    attempts: int = 0
    losses: int = 0
    attempt: Attempt | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in the queue: by priority, then in order of arrival, also when it comes back."""
        return self.params.priority, self.number

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + len(self.delivered)

    def held_tokens(self, budget: int | None, longest: int) -> int:
        """The most tokens that a decode worker must hold of it: to its end, or to the budget beside what there is."""
        asked = self.params.max_tokens
        end = longest if asked is None else min(longest, self.num_prompt + asked)
        return end if budget is None else min(end, self.num_tokens + budget)
