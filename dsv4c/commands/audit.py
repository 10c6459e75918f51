"""`dsv4c audit`: what the machine code of an artifact's GPU kernels holds, and whether it is what was promised."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4c.commands.terminal import console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("audit", help="whether an artifact's GPU machine code is what its schedules promise")
    parser.add_argument("artifact", type=Path, metavar="DIR", help="an artifact's folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a row for each kind of kernel and every fault; 0 if there is none, else 1."""
    from rich.table import Table

    from dsv4c.opened import load
    from dsv4c.schedules.audit import audit

    table = Table("kernel", "op", "launches", "matrix instructions", "copies", "registers", "local", "shared", box=None)
    rows: dict[tuple[str, str, str], list[tuple[int, int, int, int]]] = {}
    broken: list[str] = []
    for one in audit(args.artifact, load(args.artifact).manifest):
        names = ", ".join(sorted(one.code.matrix)) or "-"
        sizes = (one.code.copies, one.code.registers, one.code.local, one.launch.shared)
        rows.setdefault((one.launch.symbol, one.kernel.op, names), []).append(sizes)
        broken += [f"`{one.launch.symbol}` of {one.kernel.name} ({one.kernel.schedule}) {f}" for f in one.faults]
    for (symbol, op, names), figures in sorted(rows.items()):
        most = [str(max(column)) for column in zip(*figures, strict=True)]
        table.add_row(symbol, op, str(len(figures)), names, *most)
    out = console()
    out.print(table)
    for fault in sorted(set(broken)):
        out.print(f"fault: {fault}", soft_wrap=True)
    count = sum(len(figures) for figures in rows.values())
    out.print(f"{count} launches, {len(set(broken))} faults")
    return 1 if broken else 0
