"""The command line: parsing and printing, nothing else. Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 a fault of ours, 2 the user's input. Heavy imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dsv4c import __version__
from dsv4c.errors import ConfigError, Dsv4cError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from dsv4c.config import ModelConfig
    from dsv4c.runtime.memory import MemoryPlan, Room
    from dsv4c.runtime.poolsizes import PoolSizes
    from dsv4c.runtime.weights import LoadReport


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        return int(args.run(args))
    except Dsv4cError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint=f"see `{self.prog} --help`")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _not_negative(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dsv4c", description="Compile DeepSeek-V4 to an artifact, and serve it.")
    parser.add_argument("--version", action="version", version=f"dsv4c {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    compile_ = commands.add_parser("compile", help="compile a checkpoint folder or a preset to an artifact")
    compile_.add_argument("model", metavar="MODEL", help="a checkpoint folder, or flash, pro, nano")
    compile_.add_argument("--target", required=True, help="what to compile for: cpu, or sm_90a (Hopper)")
    compile_.add_argument("-o", "--output", type=Path, help="the artifact's folder")
    compile_.add_argument("--dry-run", action="store_true", help="everything but emitting; print the passes")
    compile_.add_argument("--max-context", type=_positive, help="longest request in tokens")
    compile_.add_argument("--max-tokens", type=_positive, help="tokens of one step (default 512, GPU 8192)")
    compile_.add_argument("--max-requests", type=_positive, help="requests of one step (default 64, GPU 256)")
    compile_.add_argument("--num-layers", type=_positive, help="only the first layers of a preset, to measure with")
    compile_.add_argument("--fake-quant", action="store_true", help="fake-quantise KV entries as in training")
    compile_.add_argument("--cache", type=Path, help="folder for built kernels (default: beside the artifact)")
    compile_.set_defaults(run=_compile)

    run = commands.add_parser("run", help="serve an artifact over HTTP, or answer one prompt")
    run.add_argument("artifact", metavar="DIR", type=Path, help="the artifact's folder")
    run.add_argument("--weights", type=Path, help="checkpoint folder, if the artifact holds no weights")
    run.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: seeded random weights")
    run.add_argument("--seed", type=int, default=0, help="of dummy weights, and of sampling with --prompt")
    run.add_argument("--tokenizer", type=Path, help="tokenizer.json, if the artifact holds none")
    run.add_argument("--prompt", help="answer once on stdout and exit")
    run.add_argument("--max-new-tokens", type=_positive, default=64, help="with --prompt (default 64)")
    run.add_argument("--temperature", type=float, default=0.7, help="with --prompt (default 0.7; 0 is greedy)")
    run.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1)")
    run.add_argument("--port", type=int, default=8000, help="port to bind (default 8000)")
    run.add_argument("--model-name", help="the name clients use (default: the artifact's folder)")
    run.add_argument("--max-requests", type=_positive, help="requests served at once")
    run.add_argument("--max-queue", type=_positive, default=512, help="requests that may wait (default 512)")
    run.add_argument("--max-context", metavar="TOKENS", help="longest request, such as 8192 or 128K")
    run.add_argument("--kv-memory", type=float, metavar="GB", help="for KV pools (default: what there is room for)")
    run.add_argument(
        "--gpu-memory-utilization", type=float, metavar="SHARE", help="of the card's memory to fill (default 0.92)"
    )
    run.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt from its first token")
    run.add_argument("--threads", type=_positive, help="CPU threads (default: all cores)")
    how = run.add_mutually_exclusive_group()
    how.add_argument("--executor", choices=("graph", "eager"), default="graph", help="GPU: capture CUDA graphs, or not")
    how.add_argument(
        "--debug-contracts", dest="executor", action="store_const", const="contracts",
        help="GPU: check every segment's contract at every step, uncaptured",
    )  # fmt: skip
    how.add_argument(
        "--shadow", dest="executor", action="store_const", const="shadow",
        help="run every call's reference beside it and report what differs",
    )  # fmt: skip
    run.add_argument(
        "--break", dest="breaks", action="append", default=[], metavar="SCOPE", help="GPU: keep out of graphs, `L07.*`"
    )
    run.set_defaults(run=_run)

    plan = commands.add_parser(
        "plan", help="how many requests fit in memory, and what binds, before anything is loaded"
    )
    plan.add_argument("artifact", metavar="DIR", type=Path, help="the artifact's folder")
    plan.add_argument(
        "--gpu-memory", "--memory", dest="memory", metavar="SIZE",
        help="such as 141GB or 131GiB (default: this machine's card, or its memory for target cpu)",
    )  # fmt: skip
    plan.add_argument("--context", metavar="TOKENS", help="of every request, such as 128K (default: the artifact's)")
    plan.add_argument("--requests", type=_positive, help="whether so many fit at once (default: as many as do)")
    plan.add_argument(
        "--snapshots", type=_not_negative, help="of the prefix cache for a request (default: as in `run`)"
    )
    plan.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="of it to fill (default 0.92)")
    plan.add_argument("--json", action="store_true", help="the plan as JSON")
    plan.set_defaults(run=_plan)

    tune = commands.add_parser("tune", help="measure schedules on this machine's GPU and record the rows")
    tune.add_argument("--target", required=True, help="what to tune for: sm_90a")
    tune.add_argument("--family", action="append", help="only these families of ops (hyper, rows, experts, ...)")
    tune.add_argument("--op", help="only this op")
    tune.add_argument("--label", default="", help="only workloads whose label contains this (flash, decode, ...)")
    tune.add_argument("--max-configs", type=_positive, default=12, help="of each schedule (default 12)")
    tune.add_argument("--top", type=_positive, default=12, help="of all, by the cost model (default 12)")
    tune.add_argument("--baselines", action="store_true", help="also time the reference, plain and compiled by torch")
    tune.add_argument(
        "--build-only", type=Path, metavar="DIR", help="compile the candidates, on a machine without a GPU"
    )
    tune.add_argument("--bundle", type=Path, metavar="DIR", help="measure what `--build-only` compiled")
    tune.add_argument("--rows", type=Path, help="where rows go (default: the tuned rows that selection reads)")
    tune.add_argument("--cache", type=Path, default=Path("build/.tune-cache"), help="folder for built kernels")
    tune.set_defaults(run=_tune)

    inspect = commands.add_parser("inspect", help="an artifact in words")
    inspect.add_argument("artifact", metavar="DIR", type=Path, help="the artifact's folder")
    inspect.set_defaults(run=_inspect)
    return parser


def _compile(args: argparse.Namespace) -> int:
    from dsv4c.checkpoint.reader import Checkpoint
    from dsv4c.compile import Options, compile_artifact, lower, plan_artifact
    from dsv4c.config import PRESETS, Target
    from dsv4c.describe import PassTable, plan_table

    target = Target(args.target)
    folder = Path(args.model) if args.model not in PRESETS and Path(args.model).exists() else None
    if folder is not None:
        checkpoint = Checkpoint(folder)
        checkpoint.validate()
        config = checkpoint.config
    else:
        config = _preset_or_folder(args.model)
    whole = config.num_hidden_layers
    truncated = args.num_layers is not None and args.num_layers != whole
    if truncated:
        if folder is not None:
            raise ConfigError(
                "`--num-layers` is for presets", hint="compile flash, pro or nano, and give it `--weights`"
            )
        config = config.truncated(args.num_layers)
        print(f"a truncated model: the first {args.num_layers} of {whole} layers, for measurement", file=sys.stderr)
    max_tokens = args.max_tokens or (512 if target.arch == "cpu" else 8192)
    options = Options(
        max_context=args.max_context or min(config.max_position_embeddings, 131072),
        max_tokens=max_tokens,
        max_requests=min(args.max_requests or (64 if target.arch == "cpu" else 256), max_tokens),
        fake_quant=args.fake_quant,
    )
    table = PassTable()
    if args.dry_run:
        program = lower(config, options, table.watch, target.arch)
        made = plan_artifact(program, target, options)
        console = _console()
        console.print(table.table(), plan_table(made))
        console.print(f"{table.seconds:.1f} s from start to plan")
        return 0
    if args.output is None:
        raise ConfigError("`compile` needs `-o DIR`", hint="or `--dry-run` to emit nothing")
    with _progress() as progress:
        passes = progress.add_task("passes", total=None, detail="")
        kernels = progress.add_task("kernels", total=None, detail="")

        def built(done: int, total: int, name: str) -> None:
            progress.update(kernels, completed=done, total=total, detail=name)

        compile_artifact(
            config, target, args.output, options, checkpoint=folder, cache=args.cache,
            truncated_from=whole if truncated else None,
            watch=lambda step: progress.update(passes, advance=1, detail=step.name), progress=built,
        )  # fmt: skip
    print(f"wrote {args.output} in {table.seconds:.1f} s", file=sys.stderr)
    return 0


def _preset_or_folder(name: str) -> ModelConfig:
    from dsv4c.config import preset

    if any(c in name for c in "/\\.") or Path(name).is_absolute():
        raise ConfigError(f"`{name}` does not exist", hint="MODEL is a checkpoint folder, or flash, pro, nano")
    return preset(name)


def _run(args: argparse.Namespace) -> int:
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
        threads=args.threads,
        executor=args.executor,
        breaks=tuple(args.breaks),
    )
    sock = bind(args.host, args.port) if args.prompt is None else None
    with _progress("{task.fields[amount]}") as progress:
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


def _plan(args: argparse.Namespace) -> int:
    from dsv4c.artifact import load_manifest
    from dsv4c.describe_memory import answer_of, memory_json, memory_tables
    from dsv4c.launch import SNAPSHOTS
    from dsv4c.room import given_room, measured_room, plan_of
    from dsv4c.units import parse_bytes, parse_tokens

    total = None if args.memory is None else parse_bytes(args.memory)
    manifest = load_manifest(args.artifact)
    plan, share = plan_of(args.artifact, manifest), args.gpu_memory_utilization
    room = measured_room(manifest.target, share) if total is None else given_room(manifest.target, total, share)
    context = plan.max_context if args.context is None else parse_tokens(args.context)
    snapshots = SNAPSHOTS if args.snapshots is None else args.snapshots
    fit = plan.fit(room, context, snapshots)
    requests = args.requests or max(1, fit.requests)
    longest = plan.longest(room, requests, snapshots)
    sizes = plan.sizes(requests, context, snapshots)
    if args.json:
        print(json.dumps(memory_json(plan, room, sizes, fit, longest), indent=1))
        return 0
    _console().print(memory_tables(plan, room, sizes), answer_of(plan, room, fit, args.requests, longest))
    return 0


def _tune(args: argparse.Namespace) -> int:
    from dsv4c.config import Target
    from dsv4c.tune import tune

    with _progress() as progress:
        task = progress.add_task("kernels", total=None, detail="")

        def built(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, detail=name)

        count = tune(
            Target(args.target).arch, families=args.family, op=args.op, label=args.label, most=args.max_configs,
            top=args.top,
            baselines=args.baselines, build_only=args.build_only, bundle=args.bundle, rows=args.rows, cache=args.cache,
            progress=built,
        )  # fmt: skip
    print(f"{count} candidates built" if args.build_only else f"{count} rows recorded", file=sys.stderr)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from dsv4c.artifact import load_manifest
    from dsv4c.describe import manifest_tables

    _console().print(manifest_tables(load_manifest(args.artifact)))
    return 0


def _console() -> Console:
    """stdout; as wide as the tables need where it is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=180)


def _progress(amount: str | None = None) -> Progress:
    """Bars on a terminal; `amount` says how much of each is done (default: how many of how many)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    done = MofNCompleteColumn() if amount is None else TextColumn(amount)
    return Progress(
        TextColumn("{task.description:<8}"), BarColumn(), done, TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"), console=Console(stderr=True),
        disable=not sys.stderr.isatty(), transient=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
