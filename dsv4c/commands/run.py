"""`dsv4c run`: serve an artifact over HTTP, or answer one prompt."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dsv4c.commands.run_options import FIXED, RUN_OPTIONS
from dsv4c.commands.settings import add_options, namespace, print_settings, settle
from dsv4c.commands.terminal import progress_bars
from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from dsv4c.chat.codec import ChatCodec
    from dsv4c.launch import ExecutorKind, Launched, LaunchOptions, LoadWatch, PlanWatch, Progress, ServeOptions
    from dsv4c.runtime.memory import MemoryPlan, Room
    from dsv4c.runtime.poolsizes import PoolSizes
    from dsv4c.runtime.record import Observer
    from dsv4c.runtime.weights import LoadReport

LaunchedT = TypeVar("LaunchedT", bound="Launched")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("run", help="serve an artifact over HTTP, or answer one prompt")
    add_options(parser, RUN_OPTIONS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until it is ended, or answers once; 0 when done."""
    settings = settle(args, RUN_OPTIONS, "run", FIXED)
    args = argparse.Namespace(**vars(args) | vars(namespace(settings)))
    if args.artifact is None:
        raise ConfigError("which artifact?", hint="give its folder, or `artifact` in dsv4c.toml")
    directory = Path(args.artifact)
    if args.print_config:
        print(print_settings(settings, "run", _facts(directory)))
        return 0

    if args.role is not None or args.prefill_workers or args.decode_workers or args.router_address is not None:
        from dsv4c.commands.run_cluster import run_router, run_worker

        run_worker(args, directory) if args.role is not None else run_router(args, settings, directory)
        return 0

    from dsv4c.launch import answer, launch, serve
    from dsv4c.runtime.serve import bind

    options = launch_options(args)
    serving = serve_options(args)
    sock = bind(args.host, args.port) if args.prompt is None else None
    launched = with_progress(partial(launch, directory, options))
    if sock is not None:
        serve(launched, sock, serving)
        return 0
    for text in answer(launched, args.prompt, args.max_new_tokens, args.temperature, args.seed):
        print(text, end="", flush=True)
    print()
    return 0


def with_progress(launch: Callable[[Progress, PlanWatch, LoadWatch], LaunchedT], *, brief: bool = False) -> LaunchedT:
    """What `launch` gives, told what to report to; bars on a terminal, and lines on stderr, one of them if `brief`."""
    from dsv4c.describe_memory import memory_summary

    with progress_bars("{task.fields[amount]}") as progress:
        tasks: dict[str, TaskID] = {}
        ends: dict[str, float] = {}
        began = time.perf_counter()

        def watch(phase: str, done: int, total: int, name: str) -> None:
            ends[phase] = time.perf_counter()
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=None, detail="", amount="")
            amount = f"{done}/{total}"
            if phase == "load":
                speed = progress.tasks[tasks[phase]].speed or 0.0
                amount = f"{done / 1e9:.2f}/{total / 1e9:.2f} GB, {speed / 1e9:.1f} GB/s"
            progress.update(tasks[phase], completed=done, total=total, detail=name, amount=amount)

        def planned(plan: MemoryPlan, room: Room, sizes: PoolSizes) -> None:
            if not brief:
                progress.console.print(memory_summary(plan, room, sizes))

        def loaded(report: LoadReport) -> None:
            if not brief:
                progress.console.print(str(report), soft_wrap=True, highlight=False)

        launched = launch(watch, planned, loaded)
        if not brief:
            progress.console.print(_chat(launched.codec), soft_wrap=True, highlight=False)
        progress.console.print(_split(began, ends), highlight=False)
    return launched


def _chat(codec: ChatCodec) -> str:
    """Which release's efforts are spoken, and whether anything said so."""
    return f"chat format: {codec.release}" + ("" if codec.release_known else ", as the checkpoint does not say")


def _split(began: float, ends: Mapping[str, float]) -> str:
    """`ready in 3.1 s: load 2.2, warm up 0.5, capture 0.1`; `ends`: when each phase ended, in order."""
    starts = [began, *ends.values()]
    parts = ", ".join(f"{phase} {end - start:.1f}" for (phase, end), start in zip(ends.items(), starts, strict=False))
    return f"ready in {time.perf_counter() - began:.1f} s: {parts}"


