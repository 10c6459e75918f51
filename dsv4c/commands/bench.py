"""`dsv4c bench serve`: load on a server that runs, and what its clients saw of it."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4c.commands.arguments import client_key, positive, seconds, server_url
from dsv4c.commands.terminal import console, progress_bars
from dsv4c.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from dsv4c.client.figures import Figures
    from dsv4c.client.load import Load
    from dsv4c.client.wire import Server


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    bench = commands.add_parser("bench", help="measure a server that runs")
    kinds = bench.add_subparsers(metavar="KIND", dest="kind", required=True, parser_class=type(bench))
    parser = kinds.add_parser("serve", help="send requests; report TTFT, TPOT, ITL, E2E latencies and goodput")
    parser.add_argument("--base-url", type=server_url, default="http://127.0.0.1:8000", help="default %(default)s")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument(
        "--endpoint", choices=("completions", "chat"), default="completions", help="default %(default)s"
    )
    parser.add_argument("--num-prompts", type=positive, default=100, help="requests to send (default %(default)s)")
    parser.add_argument(
        "--request-rate",
        type=seconds,
        metavar="R",
        help="requests a second, by a Poisson process (default: no waiting)",
    )
    parser.add_argument("--max-concurrency", type=positive, metavar="N", help="requests at once: a closed loop of N")
    parser.add_argument("--input-len", type=positive, default=256, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--output-len", type=positive, default=128, help="tokens to generate (default %(default)s)")
    parser.add_argument("--dataset", type=Path, help="JSONL with a `prompt` a line, in place of made-up words")
    parser.add_argument("--stop-at-eos", action="store_true", help="let answers end by themselves")
    parser.add_argument("--extra-body", default="{}", metavar="JSON", help="more fields of every request")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default 0)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="requests before the clock (default 1)")
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits: `ttft:500 tpot:50 e2el:5000`"
    )
    parser.add_argument("--percentiles", default="50,90,99", help="default %(default)s")
    parser.add_argument("--timeout", type=seconds, default=3600.0, help="seconds for a request (default %(default)s)")
    parser.add_argument("--api-key-file", type=Path, help="its first key is sent")
    parser.add_argument("--json", type=Path, help="append the figures to this JSONL file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a table; 0 when every request was answered. Raises EngineError when none was."""
    from dsv4c.client.figures import read_limits
    from dsv4c.client.load import Load
    from dsv4c.client.wire import Server

    try:
        percentiles = [float(part) for part in args.percentiles.split(",")]
        extra = json.loads(args.extra_body)
    except ValueError as error:
        raise ConfigError(f"`--percentiles` or `--extra-body` is not understood: {error}") from error
    if not all(0 <= p <= 100 for p in percentiles) or not isinstance(extra, dict):
        raise ConfigError("`--percentiles` are numbers from 0 to 100, `--extra-body` is an object")
    limits = read_limits(args.goodput)
    load = Load(
        args.endpoint, args.num_prompts, args.request_rate, args.max_concurrency, args.input_len, args.output_len,
        args.seed, not args.stop_at_eos, extra,
    )  # fmt: skip
    server = Server(args.base_url, client_key(args.api_key_file))
    figures, model = asyncio.run(_measure(server, load, args, percentiles, limits))
    _print(figures, load, model)
    if args.json is not None:
        row = {"model": model, "base_url": args.base_url, **_asked(load), **figures.to_dict()}
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if not figures.completed:
        raise EngineError("no request was answered")
    return 1 if figures.failed else 0


async def _measure(
    server: Server, load: Load, args: argparse.Namespace, percentiles: list[float], limits: dict[str, float]
) -> tuple[Figures, str]:
    from dsv4c.client.figures import Figures
    from dsv4c.client.load import random_prompts, run_load
    from dsv4c.client.wire import served_model

    async with server.session(60.0) as session:
        model = args.model or await served_model(session, server)
        if args.dataset is not None:
            prompts: list[Any] = _prompts_of(args.dataset, load.num_prompts)
        else:
            prompts = await random_prompts(session, server, model, load)
    if args.warmup:
        await run_load(server, model, load, prompts[: args.warmup], lambda done: None, args.timeout)
    with progress_bars() as progress:
        task = progress.add_task("requests", total=len(prompts), detail="")
        timed, wall = await run_load(
            server, model, load, prompts, lambda done: progress.update(task, completed=done), args.timeout
        )
    return Figures.of(timed, wall, percentiles, limits), model


def _prompts_of(file: Path, most: int) -> list[str]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [row["prompt"] for row in rows[:most]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"`{file}` is no JSONL with a `prompt` a line: {error}") from error
    if not prompts:
        raise ConfigError(f"`{file}` holds no prompt")
    return prompts


def _asked(load: Load) -> dict[str, Any]:
    return {
        "endpoint": load.endpoint, "num_prompts": load.num_prompts, "request_rate": load.rate,
        "max_concurrency": load.concurrency, "input_len": load.input_len, "output_len": load.output_len,
    }  # fmt: skip


def _print(figures: Figures, load: Load, model: str) -> None:
    from rich.table import Table

    from dsv4c.client.figures import LATENCIES

    out, said = console(), figures.to_dict()
    how = "all at once" if load.concurrency is None else f"{load.concurrency} at once"
    if load.rate is not None:
        how = f"Poisson, {load.rate:g} a second" + (f", {how} at most" if load.concurrency else "")
    out.print(f"{model}: {load.endpoint}, {how}", highlight=False)
    out.print(
        f"{figures.completed} answered, {figures.failed} failed in {figures.seconds:.2f} s: "
        f"{said['requests_per_s']:.2f} requests/s, {said['output_tokens_per_s']:,.1f} output tokens/s, "
        f"{said['all_tokens_per_s']:,.1f} tokens/s with prompts", highlight=False,
    )  # fmt: skip
    if figures.good is not None:
        kept = f"{figures.good} of {figures.completed + figures.failed} requests kept every limit"
        out.print(f"goodput: {said['goodput_per_s']:.2f} requests/s, {kept}", highlight=False)
    columns = list(next(iter(figures.latencies_ms.values()), {}))
    table = Table("ms", *columns, "", box=None, pad_edge=False)
    for name, summary in figures.latencies_ms.items():
        table.add_row(name, *(f"{summary[column]:,.2f}" for column in columns), LATENCIES[name])
    if columns:
        out.print(table)
    for message, count in figures.errors.items():
        out.print(f"failed {count} times: {message}", markup=False, highlight=False)
