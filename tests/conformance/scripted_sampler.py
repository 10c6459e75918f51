"""The test-only hook: nano computes as ever, and the tokens of chosen requests are replaced by a script's.

    engine.runner --wrapped--> Scripted --collect--> chosen tokens, those of scripted requests replaced

What follows a token (stop tokens, limits, text, parsing, the wire) is the server's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dsv4c.runtime.request import Request
from dsv4c.runtime.runner import Chosen, StepRunner
from dsv4c.runtime.sampler import TokenLogprob
from dsv4c.runtime.scheduler import Span


class Scripted:
    """A runner around another of lag 0. `scripts`: token ids, one list for each of the next requests."""

    lag = 0

    def __init__(self, inner: StepRunner, eos: int) -> None:
        assert inner.lag == 0, "a script knows what was generated only where the host does"
        self.inner = inner
        self.eos = eos
        self.scripts: deque[list[int]] = deque()
        self._given: dict[str, list[int] | None] = {}

    def check(self, request: Request, /) -> None:
        self.inner.check(request)

    def copy_states(self, pairs: Sequence[tuple[int, int]], /) -> None:
        self.inner.copy_states(pairs)

    def synchronize(self) -> None:
        self.inner.synchronize()

    def launch(self, spans: Sequence[Span], /) -> tuple[Any, list[Request]]:
        return self.inner.launch(spans), [span.request for span in spans if span.samples]

    def finish(self, ticket: tuple[Any, list[Request]], /) -> None:
        self.inner.finish(ticket[0])

    def collect(self, ticket: tuple[Any, list[Request]], /) -> Chosen:
        chosen, requests = self.inner.collect(ticket[0]), ticket[1]
        tokens, logprobs, drafts = list(chosen.tokens), list(chosen.logprobs), list(chosen.drafts)
        for i, request in enumerate(requests):
            script = self._script(request)
            if script is None:
                continue
            at = request.num_generated
            token = script[at] if at < len(script) else self.eos
            tokens[i] = [token]
            logprobs[i] = [TokenLogprob(token, -0.5, ((token, -0.5),)) if logprobs[i][0] is not None else None]
            if drafts:
                drafts[i] = ()
        return replace(chosen, tokens=tokens, logprobs=logprobs, drafts=drafts)

    def _script(self, request: Request) -> list[int] | None:
        if request.id not in self._given:
            self._given[request.id] = self.scripts.popleft() if self.scripts else None
        return self._given[request.id]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
