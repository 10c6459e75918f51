"""The Grafana dashboard of a server, as data: docs/grafana.json is made from it, and a test looks its metrics up.

Import docs/grafana.json in Grafana and choose the Prometheus data source that scrapes `/metrics`.
"""

from __future__ import annotations

from typing import Any

_WIDTH, _HEIGHT = 8, 8  # three panels a row, of Grafana's 24 columns
_RATE = "[$__rate_interval]"
_QUANTILES = (0.5, 0.9, 0.99)

Query = tuple[str, str]
"""(PromQL, legend)"""


def _sum(metric: str, by: str = "") -> str:
    return f'sum{f" by ({by}) " if by else ""}({metric}{{instance=~"$instance"}})'


def _rate(metric: str, by: str = "") -> str:
    return f'sum{f" by ({by}) " if by else ""}(rate({metric}{{instance=~"$instance"}}{_RATE}))'


def _quantiles(metric: str) -> list[Query]:
    return [
        (f"histogram_quantile({q}, {_rate(f'{metric}_bucket', 'le')})", f"p{100 * q:g}") for q in _QUANTILES
    ]  # fmt: skip


def _share(part: str, whole: str) -> str:
    return f"{_rate(part)} / {_rate(whole)}"


PANELS: tuple[tuple[str, str, list[Query]], ...] = (
    ("Sequences", "short", [(_sum("dsv4c_requests_running"), "running"), (_sum("dsv4c_requests_waiting"), "waiting")]),
    (
        "Tokens a second", "short",
        [(_rate("dsv4c_engine_generated_tokens_total"), "generated"), (_rate("dsv4c_step_tokens_total"), "computed")],
    ),
    ("Responses a second", "reqps", [(_rate("dsv4c_http_responses_total", "path, status"), "{{status}} {{path}}")]),
    ("Time to first token", "s", _quantiles("dsv4c_time_to_first_token_seconds")),
    ("Time between tokens", "s", _quantiles("dsv4c_inter_token_seconds")),
    ("Whole request", "s", _quantiles("dsv4c_request_seconds")),
    ("In the queue", "s", _quantiles("dsv4c_request_queue_seconds")),
    ("Prefill", "s", _quantiles("dsv4c_request_prefill_seconds")),
    ("How sequences end, a second", "short", [(_rate("dsv4c_sequences_finished_total", "reason"), "{{reason}}")]),
    (
        "KV pages in use", "percentunit",
        [(f"{_sum('dsv4c_kv_pages_used', 'group')} / {_sum('dsv4c_kv_pages', 'group')}", "{{group}}")],
    ),
    ("Prefix cache, share found", "percentunit",
     [(_share("dsv4c_prefix_cache_hits_total", "dsv4c_prefix_cache_queries_total"), "hits")]),
    ("Preemptions and failed steps, a second", "short",
     [(_rate("dsv4c_preemptions_total"), "preemptions"), (_rate("dsv4c_failed_steps_total"), "failed steps")]),
    ("Prompt tokens of a sequence", "short", _quantiles("dsv4c_request_prompt_tokens")),
    ("Generated tokens of a sequence", "short", _quantiles("dsv4c_request_generation_tokens")),
    ("Drafts kept, by position", "percentunit",
     [("avg by (position) (dsv4c_spec_decode_acceptance{instance=~\"$instance\"})", "{{position}}")]),
)  # fmt: skip
"""(title, unit, queries), in rows of three."""


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": number + 1, "title": title, "type": "timeseries", "datasource": source,
            "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": number % 3 * _WIDTH, "y": number // 3 * _HEIGHT},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
            "targets": [
                {"expr": query, "legendFormat": legend, "refId": chr(65 + i), "datasource": source}
                for i, (query, legend) in enumerate(queries)
            ],
        }
        for number, (title, unit, queries) in enumerate(PANELS)
    ]  # fmt: skip
    variables = [
        {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance", "label": "Server", "type": "query", "datasource": source, "multi": True,
            "includeAll": True, "refresh": 2, "query": {"query": "label_values(dsv4c_steps_total, instance)"},
            "current": {"text": "All", "value": "$__all"},
        },
    ]  # fmt: skip
    return {
        "title": "dsv4c", "uid": "dsv4c", "schemaVersion": 39, "editable": True, "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"}, "templating": {"list": variables}, "panels": panels,
    }  # fmt: skip
