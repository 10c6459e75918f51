"""`dsv4c bisect`: the first pass, op and schedule behind a difference from the plain model, or of two artifacts."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.commands.subjects import add_options, check_json, open_subject, write_json
from dsv4c.commands.terminal import console, progress_bars
from dsv4c.errors import ConfigError

if TYPE_CHECKING:
    from dsv4c.bisecting import Bisection


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("bisect", help="the first pass, op and schedule that cause a difference in numbers")
    parser.add_argument("what", metavar="MODEL|DIR", help="a checkpoint folder, nano, or an artifact's folder")
    parser.add_argument("other", metavar="MODEL|DIR", nargs="?", help="compare with this (default: the plain model)")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what is to blame; 0 if nothing is, else 1."""
    from dsv4c.describe_numerics import bisection_text

    check_json(args.json)
    with progress_bars("{task.fields[amount]}") as progress, tempfile.TemporaryDirectory() as scratch:
        task = progress.add_task("bisect", total=None, detail="", amount="")

        def watch(name: str) -> None:
            progress.update(task, detail=name)

        found = (_against_plain if args.other is None else _pair)(args, Path(scratch), watch)
    if args.json is not None:
        write_json(args.json, found.to_json())
    console().print(bisection_text(found))
    return 0 if found.ok else 1


def _against_plain(args: argparse.Namespace, scratch: Path, watch: Callable[[str], object]) -> Bisection:
    """The first case of inputs in which something is to blame, or the last one."""
    from dsv4c.bisecting import bisect_lineage

    subject = open_subject(args.what, args, scratch, watch)
    for case in subject.cases:
        found = bisect_lineage(
            subject.lineage, case.runs, compiled=subject.compiled, fake_quant=subject.fake_quant,
            subject=f"{subject.name} and the plain model, on {case.name} inputs", watch=watch,
        )  # fmt: skip
        if not found.ok:
            break
    return found


def _pair(args: argparse.Namespace, scratch: Path, watch: Callable[[str], object]) -> Bisection:
    """The same of two, on the inputs that both have."""
    from dsv4c.bisecting import Side, bisect_pair

    one, other = (open_subject(w, args, scratch / str(i), watch) for i, w in enumerate((args.what, args.other)))
    if one.cases[-1].runs.inputs.config != other.cases[-1].runs.inputs.config:
        raise ConfigError(f"`{one.name}` and `{other.name}` are different models", hint="see `dsv4c inspect A B`")
    others = {case.name: case.runs for case in other.cases}
    for case in one.cases:
        if case.name in others:
            found = bisect_pair(
                Side(one.name, one.lineage, case.runs, one.compiled),
                Side(other.name, other.lineage, others[case.name], other.compiled),
                watch=watch,
            )
            if not found.ok:
                break
    return found
