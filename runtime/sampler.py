"""Logits -> token ids: penalties, bias, temperature, filters, one reproducible draw; and log-probabilities.

Vectorised over the requests of a step. What a request draws depends on its seed and on how many tokens it has
generated, never on its neighbours, on chunking or on preemption. A draw is an exponential race: token v arrives at
E_v / p_v, with p_v its probability and E_v = -log(u_v) of a hash (SplitMix64) of key, count and v; the first wins,
with probability p_v. Of two distributions, the same key and count mostly draw the same token. Order of operations:

    raw logits -> log-probabilities reported (before everything below, as OpenAI and vLLM do)
    + logit_bias -> repetition, frequency, presence penalties -> the grammar's mask -> stop tokens masked until
    min_tokens, unless the grammar lets nothing else follow
    -> greedy: the most likely | / temperature -> min_p -> top_k -> top_p -> draw
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dsv4c.runtime.grammar import Masks, fill_masks
from dsv4c.runtime.params import SamplingParams

GREEDY_BELOW = 1e-5  # smaller temperatures overflow float32 before they differ from greedy
_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment (the golden ratio)
_MASK = 2**64 - 1
_SHIFTS = np.array([30, 27, 31], dtype=np.uint64)
_FACTORS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
_SHORT = (1 - 2.0**-24) * 2.0**-32  # a float32
_BLOCK = 1 << 14  # hashes at a time that stay in a core's cache, temporaries included


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function, elementwise, modulo 2**64; in place."""
    shifted = z >> _SHIFTS[0]
    z ^= shifted
    z *= _FACTORS[0]
    z ^= np.right_shift(z, _SHIFTS[1], out=shifted)
    z *= _FACTORS[1]
    z ^= np.right_shift(z, _SHIFTS[2], out=shifted)
    return z


def noise_key(seed: int, choice: int) -> int:
    """The 64-bit key of the stream of choice `choice` (of n) of a request with this seed."""
    once = _mix(np.array([seed & _MASK], dtype=np.uint64))
    return int(_mix(once + np.uint64(((choice + 1) * _GAMMA) & _MASK))[0])


