"""What a load shows: throughput, percentiles of every latency, and goodput: requests a second within their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4c.client.load import Timed
from dsv4c.errors import ConfigError

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "time between pieces of text",
    "e2el": "time to the last token",
}


@dataclass(frozen=True)
class Figures:
    """Seconds are wall time; latencies are milliseconds."""

    completed: int
    failed: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    latencies_ms: Mapping[str, Mapping[str, float]]
    """Name of `LATENCIES` -> `mean`, `p50`, ... -> milliseconds; a name without a value has none."""
    good: int | None
    """Requests that kept every limit; None: there were no limits."""
    errors: Mapping[str, int]
    """Message -> how often."""

    @classmethod
    def of(
        cls, timed: Sequence[Timed], seconds: float, percentiles: Sequence[float], limits_ms: Mapping[str, float]
    ) -> Figures:
        """The figures of one run. Requests that failed count as failed and nowhere else."""
        done = [t for t in timed if t.error is None]
        errors: dict[str, int] = {}
        for one in timed:
            if one.error is not None:
                errors[one.error] = errors.get(one.error, 0) + 1
        series = {name: [v for t in done for v in _values(t, name)] for name in LATENCIES}
        latencies = {name: _summary(values, percentiles) for name, values in series.items() if values}
        good = sum(_kept(t, limits_ms) for t in done) if limits_ms else None
        prompt, output = sum(t.prompt_tokens for t in done), sum(t.output_tokens for t in done)
        return cls(len(done), len(timed) - len(done), seconds, prompt, output, latencies, good, errors)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the derived rates."""
        rates: dict[str, Any] = {
            "completed": self.completed, "failed": self.failed, "duration_s": round(self.seconds, 3),
            "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens,
            "requests_per_s": self._rate(self.completed), "output_tokens_per_s": self._rate(self.output_tokens),
            "all_tokens_per_s": self._rate(self.prompt_tokens + self.output_tokens),
        }  # fmt: skip
        if self.good is not None:
            rates |= {"good_requests": self.good, "goodput_per_s": self._rate(self.good)}
        for name, summary in self.latencies_ms.items():
            rates |= {f"{key}_{name}_ms": round(value, 3) for key, value in summary.items()}
        return {**rates, "errors": dict(self.errors)}

    def _rate(self, count: int) -> float:
        return round(count / max(self.seconds, 1e-9), 3)


def read_limits(given: Sequence[str]) -> dict[str, float]:
    """`ttft:500` -> milliseconds by name. Raises ConfigError."""
    limits = {}
    for text in given:
        name, colon, value = text.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            colon = ""
        if not colon or name not in ("ttft", "tpot", "e2el") or not limits[name] > 0:
            raise ConfigError(
                f"`{text}` is no limit", hint="such as `ttft:500`, `tpot:50` or `e2el:5000`, in milliseconds"
            )
    return limits


def _values(timed: Timed, name: str) -> list[float]:
    if name == "itl":
        return timed.gaps_s
    value = {"ttft": timed.ttft_s, "tpot": timed.tpot_s, "e2el": timed.e2e_s}[name]
    return [] if value is None else [value]


def _kept(timed: Timed, limits_ms: Mapping[str, float]) -> bool:
    return all(1e3 * value <= limit for name, limit in limits_ms.items() for value in _values(timed, name))


def _summary(values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    found = np.asarray(values) * 1e3
    return {"mean": float(found.mean())} | {f"p{p:g}": float(np.percentile(found, p)) for p in percentiles}
