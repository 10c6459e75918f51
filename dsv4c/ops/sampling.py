"""References of sampling on the device: edits of the logits, penalties, filters, and one reproducible draw a row.

The same function as runtime/sampler.py computes on the host, with what an engine keeps on the device: a table of how
often each seat's request generated each token, a 64-bit noise key and a counter a row. Order of operations:

    edit_logits (bias, masked stop tokens) -> repetition, frequency, presence penalties -> the grammar's mask
    -> greedy: the most likely, lowest id first | / temperature -> min_p -> top_k -> top_p
    -> draw: the token that arrives first

A draw is an exponential race. Token v arrives at E_v / p_v, with p_v its weight among the kept and E_v a number of
its own from an exponential distribution of rate 1; v is the first to arrive with probability p_v / sum(p), exactly.
E_v depends on (key, counter, v) alone, so two distributions drawn with the same key and counter mostly give the same
token: no less often than (1 - d) / (1 + d), for a distance d in total variation. Other rows do not matter.
float64 inside, but for where float32 defines the noise.

A step need not wait for the host to know a token: `keep_tokens` leaves each drawn token with its request's seat, and
`feed_tokens` reads it in the next step where the host gave none.

Legend: T tokens of the step, S rows of logits, V vocabulary, Z seats, M edits, G masks of B words of 32 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ops._op import Index, Op

GREEDY_BELOW = 1e-5
"""Smaller temperatures overflow float32 before they differ from greedy."""
IN_PROMPT = 1 << 14
"""Added to a token's count if the prompt holds it; lower bits count generated tokens, up to 16,383."""
_MOST = IN_PROMPT - 1
_SHORT = (1 - 2.0**-24) * 2.0**-32  # a float32


def edit_logits(
    logits_SV: Tensor, starts_S: Tensor, stops_S: Tensor, tokens_M: Tensor, values_M: Tensor
) -> tuple[Tensor, Tensor]:
    """The logits with values[m] added to token tokens[m] of row s, for starts[s] <= m < stops[s], and what they were.

    Tokens of a row are distinct; -inf masks one. starts, stops, tokens: int64. The second result, float32 [M], holds
    the logits that were replaced (0 where no row edits): with them the raw ones can be had back, bit for bit.
    """
    replaced_M = torch.zeros_like(values_M)
    edited = logits_SV.clone()
    for row, (start, stop) in enumerate(zip(starts_S.tolist(), stops_S.tolist(), strict=True)):
        live = slice(start, stop)
        replaced_M[live] = edited[row, tokens_M[live]]
        edited[row, tokens_M[live]] += values_M[live]
    return edited, replaced_M


def feed_tokens(token_ids_T: Tensor, last_tokens_Z: Tensor, seats_T: Tensor) -> Tensor:
    """int64 [T]: the token ids, with the seat's last token where an id is negative; 0 where that is negative too."""
    return torch.where(token_ids_T < 0, last_tokens_Z[seats_T], token_ids_T).clamp(min=0)


def keep_tokens(last_tokens_Z: Tensor, seats_S: Tensor, tokens_S: Tensor) -> Tensor:
    """The last tokens with tokens[s] at seat seats[s] (in place on a device); seat 0 is nobody's and keeps anything."""
    return last_tokens_Z.index_put((seats_S,), tokens_S)


def penalise(
    logits_SV: Tensor, counts_SV: Tensor, repetition_S: Tensor, frequency_S: Tensor, presence_S: Tensor
) -> Tensor:
    """The logits less what the tokens of a request cost; counts as in `sample_penalised`, a row each."""
    generated = (counts_SV & _MOST).to(logits_SV.dtype)
    repetition = repetition_S.unsqueeze(1)
    repeated = torch.where(logits_SV > 0, logits_SV / repetition, logits_SV * repetition)
    logits_SV = torch.where(counts_SV != 0, repeated, logits_SV)
    return logits_SV - frequency_S.unsqueeze(1) * generated - presence_S.unsqueeze(1) * (generated > 0)


