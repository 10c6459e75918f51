"""Measures schedules on a card: builds every candidate, checks it against the reference, times it, writes rows.

    python -m dsv4c.tune build --family hyper --out DIR        any machine: cubins, launcher, bundle.json
    python -m dsv4c.tune measure DIR --out rows.jsonl          a machine with the card: checks, times, prints a table
    dsv4c tune --target sm_90a                                 both, for every family

A result that is wrong, not wholly written or different from run to run makes no row. Times are medians of CUDA graph
replays over rotated inputs larger than the L2 cache; limits come from a copy and matrix products in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c import artifact
from dsv4c.errors import Dsv4cError, ScheduleError
from dsv4c.ops import OPS, Op
from dsv4c.runtime import layouts
from dsv4c.runtime.gpu import GpuKernels, Run
from dsv4c.schedules._schedule import Choice, Schedule, Transforms
from dsv4c.schedules._tuned import Row, node_key, write_rows
from dsv4c.schedules._workload import Args, Workload
from dsv4c.schedules.emit import emit
from dsv4c.schedules.select import choose

FAMILIES = ("hyper", "rows", "compress", "index", "attention", "experts", "linear", "gate", "sampling")
ROTATE_BYTES = 256 << 20  # of inputs between two uses of the same one: four times the L2 cache of an H200
MOST_SETS = 48
REPLAYS = 15


@dataclass(frozen=True)
class Entry:
    """One candidate of a bundle: what to run on which workload."""

    family: str
    label: str
    op: str
    schedule: str
    config: dict[str, Any]
    kernel: str


@dataclass(frozen=True)
class Ceilings:
    """What this card does now: bytes read plus written a second, and flops a second by unit."""

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def seconds(self, workload: Workload) -> float:
        rate = self.flops_per_s[workload.unit]
        return max(workload.bytes_moved / self.bytes_per_s, workload.flops / rate)


def schedules_of(modules: Sequence[str]) -> list[Schedule]:
    """The schedules that these files of schedules/hopper declare."""
    return [s for m in modules for s in importlib.import_module(f"dsv4c.schedules.hopper.{m}").SCHEDULES]


def workloads_of(family: str) -> list[Workload]:
    """The workloads of one family."""
    return list(importlib.import_module(f"dsv4c.schedules.workloads.{family}").workloads())


def choices_of(
    workload: Workload, schedules: Sequence[Schedule], arch: str, most: int
) -> list[Choice]:
    """Every accepting schedule's first `most` configs for this workload."""
    out = []
    for schedule in schedules:
        if schedule.op != workload.op or arch not in schedule.targets or schedule.accepts(workload.node) is not None:
            continue
        for config in schedule.space(workload.node, workload.symbols)[:most]:
            out.append(choose(schedule, workload.node, arch, workload.symbols, "", config))
    return out


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
) -> int:
    """Builds all candidates into the folder `out`; returns their number."""
    entries: list[Entry] = []
    choices: dict[str, Choice] = {}
    for family in families:
        schedules = [s for s in schedules_of((family, *extra)) if keep_schedule(s)]
        for workload in filter(keep, workloads_of(family)):
            for choice in choices_of(workload, schedules, arch, most):
                choices[choice.kernel] = choice
                entries.append(
                    Entry(family, workload.label, workload.op, choice.schedule, dict(choice.config), choice.kernel)
                )
    if not entries:
        raise ScheduleError(f"no workload of {', '.join(families)} has a schedule for `{arch}`")
    out.mkdir(parents=True, exist_ok=True)
    kernels = emit(choices, out, cache, _progress, arch=arch)
    bundle = {
        "arch": arch,
        "extra": list(extra),
        "entries": [asdict(e) for e in entries],
        "kernels": {name: asdict(kernel) for name, kernel in kernels.items()},
    }
    (out / "bundle.json").write_text(json.dumps(bundle, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return len(entries)


def _progress(done: int, total: int, name: str) -> None:
    print(f"\r{done}/{total} {name[:100]:100}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def measure(
    bundle: Path, out: Path | None, *, timing: bool = True, checking: bool = True, baselines: bool = False
) -> list[Row]:
    """Runs a bundle on this machine's card, prints a table, writes the rows that are right. Rows are returned too."""
    data = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    kernels: dict[str, artifact.Kernel] = artifact.decode(dict[str, artifact.Kernel], data["kernels"])
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
        trial = Trial(workload, ceilings)
        for entry in group:
            choice = choose(schedules[entry.schedule], workload.node, data["arch"], workload.symbols, "", entry.config)
            row = trial.run(choice, kernels[entry.kernel], native, checking=checking)
            if row is not None:
                rows.append(row)
        if baselines and timing:
            trial.baselines()
        if out is not None:
            write_rows(out, rows)
        torch.cuda.empty_cache()
    return rows


class Trial:
    """All candidates of one workload, on the same inputs and reference."""

    def __init__(self, workload: Workload, ceilings: Ceilings | None, seed: int | None = None) -> None:
        self.workload = workload
        self.ceilings = ceilings
        self.op = find_op(workload.op)
        generator = torch.Generator("cuda")
        generator.manual_seed(torch.seed() % 2**62 if seed is None else seed)
        self.args = workload.make(generator)
        self._expected: list[Tensor] | None = None
        self._sets: dict[str, list[Args]] = {}

    @property
    def expected(self) -> list[Tensor]:
        """What the reference gives, computed once: outputs in order, those updated in place included."""
        if self._expected is None:
            reference = self.workload.reference or self.op.reference
            given = reference(*[a if a is None else a.clone() for a in self.args], **self.workload.node.attrs)
            self._expected = list(given) if isinstance(given, tuple) else [given]
        return self._expected

    def run(self, choice: Choice, kernel: artifact.Kernel, native: GpuKernels | None, *, checking: bool) -> Row | None:
        """Checks and times one candidate; prints its line."""
        bind = self._binder(choice, kernel, native)
        laid = self._laid(self.args, choice.layouts)
        name = f"{self.workload.label} | {choice.schedule} {_short(choice.config)}"
        error = math.nan
        try:
            if checking:
                error = self._check(choice, bind, laid)
        except WrongResult as wrong:
            print(f"FAIL {name}: {wrong}", flush=True)
            return None
        if self.ceilings is None:
            print(f"ok   {name}: error {error:.2e}", flush=True)
            return None
        us = self._time(choice, bind, laid)
        work, limit = self.workload, self.ceilings.seconds(self.workload)
        row = Row(
            op=work.op,
            key=node_key(work.node),
            symbols=dict(work.symbols),
            label=work.label,
            schedule=choice.schedule,
            config=dict(choice.config),
            microseconds=round(us, 3),
            gb_per_s=round(work.bytes_moved / us / 1e3, 1),
            tflops=round(work.flops / us / 1e6, 2),
            limit=round(limit * 1e6 / us, 4),
            error=float(f"{error:.3g}"),
            hardware=torch.cuda.get_device_name(),
            date=datetime.date.today().isoformat(),
        )
        print(
            f"ok   {name}: {us:.1f} us, {row.gb_per_s:.0f} GB/s, {row.tflops:.0f} TFLOPS, {100 * row.limit:.0f} % of "
            f"limit, error {error:.1e}",
            flush=True,
        )
        return row

    def _laid(self, args: Args, by_index: Mapping[int, Transforms]) -> Args:
        return [a if a is None or i not in by_index else layouts.apply(a, by_index[i]) for i, a in enumerate(args)]

    def _binder(
        self, choice: Choice, kernel: artifact.Kernel, native: GpuKernels | None
    ) -> Callable[[Sequence[Args]], Run]:
        """A function that binds calls on these argument lists to one run."""
        if kernel.kind == "gpu":
            assert native is not None
            return lambda calls: native.bind([(kernel.name, args) for args in calls])
        from dsv4c.runtime.kernels import VENDOR_CALLS

        vendor = VENDOR_CALLS[kernel.symbol](kernel.attrs)

        def bind(calls: Sequence[Args]) -> Run:
            def run(stream: int) -> None:
                for args in calls:
                    vendor(*args)

            return run

        return bind

    def _buffers(self, choice: Choice) -> list[Tensor | None]:
        """Workspace and outputs, poisoned."""
        out = []
        for value in (*choice.workspace, *choice.node.outputs):
            sizes = value.sizes(self.workload.symbols)
            tensor = torch.empty(sizes, dtype=getattr(torch, value.dtype), device="cuda")
            tensor.view(torch.uint8).fill_(0xFF) if tensor.numel() else None  # NaN, or -1
            out.append(tensor)
        return out

    def _check(self, choice: Choice, bind: Callable[[Sequence[Args]], Run], laid: Args) -> float:
        first, second = (self._results(choice, bind, laid) for _ in range(2))
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            if not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
                raise WrongResult(f"output {i} differs from run to run")
        measured = (self.workload.error or largest_error)(first, self.expected)
        if not measured <= choice.tolerance:
            raise WrongResult(f"error {measured:.3e} is over the tolerance {choice.tolerance:.1e}")
        return measured

    def _results(self, choice: Choice, bind: Callable[[Sequence[Args]], Run], laid: Args) -> list[Tensor]:
        """The op's outputs, in order, of one run on copies of what it updates in place."""
        args = list(laid)
        for index in choice.node.mutates:
            tensor = args[index]
            assert tensor is not None
            args[index] = tensor.clone()
        buffers = self._buffers(choice)
        bind([[*args, *buffers]])(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        fresh = iter(buffers[len(choice.workspace) :])
        results = []
        for i in range(self.op.outputs):
            if i in self.op.in_place:
                results.append(args[self.op.parameters.index(self.op.in_place[i])])
            else:
                results.append(next(fresh))
        return [r for r in results if r is not None]

    def _time(self, choice: Choice, bind: Callable[[Sequence[Args]], Run], laid: Args) -> float:
        """Median microseconds of one call, over replays of a graph of calls on rotated copies."""
        size = sum(a.nbytes for a in laid if a is not None)
        count = min(MOST_SETS, max(2, math.ceil(ROTATE_BYTES / max(size, 1))))
        calls = [[*(a if a is None else a.clone() for a in laid), *self._buffers(choice)] for _ in range(count)]
        run = bind(calls)
        return time_graph(lambda: run(torch.cuda.current_stream().cuda_stream)) / count

    def baselines(self) -> None:
        """Times the other implementations that the workload names."""
        for name, make in self.workload.baselines.items():
            us = time_graph(make(self.args))
            print(f"     {self.workload.label} | baseline {name}: {us:.1f} us", flush=True)


class WrongResult(Exception):
    """A candidate's result is not what it must be."""


def largest_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, over outputs, of max|out - ref| / max|ref|; NaN or a different shape gives infinity."""
    worst = 0.0
    for out, ref in zip(outputs, expected, strict=True):
        if out.shape != ref.shape:
            return math.inf
        if not out.numel():
            continue
        if not ref.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(out.long(), ref.long()) else math.inf)
            continue
        apart = (out.float() - ref.float()).abs().max().item()
        scale = ref.float().abs().max().item()
        worst = max(worst, apart / scale if scale else (math.inf if apart else 0.0))
        if math.isnan(apart):
            return math.inf
    return worst


def time_graph(call: Callable[[], object]) -> float:
    """Median microseconds of one replay of the graph that `call` makes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def measure_ceilings() -> Ceilings:
    """The copy bandwidth and matrix rates of this card, on random data."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    bytes_per_s = 2 * source.nbytes / (time_graph(lambda: target.copy_(source)) / 1e6)
    del source, target
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    bf16 = 2 * n**3 / (time_graph(lambda: torch.mm(a, b, out=out)) / 1e6)
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device="cuda")
    fp8 = 2 * n**3 / (time_graph(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)) / 1e6)
    card = torch.cuda.get_device_properties()
    clock = 1.755e9  # boost clock of the SXM part; the vector rate is arithmetic, not measured
    return Ceilings(bytes_per_s, {"bf16": bf16, "fp8": fp8, "fp32": card.multi_processor_count * 256 * clock})


def find_op(name: str) -> Op:
    """The logical op of this name."""
    if name not in OPS:
        raise ScheduleError(f"no logical op is named `{name}`")
    return OPS[name]


def _short(config: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsv4c.tune", description="Build and measure schedules.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="compile all candidates of a family (no GPU needed)")
    one.add_argument("--family", action="append", required=True, choices=FAMILIES)
    one.add_argument("--extra", action="append", default=[], help="another file of schedules/hopper, e.g. tile")
    one.add_argument("--op", help="only this op")
    one.add_argument("--label", help="only workloads whose label contains this")
    one.add_argument("--schedule", help="only schedules whose name contains this")
    one.add_argument("--max-configs", type=int, default=12)
    one.add_argument("--arch", default="sm_90a")
    one.add_argument("--cache", type=Path, default=Path("build/.tune-cache"))
    one.add_argument("--out", type=Path, required=True)
    two = commands.add_parser("measure", help="check and time a bundle on this machine's card")
    two.add_argument("bundle", type=Path)
    two.add_argument("--out", type=Path)
    two.add_argument("--no-timing", action="store_true")
    two.add_argument("--no-check", action="store_true")
    two.add_argument("--baselines", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.command == "build":
            count = build(
                args.family, args.out, args.cache, args.arch, extra=args.extra, most=args.max_configs,
                keep=lambda w: (not args.op or w.op == args.op) and (not args.label or args.label in w.label),
                keep_schedule=lambda s: not args.schedule or args.schedule in s.name,
            )  # fmt: skip
            print(f"{count} candidates in {args.out}")
        else:
            measure(
                args.bundle, args.out, timing=not args.no_timing, checking=not args.no_check, baselines=args.baselines
            )
    except Dsv4cError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
