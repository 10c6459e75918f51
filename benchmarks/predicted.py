"""Predicted beside measured: calibrates kernels' constants on half of an H200's tuned rows, and states the error.

usage: python benchmarks/predicted.py [--calibrate] [--steps] [--rows FILE] [--from MICROSECONDS]

Each schedule's fastest config of a workload is one call. The sizes (model, tokens, requests, context) at which the same
kernels were measured are dealt in turn: the first, third, ... calibrate, the second, fourth, ... are held out; kernels
measured at one or two sizes only calibrate. `--calibrate` writes schedules/predict/sm_90a.json. The table counts the
fastest schedule of each workload. Sampling counts where it is greedy or has a temperature, experts where routing is
even: what filters and skew add depends on the data. `--steps` predicts the whole steps of benchmarks/gpu_engine.jsonl,
which calibrate nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv4c.schedules._tuned import FOLDER, Row, read_rows
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.predict import Situation, Stage, stages
from dsv4c.schedules.predict._rates import FILE, Rates, card_of, known, seconds
from dsv4c.tune import FAMILIES, workloads_of

TARGET = "sm_90a"
SHORT = 20.0  # microseconds: below, the bar of 20 % does not hold
WAITING = "hyper.few_"  # kernels that move too little, and too early, for a share of the bandwidth to show
LOW = {"fixed_us": 0.3, "round_us": 0.0, "memory": 0.05, "matrix": 0.02}
HIGH = {"fixed_us": 30.0, "round_us": 60.0, "memory": 1.0, "matrix": 1.0}


@dataclass(frozen=True)
class Call:
    """One measured call. `calibrates`: whether its time was used."""

    row: Row
    stages: tuple[Stage, ...]
    fastest: bool
    calibrates: bool

    def predicted(self, rates: Mapping[str, Rates]) -> float:
        """Microseconds."""
        return 1e6 * sum(seconds(stage, TARGET, rates=rates) for stage in self.stages)

    def error(self, rates: Mapping[str, Rates]) -> float:
        """Predicted over measured, less one."""
        return self.predicted(rates) / self.row.microseconds - 1


Size = tuple[str, int, int, int]
"""Model, tokens, requests, context."""


def _count(text: str) -> int:
    scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
    return int(text.rstrip("KM")) * scale


def situation(workload: Workload) -> Situation:
    """The step that a label speaks of: `decode 64 @8K`, `prefill 8192 @120K` (what was before), `4 x 2048`."""
    label, symbols = workload.label, workload.symbols
    tokens = next(symbols[name] for name in ("T", "S", "D") if name in symbols)
    sampling = "greedy" if "greedy" in label else "temperature"
    at, several = re.search(r"@(\w+)", label), re.search(r"prefill (\d+) x (\d+)", label)
    if several:
        return Situation(tokens, int(several[1]), int(several[2]), sampling)
    if at is None:
        decodes = "decode" in label
        return Situation(tokens, tokens if decodes else 1, 8192 if decodes else tokens, sampling)
    before = _count(at[1])
    return Situation(tokens, tokens, before) if "decode" in label else Situation(tokens, 1, before + tokens)


def _counted(row: Row) -> bool:
    if row.op.startswith("sample"):
        return "greedy" in row.label or "temperature" in row.label
    return "skewed" not in row.label and "one" not in row.label.split()


def calls() -> list[Call]:
    """Every schedule's fastest config on every workload, dealt to calibration and hold-out."""
    workloads = {(w.op, w.label): w for family in FAMILIES for w in workloads_of(family)}
    best: dict[tuple[str, str, str, bool], Row] = {}
    for row in filter(_counted, read_rows(FOLDER / f"{TARGET}.jsonl")):
        key = (row.op, row.label, row.schedule, bool(row.config.get("turned")))  # Blackwell's form of another kernel
        if key not in best or row.microseconds < best[key].microseconds:
            best[key] = row
    fastest: dict[tuple[str, str], Row] = {}
    for (op, label, *_), row in best.items():
        if (op, label) not in fastest or row.microseconds < fastest[op, label].microseconds:
            fastest[op, label] = row
    dealt: dict[tuple[str, ...], list[tuple[Row, tuple[Stage, ...], Size]]] = defaultdict(list)
    for row in best.values():
        workload = workloads[row.op, row.label]
        if not all(workload.symbols.get(name, 1) for name in "TSD"):
            continue
        step = situation(workload)
        found = stages(row.schedule, workload.node, workload.symbols, row.config, step, card_of(TARGET))
        size = (row.label.split()[0], step.tokens, step.requests, step.context)
        dealt[tuple(sorted({stage.kernel for stage in found}))].append((row, found, size))
    out = []
    for group in dealt.values():
        sizes = sorted({size for _, _, size in group})
        for row, found, size in group:
            calibrates = sizes.index(size) % 2 == 0 or len(sizes) < 3
            out.append(Call(row, found, fastest[row.op, row.label] is row, calibrates))
    return out


