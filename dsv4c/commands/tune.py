"""`dsv4c tune`: measure schedules on this machine's GPU and record the rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsv4c.commands.arguments import positive
from dsv4c.commands.terminal import progress_bars


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("tune", help="measure schedules on this machine's GPU and record the rows")
    parser.add_argument("--target", required=True, help="what to tune for: sm_90a")
    parser.add_argument("--family", action="append", help="only these families of ops (hyper, rows, experts, ...)")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--label", default="", help="only workloads whose label contains this (flash, decode, ...)")
    parser.add_argument("--max-configs", type=positive, default=12, help="of each schedule (default 12)")
    parser.add_argument("--top", type=positive, default=12, help="of all, by the cost model (default 12)")
    parser.add_argument("--baselines", action="store_true", help="also time the reference, plain and compiled by torch")
    parser.add_argument(
        "--build-only", type=Path, metavar="DIR", help="compile the candidates, on a machine without a GPU"
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="measure what `--build-only` compiled")
    parser.add_argument("--rows", type=Path, help="where rows go (default: the tuned rows that selection reads)")
    parser.add_argument("--cache", type=Path, default=Path("build/.tune-cache"), help="folder for built kernels")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Builds or measures candidates; 0 when done."""
    from dsv4c.config import Target
    from dsv4c.tune import tune

    with progress_bars() as progress:
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
