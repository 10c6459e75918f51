"""Blackwell's schedules on a Hopper card: the same sources built for it, block-scaled products emulated.

    python -m tests.schedules.blackwell.on_hopper build DIR [PART ...]    any machine: cubins for sm_90a, cases
    python -m tests.schedules.blackwell.on_hopper run DIR [PART ...]      where the card is; needs no Triton

Parts are `experts` and the families of `schedules/workloads`. Every candidate is launched twice on poisoned buffers
through the product's launcher. Experts are judged stage by stage by exact models in float64 (expert_models.py), all
else by the op's reference on the workloads of `dsv4c tune`, with the configs that Blackwell's schedules list. All rows
go to DIR/results.jsonl, counts to DIR/short.jsonl. Its times would say nothing of a Blackwell card.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c import artifact
from dsv4c.runtime.gpu import GpuKernels
from dsv4c.schedules import blackwell
from dsv4c.schedules._schedule import Choice, Config, Schedule, Work
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.blackwell import experts, linear
from dsv4c.schedules.select import choose
from dsv4c.strictjson import decode
from dsv4c.trial import Trial, WrongResult
from dsv4c.tune import Entry, workloads_of

from . import expert_models as models
from .expert_models import Case, Stage

ARCH = "sm_90a"
FAMILIES = ("linear", "gate", "attention", "index", "hyper", "rows", "compress", "sampling", "speculation")
NOT_HERE = {"linear_fp8.tilelang_pairs": "multiplies by tcgen05 itself, which sm_90a lacks: nothing emulates it there"}
"""Schedules that cannot be built for Hopper, and why."""
_EMULATED = {s.name: s for s in (*experts.schedules(ARCH), *linear.schedules(ARCH))}
SCHEDULES: tuple[Schedule, ...] = tuple(
    dataclasses.replace(_EMULATED.get(s.name, s), cost=lambda *_: Work(launch="gpu"))  # no cost model for FP4 there
    for s in blackwell.schedules("sm_103a")
    if s.name not in NOT_HERE
)
COLUMNS = {16: 9, 32: 40, 64: 150, 128: 300}
"""Columns of a tile, and tokens that fill some of them wholly."""
KINDS = [
    (scale, rows)
    for scale in ("usual", "extreme", "tiny", "zero", "largest")
    for rows in ("usual", "zeros", "large", "max", *models.NO_NUMBERS)
]
MAPS = (
    "nano wq_a+wkv",
    "nano wo_a",
    "nano w2",
    "nano csa_compress",
    "nano gate",
    "flash wo_a",
    "flash w2",
    "flash gate",
)
"""Linear maps by model and name."""
LARGEST = 1 << 31  # bytes moved by a workload; references of larger ones take minutes
MANY = 1 << 26  # bytes moved by one that runs with every config, not with the first alone


def expert_cases() -> Iterator[tuple[str, list[Case]]]:
    """(format, cases that one kernel serves). First those of few channels with every kind of value, then flash's."""
    for fmt in models.FORMATS:
        for columns, tokens in COLUMNS.items():
            yield (
                fmt,
                [
                    Case(t, 7, 3, 512, 256, columns, routing, scale, rows, 11 * i + columns + t, apart=columns >= 64)
                    for i, (scale, rows) in enumerate(KINDS)
                    for t, routing in ((tokens, "random"), ((tokens, "one"), (1, "last"))[i % 2])
                ],
            )
    for fmt, columns, tokens in (("mxfp8", 16, 16), ("mxfp4", 128, 200)):
        yield fmt, [Case(tokens, 8, 6, 4096, 2048, columns, "random", "usual", "usual", 3)]


def workloads(family: str) -> Iterator[Workload]:
    """What a family runs: of linear maps and their gates, whose products are emulated, a few of every kind."""
    for workload in workloads_of(family):
        model, _, rest = workload.label.partition(" ")
        if "linear" in workload.op and "gate" in workload.op:
            few = model in ("nano", "flash") and workload.symbols["T"] in (3, 65)
        elif family == "linear":
            few = f"{model} {rest.split()[0]}" in MAPS
            few = few and workload.symbols["T"] in ((1, 65) if model == "nano" else (65, 129))
        else:
            few = workload.bytes_moved <= LARGEST
        if few:
            yield workload


