"""Follows requests that are to be kept through steps, for a Progress hook.

A step belongs to the life of a request in which it was launched. One that was preempted, and admitted again while a
chunk of the life before was still in flight, has computed nothing yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dsv4c.runtime.moving import Progress
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Span


class Stage(NamedTuple):
    """What a step in flight makes of a request: its first `tokens` tokens are final, if it is still in that life."""

    request: Request
    life: int
    tokens: int


class Follower:
    """Tells `progress` what steps do."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._fresh: set[Request] = set()
        """Admitted, and not in any step yet."""

    def admitted(self, request: Request) -> None:
        """It has its slot."""
        self._fresh.add(request)
        self.progress.admitted(request)

    def preempted(self, request: Request) -> None:
        """Its slot and pages are about to go."""
        self._fresh.discard(request)
        self.progress.preempted(request)

    def ended(self, request: Request, *, kept: bool) -> None:
        """It has ended."""
        self._fresh.discard(request)
        self.progress.ended(request, kept)

    def launching(self, spans: Sequence[Span], lag: int) -> list[Stage]:
        """Before a step is launched. With lag 0, what a request has resumed from is final already."""
        out = []
        for span in spans:
            request = span.request
            if request.keep:
                if lag == 0 and span.start and request in self._fresh:
                    self.progress.computed(request, span.start)
                self._fresh.discard(request)
                end = span.end - span.drafts
                self.progress.launching(request, end)
                out.append(Stage(request, request.num_preemptions, end))
        return out

    def computed(self, stages: Sequence[Stage]) -> None:
        """After it was collected, and before its tokens are taken."""
        for request, life, tokens in stages:
            if request.status == "running" and request.num_preemptions == life:
                self.progress.computed(request, tokens)
