"""Runs a DynamoEngine as a worker process: how it registers, and with which parts of Dynamo it talks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

import uvloop
from dynamo.common.backend import LLMEngine, WorkerConfig
from dynamo.common.backend.worker import Worker
from dynamo.common.constants import DisaggregationMode

Role = Literal["both", "prefill", "decode"]
_MODES = {
    "both": DisaggregationMode.AGGREGATED,
    "prefill": DisaggregationMode.PREFILL,
    "decode": DisaggregationMode.DECODE,
}
_COMPONENTS = {"both": "backend", "prefill": "prefill", "decode": "backend"}


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker registers. Where and with whom it talks is Dynamo's own configuration (DYN_*)."""

    role: Role = "both"
    namespace: str = "dynamo"
    component: str | None = None
    """None: `prefill` for that role, else `backend`. Roles must differ."""
    discovery: str = "file"
    request_plane: str = "tcp"
    event_plane: str = "zmq"
    kv_events: bool = True
    default_thinking: bool = False


def worker_config(model: str, served_model_name: str, options: WorkerOptions) -> WorkerConfig:
    """Dynamo's own description of the worker. `model`: the folder that the frontend reads."""
    return WorkerConfig(
        namespace=options.namespace,
        component=options.component or _COMPONENTS[options.role],
        endpoint="generate",
        model_name=model,
        served_model_name=served_model_name,
        discovery_backend=options.discovery,
        request_plane=options.request_plane,
        event_plane=options.event_plane,
        disaggregation_mode=_MODES[options.role],
        tool_call_parser="deepseek_v4",
        reasoning_parser="deepseek_v4",
        default_thinking_mode="enabled" if options.default_thinking else "disabled",
        enable_kv_routing=options.kv_events,
    )


def run(engine: LLMEngine, config: WorkerConfig) -> None:
    """Serves until a signal comes. Raises what kept the worker from starting."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Worker(engine, config).run())
