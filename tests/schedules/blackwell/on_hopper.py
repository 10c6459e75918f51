"""Blackwell's matrix kernels on a Hopper card, where block-scaled products are emulated: the same sources.

    python -m tests.schedules.blackwell.on_hopper build DIR     any machine: cubins for sm_90a, launcher, cases
    python -m tests.schedules.blackwell.on_hopper run DIR       where the card is; needs no Triton

`run` makes inputs there, launches twice on poisoned buffers through the product's launcher, and judges every stage by
its exact model in float64 (expert_models.py), linear maps and gates by the op's reference. One line a kernel and
stage: the worst of its cases, what is allowed there, and whether both runs gave equal bytes. All rows go to
DIR/results.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c import artifact
from dsv4c.agreement import largest_error
from dsv4c.ops import OPS
from dsv4c.runtime import layouts
from dsv4c.runtime.gpu import GpuKernels
from dsv4c.schedules._schedule import Choice, Schedule, Work
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.blackwell import experts, linear
from dsv4c.schedules.select import choose
from dsv4c.schedules.workloads import gate as gate_workloads
from dsv4c.schedules.workloads import linear as linear_workloads
from dsv4c.strictjson import decode

from . import expert_models as models
from .expert_models import Case, Stage

ARCH = "sm_90a"
SCHEDULES: dict[str, Schedule] = {
    s.op: dataclasses.replace(s, cost=lambda *_: Work(launch="gpu"))  # the cost model knows no FP4 there
    for s in (*experts.schedules(ARCH), *linear.schedules(ARCH))
}
COLUMNS = {16: 9, 32: 40, 64: 150, 128: 300}
"""Columns of a tile, and tokens that fill some of them wholly."""
KINDS = [
    (scale, rows)
    for scale in ("usual", "extreme", "tiny", "zero", "largest")
    for rows in ("usual", "zeros", "large", "max")
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
"""Linear maps by model and name; 65 tokens for nano, 129 for flash."""


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


def maps() -> Iterator[Workload]:
    """Workloads of linear maps and gates."""
    for workload in (*linear_workloads.workloads(), *gate_workloads.workloads()):
        model, _, rest = workload.label.partition(" ")
        name = f"{model} {rest.split()[0]}"
        if "gate" in workload.op:
            if "linear" in workload.op and model in ("nano", "flash") and workload.symbols["T"] in (3, 65):
                yield workload
        elif name in MAPS and workload.symbols["T"] in ((1, 65) if model == "nano" else (65, 129)):
            yield workload


def expert_choice(fmt: str, cases: Sequence[Case]) -> Choice:
    """The kernel of a list of cases, planned for the most tokens among them."""
    case = max(cases, key=lambda one: one.tokens)
    what = models.node_of(case, fmt)
    config = {**models.config_of(case, what), "stages": 2, "down_stages": 2, "warps": 8 if case.columns > 32 else 4}
    return choose(SCHEDULES[what.op], what, ARCH, {"T": case.tokens}, "", config)


def map_choice(workload: Workload) -> Choice:
    schedule = SCHEDULES[workload.op]
    config = {**schedule.space(workload.node, workload.symbols)[0], "stages": 2}
    return choose(schedule, workload.node, ARCH, workload.symbols, "", config)


def choices() -> list[Choice]:
    return [expert_choice(fmt, cases) for fmt, cases in expert_cases()] + [map_choice(one) for one in maps()]


def build(out: Path, cache: Path) -> None:
    """Cubins, launcher and records of all kernels."""
    from dsv4c.schedules.emit import emit

    out.mkdir(parents=True, exist_ok=True)
    found = {choice.kernel: choice for choice in choices()}
    kernels = emit(
        found, out, cache, lambda done, count, what: print(f"{done}/{count} {what[:80]}", flush=True), arch=ARCH
    )
    text = json.dumps({name: dataclasses.asdict(kernel) for name, kernel in kernels.items()}, indent=1, sort_keys=True)
    (out / "kernels.json").write_text(text + "\n", encoding="utf-8")


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


def _run_experts(native: GpuKernels, fmt: str, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
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


def _run_map(native: GpuKernels, workload: Workload) -> Iterator[dict[str, Any]]:
    choice = map_choice(workload)
    generator = torch.Generator("cuda").manual_seed(7)
    args = workload.make(generator)
    reference = workload.reference or OPS[workload.op].reference
    expected = reference(*args, **workload.node.attrs)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    laid: Any = [layouts.apply(a, choice.layouts[i]) if i in choice.layouts else a for i, a in enumerate(args)]  # type: ignore[arg-type]
    buffers = [
        torch.empty(value.sizes(workload.symbols), dtype=getattr(torch, value.dtype), device="cuda")
        for value in (*choice.workspace, *choice.node.outputs)
    ]
    first, second = (_launched(native, choice.kernel, laid, buffers)[len(choice.workspace) :] for _ in range(2))
    error = (workload.error or largest_error)(first, expected)
    yield _row(workload.op, workload.label, Stage("result", error, choice.tolerance), _equal(first, second))


def _row(op: str, shape: str, stage: Stage, same: bool, kind: str = "") -> dict[str, Any]:
    return {
        "op": op, "shape": shape, "kind": kind, "stage": stage.name, "error": stage.error, "allowed": stage.allowed,
        "bits": stage.bits, "good": stage.good and same, "same": same,
    }  # fmt: skip


def run(folder: Path) -> int:
    """Runs all cases, prints the worst of each kernel and stage; the number of wrong rows."""
    text = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    native = GpuKernels(decode(dict[str, artifact.Kernel], text), folder, ARCH)
    start, rows = time.monotonic(), []
    for fmt, cases in expert_cases():
        rows += list(_run_experts(native, fmt, cases))
    for workload in maps():
        rows += list(_run_map(native, workload))
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        shape = (
            row["shape"]
            if not row["kind"]
            else row["shape"].partition(" T=")[0] + " N=" + row["shape"].rpartition("N=")[2]
        )
        groups.setdefault((row["op"], shape, row["stage"]), []).append(row)
    print(f"{'op':24} {'shape':32} {'stage':16} {'cases':>5} {'max error':>10} {'tolerance':>10}  equal")
    for (op, shape, stage), found in groups.items():
        worst = max(found, key=lambda row: row["error"] / row["allowed"] if row["allowed"] else row["error"])
        state = "bits" if worst["bits"] and worst["good"] else "yes" if all(row["good"] for row in found) else "NO"
        print(
            f"{op:24} {shape:32} {stage:16} {len(found):5} {worst['error']:10.2e} {worst['allowed']:10.2e}  {state}"
            + ("" if all(row["same"] for row in found) else "  differs from run to run")
        )
    wrong = [row for row in rows if not row["good"]]
    for row in wrong[:20]:
        print(json.dumps(row))
    print(f"{len(rows)} rows, {len(wrong)} wrong, {time.monotonic() - start:.1f} s, {torch.cuda.get_device_name()}")
    return len(wrong)


def main(words: Sequence[str]) -> int:
    if len(words) != 2 or words[0] not in ("build", "run"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    if words[0] == "build":
        build(Path(words[1]), Path("build/.tune-cache"))
        return 0
    return int(run(Path(words[1])) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