def calibrate(used: Sequence[Call], rounds: int = 60) -> dict[str, Rates]:
    """Constants that make the least of the logarithms of predicted over measured: one at a time, in smaller steps."""
    by_kernel: dict[str, list[Call]] = defaultdict(list)
    for call in used:
        for kernel in {stage.kernel for stage in call.stages}:
            by_kernel[kernel].append(call)
    asks = {name: {"fixed_us"} for name in by_kernel}
    for call in used:
        for stage in call.stages:
            asks[stage.kernel] |= {"round_us"} if stage.rounds else set()
            asks[stage.kernel] |= {"memory"} if stage.bytes and not stage.kernel.startswith(WAITING) else set()
            asks[stage.kernel] |= {"matrix"} if stage.issued else set()
    table = {kernel: Rates(2.0, 0.2, 0.9, 0.8) for kernel in sorted(by_kernel)}

    def loss(kernel: str, rates: Rates) -> float:
        now = {**table, kernel: rates}
        errors = ((abs(math.log1p(call.error(now))), call.row.microseconds) for call in by_kernel[kernel])
        return sum((e * e if e < 0.4 else 0.8 * e - 0.16) * (1.0 if us > SHORT else 0.3) for e, us in errors)

    factor = 2.0
    for turn in range(rounds):
        for kernel in table:
            for name in sorted(asks[kernel]):
                best = table[kernel]
                least, value = loss(kernel, best), getattr(best, name)
                tries = [value * factor, value / factor] + ([0.0, 0.05] if name == "round_us" else [])
                for one in tries:
                    other = Rates(**{**asdict(best), name: min(max(one, LOW[name]), HIGH[name])})
                    found = loss(kernel, other)
                    if found < least - 1e-9:
                        least, table[kernel] = found, other
        if turn % 4 == 3:
            factor = 1 + (factor - 1) * 0.7
    plain = Rates(1.0, 0.0, 1.0, 1.0)
    for kernel, rates in table.items():  # what a kernel does not ask for has no constant
        kept = {name: getattr(rates if name in asks[kernel] else plain, name) for name in asdict(rates)}
        table[kernel] = Rates(**{name: round(number, 3) for name, number in kept.items()})
    return table


def table_of(found: Iterable[Call], rates: Mapping[str, Rates], least: float) -> list[str]:
    """Rows of Markdown: the error of every op on what was held out, and on all."""
    by_op: dict[str, list[Call]] = defaultdict(list)
    for call in found:
        if call.fastest and call.row.microseconds > least:
            by_op[call.row.op].append(call)
    lines = ["| op | held out | mean error | worst | all | mean error | worst |", "| --- " * 7 + "|"]
    for op, group in sorted(by_op.items()):
        held = [call.error(rates) for call in group if not call.calibrates]
        every = [call.error(rates) for call in group]
        lines.append(f"| `{op}` | {_errors(held)} | {_errors(every)} |")
    return lines


def _errors(errors: Sequence[float]) -> str:
    if not errors:
        return "0 | - | -"
    return f"{len(errors)} | {100 * statistics.fmean(map(abs, errors)):.0f} % | {100 * max(errors, key=abs):+.0f} %"


