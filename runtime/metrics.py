"""Counters and histograms of one server, in a registry of its own, and the engine's gauges read at scrape time.

Names begin with `dsv4c_`; `metrics_vllm` gives those with a counterpart a second name. docs/metrics.md lists all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.metrics_vllm import VllmNames
from dsv4c.runtime.speculation import SpeculationStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds; from one CPU decode step of a tiny model to a long queue.
_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKENS = tuple(2**power for power in range(0, 21, 2))  # to a million
_CHOICES = (1, 2, 4, 8, 16, 32, 64, 128)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("dsv4c_requests_running", "Sequences in the current batch", value=stats.running)
        yield GaugeMetricFamily("dsv4c_requests_waiting", "Sequences waiting to be admitted", value=stats.waiting)
        yield GaugeMetricFamily(
            "dsv4c_requests_arriving", "Sequences whose state is on its way in", value=stats.arriving
        )
        yield GaugeMetricFamily("dsv4c_requests_kept", "Sequences that ended and wait to be read", value=stats.kept)
        yield GaugeMetricFamily("dsv4c_slots_unsettled", "Slots that a lost transfer may write", value=stats.unsettled)
        yield CounterMetricFamily("dsv4c_preemptions", "Sequences put back for lack of pages", value=stats.preemptions)
        for name, text, tokens in (
            ("queries", "Tokens of prompts looked up in the prefix cache", stats.prefix_queried_tokens),
            ("hits", "Tokens of prompts found in the prefix cache", stats.prefix_hit_tokens),
        ):
            yield CounterMetricFamily(f"dsv4c_prefix_cache_{name}", text, value=tokens)
        for name, text, pages in (
            ("dsv4c_kv_pages_used", "KV pages in use", stats.pages_used),
            ("dsv4c_kv_pages_cached", "KV pages that only the prefix cache holds", stats.pages_cached),
            ("dsv4c_kv_pages", "KV pages there are", stats.pages_total),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["group"])
            for group, count in pages.items():
                gauge.add_metric([group], count)
            yield gauge
        shares = [stats.pages_used.get(group, 0) / max(1, total) for group, total in stats.pages_total.items()]
        yield GaugeMetricFamily(
            "dsv4c_kv_usage",
            "Share of the KV pages in use, of the group that is fullest",
            value=max(shares, default=0.0),
        )
        yield CounterMetricFamily("dsv4c_steps", "Steps launched", value=stats.steps)
        yield CounterMetricFamily("dsv4c_step_tokens", "Tokens computed, recomputed ones too", value=stats.step_tokens)
        yield CounterMetricFamily(
            "dsv4c_engine_generated_tokens", "Generated tokens as they come, those of requests that go on too",
            value=stats.generated_tokens,
        )  # fmt: skip
        yield CounterMetricFamily("dsv4c_failed_steps", "Steps that raised", value=stats.failed_steps)
        for name, text, seconds in (
            ("step", "Seconds spent in steps", stats.step_s),
            ("wait", "Of the seconds spent in steps, those spent waiting for the device", stats.wait_s),
        ):
            yield CounterMetricFamily(f"dsv4c_engine_{name}_seconds", text, value=seconds)
        if stats.speculation.tried:
            yield from _speculation(stats.speculation)


def _speculation(stats: SpeculationStats) -> Iterator[Metric]:
    """Of an engine that verifies drafts. Positions count from 0, the first draft."""
    for name, text, counts in (
        ("draft", "Drafts verified", stats.tried), ("accepted", "Drafts kept", stats.kept)
    ):  # fmt: skip
        counter = CounterMetricFamily(f"dsv4c_spec_decode_{name}_tokens", f"{text}, by position", labels=["position"])
        for position, count in enumerate(counts):
            counter.add_metric([str(position)], count)
        yield counter
    acceptance = GaugeMetricFamily(
        "dsv4c_spec_decode_acceptance", "Share of the drafts verified at a position that was kept", labels=["position"]
    )
    for position, (kept, tried) in enumerate(zip(stats.kept, stats.tried, strict=True)):
        acceptance.add_metric([str(position)], kept / max(1, tried))
    yield acceptance
    yield CounterMetricFamily(
        "dsv4c_spec_decode_steps", "Steps that verified drafts, once for each sequence in them", value=stats.steps
    )
    yield GaugeMetricFamily(
        "dsv4c_spec_decode_tokens_per_step", "Tokens that such a step gave a sequence",
        value=1.0 + stats.accepted / max(1, stats.steps),
    )  # fmt: skip


class TokenHistogram(Collector):
    """A histogram that is observed once a token, by one thread: a list of counts, without a lock (0.2 us, not 1)."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name, self._text, self._buckets = name, text, tuple(buckets)
        self._counts = [0] * (len(self._buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        pairs, total = [], 0
        for edge, count in zip((*map(str, self._buckets), "+Inf"), list(self._counts)):
            total += count
            pairs.append((edge, float(total)))
        yield HistogramMetricFamily(self._name, self._text, buckets=pairs, sum_value=self._sum)


class Metrics:
    """The numbers of one app. Two apps in one process never share them."""

    def __init__(self, stats: Callable[[], EngineStats], model_name: str = "") -> None:
        self._own = CollectorRegistry(auto_describe=False)
        self._own.register(_EngineCollector(stats))
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self._own)
        self.registry.register(VllmNames(self._own, model_name))
        registry = self._own

        def histogram(name: str, text: str, buckets: Iterable[float] = _LATENCY_S) -> Histogram:
            return Histogram(f"dsv4c_{name}", text, buckets=tuple(buckets), registry=registry)

        self.responses = Counter(
            "dsv4c_http_responses",
            "Answered HTTP requests (499: the client left)",
            ["path", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("dsv4c_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generation_tokens = Counter("dsv4c_generation_tokens", "Generated tokens", registry=registry)
        self.finished = Counter(
            "dsv4c_sequences_finished", "Sequences by how they ended", ["reason"], registry=registry
        )
        self.first_token = histogram("time_to_first_token_seconds", "From request to first token")
        self.output_token = histogram("time_per_output_token_seconds", "Mean time between the tokens of a sequence")
        self.request = histogram("request_seconds", "From request to the end of its response")
        self.queue = histogram("request_queue_seconds", "From a sequence's submission to its first step")
        self.prefill = histogram("request_prefill_seconds", "From a sequence's first step to its first token")
        self.decode = histogram("request_decode_seconds", "From a sequence's first token to its last")
        self.request_prompt = histogram("request_prompt_tokens", "Tokens of a sequence's prompt", _TOKENS)
        self.request_generated = histogram("request_generation_tokens", "Tokens generated for a sequence", _TOKENS)
        self.request_limit = histogram("request_max_tokens", "Tokens that a sequence may generate at most", _TOKENS)
        self.request_choices = histogram("request_sequences", "Sequences of a request: prompts times `n`", _CHOICES)
        self.between_tokens = TokenHistogram(
            "dsv4c_inter_token_seconds",
            "Time between the tokens of a sequence as they reach it, one by one",
            _LATENCY_S,
        )
        registry.register(self.between_tokens)

    def text(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)