def mask(logits_SV: Tensor, mask_rows_S: Tensor, masks_GB: Tensor) -> Tensor:
    """The logits with -inf for tokens that row mask_rows[s] of the masks forbids; 0 masks nothing.

    masks: int32 [G, ceil(V / 32)], token v is bit v % 32 of word v // 32, 1: allowed. Its row 0 is never read.
    """
    tokens = torch.arange(logits_SV.shape[1], device=logits_SV.device)
    allowed_SV = (masks_GB[mask_rows_S][:, tokens // 32] >> (tokens % 32)) & 1
    return torch.where((allowed_SV == 0) & (mask_rows_S != 0).unsqueeze(1), -torch.inf, logits_SV)


def exponentials(keys_S: Tensor, counters_S: Tensor, vocab: int) -> Tensor:
    """float64 [S, vocab], above 0 and finite: the noise E_v = -log(u_v) of every token.

    SplitMix64 twice: number `counters` of stream `keys` is a stream, whose number v // 2 is the noise of two tokens;
    the even one takes the lower 32 bits r. 1 - u = (r + 1/2) / 2^32, in float32: u near 1, where winners are, has all
    its bits, and the factor is short of 2^-32 by so much that u is never 0.
    """
    pairs = torch.arange((vocab + 1) // 2, device=keys_S.device)
    z = _number(_number(keys_S, counters_S).unsqueeze(1), pairs)
    words = torch.stack((z & 0xFFFFFFFF, _shifted(z, 32)), -1).flatten(1)[:, :vocab]
    past = (words.float() + 0.5) * _SHORT
    return -torch.log1p(-past.double())


def _number(streams: Tensor, counters: Tensor) -> Tensor:
    """Number `counters` of the SplitMix64 streams, as int64."""
    z = streams + (counters + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right that fills with zeros, of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def kept(
    logits_SV: Tensor, temperature_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor
) -> tuple[Tensor, Tensor]:
    """float64 weights [S, V] of the tokens that a row may draw (0 for the others), and which rows are sound.

    top_k: the k most likely and all that tie with the last of them, 0 keeps all; top_p: of these, the fewest most
    likely whose weight reaches top_p of the first k's, with ties; min_p: relative to the most likely. A row whose
    logits hold NaN, or whose best is not finite, is not sound.
    """
    x_SV = logits_SV.double()
    best_S1 = x_SV.amax(-1, keepdim=True)
    sound_S = torch.isfinite(best_S1[:, 0]) & ~x_SV.isnan().any(-1)
    x_SV = torch.where(sound_S.unsqueeze(1), x_SV, 0.0)
    best_S1 = x_SV.amax(-1, keepdim=True)
    first = torch.zeros_like(x_SV).scatter(1, (x_SV == best_S1).long().argmax(-1, keepdim=True), 1.0)
    p_SV = torch.exp((x_SV - best_S1) / temperature_S.double().clamp(min=GREEDY_BELOW).unsqueeze(1))
    p_SV = p_SV.masked_fill(p_SV < min_p_S.double().unsqueeze(1), 0.0)
    vocab = p_SV.shape[1]
    ordered_SV = p_SV.sort(-1, descending=True).values
    mass_SV = ordered_SV.cumsum(-1)
    last_S1 = torch.where((top_k_S > 0) & (top_k_S < vocab), top_k_S, vocab).long().unsqueeze(1) - 1
    wanted_S1 = top_p_S.double().unsqueeze(1) * mass_SV.gather(1, last_S1)
    reached_S1 = torch.where(top_p_S.unsqueeze(1) < 1, torch.searchsorted(mass_SV, wanted_S1), vocab)
    p_SV = p_SV.masked_fill(p_SV < ordered_SV.gather(1, torch.minimum(last_S1, reached_S1)), 0.0)
    return torch.where((temperature_S < GREEDY_BELOW).unsqueeze(1), first, p_SV), sound_S


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    keys_S: Tensor,
    counters_S: Tensor,
) -> Tensor:
    """int64 [S]: the token drawn for each row, -1 where the row is not sound (see `kept`).

    logits float32; temperature, top_p, min_p float32; top_k int32; keys, counters int64.
    """
    p_SV, sound_S = kept(logits_SV, temperature_S, top_k_S, top_p_S, min_p_S)
    arrivals_SV = exponentials(keys_S, counters_S, p_SV.shape[1]) / p_SV
    return torch.where(sound_S, arrivals_SV.argmin(-1), -1)


def sample_penalised(
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
) -> tuple[Tensor, Tensor]:
    """`sample` of the penalised, masked logits; and the counts with each drawn token counted (in place on a device).

    counts: int16 [Z, V], row `slots[s]` for row s: how often the request generated the token, plus IN_PROMPT if its
    prompt holds it. Seat 0 is nobody's: rows on it are neither penalised nor counted. Penalties float32, slots int64;
    no two rows share another seat. Masks as in `mask`.
    """
    nobody_S1 = (slots_S == 0).unsqueeze(1)
    penalised_SV = penalise(logits_SV, counts_ZV[slots_S], repetition_S, frequency_S, presence_S)
    penalised_SV = torch.where(nobody_S1, logits_SV, penalised_SV)
    penalised_SV = mask(penalised_SV, mask_rows_S, masks_GB)
    tokens_S = sample(penalised_SV, temperature_S, top_k_S, top_p_S, min_p_S, keys_S, counters_S)
    counts_ZV = counts_ZV.clone()
    live = (slots_S != 0) & (tokens_S >= 0)
    old = counts_ZV[slots_S[live], tokens_S[live]]
    counts_ZV[slots_S[live], tokens_S[live]] = torch.where((old & _MOST) < _MOST, old + 1, old)
    return tokens_S, counts_ZV


_TOKEN = Index("logits_SV", dims=(1,), low=-1)

OPS = (
    Op("feed_tokens", feed_tokens, indices={"seats_T": Index("last_tokens_Z")}),
    Op("keep_tokens", keep_tokens, in_place={0: "last_tokens_Z"}, indices={"seats_S": Index("last_tokens_Z")}),
    Op(
        "edit_logits", edit_logits, outputs=2, in_place={0: "logits_SV"},
        indices={"tokens_M": Index("logits_SV", dims=(1,))},
    ),
    Op("sample", sample, indices={0: _TOKEN}),
    Op(
        "sample_penalised", sample_penalised, outputs=2, in_place={1: "counts_ZV"},
        indices={0: _TOKEN, "slots_S": Index("counts_ZV"), "mask_rows_S": Index("masks_GB")},
    ),
)  # fmt: skip
