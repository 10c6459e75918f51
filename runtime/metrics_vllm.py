"""vLLM's names for what this server counts, so that dashboards and scripts made for vLLM work as they are.

Every family is one of ours under a second name, with vLLM's labels `model_name` and `engine`: nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


@dataclass(frozen=True)
class Alias:
    """vLLM's family `name` is our family `ours`, with labels renamed, or summed away where `summed`."""

    name: str
    ours: str
    labels: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    """Label values that vLLM calls otherwise."""
    summed: bool = False


ALIASES = (
    Alias("vllm:num_requests_running", "dsv4c_requests_running"),
    Alias("vllm:num_requests_waiting", "dsv4c_requests_waiting"),
    Alias("vllm:kv_cache_usage_perc", "dsv4c_kv_usage"),
    Alias("vllm:gpu_cache_usage_perc", "dsv4c_kv_usage"),  # until 0.9
    Alias("vllm:num_preemptions", "dsv4c_preemptions"),
    Alias("vllm:prefix_cache_queries", "dsv4c_prefix_cache_queries"),
    Alias("vllm:prefix_cache_hits", "dsv4c_prefix_cache_hits"),
    Alias("vllm:prompt_tokens", "dsv4c_prompt_tokens"),
    Alias("vllm:generation_tokens", "dsv4c_generation_tokens"),
    Alias("vllm:request_success", "dsv4c_sequences_finished", {"reason": "finished_reason"}, {"cancelled": "abort"}),
    Alias("vllm:time_to_first_token_seconds", "dsv4c_time_to_first_token_seconds"),
    Alias("vllm:inter_token_latency_seconds", "dsv4c_inter_token_seconds"),
    Alias("vllm:time_per_output_token_seconds", "dsv4c_inter_token_seconds"),  # until 0.12, of single tokens
    Alias("vllm:request_time_per_output_token_seconds", "dsv4c_time_per_output_token_seconds"),
    Alias("vllm:e2e_request_latency_seconds", "dsv4c_request_seconds"),
    Alias("vllm:request_queue_time_seconds", "dsv4c_request_queue_seconds"),
    Alias("vllm:request_prefill_time_seconds", "dsv4c_request_prefill_seconds"),
    Alias("vllm:request_decode_time_seconds", "dsv4c_request_decode_seconds"),
    Alias("vllm:request_prompt_tokens", "dsv4c_request_prompt_tokens"),
    Alias("vllm:request_generation_tokens", "dsv4c_request_generation_tokens"),
    Alias("vllm:request_max_num_generation_tokens", "dsv4c_request_max_tokens"),
    Alias("vllm:request_params_max_tokens", "dsv4c_request_max_tokens"),
    Alias("vllm:request_params_n", "dsv4c_request_sequences"),
    Alias("vllm:spec_decode_num_drafts", "dsv4c_spec_decode_steps"),
    Alias("vllm:spec_decode_num_draft_tokens", "dsv4c_spec_decode_draft_tokens", summed=True),
    Alias("vllm:spec_decode_num_accepted_tokens", "dsv4c_spec_decode_accepted_tokens", summed=True),
    Alias("vllm:spec_decode_num_accepted_tokens_per_pos", "dsv4c_spec_decode_accepted_tokens"),
)


class VllmNames(Collector):
    """The families of another collector that vLLM has too, under vLLM's names."""

    def __init__(self, ours: Collector, model_name: str) -> None:
        self._ours = ours
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        families = {family.name: family for family in self._ours.collect()}
        for alias in ALIASES:
            if (family := families.get(alias.ours)) is not None:
                yield self._renamed(family, alias)

    def _renamed(self, family: Metric, alias: Alias) -> Metric:
        renamed = Metric(alias.name, f"{family.documentation} (`{alias.ours}`)", family.type)
        if alias.summed:
            total = sum(sample.value for sample in family.samples)
            renamed.samples = [Sample(f"{alias.name}_total", dict(self._labels), total)]
            return renamed
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue  # when the process began: said once, under our name
            labels = {alias.labels.get(k, k): alias.values.get(v, v) for k, v in sample.labels.items()}
            name = alias.name + sample.name.removeprefix(alias.ours)
            renamed.samples.append(Sample(name, {**labels, **self._labels}, sample.value))
        return renamed
