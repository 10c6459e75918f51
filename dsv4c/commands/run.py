"""`dsv4c run`: serve an artifact over HTTP, or answer one prompt."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.commands.arguments import not_negative, positive
from dsv4c.commands.terminal import progress_bars
from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from dsv4c.runtime.memory import MemoryPlan, Room
    from dsv4c.runtime.poolsizes import PoolSizes
    from dsv4c.runtime.weights import LoadReport


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("run", help="serve an artifact over HTTP, or answer one prompt")
    parser.add_argument("artifact", metavar="DIR", type=Path, help="the artifact's folder")
    parser.add_argument("--weights", type=Path, help="checkpoint folder, if the artifact holds no weights")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: seeded random weights")
    parser.add_argument("--seed", type=int, default=0, help="of dummy weights, and of sampling with --prompt")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, if the artifact holds none")
    parser.add_argument("--prompt", help="answer once on stdout and exit")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="with --prompt (default 64)")
    parser.add_argument("--temperature", type=float, default=0.7, help="with --prompt (default 0.7; 0 is greedy)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to bind (default 8000)")
    parser.add_argument("--model-name", help="the name clients use (default: the artifact's folder)")
    parser.add_argument("--max-requests", type=positive, help="requests served at once")
    parser.add_argument("--max-queue", type=positive, default=512, help="requests that may wait (default 512)")
    parser.add_argument("--max-context", metavar="TOKENS", help="longest request, such as 8192 or 128K")
    parser.add_argument("--kv-memory", type=float, metavar="GB", help="for KV pools (default: what there is room for)")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, metavar="SHARE", help="of the card's memory to fill (default 0.92)"
    )
    parser.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt from its first token")
    parser.add_argument(
        "--speculative-tokens", type=not_negative, metavar="N",
        help="most drafts verified in a step (default: as compiled; 0: off)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, help="CPU threads (default: all cores)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--executor", choices=("graph", "eager"), default="graph", help="GPU: capture CUDA graphs, or not")
    how.add_argument(
        "--debug-contracts", dest="executor", action="store_const", const="contracts",
        help="GPU: check every segment's contract at every step, uncaptured",
    )  # fmt: skip
    how.add_argument(
        "--shadow", dest="executor", action="store_const", const="shadow",
        help="run every call's reference beside it and report what differs",
    )  # fmt: skip
    parser.add_argument(
        "--break", dest="breaks", action="append", default=[], metavar="SCOPE", help="GPU: keep out of graphs, `L07.*`"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until it is ended, or answers once; 0 when done."""
    from dsv4c.describe_memory import memory_summary
    from dsv4c.launch import LaunchOptions, answer, launch, serve
    from dsv4c.runtime.serve import bind
    from dsv4c.units import parse_tokens

    if args.kv_memory is not None and not 0 < args.kv_memory < math.inf:
        raise ConfigError(f"`--kv-memory` must be positive, not {args.kv_memory}")
    options = LaunchOptions(
        weights=args.weights,
        dummy_seed=args.seed if args.load_format == "dummy" else None,
        tokenizer=args.tokenizer,
        model_name=args.model_name,
        max_requests=args.max_requests,
        max_context=None if args.max_context is None else parse_tokens(args.max_context),
        max_queue=args.max_queue,
        kv_memory_bytes=None if args.kv_memory is None else int(args.kv_memory * 1e9),
        gpu_memory_utilization=args.gpu_memory_utilization,
        prefix_cache=not args.no_prefix_cache,
        speculative_tokens=args.speculative_tokens,
        threads=args.threads,
        executor=args.executor,
        breaks=tuple(args.breaks),
    )
    sock = bind(args.host, args.port) if args.prompt is None else None
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
            progress.console.print(memory_summary(plan, room, sizes))

        def loaded(report: LoadReport) -> None:
            progress.console.print(str(report), soft_wrap=True, highlight=False)

        launched = launch(args.artifact, options, watch, planned, loaded)
        progress.console.print(_split(began, ends), highlight=False)
    if sock is not None:
        serve(launched, sock)
        return 0
    for text in answer(launched, args.prompt, args.max_new_tokens, args.temperature, args.seed):
        print(text, end="", flush=True)
    print()
    return 0


def _split(began: float, ends: Mapping[str, float]) -> str:
    """`ready in 3.1 s: load 2.2, warm up 0.5, capture 0.1`; `ends`: when each phase ended, in order."""
    starts = [began, *ends.values()]
    parts = ", ".join(f"{phase} {end - start:.1f}" for (phase, end), start in zip(ends.items(), starts, strict=False))
    return f"ready in {time.perf_counter() - began:.1f} s: {parts}"
