"""A drafter for the stand-in that knows what will follow, and is wrong, or brief, as often as it is told."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from dsv4c.runtime.sampler import SamplerState, sample
from dsv4c.runtime.scheduler import Span
from tests.runtime.standin import HORIZON, VOCAB, direct_logits


class Oracle:
    """`errors`: share of drafts that are wrong; `brief`: share of places where it stops short of what is wanted."""

    def __init__(
        self, errors: float = 0.0, brief: float = 0.0, seed: int = 0, horizon: int = HORIZON, wide: int = 128
    ) -> None:
        self.errors, self.brief = errors, brief
        self._random = random.Random(seed)
        self._sees = horizon, wide

    def draft(
        self,
        spans: Sequence[Span],
        inputs: Mapping[str, torch.Tensor],
        tokens: Sequence[Sequence[int | None]],
        states: Sequence[SamplerState],
    ) -> list[tuple[int, ...]]:
        """See Drafter."""
        sampling = [span for span in spans if span.samples]
        return [self._of(*item) for item in zip(sampling, tokens, states, strict=True)]

    def _of(self, span: Span, tokens: Sequence[int | None], state: SamplerState) -> tuple[int, ...]:
        chosen = [t for t in tokens if t is not None]
        if len(chosen) < len(tokens):
            return ()
        known = [*span.request.tokens(0, span.end - span.drafts).tolist(), *chosen]
        drafts: list[int] = []
        while len(drafts) < span.wanted and self._random.random() >= self.brief:
            logits = torch.from_numpy(direct_logits(known + drafts, *self._sees))[None]
            (token,), _ = sample(logits, [state.ahead([*chosen, *drafts])])
            assert token is not None
            drafts.append((token + 1) % VOCAB if self._random.random() < self.errors else token)
        return tuple(drafts)