def log_uniforms(
    keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64], vocab_size: int
) -> npt.NDArray[np.float32]:
    """[len(keys), vocab_size], below 0 and finite: log(u_v) of every token.

    SplitMix64 twice: number `counters` of stream `keys` is a stream, whose number v // 2 is the noise of two tokens;
    the even one takes the lower 32 bits r. 1 - u = (r + 1/2) / 2**32, in float32: u near 1, where winners are, has all
    its bits, and the factor is short of 2**-32 by so much that u is never 0.
    """
    pairs = (vocab_size + 1) // 2
    steps = np.arange(1, pairs + 1, dtype=np.uint64)
    steps *= np.uint64(_GAMMA)
    streams = _mix(keys + (counters + np.uint64(1)) * np.uint64(_GAMMA))
    out = np.empty((streams.size, 2 * pairs), dtype=np.float32)
    rows, columns = max(1, _BLOCK // max(pairs, 1)), min(_BLOCK, max(pairs, 1))
    for row in range(0, streams.size, rows):
        for column in range(0, pairs, columns):
            z = _mix(streams[row : row + rows, None] + steps[column : column + columns])
            words = z.astype("<u8", copy=False).view("<u4")
            past = out[row : row + rows, 2 * column : 2 * column + words.shape[1]]
            np.add(words, np.float32(0.5), out=past, dtype=np.float32, casting="same_kind")
            past *= np.float32(-_SHORT)
    return torch.from_numpy(out).log1p_().numpy()[:, :vocab_size]  # NumPy's log1p takes 10 times as long


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token and of the most likely ones in its place, (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SamplerState:
    """What sampling must remember of one request; survives preemption. `accept` every token that was chosen."""

    __slots__ = ("_counts", "_index", "_seen", "_size", "bias", "generated", "grammar", "key", "params", "stop_ids")

    def __init__(
        self, params: SamplingParams, prompt: npt.NDArray[np.int64], stop_ids: Sequence[int] = (), choice: int = 0
    ) -> None:
        self.params = params
        self.key = noise_key(params.seed if params.seed is not None else secrets.randbits(64), choice)
        self.generated = 0
        self.stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        bias = sorted(params.logit_bias.items())
        self.bias = np.array([t for t, _ in bias], dtype=np.int64), np.array([b for _, b in bias], dtype=np.float32)
        self.grammar = None if params.grammar is None else params.grammar.start(stop_ids)
        self._index: dict[int, int] = {}
        self._seen = np.zeros(0, dtype=np.int64)
        self._size = 0
        if params.repetition_penalty != 1.0:
            self._seen = np.unique(prompt)
            self._size = self._seen.size
            self._index = {int(t): i for i, t in enumerate(self._seen)}
        self._counts = np.zeros(self._size, dtype=np.float32)

    @property
    def greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    @property
    def masks(self) -> bool:
        return self.generated < self.params.min_tokens and self.stop_ids.size > 0

    @property
    def edits(self) -> bool:
        """Whether the logits change at all before the temperature."""
        return bool(self.params.logit_bias) or self.masks or self.penalises or self.grammar is not None

    def seen(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Distinct tokens that penalties look at, and how often each was generated (0: only in the prompt)."""
        return self._seen[: self._size], self._counts[: self._size]

    def ahead(self, tokens: Sequence[int]) -> SamplerState:
        """This state as it will be once these tokens are accepted; to sample with, not to go on from."""
        out = copy.copy(self)
        out.generated += len(tokens)
        if self.grammar is not None:
            out.grammar = self.grammar.ahead(tokens)
        if self.penalises and tokens:
            seen, counts = self.seen()
            new = [t for t in dict.fromkeys(tokens) if t not in self._index]
            out._seen = np.concatenate([seen, np.array(new, dtype=np.int64)])
            out._counts = np.concatenate([counts, np.zeros(len(new), dtype=np.float32)])
            out._size = out._seen.size
            places = {t: self._size + i for i, t in enumerate(new)}
            for token in tokens:
                out._counts[places[token] if token in places else self._index[token]] += 1.0
        return out

    def accept(self, token: int) -> None:
        self.generated += 1
        if self.grammar is not None:
            self.grammar.accept(token)
        if not self.penalises:
            return
        at = self._index.get(token)
        if at is None:
            at = self._index[token] = self._size
            if self._size == self._seen.size:
                room = max(64, 2 * self._size)
                self._seen, self._counts = np.resize(self._seen, room), np.resize(self._counts, room)
            self._seen[at], self._counts[at] = token, 0.0
            self._size += 1
        self._counts[at] += 1.0


def sample(
    logits_SV: torch.Tensor, states: Sequence[SamplerState], masks: Masks | None = None
) -> tuple[list[int | None], list[TokenLogprob | None]]:
    """One token for each row, and its log-probability where asked for.

    logits_SV: [S, vocab] float32, left unchanged; states[i] belongs to row i and is not advanced (see `accept`).
    masks: those of the rows' grammars; None: still to be filled.
    A row whose logits hold NaN, or whose best is not finite, gives None for both; the others are not affected.
    """
    edited_SV = _edit(logits_SV, states, masks)
    best_S, ids_S = edited_SV.max(dim=-1)
    finite_S = torch.isfinite(best_S)
    tokens: list[int | None] = ids_S.tolist()
    if not bool(finite_S.all()):
        tokens = [token if finite else None for token, finite in zip(tokens, finite_S.tolist(), strict=True)]
    drawn = [i for i, s in enumerate(states) if not s.greedy and tokens[i] is not None]
    if drawn:
        rows = states if len(drawn) == len(states) else [states[i] for i in drawn]
        part_SV = edited_SV if len(drawn) == len(states) else edited_SV[drawn]
        for i, token in zip(drawn, _draw(part_SV, rows).tolist(), strict=True):
            tokens[i] = token
    logprobs: list[TokenLogprob | None] = [None] * len(tokens)
    wanted = {i: t for i, t in enumerate(tokens) if states[i].params.logprobs is not None and t is not None}
    if wanted:
        counts = [states[i].params.logprobs or 0 for i in wanted]
        for i, entry in zip(wanted, logprobs_of(logits_SV[list(wanted)], [*wanted.values()], counts), strict=True):
            logprobs[i] = entry
    return tokens, logprobs


def logprobs_of(logits_SV: torch.Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of tokens[i] under row i, with the top[i] most likely ones. logits_SV: [S, vocab] float32."""
    if not tokens:
        return []
    logp_SV = torch.log_softmax(logits_SV.float(), dim=-1)
    chosen = logp_SV.gather(1, torch.tensor(tokens, device=logp_SV.device)[:, None])[:, 0].tolist()
    values_SK, ids_SK = logp_SV.topk(min(max(top), logp_SV.shape[-1]), dim=-1)
    values, ids = values_SK.tolist(), ids_SK.tolist()
    return [
        TokenLogprob(token, chosen[i], tuple(zip(ids[i][: top[i]], values[i][: top[i]], strict=True)))
        for i, token in enumerate(tokens)
    ]


def _edit(logits_SV: torch.Tensor, states: Sequence[SamplerState], masks: Masks | None = None) -> torch.Tensor:
    """The logits after bias, penalties and masks; the very tensor where nobody asks for any."""
    if not any(s.edits for s in states):
        return logits_SV
    logits_SV = logits_SV.clone()
    biased = [(i, *s.bias) for i, s in enumerate(states) if s.params.logit_bias]
    if biased:
        at, values = _scatter(logits_SV, biased)
        logits_SV[at] += values
    penalised = [(i, *s.seen()) for i, s in enumerate(states) if s.penalises]
    if penalised:
        at, counts = _scatter(logits_SV, penalised)
        per_row = [[getattr(s.params, f"{p}_penalty") for s in states] for p in ("repetition", "frequency", "presence")]
        repetition_S, frequency_S, presence_S = torch.tensor(per_row, device=logits_SV.device, dtype=logits_SV.dtype)
        rows, seen = at[0], logits_SV[at]
        seen = torch.where(seen > 0, seen / repetition_S[rows], seen * repetition_S[rows])
        logits_SV[at] = seen - frequency_S[rows] * counts - presence_S[rows] * (counts > 0)
    ruled = [(i, s.grammar) for i, s in enumerate(states) if s.grammar is not None]
    if ruled:
        if masks is None:
            masks = fill_masks([cursor for _, cursor in ruled], width_of(states))
        else:
            masks = masks[[i for i, _ in ruled]]
        _mask(logits_SV, [i for i, _ in ruled], masks, width_of(states))
    masked = [(i, s.stop_ids, np.zeros(s.stop_ids.size, np.float32)) for i, s in enumerate(states) if s.masks]
    masked = [e for e in masked if states[e[0]].grammar is None or _goes_on(logits_SV[e[0]], e[1])]
    if masked:
        at, _ = _scatter(logits_SV, masked)
        logits_SV[at] = -torch.inf
    return logits_SV


def width_of(states: Sequence[SamplerState]) -> int:
    """Tokens that the grammars know; 0 if no state has one. An engine has one vocabulary."""
    return next((s.params.grammar.vocab_size for s in states if s.params.grammar is not None), 0)


def _mask(logits_SV: torch.Tensor, rows: Sequence[int], masks: Masks, width: int) -> None:
    """-inf for tokens whose bit is 0, and for those beyond the grammars' vocabulary. In place, on the host."""
    words = masks.astype("<i4", copy=False).view(np.uint8)
    forbidden = np.unpackbits(words, axis=1, count=width, bitorder="little") == 0
    for row, out in zip(rows, forbidden, strict=True):
        logits_V = logits_SV[row].numpy()
        np.putmask(logits_V[:width], out, -np.inf)
        if out.any():  # a row that nothing masks has left its grammar behind
            logits_V[width:] = -np.inf


def _goes_on(logits_V: torch.Tensor, stop_ids: npt.NDArray[np.int64]) -> bool:
    """Whether any other token than these is possible."""
    left_V = logits_V.clone()
    left_V[torch.from_numpy(stop_ids)] = -torch.inf
    return bool((left_V > -torch.inf).any())


def _scatter(
    logits_SV: torch.Tensor, entries: Sequence[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32]]]
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Row and column indices of sparse (row, columns, values) entries, and the values, on the logits' device."""
    rows = np.repeat([i for i, _, _ in entries], [c.size for _, c, _ in entries])
    columns = np.concatenate([c for _, c, _ in entries])
    values = np.concatenate([v for _, _, v in entries])
    device = logits_SV.device
    at = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
    return at, torch.from_numpy(values).to(device)


def _draw(logits_SV: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """[S] int64: one token a row from its filtered distribution. Rows do not influence each other."""
    device = logits_SV.device
    temperature_S = torch.tensor([s.params.temperature for s in states], device=device, dtype=torch.float32)
    logits_SV = logits_SV.float()
    # relative to the row's best: a small temperature then sends the others to -inf, and never gives NaN
    p_SV = torch.softmax((logits_SV - logits_SV.amax(-1, keepdim=True)) / temperature_S[:, None], dim=-1)
    if any(s.params.min_p > 0 for s in states):
        min_p_S = torch.tensor([s.params.min_p for s in states], device=device, dtype=torch.float32)
        p_SV = p_SV.masked_fill(p_SV < min_p_S[:, None] * p_SV.amax(-1, keepdim=True), 0.0)
    sorting = [i for i, s in enumerate(states) if s.params.top_k > 0 or s.params.top_p < 1.0]
    if len(sorting) == len(states):
        p_SV = _keep_top(p_SV, states)
    elif sorting:
        p_SV[sorting] = _keep_top(p_SV[sorting], [states[i] for i in sorting])
    keys = np.array([s.key for s in states], dtype=np.uint64)
    counters = np.array([s.generated for s in states], dtype=np.uint64)
    # log(u) / p, which is an arrival's time below 0
    times_SV = torch.from_numpy(log_uniforms(keys, counters, p_SV.shape[-1])).to(device).div_(p_SV)
    return _argmax(times_SV)


def _argmax(x_SV: torch.Tensor) -> torch.Tensor:
    """The first largest of each row. NumPy's is 15 times as fast on a CPU."""
    return torch.from_numpy(x_SV.numpy().argmax(-1)) if x_SV.device.type == "cpu" else x_SV.argmax(-1)


def _keep_top(p_SV: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """The probabilities with those below the k-th, then below top_p of what is left, set to 0. Ties stay together."""
    vocab, device = p_SV.shape[-1], p_SV.device
    k_S = torch.tensor([s.params.top_k if 0 < s.params.top_k < vocab else vocab for s in states], device=device)
    top_p_S = torch.tensor([s.params.top_p for s in states], device=device, dtype=torch.float64)
    sorted_SV = _sorted(p_SV)
    mass_SV = sorted_SV.cumsum(-1, dtype=torch.float64)
    last_S1 = k_S[:, None] - 1
    wanted_S1 = top_p_S[:, None] * mass_SV.gather(1, last_S1)
    # the first rank whose mass, with all likelier ones, reaches top_p; rounding must not lose a row's whole tail
    reached_S1 = torch.where(top_p_S[:, None] < 1.0, torch.searchsorted(mass_SV, wanted_S1), vocab)
    return p_SV.masked_fill(p_SV < sorted_SV.gather(1, torch.minimum(last_S1, reached_S1)), 0.0)


def _sorted(p_SV: torch.Tensor) -> torch.Tensor:
    """Each row in descending order. NumPy sorts values with vector instructions, 40x faster than torch on a CPU."""
    if p_SV.device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(np.sort(p_SV.numpy(), axis=-1)[:, ::-1]))
    return p_SV.sort(dim=-1, descending=True).values
