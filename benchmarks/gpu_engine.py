"""The engine on a GPU, end to end: decode steps, prefill, start, idle gaps; `flash` layers with dummy weights.

usage: python benchmarks/gpu_engine.py ARTIFACT [--decode 1 16 64 128 256] [--contexts 1024 8192 131072]
                                       [--prefill 8192 65536] [--gpu-memory 0.92] [--trace FILE] [--rows FILE]

A step is the real one: scheduler, staged inputs, one graph from token ids to sampled tokens, tokens read one step late.
Device time is from events around each replay, wall time from the host's clock over many steps. Long contexts are not
prefilled: a real prefill of 8,192 tokens is tiled over the pools, and requests are told that they are that long.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4c import artifact
from dsv4c.config import ModelConfig
from dsv4c.launch import LaunchOptions, launch_engine
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request
from dsv4c.runtime.reuse import Match
from dsv4c.trial import time_graph

STEPS = 40


class Clock:
    """Events around every launch of the executor: device time of steps, and the gaps between them."""

    def __init__(self, executor: Any) -> None:
        self._begin, self._finish, self._launch = executor.begin, executor.finish, executor.launch
        self._stream = executor.stream
        self.events: list[tuple[Any, Any]] = []
        self.names: list[str] = []
        executor.begin, executor.finish, executor.launch = self.begin, self.finish, self.launch

    def launch(self, name: str) -> Any:
        self._mark(name)
        return self._ended(self._launch(name))

    def begin(self, name: str) -> None:
        self._mark(name)
        self._begin(name)

    def finish(self, name: str) -> Any:
        return self._ended(self._finish(name))

    def _mark(self, name: str) -> None:
        self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self.names.append(name)
        self.events[-1][0].record(self._stream)

    def _ended(self, out: Any) -> Any:
        self.events[-1][1].record(self._stream)
        return out

    def take(self) -> tuple[list[float], list[float], list[str]]:
        """Milliseconds of every launch since the last call, those between them, and the programs' names."""
        torch.cuda.synchronize()
        events, names = self.events, self.names
        self.events, self.names = [], []
        gaps = [a[1].elapsed_time(b[0]) for a, b in itertools.pairwise(events)]
        return [begin.elapsed_time(end) for begin, end in events], gaps, names


def prompt(engine: Engine, tokens: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, engine.vocab_size, tokens).tolist()


def step(engine: Engine) -> None:
    for event in engine.step():
        if event.end is not None and event.end.error is not None:
            raise event.end.error


def drain(engine: Engine) -> None:
    for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
        engine.cancel(request.id)
    while engine.has_work:
        engine.step()


def prefill(engine: Engine, clock: Clock, tokens: int) -> dict[str, Any]:
    """One prompt, in chunks; the second of two runs."""
    out: dict[str, Any] = {}
    for run in range(2):
        clock.take()
        began = time.perf_counter()
        engine.submit(Request(f"prefill {tokens} {run}", prompt(engine, tokens, run), SamplingParams(max_tokens=1)))
        while engine.has_work:
            step(engine)
        wall = time.perf_counter() - began
        device, gaps, names = clock.take()
        out = {
            "phase": "prefill", "tokens": tokens, "device_ms": round(sum(device), 3), "wall_ms": round(wall * 1e3, 3),
            "tokens_per_s": round(tokens / sum(device) * 1e3), "steps": len(names), "gap_ms": round(sum(gaps), 3),
        }  # fmt: skip
    return out


