"""Numbers of a node that moves state, read at scrape time; beside the engine's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsv4c.runtime.transfer.node import NodeStats


class TransferCollector(Collector):
    """Of one node."""

    def __init__(self, stats: Callable[[], NodeStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        moved = stats.transfer
        for name, text, value in (
            ("leases", "Prefills whose state is kept, or will be, for a reader", stats.leases),
            ("moving", "Requests whose state is wanted from a prefill worker", stats.moving),
            ("pulls", "Pulls under way", moved.pulling),
            ("quarantined", "Pulls that were given up and may still write", moved.quarantined),
            ("peers", "Workers that state was pulled from and that are not known to be dead", moved.peers),
        ):
            yield GaugeMetricFamily(f"dsv4c_transfer_{name}", text, value=value)
        for name, text, total in (
            ("granted", "Leases given", float(stats.granted)),
            ("expired", "Leases that nobody read in time", stats.expired),
            ("moved", "Requests that went on with state from elsewhere", stats.moved),
            ("recomputed", "Requests whose state was lost, and whose prompts were computed here", stats.recomputed),
            ("pulled_bytes", "Bytes pulled", moved.pulled_bytes),
            ("early_bytes", "Of these, those pulled while the prompt was still computed", moved.early_bytes),
            ("pull_seconds", "Seconds from the beginning of each pull to its end", moved.pull_s),
        ):  # fmt: skip
            yield CounterMetricFamily(f"dsv4c_transfer_{name}", text, value=total)
        failed = CounterMetricFamily("dsv4c_transfer_failures", "Pulls that failed, by error", labels=["error"])
        for error, count in moved.failed.items():
            failed.add_metric([error], count)
        yield failed