def configs(schedule: Schedule, workload: Workload) -> tuple[Config, ...]:
    """Those to run; less is on its way at a time where products lie in registers, beside Hopper's shared memory."""
    space = schedule.space(workload.node, workload.symbols)
    if schedule.name in _EMULATED:
        return ({**space[0], "stages": 2},)
    if schedule.name.endswith("triton_wide"):
        space = tuple({**config, "stages": 1} for config in space)
    return space if workload.bytes_moved <= MANY else space[:1]


def map_choices(family: str) -> Iterator[tuple[Workload, Choice]]:
    """Every candidate of a family."""
    for workload in workloads(family):
        for schedule in SCHEDULES:
            if schedule.op == workload.op and schedule.accepts(workload.node) is None:
                for config in configs(schedule, workload):
                    yield workload, choose(schedule, workload.node, ARCH, workload.symbols, "", config)


def expert_choice(fmt: str, cases: Sequence[Case]) -> Choice:
    """The kernel of a list of cases, planned for the most tokens among them."""
    case = max(cases, key=lambda one: one.tokens)
    what = models.node_of(case, fmt)
    config = {**models.config_of(case, what), "stages": 2, "down_stages": 2, "warps": 8 if case.columns > 32 else 4}
    schedule = next(s for s in SCHEDULES if s.op == what.op)
    return choose(schedule, what, ARCH, {"T": case.tokens}, "", config)


def build(out: Path, cache: Path, parts: Sequence[str]) -> None:
    """Cubins, launcher and records of all kernels, and which candidates there are."""
    from dsv4c.schedules.emit import emit

    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Choice] = {}
    entries = []
    if "experts" in parts:
        found = {choice.kernel: choice for choice in (expert_choice(fmt, cases) for fmt, cases in expert_cases())}
    for family in FAMILIES:
        for workload, choice in map_choices(family) if family in parts else ():
            found[choice.kernel] = choice
            entry = Entry(family, workload.label, workload.op, choice.schedule, dict(choice.config), choice.kernel)
            entries.append(dataclasses.asdict(entry))
    kernels = emit(
        found, out, cache, lambda done, count, what: print(f"{done}/{count} {what[:80]}", flush=True), arch=ARCH
    )
    records = {name: dataclasses.asdict(kernel) for name, kernel in kernels.items()}
    text = json.dumps({"entries": entries, "kernels": records}, indent=1, sort_keys=True)
    (out / "bundle.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(entries)} candidates, {len(found)} kernels")


def _launched(native: GpuKernels, kernel: str, call: Sequence[Tensor], buffers: Sequence[Tensor]) -> list[Tensor]:
    """All buffers after a call on poisoned ones, copied."""
    for tensor in buffers:
        tensor.view(torch.uint8).fill_(0xFF)
    native.bind([(kernel, [*call, *buffers])])(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return [tensor.clone() for tensor in buffers]


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


def _run_experts(native: GpuKernels, fmt: str, cases: Sequence[Case]) -> Iterator[Row]:
    choice = expert_choice(fmt, cases)
    for case in cases:
        what = models.node_of(case, fmt)
        args = models.inputs_of(case, fmt, what, "cuda")
        laid = models.laid_out(args, what)
        buffers = models.buffers_of(case, what, choice.config, "cuda")
        first, second = (_launched(native, choice.kernel, laid, buffers) for _ in range(2))
        same = _equal(first[-1:], second[-1:])
        shape = f"{case.dim}x{case.inner} T={case.tokens} N={case.columns}"
        for stage in models.stages(fmt, case, args, first):
            yield _row(f"{what.op} {fmt}", shape, stage, same, kind=f"{case.routing} {case.scale} {case.rows}")


def _run_family(native: GpuKernels, kernels: Mapping[str, artifact.Kernel], entries: Sequence[Entry]) -> Iterator[Row]:
    """Candidates of one family, those of a workload on the same inputs."""
    known = {s.name: s for s in SCHEDULES}
    of: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        of.setdefault((entry.op, entry.label), []).append(entry)
    for workload in workloads_of(entries[0].family) if entries else ():
        group = of.get((workload.op, workload.label), [])
        trial = Trial(workload, None, seed=7) if group else None
        for entry in group:
            assert trial is not None
            schedule = known[entry.schedule]
            choice = choose(schedule, workload.node, ARCH, workload.symbols, "", entry.config)
            assert choice.kernel == entry.kernel, "the bundle was built from other sources"
            wrong, error = "", float("inf")
            try:
                error = trial.check(choice, kernels[entry.kernel], native)
            except (WrongResult, RuntimeError) as reason:  # one that the card refuses must not hide the others
                wrong = str(reason).splitlines()[0]
                print(f"FAIL {workload.label} | {schedule.name} {entry.config}: {wrong}", flush=True)
            same = "run to run" not in wrong
            stage = Stage("result", error, choice.tolerance)
            row = _row(workload.op, workload.label.split()[0], stage, same, kind=workload.label)
            yield {**row, "schedule": schedule.name, "config": entry.config, "good": not wrong}
        torch.cuda.empty_cache()


Row = dict[str, Any]


def _row(op: str, shape: str, stage: Stage, same: bool, kind: str = "") -> Row:
    return {
        "op": op, "schedule": "", "shape": shape, "kind": kind, "stage": stage.name, "error": stage.error,
        "allowed": stage.allowed, "bits": stage.bits, "good": stage.good and same, "same": same,
    }  # fmt: skip


def run(folder: Path, parts: Sequence[str]) -> int:
    """Runs all cases, prints the worst of each kernel and stage; the number of wrong rows."""
    data = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    kernels: dict[str, artifact.Kernel] = decode(dict[str, artifact.Kernel], data["kernels"])
    native = GpuKernels(kernels, folder, ARCH)
    entries = [Entry(**entry) for entry in data["entries"]]
    start = time.monotonic()
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        rows: list[Row] = []
        for part in parts:
            first = time.monotonic()
            found = [entry for entry in entries if entry.family == part]
            for row in _run_family(native, kernels, found) if part != "experts" else _all_experts(native):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
            print(f"{part}: {time.monotonic() - first:.1f} s", flush=True)
    short = shortened(rows, torch.cuda.get_device_name(), datetime.date.today().isoformat())
    (folder / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short), encoding="utf-8")
    for line in summary(rows):
        print(line)
    wrong = [row for row in rows if not row["good"]]
    for row in wrong[:20]:
        print(json.dumps(row))
    print(f"{len(rows)} rows, {len(wrong)} wrong, {time.monotonic() - start:.1f} s, {torch.cuda.get_device_name()}")
    return len(wrong)


