"""Drafts on the host: the MTP block's program run behind the model's, pass by pass.

    pass 1    every row that stays: the main model's hidden rows, each with the token that follows it
    pass j    one row a request: what pass j - 1 left of its last row, with the draft that it gave

A pass writes the block's window entries. Those of passes 2 and later stand on guesses; the next step's pass 1 writes
the same positions again. Drafts are drawn as the model's tokens will be, from the same noise (sampler.py): that makes
them agree as often as two distributions can without knowing each other, and decides no token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsv4c.artifact import Input
from dsv4c.runtime.batch import BatchBuilder
from dsv4c.runtime.kvpool import Int64Array, KVPool
from dsv4c.runtime.sampler import SamplerState, sample
from dsv4c.runtime.scheduler import Span


class Drafter(Protocol):
    """Guesses what follows the tokens that a step has chosen."""

    def draft(
        self, spans: Sequence[Span], tokens: Sequence[Sequence[int | None]], states: Sequence[SamplerState]
    ) -> list[tuple[int, ...]]:
        """Up to `span.wanted` drafts for each span that samples, from the step that was just computed.

        `tokens`: what the step chose for it, to be accepted; `states`: of its sampling, before that.
        """


class HiddenExecutor(Protocol):
    """An executor whose program also gives what a drafter reads."""

    @property
    def hidden(self) -> Tensor:
        """[T, ...] of the last step, valid until the next."""

    def step(self, inputs: Mapping[str, Tensor], /) -> Tensor: ...


class MtpDrafter:
    """`main` computes the model, `block` the MTP block over the same pools; `inputs` and `symbols` are the block's."""

    def __init__(
        self,
        main: HiddenExecutor,
        block: HiddenExecutor,
        inputs: Iterable[Input],
        pool: KVPool,
        symbols: Mapping[str, int],
    ) -> None:
        self._main, self._block = main, block
        inputs = tuple(inputs)
        self._hidden = next(item.name for item in inputs if item.kind == "hidden")
        self._batch = BatchBuilder((i for i in inputs if i.kind != "hidden"), pool, symbols)

    def draft(
        self, spans: Sequence[Span], tokens: Sequence[Sequence[int | None]], states: Sequence[SamplerState]
    ) -> list[tuple[int, ...]]:
        """See Drafter."""
        out: list[list[int]] = [[] for _ in tokens]
        if not any(span.wanted for span in spans):
            return [() for _ in tokens]
        kept, following, rows, given = [], [], [], iter(tokens)
        first = 0
        for span in spans:
            end, more = span.end, span.request.tokens(span.start + 1, span.end + 1)
            if span.samples:
                found = next(given)
                end += len(found) - 1 - span.drafts
                more = np.concatenate([span.request.tokens(span.start + 1, span.end - span.drafts), _whole(found)])
            kept.append(Span(span.request, span.start, end, span.samples, range(0)))
            following.append(more)
            rows.append(np.arange(first, first + end - span.start))
            first += span.length
        hidden = self._main.hidden.index_select(0, torch.from_numpy(np.concatenate(rows)))
        logits = self._pass(kept, np.concatenate(following), hidden)
        hidden = self._block.hidden
        lasts = np.cumsum([s.length for s in kept]) - 1
        alive = [(i, s, int(lasts[n])) for i, (n, s) in enumerate((n, s) for n, s in enumerate(kept) if s.samples)]
        wanted = [s.wanted if _goes_on(s, t) else 0 for s, t in zip((s for s in spans if s.samples), tokens, strict=True)]
        while True:
            alive = [(i, s, row) for i, s, row in alive if wanted[i] > len(out[i])]
            if not alive:
                return [tuple(drafts) for drafts in out]
            index = [i for i, _, _ in alive]
            ahead = [states[i].ahead([*_known(tokens[i]), *out[i]]) for i in index]
            drawn, _ = sample(logits[index], ahead)
            for i, token in zip(index, drawn, strict=True):
                if token is None:
                    wanted[i] = 0
                else:
                    out[i].append(token)
            more_of = [(i, s, row) for i, s, row in alive if wanted[i] > len(out[i])]
            if not more_of:
                continue
            hidden = hidden.index_select(0, torch.tensor([row for _, _, row in more_of]))
            steps = [Span(s.request, s.end, s.end + 1, True, range(0)) for _, s, _ in more_of]
            part = self._pass(steps, np.array([out[i][-1] for i, _, _ in more_of], dtype=np.int64), hidden)
            logits = logits.new_empty(logits.shape)
            logits[[i for i, _, _ in more_of]] = part
            hidden = self._block.hidden
            alive = [(i, s, n) for n, ((i, _, _), s) in enumerate(zip(more_of, steps, strict=True))]

    def _pass(self, spans: Sequence[Span], next_ids: Int64Array, hidden: Tensor) -> Tensor:
        """One run of the block: logits of the spans that sample."""
        inputs = self._batch.build(spans, {"next_ids": next_ids})
        return self._block.step({**inputs, self._hidden: hidden})


def _known(tokens: Sequence[int | None]) -> list[int]:
    return [token for token in tokens if token is not None]


def _whole(tokens: Sequence[int | None]) -> Int64Array:
    """A token that is none ends its request: any will do."""
    return np.array([0 if token is None else token for token in tokens], dtype=np.int64)


def _goes_on(span: Span, tokens: Sequence[int | None]) -> bool:
    """Whether the request surely has a step after this one."""
    request = span.request
    if None in tokens or any(token in request.stop_ids for token in tokens):
        return False
    return request.num_tokens + len(tokens) + 1 < request.max_tokens_total
