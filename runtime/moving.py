"""What an engine tells those who move a request's state in or out of its pools, and what they tell it.

    out   Request(keep=True) runs as any other. Progress hears when it is admitted, what each step will make final, what
          has become final, and how it ended. Ended by `stop` or `length`, its slot and pages are kept as they are until
          `Engine.let_go`
    in    Request(moving=True) is not computed: it gets a slot and pages, and Transfers is told where its state belongs.
          Then `Engine.arrived`, with the tokens chosen elsewhere, makes it a running request, or `Engine.lost` puts it
          back to the front of the queue, to be computed here

Both hooks are called in the engine's thread and must not call back into the engine (but see `Transfers.ended`). What
they raise is a fault of the engine. Lengths and positions are in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dsv4c.runtime.request import Request
from dsv4c.runtime.sampler import TokenLogprob


@dataclass(frozen=True, slots=True)
class Arrival:
    """Where the state of a moving request belongs: that of its first `target` tokens.

    `tables`: group -> first column, and its pages from there to `target`. Groups without a horizon begin at column 0,
    and tokens [0, `start`) of theirs are there already, on pages that are shared: nobody may write them. Of groups with
    a horizon there are the pages that token `target` and later ones read, all to be filled. State rows are `slot`.
    """

    request: Request
    slot: int
    start: int
    target: int
    tables: Mapping[str, tuple[int, tuple[int, ...]]]


class First(Protocol):
    """The first tokens of a moved request, chosen where its prompt was computed. An Event is one."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def logprobs(self) -> Sequence[TokenLogprob]: ...

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob | None]: ...

    @property
    def cached_tokens(self) -> int: ...


class Transfers(Protocol):
    """Fills the pages of moving requests."""

    def begin(self, arrival: Arrival, /) -> None:
        """The pages are the request's, and no step or copy launched before can write them any more."""

    def ended(self, request_id: str, /) -> None:
        """The request has ended after `begin`. Its slot and pages stay until `Engine.settle`, which this may call."""


class Progress(Protocol):
    """Follows requests that are to be kept."""

    def admitted(self, request: Request, /) -> None:
        """It has its slot, for the first time or again."""

    def launching(self, request: Request, end: int, /) -> None:
        """A step is about to be launched that makes its first `end` tokens final; page tables are that step's."""

    def mark(self, number: int, /) -> None:
        """During a step on the host: what it writes to the pools of mark `number` (marks.py) is there."""

    def computed(self, request: Request, tokens: int, /) -> None:
        """The state of its first `tokens` tokens lies in every pool and will not change."""

    def preempted(self, request: Request, /) -> None:
        """Its slot and pages are about to go. It comes back by `admitted`, unless it ends."""

    def ended(self, request: Request, complete: bool, /) -> None:
        """It has ended. `complete`: by `stop` or `length`, with its state in the pools, and is kept."""