def launch_options(args: argparse.Namespace) -> LaunchOptions:
    """What loads and computes. Raises ConfigError for values that exclude each other."""
    from dsv4c.launch import LaunchOptions
    from dsv4c.units import parse_tokens

    if args.kv_memory is not None and not 0 < args.kv_memory < math.inf:
        raise ConfigError(f"`--kv-memory` must be positive, not {args.kv_memory}")
    given = [name for name in ("debug_contracts", "shadow") if getattr(args, name)]
    if len(given) + (args.executor != "graph") > 1:
        raise ConfigError("`--executor`, `--debug-contracts` and `--shadow` exclude each other")
    executor: ExecutorKind = args.executor
    if given:
        executor = "shadow" if args.shadow else "contracts"
    return LaunchOptions(
        weights=None if args.weights is None else Path(args.weights),
        dummy_seed=args.seed if args.load_format == "dummy" else None,
        tokenizer=None if args.tokenizer is None else Path(args.tokenizer),
        chat_release=args.chat_release,
        model_name=args.model_name,
        max_requests=args.max_requests,
        max_context=None if args.max_context is None else parse_tokens(args.max_context),
        max_queue=args.max_queue,
        kv_memory_bytes=None if args.kv_memory is None else int(args.kv_memory * 1e9),
        gpu_memory_utilization=args.gpu_memory_utilization,
        prefix_cache=not args.no_prefix_cache,
        speculative_tokens=args.speculative_tokens,
        budget_tokens=args.budget_tokens,
        threads=args.threads,
        device=args.device,
        executor=executor,
        breaks=args.__dict__["break"],
    )


def serve_options(args: argparse.Namespace) -> ServeOptions:
    """How clients are treated; files that it needs are read here. Raises ConfigError."""
    from dsv4c.launch import ServeOptions
    from dsv4c.runtime.keys import read_keys
    from dsv4c.runtime.logs import log_request
    from dsv4c.runtime.operations import Operations
    from dsv4c.runtime.tls import Tls

    if (args.ssl_certfile is None) != (args.ssl_keyfile is None) or (args.ssl_ca_certs and not args.ssl_certfile):
        raise ConfigError("TLS needs both `--ssl-certfile` and `--ssl-keyfile`")
    if not 0 <= args.drain_delay < math.inf:
        raise ConfigError(f"`--drain-delay` must be zero or more seconds, not {args.drain_delay}")
    tls = None
    if args.ssl_certfile is not None:
        ca = None if args.ssl_ca_certs is None else Path(args.ssl_ca_certs)
        tls = Tls(Path(args.ssl_certfile), Path(args.ssl_keyfile), ca)
    observers: tuple[Observer, ...] = (log_request,)
    if args.otlp_endpoint is not None:
        from dsv4c.runtime.tracing import trace_requests

        observers += (trace_requests(args.otlp_endpoint),)
    operations = Operations(
        api_keys=read_keys(args.api_key, None if args.api_key_file is None else Path(args.api_key_file)),
        cors_origins=args.cors_origin,
        max_body_bytes=args.max_body_bytes,
        head_timeout_s=args.head_timeout,
        body_timeout_s=args.body_timeout,
        max_inflight=args.max_inflight,
        request_timeout_s=args.request_timeout,
        stall_timeout_s=args.stall_timeout,
        priority=args.scheduling_policy == "priority",
        page=not args.no_page,
        observers=observers,
    )
    return ServeOptions(
        operations, args.strict, args.default_thinking, tls, args.drain_timeout, args.drain_delay, args.log_level,
        args.log_format,
    )  # fmt: skip


def _facts(directory: Path) -> dict[str, object]:
    """What nobody can set, for it was compiled so."""
    from dsv4c.artifact import load_manifest
    from dsv4c.runtime.limits import bounds_of

    manifest = load_manifest(directory)
    bounds = bounds_of(manifest)
    return {
        "target": manifest.target,
        "isa": manifest.isa,
        "compute-dtype": manifest.compute_dtype,
        "vocab-size": manifest.vocab_size,
        "most max-requests": bounds.requests,
        "most max-context": manifest.max_context,
        "max-tokens": bounds.tokens,
        "drafter": "none" if manifest.drafter is None else manifest.drafter.kind,
        "model-sha256": manifest.model_sha256,
    }
