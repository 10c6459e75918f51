"""`dsv4c inspect`: an artifact in words."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4c.commands.terminal import console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("inspect", help="an artifact in words")
    parser.add_argument("artifact", metavar="DIR", type=Path, help="the artifact's folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the tables; 0 when done."""
    from dsv4c.artifact import load_manifest
    from dsv4c.describe import manifest_tables

    console().print(manifest_tables(load_manifest(args.artifact)))
    return 0
