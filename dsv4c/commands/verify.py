"""`dsv4c verify`: the plain model, every pass and the compiled program on the same inputs, held to what they claim."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from dsv4c.commands.subjects import add_options, check_json, open_subject, write_json
from dsv4c.commands.terminal import console, progress_bars


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("verify", help="whether every pass and schedule keeps what it claims of numbers")
    parser.add_argument("what", metavar="MODEL|DIR", help="a checkpoint folder, nano, or an artifact's folder")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0 if every claim holds, 1 if one is broken."""
    from dsv4c.describe_numerics import verification_table
    from dsv4c.verifying import verify_lineage

    check_json(args.json)
    with progress_bars("{task.fields[amount]}") as progress, tempfile.TemporaryDirectory() as scratch:
        task = progress.add_task("verify", total=None, detail="", amount="")

        def watch(name: str) -> None:
            progress.update(task, detail=name)

        subject = open_subject(args.what, args, Path(scratch), watch)
        found = verify_lineage(
            subject.lineage, subject.cases, compiled=subject.compiled, fake_quant=subject.fake_quant,
            model=subject.name, target=subject.target, notes=subject.notes, watch=watch,
        )  # fmt: skip
    if args.json is not None:
        write_json(args.json, found.to_json())
    console().print(verification_table(found))
    return 0 if found.ok else 1
