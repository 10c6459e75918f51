"""Counters and histograms of one server, in a registry of its own, and the engine's gauges read at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsv4c.runtime.engine import EngineStats
from dsv4c.runtime.speculation import SpeculationStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds; from one CPU decode step of a tiny model to a long queue.
_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("dsv4c_requests_running", "Sequences in the current batch", value=stats.running)
        yield GaugeMetricFamily("dsv4c_requests_waiting", "Sequences waiting to be admitted", value=stats.waiting)
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


class Metrics:
    """The numbers of one app. Two apps in one process never share them."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_EngineCollector(stats))
        registry = self.registry
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
        self.first_token = Histogram(
            "dsv4c_time_to_first_token_seconds", "From request to first token", buckets=_LATENCY_S, registry=registry
        )
        self.output_token = Histogram(
            "dsv4c_time_per_output_token_seconds",
            "Mean time between the tokens of a sequence",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.request = Histogram(
            "dsv4c_request_seconds", "From request to the end of its response", buckets=_LATENCY_S, registry=registry
        )

    def text(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)
