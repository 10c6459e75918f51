"""`dsv4c audit`: what the machine code of an artifact's GPU kernels holds, and whether it is what was promised."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4c.commands.terminal import console
from dsv4c.errors import ArtifactError

if TYPE_CHECKING:
    from rich.table import Table

    from dsv4c.artifact import Manifest
    from dsv4c.replay import Replayed
    from dsv4c.schedules.audit import Audited


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser("audit", help="whether an artifact's GPU machine code is what its schedules promise")
    parser.add_argument("artifact", type=Path, metavar="DIR", help="an artifact's folder")
    parser.add_argument("--json", action="store_true", help="every launch as JSON")
    parser.add_argument(
        "--replay", action=argparse.BooleanOptionalAction, default=True,
        help="also make every launch on a driver that only writes it down, and compare its parameters (default: yes; "
        "needs a C++ compiler, and no CUDA driver in the process)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a row for each kind of kernel and every fault, or all as JSON; 0 if there is no fault, else 1."""
    from dsv4c.artifact import load_manifest
    from dsv4c.schedules.audit import audit

    manifest = load_manifest(args.artifact)
    if not any(kernel.launches for kernel in manifest.kernels.values()):
        raise ArtifactError(
            f"`{args.artifact}` is for `{manifest.target}`: it holds no GPU machine code to audit",
            hint="audit what `dsv4c compile --target sm_103a` (or sm_100a, sm_90a) has made",
        )
    found = list(audit(args.artifact, manifest))
    replayed = _replayed(args, manifest)
    said = [(one.kernel.name, one.launch.symbol, fault) for one in found for fault in one.faults]
    said += [(one.kernel, one.launch.symbol, fault) for one in replayed or () for fault in one.faults]
    faults = sorted({f"`{symbol}` of {name} {fault}" for name, symbol, fault in said})
    if args.json:
        made = None if replayed is None else len(replayed)
        print(
            json.dumps(
                {"target": manifest.target, "launches": [_plain(one) for one in found], "replayed": made,
                 "faults": faults}, indent=1,
            )
        )  # fmt: skip
        return 1 if faults else 0
    out = console()
    out.print(_table(found))
    for fault in faults:
        out.print(f"fault: {fault}", soft_wrap=True)
    images = len({one.launch.sha256 for one in found})
    out.print(f"{manifest.target}: {len(found)} launches in the manifest, {images} cubins")
    if replayed is None:
        out.print("not replayed: `--no-replay`")
    else:
        out.print(f"{len(replayed)} launches of {len(manifest.programs)} programs replayed on a recording driver")
    out.print(f"{len(faults)} faults")
    return 1 if faults else 0


def _replayed(args: argparse.Namespace, manifest: Manifest) -> list[Replayed] | None:
    """Every launch on the recording driver, which is built beside the artifact; None if nobody wants that."""
    from dsv4c.replay import replay

    if not args.replay:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return list(replay(args.artifact, manifest, Path(folder)))


def _table(found: list[Audited]) -> Table:
    """A row for each kernel function, op and set of matrix instructions; of sizes the largest."""
    from rich.table import Table

    table = Table(box=None)
    for name in (
        "kernel",
        "op",
        "launches",
        "matrix instructions",
        "copies",
        "registers",
        "local",
        "shared",
        "columns",
    ):
        table.add_column(name, justify="left" if name in ("kernel", "op", "matrix instructions") else "right")
    rows: dict[tuple[str, str, tuple[str, ...]], list[Audited]] = {}
    for one in found:
        rows.setdefault((one.launch.symbol, one.kernel.op, tuple(sorted(one.code.matrix))), []).append(one)
    for (symbol, op, names), group in sorted(rows.items()):
        codes = [one.code for one in group]
        matrix = ", ".join(f"{_range([code.matrix[name] for code in codes])} {name}" for name in names) or "-"
        columns = [code.columns for code in codes]
        table.add_row(
            symbol, op, str(len(group)), matrix, _range([code.copies for code in codes]),
            str(max(code.registers for code in codes)), str(max(code.local for code in codes)),
            str(max(one.launch.shared for one in group)),
            "?" if None in columns else str(max(column or 0 for column in columns)),
        )  # fmt: skip
    return table


def _range(counts: list[int]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def _plain(one: Audited) -> dict[str, Any]:
    code, launch = one.code, one.launch
    return {
        "kernel": one.kernel.name, "op": one.kernel.op, "schedule": one.kernel.schedule, "symbol": launch.symbol,
        "file": launch.file, "target": code.target, "matrix": dict(sorted(code.matrix.items())),
        "copies": code.copies, "registers": code.registers, "threads": launch.threads, "local_bytes": code.local,
        "shared_bytes": launch.shared, "tensor_columns": code.columns, "parameters": len(code.cubin.parameters),
        "parameter_bytes": code.cubin.parameter_bytes, "faults": list(one.faults),
    }  # fmt: skip
