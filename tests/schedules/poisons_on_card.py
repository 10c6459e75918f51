"""NaN and infinity through Hopper's kernels on the card, and what keeping them costs beside other machine code.

    python -m tests.schedules.poisons_on_card build DIR         any machine: cubins for sm_90a of this tree
    python -m tests.schedules.poisons_on_card run DIR [OTHER]   where an H200 is; needs no Triton

`run` checks each kernel as tuning does, then with every bad value of poisons.py beside its reference. With OTHER, a
folder built from another tree, the kernels of both are timed in turn: replays of graphs over rotated inputs, medians.
Rows go to DIR/results.jsonl.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsv4c import artifact
from dsv4c.runtime.gpu import GpuKernels
from dsv4c.schedules._schedule import Choice
from dsv4c.schedules._tuned import Tuned
from dsv4c.schedules._workload import Args, Workload
from dsv4c.schedules.emit import emit
from dsv4c.schedules.select import choose, select
from dsv4c.strictjson import decode
from dsv4c.trial import MOST_SETS, ROTATE_BYTES, Trial, WrongResult
from dsv4c.tune import Entry, schedules_of, workloads_of

ARCH = "sm_90a"
CHECKED: dict[str, tuple[str, ...]] = {
    "rows": ("flash decode 3", "nano decode 65"),
    "hyper": ("flash decode 65", "flash prefill 65", "nano decode 65", "nano prefill 65"),
    "compress": ("short", "decode 64"),
    "index": ("query 65", "query 67", "decode edges", "prefill ragged"),
    "attention": ("decode edges", "prefill ragged", "flash decode 1 @8K"),
    "experts": ("nano decode 64", "flash decode 1", "flash decode 33 one", "nano prefill 500 one"),
    "gate": ("flash bias decode 65", "flash hash decode 65", "nano bias decode 65", "nano hash decode 65"),
    "linear": ("flash w2 decode 3", "flash w2 decode 129", "flash wo_a decode 65", "nano w1+w3 decode 65"),
    "sampling": ("nano",),
}
"""Parts of labels, by family. Of one op, model and format the smallest two workloads are taken."""
MOVES = {"entry_slots", "token_slots", "entry_rope_table", "rope_table", "take_rows", "embed", "embed_streams"}
"""Ops without arithmetic on activations."""
TIMED: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "rows": tuple(
        (op, ("flash decode 64", "flash prefill 8192"))
        for op in (
            "quantise_rows", "rms_norm_quantise", "rope_quantise", "swiglu_quantise", "swiglu_pair", "norm_rope_pack",
            "qkv_norm_rope_pack",
        )
    ),
    "hyper": (
        ("hc_pre_norm_quantise", ("flash decode 64", "flash decode 512", "flash prefill 8192")),
        ("hc_post_pre_norm_quantise", ("flash decode 64", "flash prefill 8192")),
        ("hc_post_pre_norm", ("flash decode 64", "flash prefill 8192")),
    ),
    "compress": (
        ("compress_pack", ("decode 64 @8K", "prefill 8192")),
        ("compress_online_pack", ("decode 64 @8K",)),
    ),
    "index": (
        ("index_query", ("query 65", "query 8192")),
        ("index_scores", ("flash fp4 decode 64 @8K", "flash fp4 decode 64 @128K", "flash fp4 prefill 8192 @0")),
        ("index_topk_packed", ("flash fp4 decode 64 @128K", "flash fp4 prefill 8192 @0")),
    ),
    "attention": tuple(
        (op, ("flash decode 1 @8K", "flash decode 64 @8K", "flash prefill 4096 @0"))
        for op in ("attend_window_packed", "attend_csa_packed", "attend_hca_packed")
    ),
    "experts": (("experts_fp4", ("flash decode 1", "flash decode 64", "flash prefill 2048")),),
}  # fmt: skip
"""Ops whose machine code has changed, and labels."""


def _wanted() -> Iterator[tuple[str, Workload, bool]]:
    """(family, workload, whether it is timed)."""
    for family, parts in CHECKED.items():
        taken: dict[tuple[str, str], int] = {}
        for workload in sorted(workloads_of(family), key=lambda w: w.bytes_moved):
            if not any(part in workload.label for part in parts) or min(workload.symbols.values(), default=1) == 0:
                continue
            if (
                workload.op in MOVES
                or workload.label.startswith("pro")
                or workload.symbols.get("T", workload.symbols.get("S", 0)) > 3000
            ):
                continue
            key = (workload.op, str(workload.node.attrs.get("format")) + workload.label.split()[0])
            taken[key] = taken.get(key, 0) + 1
            if taken[key] <= 2:
                yield family, workload, False
    for family, ops in TIMED.items():
        for op, labels in ops:
            for workload in workloads_of(family):
                if workload.op == op and any(workload.label.endswith(label) for label in labels):
                    yield family, workload, True


def build(folder: Path) -> None:
    """Cubins, launcher and bundle.json: of every workload what selection takes."""
    tuned, entries, choices = Tuned.of(ARCH), [], {}
    for family, workload, timed in _wanted():
        choice = select(workload.node, ARCH, workload.symbols, tuned)
        if "tile" in choice.schedule.partition(".")[2] and "tiles" not in choice.schedule:
            continue
        choices[choice.kernel] = choice
        entry = Entry(family, workload.label, workload.op, choice.schedule, dict(choice.config), choice.kernel)
        entries.append({**asdict(entry), "timed": timed})
    folder.mkdir(parents=True, exist_ok=True)
    kernels = emit(
        choices, folder, folder.parent / "cache", lambda done, count, what: print(done, count, what[:70], flush=True),
        arch=ARCH,
    )  # fmt: skip
    bundle = {"entries": entries, "kernels": {name: asdict(kernel) for name, kernel in kernels.items()}}
    (folder / "bundle.json").write_text(json.dumps(bundle, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(entries)} calls, {len(kernels)} kernels")


def _loaded(folder: Path) -> tuple[list[dict[str, Any]], dict[str, artifact.Kernel], GpuKernels]:
    data = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    kernels = decode(dict[str, artifact.Kernel], data["kernels"])
    return data["entries"], kernels, GpuKernels(kernels, folder, ARCH)


def _prepared(entry: dict[str, Any]) -> tuple[Trial, Choice]:
    family, label = entry["family"], entry["label"]
    workload = next(w for w in workloads_of(family) if (w.op, w.label) == (entry["op"], label))
    schedule = next(s for s in schedules_of((family,)) if s.name == entry["schedule"])
    return Trial(workload, None, 7), choose(schedule, workload.node, ARCH, workload.symbols, "", entry["config"])


def _check(entry: dict[str, Any], kernels: dict[str, artifact.Kernel], native: GpuKernels) -> Iterator[dict[str, Any]]:
    """Ordinary correctness, then each bad value."""
    from tests.schedules.poisons import decoded, judge, poisons

    trial, choice = _prepared(entry)
    op, attrs, kernel = trial.op, trial.workload.node.attrs, kernels[choice.kernel]
    try:
        error = trial.check(choice, kernel, native)
    except (WrongResult, RuntimeError) as wrong:
        yield {"bad": "", "good": False, "says": str(wrong).splitlines()[0]}
        return
    yield {"bad": "", "good": True, "says": f"error {error:.1e} of {choice.tolerance:.0e}"}
    bind = trial._binder(choice, kernel, native)

    def both(args: Args) -> tuple[Any, Any]:
        given = op.reference(*[a if a is None else a.clone() for a in args], **attrs)
        ref = list(given) if isinstance(given, tuple) else [given]
        out = trial._results(choice, bind, trial._laid(args, choice.layouts))
        return decoded(op, attrs, args, out), decoded(op, attrs, args, ref)

    clean, clean_expected = both(trial.args)
    generator = torch.Generator("cuda")
    generator.manual_seed(11)
    for poison in poisons(op, attrs, trial.args, generator):
        try:
            verdict = judge(clean, clean_expected, *both(poison.args))
        except (AssertionError, RuntimeError) as wrong:  # the others are still of interest
            yield {"bad": poison.name, "good": False, "says": str(wrong).splitlines()[0] if str(wrong) else "shapes"}
        else:
            yield {"bad": poison.name, "good": verdict.good, "says": str(verdict)}


def _graph(run: Callable[[int], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run(torch.cuda.current_stream().cuda_stream)
    return graph


def _times(entry: dict[str, Any], mine: tuple[Any, GpuKernels], other: tuple[Any, GpuKernels]) -> dict[str, Any]:
    """Median microseconds of one call: this tree's, the other's, and this one's again."""
    trial, choice = _prepared(entry)
    laid = trial._laid(trial.args, choice.layouts)
    size = sum(a.nbytes for a in laid if a is not None)
    count = min(MOST_SETS, max(2, math.ceil(ROTATE_BYTES / max(size, 1))))
    copies: list[Args] = []
    for _ in range(count):
        own: Args = []
        for a in laid:
            same = a
            if a is not None:
                same = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a)
            own.append(same)
        copies.append([*own, *trial._buffers(choice)])
    graphs = []
    for kernels, native in (mine, other, mine):
        graphs.append(_graph(trial._binder(choice, kernels[choice.kernel], native)(copies)))
    taken: list[list[float]] = [[], [], []]
    for turn in range(34):
        for i in ((0, 1, 2), (2, 1, 0))[turn % 2]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[i].replay()
            end.record()
            torch.cuda.synchronize()
            if turn > 3:
                taken[i].append(begin.elapsed_time(end) * 1e3 / count)
    now, before, again = (statistics.median(t) for t in taken)
    return {"us": round(now, 3), "other_us": round(before, 3), "again_us": round(again, 3)}


