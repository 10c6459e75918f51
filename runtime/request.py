"""One request: its tokens, where it stands, and the events it gives.

    new --submit--> waiting --admit--> running --stop | length--> finished
                     ^  |  ^              |  ^
                     |  |  +--- preempt --+  |     from any of them: cancelled, or failed with a reason
                     |  +-- open --> arriving +
                     +---- lost ---------+         of a request whose state is moved here (moving.py)

A request ends in exactly one way and then holds no page and no slot, unless it is to be kept: until somebody lets it
go. Tokens generated so far, the sampler's state and the text hook live here, outside the pools, so that a preempted
request goes on as if nothing had happened. What another engine has generated counts in everything as if this one had,
but gives no event.

A token in flight is being chosen by a step that was launched and not yet collected: its position is taken, its id not
known (-1). Schedules and sampling count it as there, events and ends do not. A step that verifies drafts brings one
token at least; how many more is known when it is collected (`num_uncertain`), and until then every count is the least.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from dsv4c.errors import Dsv4cError
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.sampler import SamplerState, TokenLogprob

FinishReason = Literal["stop", "length", "cancelled", "failed"]
Status = Literal["new", "waiting", "arriving", "running", "ended"]

NEVER = 2**62
"""A number of tokens that no request reaches."""


class TextStop(Protocol):
    """Stop strings, injected above the token level; called in the engine's thread right after a token is chosen.

    `push` gets every generated token once, in order, stop tokens excepted, and says whether the text it completes
    ends the request. The request then finishes with reason `stop` in the same step: no later token is computed or
    delivered. Before `min_tokens` tokens the answer is ignored. An exception fails this request alone.
    """

    def push(self, token_id: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class End:
    """How a request ended. `stop_token` is the stop token that ended it, if one did; its text is not wanted."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    stop_token: int | None = None
    error: Dsv4cError | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What a step gave one request. The last event of a request, and no other, has an `end`.

    `tokens`: newly generated ids, a stop token included. `logprobs`: one for each, if asked for.
    `prompt_logprobs`: one for each token of the prompt, if asked for, all with the first event that has a token;
    that of the prompt's first token is None, as nothing predicts it. `cached_tokens`: of the prompt, those that were
    not computed; `queued_s`: seconds from the request's making to its first step. Both come with the first event that
    has a token, else 0.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0
    queued_s: float = field(default=0.0, compare=False)
    end: End | None = None


def with_ends(events: Sequence[Event], ends: Sequence[Event]) -> list[Event]:
    """Events of a step, and ends that came behind: still at most one a request."""
    late = {event.request_id: event for event in ends}
    told = [dataclasses.replace(e, end=late.pop(e.request_id).end) if e.request_id in late else e for e in events]
    return [*told, *late.values()]


