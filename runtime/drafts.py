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
from dsv4c.runtime.kvpool import Int64Array
from dsv4c.runtime.sampler import SamplerState, sample
from dsv4c.runtime.scheduler import Span


class Drafter(Protocol):
    """Guesses what follows the tokens that a step has chosen."""

    def draft(
        self,
        spans: Sequence[Span],
        inputs: Mapping[str, Tensor],
        tokens: Sequence[Sequence[int | None]],
        states: Sequence[SamplerState],
    ) -> list[tuple[int, ...]]:
        """Up to `span.wanted` drafts for each span that samples, from the step that was just computed.

        `inputs`: that step's; `tokens`: what it chose for each span that samples, to be accepted; `states`: of their
        sampling, before that.
        """


class HiddenExecutor(Protocol):
    """An executor whose program also gives what a drafter reads."""

    @property
    def hidden(self) -> Tensor:
        """[T, ...] of the last step, valid until the next."""

    def step(self, inputs: Mapping[str, Tensor], /) -> Tensor: ...


class MtpDrafter:
    """`main` computes the model, `block` the MTP block over the same pools; `inputs` are the block's."""

    def __init__(self, main: HiddenExecutor, block: HiddenExecutor, inputs: Iterable[Input]) -> None:
        self._main, self._block = main, block
        names = {item.kind: item.name for item in inputs if item.kind != "page_table"}
        self._tables = [item.name for item in inputs if item.kind == "page_table"]
        self._hidden, self._next, self._rows = names["hidden"], names["next_ids"], names["logit_rows"]
        self._positions, self._owners = names["positions"], names["request_rows"]

    def draft(
        self,
        spans: Sequence[Span],
        inputs: Mapping[str, Tensor],
        tokens: Sequence[Sequence[int | None]],
        states: Sequence[SamplerState],
    ) -> list[tuple[int, ...]]:
        """See Drafter."""
        drafts: list[list[int]] = [[] for _ in tokens]
        if not any(span.wanted for span in spans):
            return [() for _ in tokens]
        rows, following, lasts = _rows_kept(spans, tokens)
        whole = rows.size == inputs[self._positions].shape[0]
        at = torch.from_numpy(rows)
        positions, owners, hidden = (
            tensor if whole else tensor.index_select(0, at)
            for tensor in (inputs[self._positions], inputs[self._owners], self._main.hidden)
        )
        tables = {name: inputs[name] for name in self._tables}
        last = torch.from_numpy(lasts)
        logits = self._pass(tables, positions, owners, following, last, hidden)
        sampling = [span for span in spans if span.samples]
        wanted = [min(s.wanted, room_for_drafts(s, t)) for s, t in zip(sampling, tokens, strict=True)]
        alive = list(range(len(sampling)))
        while True:
            going = [n for n, i in enumerate(alive) if len(drafts[i]) < wanted[i]]
            if not going:
                return [tuple(found) for found in drafts]
            if len(going) < len(alive):
                alive = [alive[n] for n in going]
                logits, last = logits[going], last[going]
            ahead = [states[i].ahead([*_known(tokens[i]), *drafts[i]]) for i in alive]
            drawn, _ = sample(logits, ahead)
            for i, token in zip(alive, drawn, strict=True):
                if token is None:  # no numbers: nothing is drafted behind it
                    wanted[i] = 0
                else:
                    drafts[i].append(token)
            going = [n for n, i in enumerate(alive) if len(drafts[i]) < wanted[i]]
            if not going:
                continue
            if len(going) < len(alive):
                alive, last = [alive[n] for n in going], last[going]
            positions, owners = positions[last] + 1, owners[last]
            hidden = self._block.hidden.index_select(0, last)
            last = torch.arange(len(alive))
            following = np.array([drafts[i][-1] for i in alive], dtype=np.int64)
            logits = self._pass(tables, positions, owners, following, last, hidden)

    def _pass(
        self,
        tables: Mapping[str, Tensor],
        positions: Tensor,
        owners: Tensor,
        next_ids: Int64Array,
        last: Tensor,
        hidden: Tensor,
    ) -> Tensor:
        """One run of the block over rows of the batch; logits of the rows `last`."""
        rows = {self._positions: positions, self._owners: owners, self._rows: last, self._hidden: hidden}
        return self._block.step({**tables, **rows, self._next: torch.from_numpy(next_ids)})


def _rows_kept(
    spans: Sequence[Span], tokens: Sequence[Sequence[int | None]]
) -> tuple[Int64Array, Int64Array, Int64Array]:  # fmt: skip
    """The rows of the batch whose tokens stay, the token that follows each, and which of them are spans' last."""
    rows: list[int] = []
    following: list[int] = []
    lasts: list[int] = []
    given = iter(tokens)
    first = count = 0
    for span in spans:
        length, end = span.length, span.end - span.drafts
        if span.samples:
            found = next(given)
            length += len(found) - 1 - span.drafts
            # a token that is none ends its request: any will do
            following += span.request.tokens(span.start + 1, end).tolist() + [t or 0 for t in found]
            lasts.append(count + length - 1)
        else:
            following += span.request.tokens(span.start + 1, end + 1).tolist()
        rows += range(first, first + length)
        first += span.length
        count += length
    return (np.array(rows, np.int64), np.array(following, np.int64), np.array(lasts, np.int64))


def _known(tokens: Sequence[int | None]) -> list[int]:
    return [token for token in tokens if token is not None]


def room_for_drafts(span: Span, tokens: Sequence[int | None]) -> int:
    """How many tokens the request may still have to come that are not its last: that one needs no draft."""
    request = span.request
    if None in tokens or not request.stop_ids.isdisjoint(tokens):
        return 0
    return max(0, request.max_tokens_total - 1 - request.num_tokens - len(tokens))
