"""References of speculative decoding on the device: what a step needs to know before the host does, and what it keeps.

A step verifies drafts: each row of logits is sampled as it would be without them, and a draft is kept if the row before
it gave that token. So a step's tokens start where the one before left its request, which only the device knows:

    feed_drafts, feed_spans, feed_ends   tokens, positions and window ends that the host gave relative to that place
    row_facts                            of each row of logits: the token there, and the number of the one it chooses
    sample_drafted                       `sample_penalised` of rows behind drafts that are not counted yet
    accept_drafts                        how many rows of a request count, and where it is then
    place_tokens                         the tokens that follow each row, for the drafter
    advance_rows, keep_draft             one row further; a draft for the next step

State by seat (slot): `pending` [Z, K + 1], the last token, not computed yet, and the drafts behind it; `length` [Z],
the tokens computed, which is the position of the first. Seat 0 is nobody's. Integers are int64 where nothing else is
said.

Legend: T tokens of the step, S rows of logits, D requests that sample, K most drafts, Z seats, R rows of tables, V
vocabulary, E window ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ops._op import Index, Op
from dsv4c.ops.sampling import IN_PROMPT, mask, penalise, sample

MOST = IN_PROMPT - 1
"""Of a token's count."""


def feed_drafts(
    token_ids_T: Tensor, positions_T: Tensor, request_rows_T: Tensor, pending_ZK: Tensor, length_Z: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids and positions [T]. Token -1 - i is the seat's pending i, 0 where that is negative too.

    Position -1 - i is i behind the seat's length.
    """
    back = (-1 - token_ids_T).clamp(min=0)
    tokens_T = torch.where(token_ids_T < 0, pending_ZK[request_rows_T, back], token_ids_T).clamp(min=0)
    at_T = length_Z[request_rows_T] - 1 - positions_T
    return tokens_T, torch.where(positions_T < 0, at_T, positions_T)


def feed_spans(seq_starts_R: Tensor, seq_ends_R: Tensor, length_Z: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and ends [R]. A start below 0 is the seat's length, an end -n is n behind it. R = Z."""
    starts_R = torch.where(seq_starts_R < 0, length_Z, seq_starts_R)
    return starts_R, torch.where(seq_ends_R < 0, length_Z - seq_ends_R, seq_ends_R)


def feed_ends(
    ends_E: Tensor, positions_T: Tensor, request_rows_T: Tensor, seq_starts_R: Tensor, seq_ends_R: Tensor, *, ratio: int
) -> Tensor:
    """Rows [E] that complete a window, -1 for none. -2 - f is that row of the span beginning at row f, if it has one.

    Spans so given have at most `ratio` tokens; everything else is as the step has it.
    """
    first_E = (-2 - ends_E).clamp(min=0)
    seat_E = request_rows_T[first_E]
    more_E = ratio - 1 - positions_T[first_E] % ratio
    found_E = torch.where(more_E < seq_ends_R[seat_E] - seq_starts_R[seat_E], first_E + more_E, -1)
    return torch.where(ends_E < -1, found_E, ends_E)


def row_facts(
    token_ids_T: Tensor, positions_T: Tensor, logit_rows_S: Tensor, shifts_S: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[S]: the token at each row of logits, and its position plus `shifts`: the counter of the noise there."""
    return token_ids_T[logit_rows_S], positions_T[logit_rows_S] + shifts_S


def counts_behind(counts_ZV: Tensor, slots_S: Tensor, chain_S: Tensor, drafted_S: Tensor) -> Tensor:
    """[S, V]: the counts of each row's seat with the drafts that it lies behind."""
    counts_SV = counts_ZV[slots_S].clone()
    for row, chain in enumerate(chain_S.tolist()):
        for draft in drafted_S[row + 1 - chain : row + 1].tolist():
            counts_SV[row, draft] += (counts_SV[row, draft] & MOST) < MOST
    return counts_SV


def sample_drafted(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    keys_S: Tensor,
    counters_S: Tensor,
    slots_S: Tensor,
    counts_ZV: Tensor,
    repetition_S: Tensor,
    frequency_S: Tensor,
    presence_S: Tensor,
    mask_rows_S: Tensor,
    masks_GB: Tensor,
    chain_S: Tensor,
    drafted_S: Tensor,
) -> Tensor:
    """int64 [S]: `sample` of the penalised, masked logits. Row s lies behind `chain[s]` drafts of its request.

    Penalties count them, drafted[s], drafted[s - 1], ..., as generated besides counts[slots[s]]; seat 0 is not
    penalised. Nothing is counted here: which rows stay is known later.
    """
    counts_SV = counts_behind(counts_ZV, slots_S, chain_S, drafted_S)
    penalised_SV = penalise(logits_SV, counts_SV, repetition_S, frequency_S, presence_S)
    penalised_SV = torch.where((slots_S == 0).unsqueeze(1), logits_SV, penalised_SV)
    penalised_SV = mask(penalised_SV, mask_rows_S, masks_GB)
    return sample(penalised_SV, temperature_S, top_k_S, top_p_S, min_p_S, keys_S, counters_S)


def accept_drafts(
    tokens_S: Tensor,
    drafted_S: Tensor,
    logit_rows_S: Tensor,
    positions_T: Tensor,
    counters_S: Tensor,
    starts_D: Tensor,
    limits_D: Tensor,
    seats_D: Tensor,
    penalty_seats_S: Tensor,
    pending_ZK: Tensor,
    length_Z: Tensor,
    counts_ZV: Tensor,
    *,
    end: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(accepted, rows, next positions, next counters) [D], then pending, length and counts (in place on a device).

    `end`: of the context. Behind a request that reaches it, what is drafted has no place, and its position is the last.

    Request d has rows starts[d] ... starts[d] + limits[d] of logits. The first counts; the next does if the one before
    gave the token that is there. `rows`: the last that counts, as a row of the batch. Its token becomes the seat's
    last, and is not yet computed; tokens of rows that count are counted, where the request penalises.
    """
    pending_ZK, length_Z, counts_ZV = pending_ZK.clone(), length_Z.clone(), counts_ZV.clone()
    accepted, rows, positions, counters = [], [], [], []
    for first, limit, seat in zip(starts_D.tolist(), limits_D.tolist(), seats_D.tolist(), strict=True):
        kept = 0
        while kept < limit and int(tokens_S[first + kept]) == int(drafted_S[first + kept + 1]):
            kept += 1
        last = first + kept
        row = int(logit_rows_S[last])
        accepted.append(kept + 1)
        rows.append(row)
        positions.append(min(int(positions_T[row]) + 1, end - 1))
        counters.append(int(counters_S[last]) + 1)
        if seat:
            pending_ZK[seat, 0], length_Z[seat] = tokens_S[last], positions_T[row] + 1
        counted = int(penalty_seats_S[first]) if seat else 0  # nobody's first row is somebody else's
        for token in tokens_S[first : last + 1].tolist() if counted else ():
            if token >= 0:
                counts_ZV[counted, token] += (counts_ZV[counted, token] & MOST) < MOST
    lists, device = (accepted, rows, positions, counters), tokens_S.device
    given = (torch.tensor(values, dtype=torch.int64, device=device) for values in lists)
    return (*given, pending_ZK, length_Z, counts_ZV)  # type: ignore[return-value]


def place_tokens(next_ids_T: Tensor, logit_rows_S: Tensor, seats_S: Tensor, tokens_S: Tensor) -> Tensor:
    """[T]: the next ids, with tokens[s] (never below 0) at row logit_rows[s] where seats[s] is somebody's.

    In place on a device.
    """
    live = seats_S != 0
    return next_ids_T.index_put((logit_rows_S[live],), tokens_S[live].clamp(min=0))


def advance_rows(positions_D: Tensor, counters_D: Tensor, *, by: int, end: int) -> tuple[Tensor, Tensor]:
    """Both plus `by`, positions up to the last before `end`."""
    return (positions_D + by).clamp(max=end - 1), counters_D + by


def keep_draft(pending_ZK: Tensor, seats_D: Tensor, drafts_D: Tensor, *, at: int) -> Tensor:
    """Pending with drafts[d] (never below 0) at [seats[d], at], in place on a device; seat 0 keeps nothing."""
    live = seats_D != 0
    out = pending_ZK.clone()
    out[seats_D[live], at] = drafts_D[live].clamp(min=0)
    return out


_SEAT = Index("pending_ZK")
_ROW = Index("positions_T")

OPS = (
    Op("feed_drafts", feed_drafts, outputs=2, indices={"request_rows_T": _SEAT}),
    Op("feed_spans", feed_spans, outputs=2),
    Op("feed_ends", feed_ends, indices={0: Index("positions_T", low=-1), "request_rows_T": Index("seq_starts_R")}),
    Op("row_facts", row_facts, outputs=2, indices={"logit_rows_S": _ROW}),
    Op(
        "sample_drafted", sample_drafted,
        indices={0: Index("logits_SV", dims=(1,), low=-1), "slots_S": Index("counts_ZV"),
                 "mask_rows_S": Index("masks_GB"), "drafted_S": Index("logits_SV", dims=(1,))},
    ),
    Op(
        "accept_drafts", accept_drafts, outputs=7, in_place={4: "pending_ZK", 5: "length_Z", 6: "counts_ZV"},
        indices={
            1: _ROW, "logit_rows_S": _ROW, "starts_D": Index("tokens_S"), "seats_D": _SEAT,
            "penalty_seats_S": Index("counts_ZV"), "tokens_S": Index("counts_ZV", dims=(1,), low=-1),
        },
    ),
    Op(
        "place_tokens", place_tokens, in_place={0: "next_ids_T"},
        indices={"logit_rows_S": Index("next_ids_T")},
    ),
    Op("advance_rows", advance_rows, outputs=2),
    Op("keep_draft", keep_draft, in_place={0: "pending_ZK"}, indices={"seats_D": _SEAT}),
)  # fmt: skip
