"""When one request of Dynamo's frontend got its tokens, told to the worker's own metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Event
from dsv4c.runtime.transfer.node import Prefilled


class RequestClock:
    """Counts from when it was made. The names of what it observes are those of the standalone server."""

    def __init__(self, metrics: Metrics, num_prompt: int, params: SamplingParams) -> None:
        self._metrics, self._num_prompt = metrics, num_prompt
        self._start_s = time.perf_counter()
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        metrics.prompt_tokens.inc(num_prompt)
        metrics.request_choices.observe(params.n)
        if params.max_tokens is not None:
            metrics.request_limit.observe(params.max_tokens)

    def events(self, index: int, events: Sequence[Event]) -> None:
        """Events of choice `index` are here. Tokens that come together share the time since the last."""
        now, metrics = time.perf_counter(), self._metrics
        tokens = sum(len(event.tokens) for event in events)
        if tokens and index not in self._first_s:
            self._first_s[index] = now
            queued_s = sum(event.queued_s for event in events)
            metrics.first_token.observe(now - self._start_s)
            metrics.queue.observe(queued_s)
            metrics.prefill.observe(max(0.0, now - self._start_s - queued_s))
        elif tokens:
            for _ in range(tokens):
                metrics.between_tokens.observe((now - self._last_s[index]) / tokens)
        if tokens:
            self._last_s[index] = now
        end = events[-1].end
        if end is None:
            return
        metrics.finished.labels(end.reason).inc()
        metrics.generation_tokens.inc(end.generated_tokens)
        metrics.request_prompt.observe(self._num_prompt)
        metrics.request_generated.observe(end.generated_tokens)
        metrics.request.observe(now - self._start_s)
        if index in self._first_s and end.generated_tokens > 1:
            metrics.decode.observe(now - self._first_s[index])
            metrics.output_token.observe((now - self._first_s[index]) / (end.generated_tokens - 1))

    def prefilled(self, first: Prefilled) -> None:
        """A prompt was computed for another worker."""
        waited = time.perf_counter() - self._start_s
        self._metrics.first_token.observe(waited)
        self._metrics.prefill.observe(waited)
        self._metrics.request.observe(waited)
        self._metrics.request_prompt.observe(self._num_prompt)
        self._metrics.finished.labels(first.finish).inc()
