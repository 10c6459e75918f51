"""Every option of `dsv4c run`, once: for the command line, `dsv4c.toml`, `--print-config` and docs/configuration.md."""

from __future__ import annotations

from dsv4c.commands.arguments import not_negative, positive, seconds
from dsv4c.commands.settings import Option

RUN_OPTIONS = (
    Option("artifact", "the artifact's folder", metavar="DIR", positional=True),
    # what is served
    Option("weights", "checkpoint folder, if the artifact holds no weights", metavar="DIR"),
    Option("load-format", "dummy: seeded random weights", "auto", choices=("auto", "dummy")),
    Option("seed", "of dummy weights, and of sampling with --prompt", 0, type=int, metavar="N"),
    Option("tokenizer", "tokenizer.json, if the artifact holds none", metavar="FILE"),
    Option(
        "chat-release",
        "the release whose reasoning efforts to speak",
        choices=("preview", "0731"),
        unset="the checkpoint's, or preview if it does not say",
    ),
    Option("model-name", "the name clients use", metavar="NAME", unset="the artifact's folder"),
    # answering once
    Option("prompt", "answer once on stdout and exit", metavar="TEXT", saved=False),
    Option("max-new-tokens", "with --prompt", 64, type=positive, metavar="N"),
    Option("temperature", "with --prompt; 0 is greedy", 0.7, type=float, metavar="T"),
    # the network
    Option("host", "address to bind", "127.0.0.1", metavar="ADDRESS"),
    Option("port", "port to bind", 8000, type=int, metavar="N"),
    Option("ssl-certfile", "PEM file: serve TLS with this certificate", metavar="FILE"),
    Option("ssl-keyfile", "PEM file: its key", metavar="FILE"),
    Option("ssl-ca-certs", "PEM file: clients must show a certificate that it has signed", metavar="FILE"),
    Option("cors-origin", "a page of this origin may call the server from a browser; `*`: any", repeated=True),
    # clients
    Option(
        "api-key",
        "clients must send it (or another one given); better in a file",
        metavar="KEY",
        repeated=True,
        secret=True,
    ),
    Option("api-key-file", "API keys, one a line", metavar="FILE"),
    Option("max-body-bytes", "largest body of a request", 32 * 2**20, type=positive, metavar="N"),
    Option("max-inflight", "HTTP requests at hand at once; more get a 503", 4096, type=positive, metavar="N"),
    Option("max-queue", "sequences that may wait; more get a 503", 512, type=positive, metavar="N"),
    Option("request-timeout", "most seconds for a request", type=seconds, metavar="S", unset="none"),
    Option("head-timeout", "seconds for a request's line and headers to arrive", 30.0, type=seconds, metavar="S"),
    Option("body-timeout", "seconds for a request's body to arrive", 60.0, type=seconds, metavar="S"),
    Option("stall-timeout", "seconds until a client that reads nothing is given up", 300.0, type=seconds, metavar="S"),
    Option(
        "scheduling-policy",
        "priority: requests may have one, the lowest goes first",
        "fcfs",
        choices=("fcfs", "priority"),
    ),
    Option("strict", "unknown fields of requests are errors, not named in a header", flag=True),
    Option("default-thinking", "chat requests that do not say think", flag=True, opposite="no-thinking"),
    Option("no-page", "no playground at `/`", flag=True),
    # the engine
    Option("max-requests", "requests served at once", type=positive, metavar="N", unset="as compiled"),
    Option("max-context", "longest request, such as 8192 or 128K", metavar="TOKENS", unset="as compiled"),
    Option("kv-memory", "for KV pools", type=float, metavar="GB", unset="what there is room for"),
    Option("gpu-memory-utilization", "of the card's memory to fill", type=float, metavar="SHARE", unset="0.92"),
    Option("no-prefix-cache", "compute every prompt from its first token", flag=True),
    Option(
        "speculative-tokens",
        "most drafts verified in a step; 0: off",
        type=not_negative,
        metavar="N",
        unset="as compiled",
    ),
    Option("threads", "CPU threads", type=positive, metavar="N", unset="all cores"),
    Option("device", "GPU: number of the card", 0, type=not_negative, metavar="N"),
    Option("executor", "GPU: capture CUDA graphs, or not", "graph", choices=("graph", "eager")),
    Option("debug-contracts", "GPU: check every segment's contract at every step, uncaptured", flag=True),
    Option("shadow", "run every call's reference beside it and report what differs", flag=True),
    Option("break", "GPU: keep out of graphs, `L07.*`", metavar="SCOPE", repeated=True),
    # several processes
    Option("prefill-workers", "processes that compute prompts for others", 0, type=not_negative, metavar="P"),
    Option("decode-workers", "processes that generate; with any, this one routes", 0, type=not_negative, metavar="D"),
    Option(
        "transfer",
        "how state moves between workers; local: all in one process",
        choices=("shm", "local", "nixl"),
        unset="shm, or nixl on a GPU",
    ),
    Option("budget-tokens", "room that a request has for more tokens", type=positive, metavar="N", unset="to its end"),
    Option("worker-timeout", "seconds of silence after which a worker is lost", 5.0, type=seconds, metavar="S"),
    Option("lease-ttl", "seconds that a prompt is kept for whoever pulls it", 30.0, type=seconds, metavar="S"),
    Option(
        "transfer-timeout", "seconds without a byte until a prompt is computed anew", 10.0, type=seconds, metavar="S"
    ),
    Option("nixl-devices", "UCX's network devices; `all`: any", "lo", metavar="LIST"),
    Option("router-address", "where workers may join: HOST:PORT or unix:PATH", metavar="ADDRESS", unset="nowhere"),
    Option("role", "serve a router, not clients", choices=("prefill", "decode", "both"), saved=False),
    Option("router", "with --role: its address", metavar="ADDRESS"),
    Option("secret-file", "what router and workers know each other by", metavar="FILE"),
    Option("worker-name", "with --role: its name in logs and metrics", metavar="NAME", unset="role, host and process"),
    # the end, and what is said
    Option("drain-timeout", "seconds that requests in flight have after SIGTERM", 30.0, type=seconds, metavar="S"),
    Option("drain-delay", "seconds to go on taking requests after SIGTERM, while /ready says no", 0.0, type=float),
    Option("log-level", "of what goes to stderr", "info", choices=("debug", "info", "warning", "error")),
    Option("log-format", "text lines, or a JSON object a line", "text", choices=("text", "json")),
    Option("otlp-endpoint", "send traces there, such as http://127.0.0.1:4318/v1/traces", metavar="URL"),
)

FIXED = ("target", "tp", "isa", "compute-dtype", "vocab-size", "buckets", "max-tokens", "drafter", "passes")
"""Keys that nobody can set: the artifact was compiled so."""
