"""OpenTelemetry: one server span for every request to an endpoint, sent as OTLP over HTTP. Optional: the extra `otel`.

Attribute names are OpenTelemetry's for generative AI, as vLLM uses them. The caller's `traceparent` is the parent. The
span is made when the request has ended, from its record, so that nothing is added to a request that runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4c.errors import ConfigError
from dsv4c.runtime.record import Observer, RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_QUIET = frozenset(("/health", "/ready", "/metrics", "/"))


def trace_requests(endpoint: str) -> Observer:
    """The observer that sends spans to this address. Raises ConfigError where the extra is not installed."""
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"`{endpoint}` is no address for traces", hint="such as http://127.0.0.1:4318/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError("traces need OpenTelemetry", hint="pip install 'dsv4c[otel]'") from error
    return trace_to(OTLPSpanExporter(endpoint=endpoint))


def trace_to(exporter: SpanExporter, *, batched: bool = True) -> Observer:
    """The observer that gives spans to an exporter: in a thread of its own, or, not batched, at once."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    provider = TracerProvider(resource=Resource({"service.name": "dsv4c"}))
    provider.add_span_processor(BatchSpanProcessor(exporter) if batched else SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("dsv4c")
    parents = TraceContextTextMapPropagator()

    def observe(record: RequestRecord) -> None:
        if record.path in _QUIET:
            return
        parent = parents.extract({"traceparent": record.traceparent}) if record.traceparent else None
        start_ns = int(record.started_s * 1e9)
        span = tracer.start_span(
            f"{record.method} {record.path[:100]}", parent, SpanKind.SERVER, _attributes(record), start_time=start_ns
        )
        if record.first_token_s is not None:
            span.add_event("first token", timestamp=start_ns + int(record.first_token_s * 1e9))
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, record.error or ""))
        span.end(start_ns + int(record.duration_s * 1e9))

    return observe


def _attributes(record: RequestRecord) -> dict[str, Any]:
    found = {
        "http.request.method": record.method,
        "url.path": record.path[:100],
        "http.response.status_code": record.status,
        "error.type": record.error,
        "gen_ai.request.id": record.request_id,
        "gen_ai.response.id": record.response_id,
        "gen_ai.response.model": record.model,
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.completion_tokens,
        "gen_ai.usage.cached_tokens": record.cached_tokens,
        "gen_ai.latency.time_in_queue": record.queue_s,
        "gen_ai.latency.time_to_first_token": record.first_token_s,
        "gen_ai.latency.e2e": record.duration_s,
    }
    return {name: value for name, value in found.items() if value is not None}