def _all_experts(native: GpuKernels) -> Iterator[Row]:
    for fmt, cases in expert_cases():
        yield from _run_experts(native, fmt, cases)


def shortened(rows: Sequence[Row], hardware: str, date: str) -> Iterator[Row]:
    """A row a schedule, model or shape, and stage: benchmarks/blackwell_on_hopper.jsonl."""
    for (what, shape, stage), found in _grouped(rows).items():
        used = [row["error"] / row["allowed"] for row in found if row["allowed"]]
        yield {
            "measures": "numerics", "schedule": what, "shape": shape, "stage": stage, "results": len(found),
            "kinds": len({row["kind"] for row in found}), "wrong": sum(not row["good"] for row in found),
            "worst_to_allowed": float(f"{max(used, default=0.0):.2g}"), "same": all(row["same"] for row in found),
            "built_for": ARCH, "hardware": hardware, "date": date,
        }  # fmt: skip


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by schedule, shape without its number of tokens, and stage."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        shape = row["shape"]
        if "T=" in shape:
            shape = shape.partition(" T=")[0] + " N=" + shape.rpartition("N=")[2]
        groups.setdefault((row["schedule"] or row["op"], shape, row["stage"]), []).append(row)
    return groups


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """A line a kernel, shape and stage: the case that used most of what is allowed."""
    yield f"{'schedule':44} {'shape':20} {'stage':16} {'cases':>5} {'max error':>10} {'allowed':>10}  equal"
    for (what, shape, stage), found in _grouped(rows).items():
        worst = max(found, key=lambda row: row["error"] / row["allowed"] if row["allowed"] else row["error"])
        state = "bits" if worst["bits"] and worst["good"] else "yes" if all(row["good"] for row in found) else "NO"
        yield (
            f"{what:44} {shape:20} {stage:16} {len(found):5} {worst['error']:10.2e} {worst['allowed']:10.2e}  {state}"
            + ("" if all(row["same"] for row in found) else "  differs from run to run")
        )


def main(words: Sequence[str]) -> int:
    every = ("experts", *FAMILIES)
    if len(words) < 2 or words[0] not in ("build", "run") or not set(words[2:]) <= set(every):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    parts = [part for part in every if part in (words[2:] or every)]
    if words[0] == "build":
        build(Path(words[1]), Path("build/.tune-cache"), parts)
        return 0
    return int(run(Path(words[1]), parts) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
