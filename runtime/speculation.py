"""How many drafts a step verifies, and how that went.

    length(requests)    the drafts of a request that give most tokens a second when so many requests decode together
    record(outcomes)    (drafts verified, drafts kept) of every request of a step
    observe(...)        how long such a step took

Kept drafts come from live rates by position, that fade; the cost of a step from what was measured here, and until then
from a prior: the compiler's prediction where there is one. What is chosen never changes a token, only when it comes, so
lengths are tried out while serving: now and then a step verifies one draft more or less than the best known.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dsv4c.artifact import Program

FADE = 0.998  # of a rate's weight with every outcome: the last 500 count
PRIOR_RATE, PRIOR_WEIGHT = 0.7, 8.0  # the first draft of DeepSeek-V3's MTP block is kept in 0.85 to 0.9 of steps
GAIN = 1.03  # by which another length must be better: measured steps differ by a few per cent
TRY_EVERY = 128  # steps of one size between trials of another length
TRY_STEPS = 4  # of a trial: the first has drafts of the length before
SETTLED = 8  # measured steps, from which they replace the prior
STEP_FADE = 0.95

StepCost = Callable[[int, int], float]
"""(requests that decode, drafts of each) -> time of a step, in any unit."""


def linear_cost(requests: int, drafts: int) -> float:
    """A guess for machines whose step is bound by weights: a draft costs a fifth of a step, whoever is served."""
    return 1.0 + 0.2 * drafts


def predicted_cost(programs: Iterable[Program]) -> StepCost:
    """What the compiler predicts of the decode program that holds a step; linear_cost where there is none."""
    known: dict[int, list[tuple[int, float]]] = {}
    for program in programs:
        if program.phase == "decode" and program.predicted_us and "D" in program.symbols:
            requests = program.symbols["D"]
            known.setdefault(program.symbols["S"] // requests - 1, []).append((requests, program.predicted_us))
    if not known:
        return linear_cost
    for sizes in known.values():
        sizes.sort()

    def cost(requests: int, drafts: int) -> float:
        sizes = known[drafts]
        at = bisect_left(sizes, (requests, 0.0))
        return sizes[min(at, len(sizes) - 1)][1]

    return cost


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Totals since the engine was made. `kept[i]` of `tried[i]` drafts at position i (0: the first) were kept."""

    tried: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    steps: int = 0
    """Of single requests: every one gave its request 1 + drafts kept tokens."""

    @property
    def drafted(self) -> int:
        return sum(self.tried)

    @property
    def accepted(self) -> int:
        return sum(self.kept)


class _Rate:
    """A share that fades: recent outcomes count more."""

    def __init__(self, prior: float) -> None:
        self._kept, self._seen = prior * PRIOR_WEIGHT, PRIOR_WEIGHT

    def add(self, kept: bool) -> None:
        self._kept, self._seen = self._kept * FADE + kept, self._seen * FADE + 1.0

    @property
    def value(self) -> float:
        return self._kept / self._seen


class _Size:
    """What is known of steps of one number of requests (rounded up to a power of two)."""

    def __init__(self, lengths: int) -> None:
        self.seconds = [0.0] * lengths
        self.measured = [0] * lengths
        self.best = -1
        self.turn = 0


class Speculation:
    """See the file's docstring. `max_tokens`: the most drafts, 0 for none; `fixed`: always as many as that."""

    def __init__(self, max_tokens: int, cost: StepCost = linear_cost, *, fixed: bool = False) -> None:
        self.max_tokens = max_tokens
        self._cost, self._fixed = cost, fixed
        self._rates = [_Rate(PRIOR_RATE ** (i + 1)) for i in range(max_tokens)]
        self._sizes: dict[int, _Size] = {}
        self._tried, self._kept, self._steps = [0] * max_tokens, [0] * max_tokens, 0

    def renewed(self) -> Speculation:
        """The same choice, with nothing counted or learnt."""
        return Speculation(self.max_tokens, self._cost, fixed=self._fixed)

    def length(self, requests: int) -> int:
        """Drafts of each request in the next step in which so many decode."""
        if self._fixed or not self.max_tokens:
            return self.max_tokens
        size = self._size(requests)
        best = self._best(size, requests)
        trial = size.turn % TRY_EVERY
        if trial < TRY_STEPS and size.turn >= TRY_STEPS:  # its neighbours in turn
            other = best + (1 if size.turn // TRY_EVERY % 2 else -1)
            return other if 0 <= other <= self.max_tokens else best
        return best

    def record(self, outcomes: Sequence[tuple[int, int]]) -> None:
        """Counts (drafts verified, drafts kept) of single requests in a step."""
        for drafts, kept in outcomes:
            self._steps += 1
            for i in range(drafts):
                self._tried[i] += 1
                self._kept[i] += i < kept
                self._rates[i].add(i < kept)

    def observe(self, requests: int, drafts: int, seconds: float) -> None:
        """Takes note of a step in which so many requests decoded, with so many drafts each, and nothing else ran."""
        size = self._size(requests)
        size.turn += 1
        share = 1.0 if not size.measured[drafts] else 1.0 - STEP_FADE
        size.seconds[drafts] += share * (seconds - size.seconds[drafts])
        size.measured[drafts] += 1

    def stats(self) -> SpeculationStats:
        return SpeculationStats(tuple(self._tried), tuple(self._kept), self._steps)

    def tokens(self, drafts: int) -> float:
        """Expected tokens of a request in a step that verifies so many drafts."""
        return 1.0 + sum(rate.value for rate in self._rates[:drafts])

    def _size(self, requests: int) -> _Size:
        key = 1 << max(0, requests - 1).bit_length()
        if key not in self._sizes:
            self._sizes[key] = _Size(1 + self.max_tokens)
        return self._sizes[key]

    def _best(self, size: _Size, requests: int) -> int:
        rates = [self.tokens(k) / self._seconds(size, requests, k) for k in range(1 + self.max_tokens)]
        best = max(range(len(rates)), key=lambda k: rates[k])
        if size.best < 0 or rates[best] > GAIN * rates[size.best]:
            size.best = best
        return size.best

    def _seconds(self, size: _Size, requests: int, drafts: int) -> float:
        """Of a step: measured, or the prior in units of what was measured."""
        if size.measured[drafts] >= SETTLED:
            return size.seconds[drafts]
        known = [k for k, count in enumerate(size.measured) if count >= SETTLED]
        unit = size.seconds[known[0]] / self._cost(requests, known[0]) if known else 1.0
        return unit * self._cost(requests, drafts)