class Request:
    """A prompt with its parameters, and everything the engine knows of it. `choice` is its number among `n`.

    `salt`: only requests with the same salt share what they have computed. `generated`: tokens that another engine has
    generated and delivered. `keep`: its state stays in the pools when it ends. `moving`: its state comes from
    elsewhere (moving.py).
    """

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int] | npt.NDArray[np.int64],
        params: SamplingParams | None = None,
        *,
        text_stop: TextStop | None = None,
        choice: int = 0,
        salt: Hashable = None,
        generated: Sequence[int] = (),
        keep: bool = False,
        moving: bool = False,
    ) -> None:
        self.id = request_id
        self.params = params or SamplingParams()
        self.text_stop = text_stop
        self.choice = choice
        self.salt = salt
        self.keep = keep
        self.moving = moving
        """Until its state has arrived, or is lost: then it is a request like any other."""
        self._tokens: npt.NDArray[np.int64] = np.array(prompt, dtype=np.int64).reshape(-1)
        self.num_given = len(generated)
        """Of the generated tokens, the first ones, which another engine has delivered."""
        self.num_prompt = self._tokens.size
        if generated:
            self._tokens = np.concatenate([self._tokens, np.array(generated, dtype=np.int64)])
        self.num_tokens = self.num_total = self._tokens.size
        """Known tokens, and known ones with those in flight."""
        self.num_inflight = 0
        """Tokens in flight; they follow the known ones. Preemption keeps them: they were chosen rightly."""
        self.num_computed = 0
        """Tokens whose state lies in the pools once all that was launched has run."""
        self.num_uncertain = 0
        """Tokens that steps in flight may bring besides those in flight: the drafts that they verify."""
        self.drafts: tuple[int, ...] = ()
        """What may follow the last known token, where the host knows the drafts."""
        self.num_drafts = 0
        """Drafts that the next step can verify, here or on the device."""
        self.num_cached = 0
        """Tokens of the prompt that were not computed, as it was admitted first."""
        self.block_end = NEVER
        """Tokens to compute until the prefix cache can take another block."""
        self.block_keys: list[bytes] = []
        """Its first blocks of tokens, as the prefix cache has looked them up."""
        self.max_tokens_total = 0
        """Prompt and generated tokens at most; set on submission."""
        self.stop_ids: frozenset[int] = frozenset()
        self.sampler: SamplerState | None = None
        self.slot = 0
        self.status: Status = "new"
        self.made_s = time.perf_counter()
        self.first_step_s = 0.0
        """When its first step was launched, on the clock of `made_s`; 0 before."""
        self.num_preemptions = 0
        self.prompt_logprobs: list[TokenLogprob | None] = []
        """Gathered chunk by chunk; preemption keeps them, so no row is asked for twice."""
        if self.scores_prompt:
            self.prompt_logprobs.append(None)

    def __repr__(self) -> str:
        return f"Request({self.id!r}, {self.status}, {self.num_computed}/{self.num_tokens} tokens)"

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted; whoever generated its first token has given them."""
        return self.params.prompt_logprobs is not None and not self.num_given

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_sampled(self) -> int:
        """Generated tokens and those in flight: the number of the next one, for its noise and for `min_tokens`."""
        return self.num_total - self.num_prompt

    @property
    def pending(self) -> int:
        """Tokens not yet in the pools: 1 while decoding, more while (re)computing."""
        return self.num_total - self.num_computed

    def tokens(self, start: int = 0, end: int | None = None) -> npt.NDArray[np.int64]:
        """A view of tokens [start, end) of prompt and generated ones together; by default to the last known one.

        Tokens in flight are -1: the device feeds them.
        """
        return self._tokens[start : self.num_tokens if end is None else end]

    def token(self, position: int) -> int:
        """The token at a position; -1 while it is in flight."""
        return int(self._tokens[position])

    def expect(self, drafts: int = 0, wanted: int = 0) -> None:
        """Records that a step was launched which chooses the next token, verifies `drafts` of more, and makes new ones.

        `wanted`: how many of these; `drafts` will say which, if the host gets to know.
        """
        self._extend()
        self.num_inflight += 1
        self.num_uncertain += drafts
        self.drafts, self.num_drafts = (), wanted

    def arrive(self, count: int, drafts: int = 0) -> None:
        """Records that the oldest step in flight, launched with `drafts`, brought `count` tokens: `append` is due."""
        self.num_inflight -= 1
        self.num_uncertain -= drafts
        for _ in range(count - 1):
            self._extend()
        if self.status == "running":  # a preempted request computes them again
            self.num_computed += count - 1

    def append(self, token: int) -> None:
        """Adds a generated token, the first after those known."""
        self._write(self.num_tokens, token)
        self.num_tokens += 1
        self.num_total = max(self.num_total, self.num_tokens)

    def _extend(self) -> None:
        self._write(self.num_total, -1)
        self.num_total += 1

    def _write(self, position: int, token: int) -> None:
        if position == self._tokens.size:
            self._tokens = np.resize(self._tokens, max(64, 2 * position))
        self._tokens[position] = token

    def prompt_logprob_rows(self, start: int, end: int) -> range:
        """Positions in [start, end) whose logits give prompt log-probabilities not gathered yet."""
        if not self.scores_prompt:
            return range(0)
        # the row of position p predicts the prompt's token p + 1, which is entry p + 1
        return range(max(start, len(self.prompt_logprobs) - 1), min(end, self.num_prompt - 1))

    def gather_prompt(self, rows: range, entries: Sequence[TokenLogprob]) -> None:
        """Keeps the entries of these rows that are new; a chunk computed again after preemption brings some twice."""
        gathered = len(self.prompt_logprobs) - 1
        self.prompt_logprobs.extend(entries[max(0, gathered - rows.start) :])

    def ended(self, reason: FinishReason, *, stop_token: int | None = None, error: Dsv4cError | None = None) -> End:
        """The End of this request, with its counts."""
        return End(reason, self.num_prompt, self.num_generated, stop_token, error)


def expand(
    request_id: str,
    prompt: Sequence[int] | npt.NDArray[np.int64],
    params: SamplingParams,
    text_stops: Sequence[TextStop | None] | None = None,
) -> list[Request]:
    """The `params.n` requests of one call, with ids `<request_id>-<choice>` and a stream of noise each.

    `text_stops`: one hook for each choice. Without a seed the choices are independent.
    """
    prompt = np.array(prompt, dtype=np.int64).reshape(-1)
    stops = text_stops or [None] * params.n
    one = dataclasses.replace(params, n=1)
    return [
        Request(f"{request_id}-{i}", prompt, one, text_stop=stop, choice=i)
        for i, stop in zip(range(params.n), stops, strict=True)
    ]