def summary(found: Iterable[Call], rates: Mapping[str, Rates], least: float) -> str:
    """How many are within 20 %."""
    errors = [call.error(rates) for call in found if call.fastest and call.row.microseconds > least]
    within = sum(abs(error) <= 0.2 for error in errors)
    return f"{within} of {len(errors)} within 20 %, mean error {100 * statistics.fmean(map(abs, errors)):.1f} %"


def steps() -> list[dict[str, Any]]:
    """Whole steps of `flash` as the engine ran them on an H200: the median of their runs beside the prediction."""
    from dsv4c.config import preset
    from dsv4c.predict import Predictor

    lines = (Path(__file__).parent / "gpu_engine.jsonl").read_text(encoding="utf-8").splitlines()
    days: dict[tuple[int, str, int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in map(json.loads, lines):
        if row["phase"] == "decode":
            days[row["layers"], "decode", row["batch"], row["context"]][row["date"]].append(row["device_ms"])
        elif row["phase"] == "prefill" and row["steps"] == 1:
            days[row["layers"], "prefill", row["tokens"], row["tokens"]][row["date"]].append(row["device_ms"])
    runs = {key: dates[max(dates)] for key, dates in days.items()}  # earlier kernels are not those that it predicts
    predictors = {layers: Predictor(preset("flash").truncated(layers), TARGET) for layers in {key[0] for key in runs}}
    out = []
    for (layers, phase, size, context), times in sorted(runs.items()):
        predictor, measured = predictors[layers], statistics.median(times)
        step = predictor.decode(size, context) if phase == "decode" else predictor.prefill(size)
        out.append({
            "layers": layers, "phase": phase, "size": size, "context": context, "runs": len(times),
            "measured_ms": round(measured, 3), "predicted_ms": round(1e3 * step.seconds, 3),
            "error": round(1e3 * step.seconds / measured - 1, 4),
        })  # fmt: skip
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true", help="fit the constants anew and write them")
    parser.add_argument("--steps", action="store_true", help="whole steps of the engine too")
    parser.add_argument("--rows", type=Path, help="write every call as a JSON object a line")
    parser.add_argument("--from", dest="least", type=float, default=SHORT, help="only calls of so many microseconds")
    args = parser.parse_args(arguments)
    found = calls()
    if args.calibrate:
        rates: Mapping[str, Rates] = calibrate([call for call in found if call.calibrates])
        FILE.write_text(json.dumps({name: asdict(r) for name, r in rates.items()}, indent=1) + "\n", encoding="utf-8")
    else:
        rates = known()
    print("\n".join(table_of(found, rates, args.least)))
    held = [call for call in found if not call.calibrates]
    print(f"\nheld out: {summary(held, rates, args.least)}\nall: {summary(found, rates, args.least)}")
    pro = [call for call in held if call.row.label.startswith("pro ")]
    print(f"held out, shapes of pro: {summary(pro, rates, args.least)}")
    for call in sorted(held, key=lambda c: -abs(c.error(rates))):
        if call.fastest and call.row.microseconds > args.least and abs(call.error(rates)) > 0.2:
            parts = ", ".join(f"{s.kernel} {1e6 * seconds(s, TARGET, rates=rates):.1f}" for s in call.stages[:3])
            print(f"{call.error(rates):+.0%} {call.row.microseconds:.1f} us {call.row.schedule}", call.row.label, parts)
    if args.steps:
        print("\n| layers | step | context | runs | measured, ms | predicted | error |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for one in steps():
            print(
                f"| {one['layers']} | {one['phase']} {one['size']:,} | {one['context']:,} | {one['runs']} "
                f"| {one['measured_ms']:.3f} | {one['predicted_ms']:.3f} | {one['error']:+.1%} |"
            )
    if args.rows:
        lines = [
            {
                "op": call.row.op, "label": call.row.label, "schedule": call.row.schedule,
                "measured_us": call.row.microseconds, "predicted_us": round(call.predicted(rates), 2),
                "error": round(call.error(rates), 4), "calibrates": call.calibrates, "fastest": call.fastest,
                "hardware": call.row.hardware,
            }
            for call in sorted(found, key=lambda c: (c.row.op, c.row.label, c.row.schedule))
        ]  # fmt: skip
        args.rows.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
