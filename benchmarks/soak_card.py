"""Random requests on a card for a while: shared prefixes, cancels, pools oversubscribed; audited at every step.

usage: python benchmarks/soak_card.py ARTIFACT [--requests 3000] [--seed 0] [--rows FILE]

Nine of ten prompts begin with one of a few long prefixes. Runs once with the prefix cache and once without it, on the
least pools that serve so many requests at all: a page of c4, c128 and index for each and one whole context, a quarter
of what they would like. Prints tokens computed, hits and preemptions. Completions of random prompts are near ties all
along, and kernels differ by bucket, so how many are the same says nothing on a card: the CPU's tests compare tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4c.artifact import load_manifest
from dsv4c.launch import SNAPSHOTS, LaunchOptions, launch_engine
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.memory import MemoryPlan
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request

CONTEXT, RUNNING = 1024, 64


def soak(engine: Engine, count: int, seed: int) -> dict[str, Any]:
    """Serves `count` requests; what was counted."""
    draw = np.random.default_rng(seed)
    prefixes = [draw.integers(0, engine.vocab_size, 520 + 40 * i).tolist() for i in range(4)]
    submitted, live = 0, []
    began = time.perf_counter()
    while submitted < count or engine.has_work:
        while submitted < count and len(live) < 2 * RUNNING:
            tail = draw.integers(0, engine.vocab_size, int(draw.integers(1, 80))).tolist()
            ids = (prefixes[int(draw.integers(4))] if draw.random() < 0.9 else []) + tail
            asked = SamplingParams(max_tokens=int(draw.integers(1, 40)), temperature=0.0, ignore_eos=True)
            engine.submit(Request(str(submitted), ids, asked))
            live.append(str(submitted))
            submitted += 1
        if draw.random() < 0.02:
            engine.cancel(live.pop(int(draw.integers(len(live)))))
        for event in engine.step():
            if event.end is not None:
                if event.end.error is not None:
                    raise event.end.error
                live = [name for name in live if name != event.request_id]
        engine.audit()
    stats = engine.stats()
    leaked = {group: pages for group, pages in engine.pool.used_pages().items() if pages}
    if leaked:
        raise SystemExit(f"pages were leaked: {leaked}")
    return {
        "seconds": round(time.perf_counter() - began, 1), "steps": stats.steps,
        "tokens_computed": stats.step_tokens, "generated": stats.generated_tokens, "preemptions": stats.preemptions,
        "hit_tokens": stats.prefix_hit_tokens, "queried_tokens": stats.prefix_queried_tokens, "ended": stats.ended,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path)
    args = parser.parse_args()
    manifest = load_manifest(args.artifact)
    plan = MemoryPlan.of(manifest)
    found: dict[bool, dict[str, Any]] = {}
    for cached in (True, False):
        least = plan.least_bytes(RUNNING, CONTEXT, SNAPSHOTS * cached)
        options = LaunchOptions(max_requests=RUNNING, max_context=CONTEXT, prefix_cache=cached, kv_memory_bytes=least)
        with torch.no_grad():
            found[cached] = soak(launch_engine(args.artifact, manifest, options), args.requests, args.seed)
    row = {
        "benchmark": "soak_card", "hardware": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(),
        "requests": args.requests, "with_cache": found[True], "without": found[False],
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    if args.rows:
        with args.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
