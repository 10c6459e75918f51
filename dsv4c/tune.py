"""Measures schedules on a card: builds every candidate, checks it against the reference, times it, writes rows.

    dsv4c tune --target sm_90a                      builds, checks, times and records rows, for every family
    dsv4c tune --target sm_90a --build-only DIR     any machine: cubins, launcher, bundle.json
    dsv4c tune --target sm_90a --bundle DIR         where the card is: checks, times, prints a table, records rows

A result that is wrong, not wholly written or different from run to run makes no row (dsv4c/trial.py). Limits come from
a copy and matrix products in the same run.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dsv4c import artifact
from dsv4c.errors import ArtifactError, ConfigError, ScheduleError
from dsv4c.runtime.gpu import GpuKernels, check_card
from dsv4c.schedules._schedule import Choice, Progress, Schedule
from dsv4c.schedules._tuned import FOLDER, Row, Tuned, read_rows, write_rows
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.emit import emit
from dsv4c.schedules.select import choose, select
from dsv4c.strictjson import decode
from dsv4c.trial import Others, Trial, measure_ceilings

FAMILIES = (
    "hyper", "rows", "compress", "index", "attention", "experts", "linear", "gate", "sampling", "speculation"
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One candidate of a bundle: what to run on which workload."""

    family: str
    label: str
    op: str
    schedule: str
    config: dict[str, Any]
    kernel: str


def schedules_of(modules: Sequence[str]) -> list[Schedule]:
    """The schedules that these files of schedules/hopper declare."""
    return [s for m in modules for s in importlib.import_module(f"dsv4c.schedules.hopper.{m}").SCHEDULES]


def workloads_of(family: str) -> list[Workload]:
    """The workloads of one family."""
    return list(importlib.import_module(f"dsv4c.schedules.workloads.{family}").workloads())


def choices_of(workload: Workload, schedules: Sequence[Schedule], arch: str, most: int) -> list[Choice]:
    """Every accepting schedule's first `most` configs for this workload, in the order of the cost model."""
    out = []
    for schedule in schedules:
        if schedule.op != workload.op or arch not in schedule.targets or schedule.accepts(workload.node) is not None:
            continue
        for config in schedule.space(workload.node, workload.symbols)[:most]:
            out.append(choose(schedule, workload.node, arch, workload.symbols, "", config))
    return sorted(out, key=lambda choice: choice.seconds)


def shortlist(choices: Sequence[Choice], workload: Workload, top: int) -> list[Choice]:
    """The `top` cheapest by the cost model, and every schedule's own first; only those where nothing is timed."""
    kept, seen = [], set()
    for place, choice in enumerate(choices):
        if choice.schedule not in seen or (place < top and "bench" in workload.purpose):
            kept.append(choice)
        seen.add(choice.schedule)
    return kept


