"""Every option of `dsv4c dynamo`: those of `dsv4c run` that concern the engine, and the worker's own."""

from __future__ import annotations

from dsv4c.commands.arguments import not_negative, positive
from dsv4c.commands.run_options import RUN_OPTIONS
from dsv4c.commands.settings import Option

_OF_RUN = (
    "artifact", "device", "weights", "load-format", "seed", "tokenizer", "chat-release", "model-name", "max-queue",
    "default-thinking", "max-requests", "max-context", "budget-tokens", "kv-memory", "gpu-memory-utilization",
    "no-prefix-cache", "speculative-tokens", "threads", "executor", "debug-contracts", "shadow", "break", "lease-ttl",
    "transfer-timeout", "nixl-devices", "drain-timeout",
)  # fmt: skip

DYNAMO_OPTIONS = (
    *(option for option in RUN_OPTIONS if option.name in _OF_RUN),
    Option("role", "what this worker computes", "both", choices=("both", "prefill", "decode")),
    # how it registers
    Option("namespace", "Dynamo's namespace", "dynamo", metavar="NAME"),
    Option("component", "Dynamo's component", metavar="NAME", unset="`prefill` for that role, else `backend`"),
    Option(
        "discovery-backend",
        "where workers and frontends find each other",
        "file",
        choices=("file", "mem", "etcd", "kubernetes"),
    ),
    Option("request-plane", "how requests come", "tcp", choices=("tcp", "nats")),
    Option("event-plane", "how KV events go", "zmq", choices=("zmq", "nats")),
    Option("no-kv-events", "tell the router nothing of the prefix cache and the load", flag=True),
    # between prefill and decode
    Option(
        "hand-over",
        "of a prefill worker; bootstrap: state moves while the prompt is computed, completed: behind it",
        "completed",
        choices=("completed", "bootstrap"),
    ),
    Option("bootstrap-host", "address that decode workers meet a prefill worker at", "127.0.0.1", metavar="ADDRESS"),
    Option("bootstrap-port", "its port; 0: any", 0, type=not_negative, metavar="N"),
    Option("bootstrap-advertise", "what decode workers are told", metavar="HOST", unset="--bootstrap-host"),
    # serving
    Option("stream-interval", "tokens of a chunk; the first comes at once", 1, type=positive, metavar="N"),
)
