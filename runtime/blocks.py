"""Drafts of whole blocks on the host: two programs that run behind the model's.

    absorb    every row of the step that stays, by what the model left of it: entries of the drafter's windows
    draft     a block a request, its last token and placeholders at the positions behind: all its tokens in one pass

A block is drafted whole; how many of its tokens the next step verifies follows from how sure the drafter is. With P_i
the probability that draft i and all before it are kept, and c the cost of a verified token, in steps without drafts, a
step that verifies k drafts gives N(k) = 1 + P_1 + ... + P_k tokens in 1 + k c. One more gives more tokens a second
while P_(k+1) > c N(k) / (1 + k c): that is the threshold. P_i never grows with i, so the first draft below it ends
the block. What is verified never changes a token, only when it comes.

Rows are absorbed even in steps after which nothing is drafted: it costs little, and a gap would spoil later drafts. A
block reads one entry more of the past than its first row's layer would; the first row of the step before it has read
that one, and its page is given back only when that step is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dsv4c.artifact import Drafter as Described
from dsv4c.artifact import Input
from dsv4c.errors import ArtifactError
from dsv4c.runtime.drafts import HiddenExecutor, room_for_drafts
from dsv4c.runtime.sampler import SamplerState
from dsv4c.runtime.scheduler import Span
from dsv4c.runtime.speculation import StepCost, linear_cost

Outputs = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs a program: inputs by name -> outputs by meaning, valid until it runs again."""


class BlockDrafter:
    """`main` computes the model, `absorb` and `draft` run the drafter's programs over the same pools.

    `inputs` are those of both programs. `cost`: of a step, by requests and drafts of each. Raises ArtifactError if the
    manifest does not say how blocks are made.
    """

    def __init__(
        self,
        main: HiddenExecutor,
        absorb: Outputs,
        draft: Outputs,
        inputs: Iterable[Input],
        described: Described,
        cost: StepCost = linear_cost,
    ) -> None:
        if described.block_size is None or described.placeholder_id is None:
            raise ArtifactError("the manifest's drafter has no blocks", hint="compile the artifact again")
        self._main, self._absorb, self._draft, self._cost = main, absorb, draft, cost
        self.block_size, self._placeholder = described.block_size, described.placeholder_id
        inputs = tuple(inputs)
        self._names = {item.kind: item.name for item in inputs if item.kind != "page_table"}
        self._tables = {item.name for item in inputs if item.kind == "page_table"}

    def draft(
        self,
        spans: Sequence[Span],
        inputs: Mapping[str, Tensor],
        tokens: Sequence[Sequence[int | None]],
        states: Sequence[SamplerState],
    ) -> list[tuple[int, ...]]:
        """See runtime.drafts.Drafter. Drafts are the likeliest tokens, whatever `states` say."""
        given, first = iter(tokens), 0
        rows: list[int] = []
        wanted: list[int] = []  # of each span that samples
        blocks: list[tuple[int, int, int]] = []  # (span, token, its position) of those that get drafts
        for i, span in enumerate(spans):
            length = span.length
            if span.samples:
                found = next(given)
                length += len(found) - 1 - span.drafts
                token = found[-1]
                wanted.append(min(span.wanted, self.block_size, room_for_drafts(span, found)))
                if wanted[-1] and token is not None:
                    blocks.append((i, token, span.start + length))
            rows += range(first, first + length)
            first += span.length
        self._take_in(inputs, np.array(rows, dtype=np.int64))
        if not blocks:
            return [() for _ in wanted]
        guesses = iter(self._guess(inputs, blocks, sum(span.samples for span in spans)))
        return [next(guesses)[:count] if count else () for count in wanted]

    def _take_in(self, inputs: Mapping[str, Tensor], rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Absorbs these rows of the step."""
        positions, owners = inputs[self._names["positions"]], inputs[self._names["request_rows"]]
        own, hidden = {self._names["positions"]: positions, self._names["request_rows"]: owners}, self._main.hidden
        if rows.size < positions.shape[0]:
            at = torch.from_numpy(rows)
            own = {name: tensor.index_select(0, at) for name, tensor in own.items()}
            hidden = hidden.index_select(0, at)
        tables = {name: inputs[name] for name in self._tables}
        self._absorb({**tables, **own, self._names["hidden"]: hidden})

    def _guess(
        self, inputs: Mapping[str, Tensor], blocks: Sequence[tuple[int, int, int]], requests: int
    ) -> list[tuple[int, ...]]:
        """For each block the drafts that are worth verifying, in a step of so many requests."""
        size, count = self.block_size, len(blocks)
        owners, token, position = (torch.tensor(column) for column in zip(*blocks, strict=True))
        token_ids = torch.full((count, size), self._placeholder)
        token_ids[:, 0] = token
        said = self._draft(
            {
                **{name: inputs[name].index_select(0, owners) for name in self._tables},
                self._names["token_ids"]: token_ids.flatten(),
                self._names["positions"]: (position.unsqueeze(1) + torch.arange(size)).flatten(),
                self._names["request_rows"]: torch.arange(count).repeat_interleave(size),
                self._names["block_rows"]: torch.arange(count) * size,
            }
        )
        price = self._cost(requests, 1) / self._cost(requests, 0) - 1.0
        kept = worth_verifying(said["confidences"], price)
        return [tuple(row[:n]) for row, n in zip(said["drafts"].tolist(), kept, strict=True)]


def worth_verifying(confidences_RB: Tensor, price: float) -> list[int]:
    """How many drafts of each block give most tokens a second. See the file's docstring; `price` is its c."""
    kept_RB = torch.sigmoid(confidences_RB.double()).cumprod(1)
    tokens_RB = 1.0 + torch.cat((torch.zeros_like(kept_RB[:, :1]), kept_RB[:, :-1].cumsum(1)), 1)
    threshold_RB = price * tokens_RB / (1.0 + price * torch.arange(kept_RB.shape[1]))
    counts: list[int] = (kept_RB > threshold_RB).long().cumprod(1).sum(1).tolist()
    return counts