def run(folder: Path, other: Path | None) -> int:
    entries, kernels, native = _loaded(folder)
    failed, rows = 0, []
    for entry in entries:
        known = {key: entry[key] for key in ("op", "label", "schedule")}
        name = f"{entry['schedule']} {entry['label']}"
        if not entry["timed"]:
            found = list(_check(entry, kernels, native))
            wrong = [one for one in found if not one["good"]]
            failed += len(wrong)
            print(f"{'FAIL' if wrong else 'ok  '} {name}: {len(found) - 1} bad values; {found[0]['says']}", flush=True)
            for one in wrong:
                print(f"     {one['bad']}: {one['says']}", flush=True)
            rows += [{**known, **one} for one in found]
        torch.cuda.empty_cache()
    if other is not None:
        _, other_kernels, other_native = _loaded(other)
        print(f"\n{'':74} {'now us':>9} {'other us':>9} {'ratio':>6} {'again':>6}")
        for entry in entries:
            if entry["timed"]:
                times = _times(entry, (kernels, native), (other_kernels, other_native))
                ratio, noise = times["us"] / times["other_us"], times["again_us"] / times["us"]
                name = f"{entry['schedule']} {entry['label']}"
                print(f"{name:74} {times['us']:9.2f} {times['other_us']:9.2f} {ratio:6.3f} {noise:6.3f}", flush=True)
                rows.append({**{key: entry[key] for key in ("op", "label", "schedule")}, **times})
            torch.cuda.empty_cache()
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    print(f"\n{sum('bad' in one for one in rows)} checks, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("build", "run"):
        sys.exit(__doc__)
    given = [Path(one) for one in sys.argv[2:]]
    if sys.argv[1] == "build":
        build(given[0])
    else:
        sys.exit(run(given[0], given[1] if len(given) > 1 else None))
