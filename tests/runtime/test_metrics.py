"""Metrics: our names and vLLM's say the same, histograms add up, and the dashboard asks for what is there."""

from __future__ import annotations

import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from dsv4c.dashboard import dashboard
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.metrics import Metrics, TokenHistogram
from dsv4c.runtime.metrics_vllm import ALIASES
from dsv4c.runtime.speculation import SpeculationStats
from tests.runtime.live import MODEL, start_toy

STATS = EngineStats(
    running=2, waiting=3, pages_used={"c4": 3, "window": 1}, pages_total={"c4": 4, "window": 10}, preemptions=5,
    pages_cached={"c4": 0, "window": 0},
    speculation=SpeculationStats(tried=(10, 5), kept=(6, 1), steps=10),
)  # fmt: skip


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_both_names_say_the_same() -> None:
    metrics = Metrics(lambda: STATS, MODEL)
    metrics.finished.labels("cancelled").inc(4)
    for value in (0.0004, 0.02, 500.0):
        metrics.between_tokens.observe(value)
    found = samples(metrics.text().decode())
    base = {"model_name": MODEL, "engine": "0"}

    def vllm(name: str, **labels: str) -> float:
        return found[f"vllm:{name}", frozenset({**base, **labels}.items())]

    assert vllm("num_requests_running") == 2 and vllm("num_requests_waiting") == 3
    assert vllm("kv_cache_usage_perc") == 0.75 and vllm("num_preemptions_total") == 5
    assert vllm("request_success_total", finished_reason="abort") == 4
    assert vllm("spec_decode_num_draft_tokens_total") == 15 and vllm("spec_decode_num_accepted_tokens_total") == 7
    assert vllm("spec_decode_num_accepted_tokens_per_pos_total", position="1") == 1
    assert vllm("inter_token_latency_seconds_count") == 3
    assert vllm("inter_token_latency_seconds_bucket", le="0.025") == 2
    assert vllm("inter_token_latency_seconds_bucket", le="+Inf") == 3
    assert found["dsv4c_inter_token_seconds_sum", frozenset()] == 500.0204


def test_every_alias_names_a_family_of_ours() -> None:
    metrics = Metrics(lambda: STATS, MODEL)
    names = {family.name for family in metrics.registry.collect()}
    assert {alias.ours for alias in ALIASES} <= names and {alias.name for alias in ALIASES} <= names
    assert len({alias.name for alias in ALIASES}) == len(ALIASES)


def test_a_token_on_the_edge_is_in_the_bucket() -> None:
    histogram = TokenHistogram("x", "", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    (family,) = histogram.collect()
    counts = {s.labels["le"]: s.value for s in family.samples if s.name == "x_bucket"}
    assert counts == {"1.0": 2, "2.0": 4, "+Inf": 5}


def test_times_of_a_request_add_up() -> None:
    live, executor = start_toy()
    try:
        executor.step_s = 0.005
        body = {"model": MODEL, "prompt": "abc", "max_tokens": 5, "ignore_eos": True, "n": 2}
        httpx.post(f"{live.api}/completions", json=body)
        found = {name: value for (name, labels), value in samples(httpx.get(f"{live.url}/metrics").text).items()}
        for name in ("queue", "prefill", "decode", "prompt_tokens", "generation_tokens", "max_tokens"):
            kind = "" if name.endswith("tokens") else "_seconds"
            assert found[f"dsv4c_request_{name}{kind}_count"] == 2, name
        assert found["dsv4c_inter_token_seconds_count"] == 8 and found["dsv4c_request_sequences_sum"] == 2
        assert found["dsv4c_request_generation_tokens_sum"] == 10 == found["dsv4c_engine_generated_tokens_total"]
        parts = [found[f"dsv4c_request_{part}_seconds_sum"] for part in ("queue", "prefill")]
        assert sum(parts) <= found["dsv4c_time_to_first_token_seconds_sum"] * 1.000001
    finally:
        live.close()


def test_the_dashboard_asks_for_what_is_there() -> None:
    metrics = Metrics(lambda: STATS, MODEL)
    metrics.finished.labels("stop").inc()
    metrics.responses.labels("/", "200").inc()
    there = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    asked = {
        name for panel in dashboard()["panels"] for target in panel["targets"]
        for name in re.findall(r"dsv4c_\w+", target["expr"])
    }  # fmt: skip
    assert asked <= there and len(asked) > 15
