"""`dsv4c explain`: every kernel of a layer, from the model's line to the segment."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4c.commands.terminal import console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "explain", help="every kernel of a layer: the model's lines, passes, schedule and why, segment and its end"
    )
    parser.add_argument("artifact", metavar="DIR", type=Path, help="the artifact's folder")
    parser.add_argument("scope", metavar="SCOPE", help="a layer or a part: L07, L07.attn, head, prelude, 'L0?.ffn'")
    parser.add_argument(
        "--program", default="decode", help="such as decode.64 (default: the largest that decodes; see `inspect`)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the kernels; 0 when done."""
    from dsv4c.describe_calls import explained
    from dsv4c.opened import load

    console().print(explained(load(args.artifact).program(args.program), args.scope), highlight=False)
    return 0