def build(
    families: Sequence[str],
    out: Path,
    cache: Path,
    arch: str,
    *,
    extra: Sequence[str] = (),
    keep: Callable[[Workload], bool] = lambda workload: True,
    keep_schedule: Callable[[Schedule], bool] = lambda schedule: True,
    most: int = 12,
    top: int = 1000,
    tuned: Tuned | None = None,
    progress: Progress | None = None,
) -> int:
    """Builds all candidates into the folder `out`; returns their number. With `tuned`, only what selection takes."""
    entries: list[Entry] = []
    choices: dict[str, Choice] = {}
    for family in families:
        schedules = [s for s in schedules_of((family, *extra)) if keep_schedule(s)]
        for workload in filter(keep, workloads_of(family)):
            found = shortlist(choices_of(workload, schedules, arch, most), workload, top)
            if tuned is not None and found:
                found = [select(workload.node, arch, workload.symbols, tuned)]
            for choice in found:
                choices[choice.kernel] = choice
                entries.append(
                    Entry(family, workload.label, workload.op, choice.schedule, dict(choice.config), choice.kernel)
                )
    if not entries:
        raise ScheduleError(f"no workload of {', '.join(families)} has a schedule for `{arch}`")
    out.mkdir(parents=True, exist_ok=True)
    kernels = emit(choices, out, cache, progress, arch=arch)
    bundle = {
        "arch": arch,
        "extra": list(extra),
        "entries": [asdict(e) for e in entries],
        "kernels": {name: asdict(kernel) for name, kernel in kernels.items()},
    }
    (out / "bundle.json").write_text(json.dumps(bundle, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return len(entries)


def measure(
    bundle: Path,
    out: Path | None,
    *,
    timing: bool = True,
    checking: bool = True,
    baselines: bool = False,
    others: Others | None = None,
) -> list[Row]:
    """Runs a bundle on this machine's card, prints a table, writes the rows that are right. Rows are returned too."""
    try:
        data = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"`{bundle}` is no bundle: {error}", hint="make one with `dsv4c tune --build-only DIR`"
        ) from error
    kernels: dict[str, artifact.Kernel] = decode(dict[str, artifact.Kernel], data["kernels"])
    entries = [Entry(**e) for e in data["entries"]]
    native = GpuKernels(kernels, bundle, data["arch"]) if any(k.kind == "gpu" for k in kernels.values()) else None
    ceilings = measure_ceilings() if timing else None
    if ceilings:
        rates = ", ".join(f"{k} {v / 1e12:.0f} TFLOPS" for k, v in ceilings.flops_per_s.items())
        print(f"{torch.cuda.get_device_name()}: copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, {rates}")
    rows: list[Row] = []
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.family, entry.op, entry.label), []).append(entry)
    for (family, op, label), group in groups.items():
        workload = next(w for w in workloads_of(family) if (w.op, w.label) == (op, label))
        schedules = {s.name: s for s in schedules_of((family, *data["extra"]))}
        trial = Trial(workload, ceilings if "bench" in workload.purpose else None)
        first = len(rows)
        for entry in group:
            choice = choose(schedules[entry.schedule], workload.node, data["arch"], workload.symbols, "", entry.config)
            row = trial.run(choice, kernels[entry.kernel], native, checking=checking)
            if row is not None:
                rows.append(row)
        if baselines and trial.ceilings:
            times = trial.baselines(others)
            print("     " + ", ".join(f"{name} {us:.1f} us" for name, us in times.items()), flush=True)
            rows[first:] = [dataclasses.replace(row, baselines=times) for row in rows[first:]]
        if out is not None:
            write_rows(out, rows)
        torch.cuda.empty_cache()
    return rows


def tune(
    arch: str,
    *,
    families: Sequence[str] | None = None,
    op: str | None = None,
    label: str = "",
    most: int = 12,
    top: int = 12,
    baselines: bool = False,
    build_only: Path | None = None,
    bundle: Path | None = None,
    rows: Path | None = None,
    cache: Path = Path("build/.tune-cache"),
    progress: Progress | None = None,
) -> int:
    """Builds and measures; rows of the same workloads and schedules replace older ones in `rows`.

    `build_only` stops after building into that folder and returns the number of candidates; `bundle` measures such a
    folder. Otherwise both happen here, and the number of rows is returned. Raises ConfigError for an unknown family,
    ScheduleError if a kernel does not build, ArtifactError without a fitting card.
    """
    if arch == "cpu":
        raise ConfigError("target `cpu` has no tuning space", hint="give a GPU target: `--target sm_90a`")
    for family in families or ():
        if family not in FAMILIES:
            raise ConfigError(f"unknown family `{family}`", hint=f"families are {', '.join(FAMILIES)}")
    if build_only is None:
        check_card(arch, 0)  # before minutes of building for nothing
    target = rows or FOLDER / f"{arch}.jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        folder = bundle or build_only or Path(scratch)
        if bundle is None:
            count = build(
                families or FAMILIES, folder, cache, arch, extra=("tile", "hyper_few"), most=most, top=top,
                progress=progress, keep=lambda w: (op is None or w.op == op) and label in w.label,
            )  # fmt: skip
            if build_only is not None:
                return count
        found = measure(folder, None, baselines=baselines)
    merge_rows(target, found)
    return len(found)


def merge_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to the file; a row of the same op, workload, schedule and config replaces the older one."""
    kept = {_identity(row): row for row in (*(read_rows(path) if path.exists() else ()), *rows)}
    write_rows(path, kept.values())


def _identity(row: Row) -> tuple[str, ...]:
    return row.op, row.label, row.schedule, json.dumps(dict(row.config), sort_keys=True)
