"""Blackwell's kernels built for Hopper and run there beside their references: the same sources, another matrix unit.

    python benchmarks/blackwell_on_hopper.py --build DIR [--family attention] [--label flash]    any machine
    python benchmarks/blackwell_on_hopper.py --run DIR                                           where an H200 is

What it shows is numerics on a card: addresses, masks, order of launches, and that a result is the same twice. Scaled
products are emulated there and sums lie in registers, so its times say nothing of a Blackwell card.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dsv4c import artifact
from dsv4c.runtime.gpu import GpuKernels
from dsv4c.schedules._schedule import Schedule
from dsv4c.schedules.emit import emit
from dsv4c.schedules.select import choose
from dsv4c.strictjson import decode
from dsv4c.trial import Trial, WrongResult
from dsv4c.tune import Entry, choices_of, workloads_of

ARCH = "sm_90a"
FAMILIES = ("attention", "index")
LARGEST = 1 << 31  # bytes moved by a workload; references of larger ones take minutes


def schedules_of(family: str) -> list[Schedule]:
    """Blackwell's own schedules of a family, for Hopper."""
    blackwell = importlib.import_module(f"dsv4c.schedules.blackwell.{family}").schedules(ARCH)
    known = {s.name for s in importlib.import_module(f"dsv4c.schedules.hopper.{family}").schedules(ARCH)}
    return [s for s in blackwell if s.name not in known]


def build(folder: Path, families: Sequence[str], label: str) -> int:
    """Cubins and bundle.json; the number of candidates."""
    entries, choices = [], {}
    for family in families:
        for workload in workloads_of(family):
            if label not in workload.label or workload.bytes_moved > LARGEST:
                continue
            for first in choices_of(workload, schedules_of(family), ARCH, 1):
                schedule = next(s for s in schedules_of(family) if s.name == first.schedule)
                # loads on their way and products in registers together need more shared memory than Hopper has
                config = {**first.config, "stages": 1} if family == "attention" else first.config
                choice = choose(schedule, workload.node, ARCH, workload.symbols, "", config)
                choices[choice.kernel] = choice
                entries.append(Entry(family, workload.label, workload.op, choice.schedule, dict(config), choice.kernel))
    folder.mkdir(parents=True, exist_ok=True)
    kernels = emit(choices, folder, folder.parent / f"{folder.name}.cache", arch=ARCH)
    bundle = {"entries": [asdict(e) for e in entries], "kernels": {n: asdict(k) for n, k in kernels.items()}}
    (folder / "bundle.json").write_text(json.dumps(bundle, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return len(entries)


def run(folder: Path, families: Sequence[str], label: str) -> int:
    """Every candidate twice on poisoned outputs, beside the reference: a line each, a table by op; how many failed."""
    data = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    kernels: dict[str, artifact.Kernel] = decode(dict[str, artifact.Kernel], data["kernels"])
    native = GpuKernels(kernels, folder, ARCH)
    ran: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    for entry in (Entry(**e) for e in data["entries"]):
        if entry.family not in families or label not in entry.label:
            continue
        workload = next(w for w in workloads_of(entry.family) if (w.op, w.label) == (entry.op, entry.label))
        schedule = next(s for s in schedules_of(entry.family) if s.name == entry.schedule)
        choice = choose(schedule, workload.node, ARCH, workload.symbols, "", entry.config)
        trial, name = Trial(workload, None), f"{workload.label} | {schedule.name}"
        one = (entry.op, entry.schedule)
        ran[one] += 1
        try:
            error = trial.check(choice, kernels[entry.kernel], native)
        except (WrongResult, RuntimeError) as wrong:
            failed[one] += 1
            print(f"FAIL {name}: {str(wrong).splitlines()[0]}", flush=True)
        else:
            print(f"ok   {name}: error {error:.1e} of {choice.tolerance:.0e}", flush=True)
    print("\n| op | schedule | right | wrong |\n| --- | --- | --- | --- |")
    for (op, name), count in sorted(ran.items()):
        wrong = failed[op, name]
        print(f"| `{op}` | `{name}` | {count - wrong} | {wrong} |")
    return sum(failed.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIR")
    parser.add_argument("--run", type=Path, metavar="DIR")
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--label", default="", help="only workloads whose label contains this")
    args = parser.parse_args()
    if args.build:
        print(f"{build(args.build, args.family or FAMILIES, args.label)} candidates built")
    return run(args.run, args.family or FAMILIES, args.label) if args.run else 0


if __name__ == "__main__":
    raise SystemExit(main())
