"""One line for every request that has ended, as text or as JSON, to stderr; and what uvicorn says, in the same form.

A line holds times, counts and ids: never a word of a prompt or an answer.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
from typing import Any, Literal

from dsv4c.runtime.record import RequestRecord

LogFormat = Literal["text", "json"]
REQUESTS = "dsv4c.requests"
_QUIET = frozenset(("/health", "/ready", "/metrics"))  # asked every few seconds; only their failures are worth a line
_CLOCKS = ("began_s", "started_s", "traceparent")


def log_request(record: RequestRecord) -> None:
    """The observer that writes the line."""
    if record.path in _QUIET and record.status < 400:
        return
    level = logging.ERROR if record.status >= 500 and record.status != 503 else logging.INFO
    logging.getLogger(REQUESTS).log(level, "request", extra={"record": record})


def log_config(level: str = "info", form: LogFormat = "text") -> dict[str, Any]:
    """`logging.config.dictConfig` of a serving process: everything to stderr. uvicorn's own access log is ours."""
    logger = {"handlers": ["stderr"], "level": level.upper(), "propagate": False}
    formatter = JsonFormatter if form == "json" else TextFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"chosen": {"()": f"{formatter.__module__}.{formatter.__name__}"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen", "stream": "ext://sys.stderr"}},
        "loggers": {"uvicorn": logger, "dsv4c": logger},
    }


class TextFormatter(logging.Formatter):
    """`2026-11-21 10:00:00,123 INFO POST /v1/completions 200 0.213s id=cmpl-1 prompt=3 completion=8 first=0.011s`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        found = getattr(record, "record", None)
        if isinstance(found, RequestRecord):
            record.msg, record.args = _line(found), ()
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `message`, and of a request the fields of its record that are known."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "message": record.getMessage()}
        found = getattr(record, "record", None)
        if isinstance(found, RequestRecord):
            line |= {k: _short(v) for k, v in dataclasses.asdict(found).items() if v is not None and k not in _CLOCKS}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _line(record: RequestRecord) -> str:
    known = {
        "id": record.request_id,
        "client": record.client,
        "key": record.key,
        "error": record.error,
        "prompt": record.prompt_tokens,
        "cached": record.cached_tokens or None,
        "completion": record.completion_tokens,
        "queue": _seconds(record.queue_s),
        "first": _seconds(record.first_token_s),
        "finish": ",".join(dict.fromkeys(record.finish_reasons)) or None,
    }
    said = " ".join(f"{name}={value}" for name, value in known.items() if value is not None)
    path = record.path.encode("unicode_escape").decode()[:100]  # a line stays a line whatever was asked for
    return f"{record.method} {path} {record.status} {record.duration_s:.3f}s {said}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}s"


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value[:200] if isinstance(value, str) else value
