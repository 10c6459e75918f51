"""The clocks of one answer: what its metrics and its record are told, token by token and at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dsv4c.runtime.completion import Choice
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.record import RequestRecord


class Clocks:
    """When the sequences of one HTTP request got their tokens, counted from when this was made."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start_s = time.perf_counter()
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._queue_s: float | None = None

    def token(self, index: int, queued_s: float) -> None:
        """A token of sequence `index` is here. `queued_s` comes with the first."""
        now = time.perf_counter()
        last = self._last_s.get(index)
        self._last_s[index] = now
        if last is not None:
            self._metrics.between_tokens.observe(now - last)
            return
        self._first_s[index] = now
        waited = now - self._start_s
        self._queue_s = queued_s if self._queue_s is None else max(self._queue_s, queued_s)
        self._metrics.first_token.observe(waited)
        self._metrics.queue.observe(queued_s)
        self._metrics.prefill.observe(max(0.0, waited - queued_s))

    def sequence_ended(self, index: int, num_tokens: int) -> None:
        """Sequence `index` has ended with this many tokens."""
        if index in self._first_s and num_tokens > 1:
            seconds = time.perf_counter() - self._first_s[index]
            self._metrics.output_token.observe(seconds / (num_tokens - 1))
            self._metrics.decode.observe(seconds)

    def ended(
        self,
        path: str,
        status: int,
        reason: str,
        num_prompt_tokens: int,
        sequences: Sequence[tuple[int, int | None, Choice]],
    ) -> None:
        """The request has ended. `sequences`: (tokens of its prompt, tokens asked for, choice); `reason` is that of
        choices without one."""
        metrics = self._metrics
        metrics.responses.labels(path, str(status)).inc()
        metrics.request.observe(time.perf_counter() - self._start_s)
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.request_choices.observe(len(sequences))
        for num_prompt, asked, choice in sequences:
            metrics.finished.labels(choice.finish_reason or reason).inc()
            metrics.generation_tokens.inc(choice.num_tokens)
            metrics.request_prompt.observe(num_prompt)
            metrics.request_generated.observe(choice.num_tokens)
            if asked is not None:
                metrics.request_limit.observe(asked)

    def fill(self, record: RequestRecord) -> None:
        """Writes the times to the record."""
        record.queue_s = self._queue_s
        if self._first_s:
            record.first_token_s = min(self._first_s.values()) - self._start_s