def tile_pools(engine: Engine, manifest: artifact.Manifest) -> None:
    """Copies the pages that a prefill of 8,192 tokens wrote over all the others."""
    executor = engine.runner.executor
    for group in manifest.kv_groups:
        for pool in group.pools:
            rows = executor.states[pool.name]
            known = min(rows.shape[0], (8192 // group.page_tokens) * group.entries_per_page)
            first = rows[group.entries_per_page : group.entries_per_page + known].clone()
            for start in range(group.entries_per_page, rows.shape[0], known):
                piece = rows[start : start + known]
                piece.copy_(first[: piece.shape[0]])
    torch.cuda.synchronize()


def seat(engine: Engine, batch: int, context: int, new: int = STEPS + 16, temperature: float = 0.0) -> bool:
    """Seats `batch` requests as if their prompts had been computed but for the last token; False: they do not fit."""
    for i in range(batch):
        length = min(context - 64 + i % 32, engine.max_context - new - 8)
        params = SamplingParams(max_tokens=new, temperature=temperature, seed=i, ignore_eos=True)
        engine.submit(Request(f"{time.perf_counter_ns()}", prompt(engine, length, i), params))
    scheduler = engine.scheduler
    while scheduler.waiting:
        request = scheduler.waiting[0]
        if not scheduler._has_room(request, Match()):
            drain(engine)
            return False
        scheduler._admit(Match())
        for tokens in (*range(8192, request.num_tokens, 8192), request.num_tokens):
            if not engine.pool.grow(request.slot, tokens):
                drain(engine)
                return False
            engine.pool.evict(request.slot, tokens - 1)
        request.num_computed = request.num_tokens - 1
    return True


def decode(engine: Engine, clock: Clock, batch: int, context: int) -> dict[str, Any] | None:
    """Steps of `batch` requests that are about `context` tokens long."""
    if not seat(engine, batch, context):
        return None
    for _ in range(6):
        step(engine)
    clock.take()
    before = engine.stats()
    began = time.perf_counter()
    for _ in range(STEPS):
        step(engine)
    wall = (time.perf_counter() - began) / STEPS
    after = engine.stats()
    device, gaps, names = clock.take()
    calls = engine.runner.executor.calls(names[-1])  # on the last step's inputs, which are still there
    part_of = {"head": "head", "sampling": "sampling"}
    parts: dict[str, list[Callable[[], object]]] = {"layers": [], "head": [], "sampling": []}
    for call, run in calls:
        parts[part_of.get(call.scope, "layers")].append(run)
    apart = {f"{part}_ms": round(time_graph(partial(_all, runs)) / 1e3, 4) for part, runs in parts.items()}
    drain(engine)
    clock.take()
    host = (after.host_s - before.host_s) / STEPS
    return {
        "phase": "decode", "batch": batch, "context": context, "program": names[-1],
        "device_ms": round(statistics.median(device), 4), "wall_ms": round(wall * 1e3, 4),
        "gap_ms": round(statistics.median(gaps), 4), "host_ms": round(host * 1e3, 4),
        **apart,
    }  # fmt: skip


def routing(engine: Engine, manifest: artifact.Manifest, clock: Clock, batch: int) -> dict[str, Any]:
    """How evenly a decode step's tokens spread over the experts: of each layer the busiest against the mean."""
    seat(engine, batch, 1024)
    for _ in range(8):
        step(engine)
    torch.cuda.synchronize()  # calls below run on another stream than steps
    name = f"decode.{batch}"
    executor, busiest, hit = engine.runner.executor, [], []
    for call, run in executor.calls(name):
        run()
        if manifest.kernels[call.kernel].op.startswith("gate_linear"):
            ids = next(
                executor.values(name)[str(arg)]
                for arg in call.args[len(call.args) - call.outputs :]
                if not executor.values(name)[str(arg)].is_floating_point()
            )
            counts = torch.bincount(ids.flatten().long(), minlength=int(manifest.model["n_routed_experts"]))
            busiest.append(round(float(counts.max() / counts.float().mean()), 1))
            hit.append(int((counts > 0).sum()))
    drain(engine)
    clock.take()
    return {"phase": "routing", "batch": batch, "busiest_over_mean": busiest, "experts_hit": hit}


def idle(engine: Engine, clock: Clock, batch: int, context: int, trace: Path) -> dict[str, Any]:
    """The share of time in which a profiler's trace of decode steps shows nothing on the device."""
    seat(engine, batch, context)
    for _ in range(6):
        step(engine)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step(engine)
        torch.cuda.synchronize()
    drain(engine)
    clock.take()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    on_device = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in on_device)
    busy, end = 0.0, spans[0][0]
    between = []
    for start, stop in spans:
        if start > end:
            between.append(start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    return {
        "phase": "idle", "batch": batch, "context": context, "idle_share": round(1 - busy / whole, 4),
        "longest_gap_us": round(max(between), 1), "kernels_a_step": round(len(spans) / STEPS, 1),
        "step_us": round(whole / STEPS, 1),
    }  # fmt: skip


def _all(runs: Sequence[Callable[[], object]]) -> None:
    for run in runs:
        run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 8192, 131072])
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192, 65536])
    parser.add_argument("--kv-memory", type=float, help="GB")
    parser.add_argument("--trace", type=Path, help="where a profiler's trace of decode steps goes")
    parser.add_argument("--rows", type=Path, help="JSONL file to append to")
    args = parser.parse_args()
    manifest = artifact.load_manifest(args.artifact)
    layers = ModelConfig.from_dict(manifest.model).num_hidden_layers
    options = LaunchOptions(
        dummy_seed=0, prefix_cache=False, kv_memory_bytes=None if args.kv_memory is None else int(args.kv_memory * 1e9)
    )
    spent: dict[str, float] = {}
    began = time.perf_counter()

    used: dict[str, int] = {}

    def watch(phase: str, done: int, total: int, name: str) -> None:
        if done == total:
            torch.cuda.synchronize()
            free, whole = torch.cuda.mem_get_info()
            used[phase] = whole - free
        spent[phase] = time.perf_counter() - began - sum(v for k, v in spent.items() if k != phase)

    engine = launch_engine(args.artifact, manifest, options, eos_token_ids=(), progress=watch)
    hardware, today = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    head = {"hardware": hardware, "date": today, "layers": layers}
    print(f"{hardware}, {layers} layers; " + ", ".join(f"{k} {v:.1f} s" for k, v in spent.items()), flush=True)
    seconds = {f"{phase.replace(' ', '_')}_s": round(s, 2) for phase, s in spent.items()}
    memory = {f"{phase.replace(' ', '_')}_bytes": size for phase, size in used.items()}
    launches = sum(
        len(manifest.kernels[c.kernel].launches)
        for p in manifest.programs.values()
        for s in p.segments
        for c in s.calls
    )
    rows: list[dict[str, Any]] = [
        {"phase": "start", "programs": len(manifest.programs), "launches": launches, **seconds, **memory}
    ]
    print(rows[0], flush=True)
    clock = Clock(engine.runner.executor)
    with torch.no_grad():
        for tokens in args.prefill:
            rows.append(prefill(engine, clock, tokens))
            print(rows[-1], flush=True)
        if 8192 not in args.prefill:
            prefill(engine, clock, 8192)
        tile_pools(engine, manifest)
        for context in args.contexts:
            for batch in args.decode:
                row = decode(engine, clock, batch, context)
                print(row or f"decode {batch} x {context}: does not fit", flush=True)
                rows += [row] if row else []
        rows.append(routing(engine, manifest, clock, max(args.decode)))
        print(rows[-1], flush=True)
        if args.trace:
            for batch in args.decode:
                rows.append(idle(engine, clock, batch, min(args.contexts), args.trace))
                print(rows[-1], flush=True)
    if args.rows:
        with args.rows.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**head, **row}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
