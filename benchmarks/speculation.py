"""What drafts cost and bring on a GPU: `flash` layers with dummy weights, drafts kept as often as is asked for.

usage: python benchmarks/speculation.py ARTIFACT [--batches 1 16 64 256] [--context 1024] [--acceptance 0.7]
                                        [--steps 60] [--rows FILE]

ARTIFACT is compiled with `--speculative-tokens`. Dummy weights draft nothing sensible; but a draft is drawn with the
noise of the token that it guesses, so the hotter requests sample, the more the noise decides and the more often both
agree. The temperature that gives the acceptance asked for is searched first. Steps are the engine's own, as in
gpu_engine.py; device time is from events around each replay. `layers_ms` is the step up to the head, call by call.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_engine import Clock, drain, prefill, seat, step, tile_pools

from dsv4c import artifact
from dsv4c.config import ModelConfig
from dsv4c.launch import LaunchOptions, launch_engine
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.limits import drafts_of
from dsv4c.runtime.speculation import Speculation
from dsv4c.trial import time_graph

Row = dict[str, Any]
BEHIND = ("head", "sampling", "draft")  # scopes after the layers


def set_drafts(engine: Engine, drafts: int) -> None:
    """From now on every step verifies so many."""
    engine.speculation = Speculation(engine.speculation.max_tokens)
    engine.scheduler._lengths = lambda _: drafts


def steps(engine: Engine, batch: int, context: int, count: int, temperature: float) -> None:
    """Seats requests and runs to a steady state; the requests last for `count` steps more."""
    most = 1 + engine.speculation.max_tokens
    if not seat(engine, batch, context, most * (count + 8) + 8, temperature):
        raise SystemExit(f"{batch} requests of {context} tokens do not fit")
    for _ in range(6):
        step(engine)


def acceptance(engine: Engine) -> list[float]:
    stats = engine.stats().speculation
    return [round(kept / max(1, tried), 4) for kept, tried in zip(stats.kept, stats.tried, strict=True)]


def heat(engine: Engine, wanted: float, context: int) -> float:
    """The temperature at which so many first drafts are kept."""
    low, high = math.log(0.1), math.log(1e5)
    for _ in range(10):
        middle = (low + high) / 2
        set_drafts(engine, 1)
        steps(engine, 64, context, 12, math.exp(middle))
        for _ in range(12):
            step(engine)
        found = acceptance(engine)[0]
        drain(engine)
        low, high = (middle, high) if found < wanted else (low, middle)
    return math.exp((low + high) / 2)


def measure(engine: Engine, clock: Clock, batch: int, drafts: int, context: int, count: int, temperature: float) -> Row:
    set_drafts(engine, drafts)
    steps(engine, batch, context, count, temperature)
    clock.take()
    engine.speculation = Speculation(engine.speculation.max_tokens)
    before, began = engine.stats(), time.perf_counter()
    for _ in range(count):
        step(engine)
    wall = (time.perf_counter() - began) / count
    after = engine.stats()
    device, gaps, names = clock.take()
    # of the last step, again: up to where it would accept, which moves requests on
    calls = engine.runner.executor.calls(names[-1])
    layers = list(itertools.takewhile(lambda c: not c[0].scope.startswith(BEHIND), calls))
    apart = {"layers_ms": round(time_graph(partial(_all, [run for _, run in layers])) / 1e3, 4)}
    kept = acceptance(engine)[:drafts]
    drain(engine)
    clock.take()
    return {
        "batch": batch, "drafts": drafts, "context": context, "program": names[-1], "acceptance": kept,
        "tokens_per_step": round((after.generated_tokens - before.generated_tokens) / count / batch, 4),
        "device_ms": round(statistics.median(device), 4), "wall_ms": round(wall * 1e3, 4),
        "host_ms": round((after.host_s - before.host_s) / count * 1e3, 4), "gap_ms": round(statistics.median(gaps), 4),
        **apart,
    }  # fmt: skip


def _all(runs: list[Callable[[], object]]) -> None:
    for run in runs:
        run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--acceptance", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=Path, help="JSONL file to append to")
    args = parser.parse_args()
    manifest = artifact.load_manifest(args.artifact)
    engine = launch_engine(args.artifact, manifest, LaunchOptions(dummy_seed=0, prefix_cache=False))
    clock = Clock(engine.runner.executor)
    layers = ModelConfig.from_dict(manifest.model).num_hidden_layers
    head = {
        "benchmark": "speculation", "hardware": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(), "layers": layers,
    }  # fmt: skip
    rows: list[Row] = []
    with torch.no_grad():
        prefill(engine, clock, 8192)
        tile_pools(engine, manifest)
        temperature = heat(engine, args.acceptance, args.context)
        print(f"temperature {temperature:.3g}", flush=True)
        for batch in args.batches:
            plain: Row = {}
            for drafts in range(drafts_of(manifest) + 1):
                row = measure(engine, clock, batch, drafts, args.context, args.steps, temperature)
                plain = plain or row
                row["step_over_plain"] = round(row["device_ms"] / plain["device_ms"], 4)
                row["tokens_per_s_user"] = round(1e3 * row["tokens_per_step"] / row["wall_ms"], 1)
                row["gain"] = round(row["tokens_per_s_user"] / plain["tokens_per_s_user"], 4)
                rows.append({**head, "temperature": round(temperature, 4), **row})
                print(json.dumps(row), flush=True)
    if args.rows:
        with args.rows.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
