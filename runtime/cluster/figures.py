"""Numbers of a router: its workers' together, and each one's own for /metrics."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsv4c.runtime.cluster.lifecycle import ENDS, PRESENT
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.speculation import SpeculationStats

if TYPE_CHECKING:
    from dsv4c.runtime.cluster.router import Router

_PRESENT = ("running", "waiting", "max_waiting", "pages_used", "pages_total", "pages_cached", "last_step_s")


def total(parts: Sequence[EngineStats], *, past: bool = False) -> EngineStats:
    """The sums. `past`: without what is so only now: queues and pages."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(EngineStats):
        each = [getattr(part, field.name) for part in parts]
        if past and field.name in _PRESENT:
            continue
        if isinstance(each[0], SpeculationStats):
            values[field.name] = SpeculationStats(
                _sum_places([s.tried for s in each]), _sum_places([s.kept for s in each]), sum(s.steps for s in each)
            )
        elif isinstance(each[0], Mapping):
            values[field.name] = dict(sum((Counter(counts) for counts in each), Counter()))
        else:
            values[field.name] = max(each) if field.name == "last_step_s" else sum(each)
    return EngineStats(**values)


def _sum_places(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    width = max((len(row) for row in rows), default=0)
    return tuple(sum(row[i] for row in rows if i < len(row)) for i in range(width))


class RouterCollector(Collector):
    """What only a router has to tell; registered beside the numbers of its server."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        router = self._router
        states = router.states()
        now = GaugeMetricFamily("dsv4c_router_requests", "Requests in each state", labels=["state"])
        for phase in PRESENT:
            now.add_metric([phase], states[phase])
        yield now
        ended = CounterMetricFamily("dsv4c_router_requests_ended", "Requests that have ended", labels=["state"])
        for state in ENDS:
            ended.add_metric([state], states[state])
        yield ended
        lost = CounterMetricFamily("dsv4c_router_workers_lost", "Workers that were lost", labels=["role"])
        for role, count in dict(router.losses).items():
            lost.add_metric([role], count)
        yield lost
        for name, text, value in (
            ("retries", "Attempts taken back, whose requests began another", router.journeys.retried),
            ("prompt_tokens", "Tokens of prompts that were placed", router.journeys.placed_tokens),
            ("cached_tokens", "Of these, tokens in the prefix cache of the worker they were given to",
             router.journeys.placed_cached_tokens),
        ):  # fmt: skip
            yield CounterMetricFamily(f"dsv4c_router_{name}", text, value=value)
        yield from self._workers()

    def _workers(self) -> Iterator[Metric]:
        members = list(self._router.members)
        labels = ["worker", "role"]
        for name, text, values in (
            ("up", "Workers that are there", [1 for _ in members]),
            ("requests", "Requests given to a worker", [len(m.given) for m in members]),
            ("leases", "Prompts that a worker keeps for others", [m.beat.leases for m in members]),
            ("prefill_tokens", "Tokens of prompts that a worker has yet to compute",
             [sum(m.uncomputed.values()) for m in members]),
            ("blocks", "Blocks in a worker's prefix cache", [len(m.blocks) for m in members]),
        ):  # fmt: skip
            gauge = GaugeMetricFamily(f"dsv4c_router_worker_{name}", text, labels=labels)
            for member, value in zip(members, values, strict=True):
                gauge.add_metric([member.name, member.role], value)
            yield gauge
        pages = GaugeMetricFamily(
            "dsv4c_router_worker_pages_claimed", "KV pages that a worker's requests may come to need",
            labels=[*labels, "group"],
        )  # fmt: skip
        transfers = CounterMetricFamily(
            "dsv4c_router_worker_transfers", "What a worker says of its transfers", labels=[*labels, "what"]
        )
        for member in members:
            for group, count in member.claimed.items():
                pages.add_metric([member.name, member.role, group], count)
            for what, count in member.beat.transfers.items():
                transfers.add_metric([member.name, member.role, what], count)
        yield pages
        yield transfers
