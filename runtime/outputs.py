"""The engine loop as the server wants it: requests by number, one Output a token.

server --submit(prompt, params, sink(Output))--> ServedEngine --Request, sink(Event)--> EngineLoop
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dsv4c.errors import Dsv4cError
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.sampler import TokenLogprob
from dsv4c.runtime.service import Output, Score, Sink


class ServedEngine:
    """What `create_app` asks of an engine, on top of a loop that runs. Any thread may call its methods."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._numbers = itertools.count(1)

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and completion together."""
        return self._loop.max_context

    @property
    def failure(self) -> Dsv4cError | None:
        """Why the engine stopped serving, or None while it is well."""
        return self._loop.failure

    def stats(self) -> EngineStats:
        return self._loop.stats()

    def submit(self, prompt: Sequence[int], params: SamplingParams, sink: Sink) -> int:
        """Queues a request and returns its number. Raises RequestError as the loop does."""
        number = next(self._numbers)

        def deliver(event: Event) -> None:
            for output in outputs_of(event):
                sink(output)

        self._loop.submit(Request(str(number), prompt, params), deliver)
        return number

    def cancel(self, request_id: int) -> None:
        """Ends a request and frees its pages before the next step; does nothing if it has ended."""
        self._loop.cancel(str(request_id))


def outputs_of(event: Event) -> list[Output]:
    """One Output a token, and one without a token where the request ends and its last token is no reason for it."""
    if event.end is None and len(event.tokens) == 1 and not (event.logprobs or event.prompt_logprobs):  # nearly all
        return [Output(event.tokens[0], None, None, event.cached_tokens, event.queued_s)]
    reason: str | None = None
    error: Dsv4cError | None = None
    if event.end is not None:
        reason = "error" if event.end.reason == "failed" else event.end.reason
        error = event.end.error
    prompt = [_score(p) for p in event.prompt_logprobs] or None
    if not event.tokens:
        return [Output(prompt_scores=prompt, finish_reason=reason, error=error)]
    last = len(event.tokens) - 1
    if event.end is not None and event.end.reason == "stop" and event.end.stop_token is None:
        last += 1  # its text has ended, by its grammar or its hook; the token is part of it
    outputs = [
        Output(
            token_id=token,
            score=_score(event.logprobs[i]) if event.logprobs else None,
            prompt_scores=prompt if i == 0 else None,
            cached_tokens=event.cached_tokens if i == 0 else 0,
            queued_s=event.queued_s if i == 0 else 0.0,
            finish_reason=reason if i == last else None,
            error=error if i == last else None,
        )
        for i, token in enumerate(event.tokens)
    ]
    return outputs if event.end is None or last < len(outputs) else [*outputs, Output(finish_reason=reason)]


def _score(entry: TokenLogprob | None) -> Score | None:
    return None if entry is None else (entry.logprob, entry.top)
