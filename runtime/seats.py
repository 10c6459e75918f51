"""What the requests in their slots ask of sampling, as arrays by slot: a step gathers its rows from them.

Written when a slot changes hands. The count tables of penalties live on the device; `fresh_counts` gives the rows that
must be written there before a step, for requests that penalise and have just come to their slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import RequestError
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Span

Int64Array = npt.NDArray[np.int64]

MAX_ASKED = 496
"""Logit biases and masked stop tokens of a request. An artifact's buffers hold 512 a row, for the model's own too."""
_IN_PROMPT = 1 << 14  # as in the sampling kernels: added to the count of a token that the prompt holds
_DTYPES: Mapping[str, type] = {
    "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32, "noise_keys": np.int64,
    "penalty_seats": np.int64, "repetition": np.float32, "frequency": np.float32, "presence": np.float32,
}  # fmt: skip


class Seats:
    """Arrays of `slots` rows; row 0 is nobody's: greedy, without penalties."""

    def __init__(self, slots: int, vocab_size: int) -> None:
        self._vocab = vocab_size
        self._owners: list[tuple[Request, int] | None] = [None] * slots
        self._arrays: dict[str, npt.NDArray[Any]] = {name: np.zeros(slots, dtype) for name, dtype in _DTYPES.items()}
        self._arrays["top_p"].fill(1.0)
        self._arrays["repetition"].fill(1.0)
        self._edits = np.zeros(slots, dtype=bool)
        self._fresh: list[int] = []

    def check(self, request: Request) -> None:
        """Raises RequestError (400) if the request edits more logits than a row has room for."""
        edits = len(request.params.logit_bias) + (len(request.params.stop_token_ids) if _masks_by_edits(request) else 0)
        if edits > MAX_ASKED:
            raise RequestError(
                f"`logit_bias` and masked stop tokens are {edits} together, at most {MAX_ASKED} are served",
                param="logit_bias",
                code="invalid_value",
            )

    def fill(self, views: Mapping[str, npt.NDArray[Any]], spans: Sequence[Span], sampled: Int64Array) -> int:
        """Writes the inputs of the sampled rows (ascending, of a span its own and its drafts'). The number of edits."""
        asking = [span for span in spans if span.samples]
        if not asking:
            return 0
        facts = []
        for span in asking:
            request = span.request
            owner = self._owners[request.slot]
            if owner is None or owner[0] is not request or owner[1] != request.num_preemptions:
                self._seat(request)
            facts.append((request.slot, request.num_sampled, span.drafts, request.num_prompt))
        seats_D, counters_D, drafts_D, prompts_D = np.array(facts, dtype=np.int64).T
        starts_D = np.cumsum(1 + drafts_D) - 1 - drafts_D
        owner_S = np.repeat(np.arange(len(asking)), 1 + drafts_D)
        chain_S = np.arange(owner_S.size) - starts_D[owner_S]
        seats_S = seats_D[owner_S]
        for name, array in self._arrays.items():
            views[name][sampled] = array[seats_S]
        if "chain" in views:
            views["chain"][sampled] = chain_S
            views["noise_shifts"][sampled] = 1 - prompts_D[owner_S]
            count = len(asking)
            views["draft_starts"][:count] = sampled[starts_D]
            views["draft_limits"][:count] = drafts_D
            views["draft_seats"][:count] = seats_D
            for name in ("temperature", "top_k", "top_p", "min_p") if "draft_keys" in views else ():
                views[f"draft_{name}"][:count] = self._arrays[name][seats_D]
            if "draft_keys" in views:
                views["draft_keys"][:count] = self._arrays["noise_keys"][seats_D]
        else:
            views["noise_counters"][sampled] = counters_D
        if not self._edits[seats_D].any():
            return 0
        rows = [(asking[i].request, int(counters_D[i] + c)) for i, c in zip(owner_S, chain_S, strict=True)]
        return self._fill_edits(views, rows, sampled)

    def _fill_edits(
        self, views: Mapping[str, npt.NDArray[Any]], rows: Sequence[tuple[Request, int]], sampled: Int64Array
    ) -> int:  # fmt: skip
        """`rows`: of each sampled row its request, and the number of the token that it chooses."""
        at = 0
        for (request, number), row in zip(rows, sampled.tolist(), strict=True):
            tokens, values = _edits(request, number)
            stop = at + tokens.size
            views["edit_starts"][row], views["edit_stops"][row] = at, stop
            views["edit_tokens"][at:stop] = tokens
            views["edit_values"][at:stop] = values
            at = stop
        return at

    def _seat(self, request: Request) -> None:
        slot, params, sampler = request.slot, request.params, request.sampler
        assert sampler is not None
        self._owners[slot] = request, request.num_preemptions
        arrays = self._arrays
        arrays["temperature"][slot], arrays["top_p"][slot] = params.temperature, params.top_p
        arrays["top_k"][slot] = max(0, min(params.top_k, 2**31 - 1))
        arrays["min_p"][slot] = params.min_p
        arrays["noise_keys"][slot] = np.uint64(sampler.key).astype(np.int64)
        arrays["repetition"][slot] = params.repetition_penalty
        arrays["frequency"][slot], arrays["presence"][slot] = params.frequency_penalty, params.presence_penalty
        arrays["penalty_seats"][slot] = slot if sampler.penalises else 0
        self._edits[slot] = bool(params.logit_bias) or _masks_by_edits(request)
        if sampler.penalises:
            self._fresh.append(slot)

    def fresh_counts(self) -> list[tuple[int, npt.NDArray[np.int16]]]:
        """(slot, counts int16 [vocab_size]) of every slot that came to be penalised since the last call."""
        out = []
        for slot in self._fresh:
            owner = self._owners[slot]
            assert owner is not None
            request = owner[0]
            generated = np.bincount(request.tokens(request.num_prompt), minlength=self._vocab)
            counts = np.minimum(generated, _IN_PROMPT - 1).astype(np.int16)
            if request.params.repetition_penalty != 1.0:
                counts[np.unique(request.tokens(0, request.num_prompt))] |= _IN_PROMPT
            out.append((slot, counts))
        self._fresh.clear()
        return out


def _masks_by_edits(request: Request) -> bool:
    """Whether stop tokens are ever masked by edits; a grammar's mask does it itself."""
    return request.params.min_tokens > 0 and request.params.grammar is None


def _edits(request: Request, number: int) -> tuple[Int64Array, npt.NDArray[np.float32]]:
    """Distinct tokens and what is added to their logits: biases, and -inf for stop tokens until `min_tokens`.

    `number`: of the token that is chosen. Where steps in flight make it uncertain, it is beyond `min_tokens`.
    """
    sampler = request.sampler
    assert sampler is not None
    tokens, values = sampler.bias
    if number >= request.params.min_tokens or not sampler.stop_ids.size or not _masks_by_edits(request):
        return tokens, values
    kept = ~np.isin(tokens, sampler.stop_ids)
    masks = np.full(sampler.stop_ids.size, -np.inf, dtype=np.float32)
    return np.concatenate([tokens[kept], sampler.stop_ids]), np.concatenate([values[kept], masks])
