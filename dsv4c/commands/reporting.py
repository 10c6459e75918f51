"""`--report FILE`: what it adds to a command's parser, and the report of a model or an artifact."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.commands.arguments import positive
from dsv4c.commands.models import chosen_model
from dsv4c.commands.terminal import progress_bars
from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from dsv4c.pipeline import Step
    from dsv4c.report import Load, Report


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--report` and the load that its memory plan is drawn for."""
    group = parser.add_argument_group("report")
    group.add_argument("--report", type=Path, metavar="FILE", help="write all there is to see as one HTML file")
    group.add_argument(
        "--gpu-memory", "--memory", dest="memory", metavar="SIZE",
        help="that the memory plan is drawn in, such as 141GB (default: a card of the target, or this machine's)",
    )  # fmt: skip
    group.add_argument("--context", metavar="TOKENS", help="of every request, such as 128K (default: the longest)")
    group.add_argument("--verified", type=Path, metavar="FILE", help="show what `dsv4c verify --json FILE` measured")
    group.add_argument("--requests", type=positive, help="at once (default: as many as fit)")


def check_options(args: argparse.Namespace, others: bool) -> None:
    """Raises ConfigError for options of a report without one, or a report beside `others`, which print something."""
    if args.report is not None and others:
        raise ConfigError("`--report` writes all of it", hint="leave out what else is to be printed")
    of_reports = {
        "--gpu-memory": args.memory, "--context": args.context, "--requests": args.requests, "--verified": args.verified
    }  # fmt: skip
    for name, value in of_reports.items():
        if args.report is None and value is not None:
            raise ConfigError(f"`{name}` is for a report", hint="give it a file, such as `--report out.html`")


def write_report(args: argparse.Namespace) -> int:
    """Writes the report of the model or artifact `args.what` to `args.report`; 0 when done.

    Raises ConfigError for a path that cannot be written, before any work.
    """
    from dsv4c.report import Load, render, report_file
    from dsv4c.units import parse_bytes, parse_tokens

    began = time.perf_counter()
    memory = None if args.memory is None else parse_bytes(args.memory)
    load = Load(memory, None if args.context is None else parse_tokens(args.context), args.requests)
    with report_file(args.report) as file:
        file.write(render(_report(args, load)))
    print(f"wrote {args.report} in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return 0


def _report(args: argparse.Namespace, load: Load) -> Report:
    from dsv4c.artifact import load_manifest
    from dsv4c.compile import usual_options
    from dsv4c.config import Target
    from dsv4c.report import read_measured, report_of_artifact, report_of_model

    folder = Path(args.what)
    is_artifact = (folder / "manifest.json").is_file()
    target = Target(load_manifest(folder).target if is_artifact else args.target or "cpu")
    measured = None if args.verified is None else read_measured(args.verified, target.arch)

    with progress_bars() as progress:
        task = progress.add_task("passes", total=None, detail="capture")

        def watch(step: Step) -> None:
            progress.update(task, advance=1, detail=step.name)

        if is_artifact:
            return report_of_artifact(folder, load, measured=measured, watch=watch)
        model = chosen_model(args.what, args.num_layers)
        name = args.what if model.folder is None else model.folder.resolve().name
        return report_of_model(
            model.config, name, target, usual_options(model.config, target), load,
            truncated_from=model.truncated_from, measured=measured, watch=watch,
        )  # fmt: skip
