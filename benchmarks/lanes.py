"""Compiles the first layers of flash for Hopper and prints what lanes are predicted to win, program by program.

    python benchmarks/lanes.py --layers 4 --output build/flash4 --cache build/.kernels

Needs no GPU. The model (dsv4c/overlap.py) adds up calls as measured alone: it leaves out the start of a graph and what
caches lose between calls, so it is the difference that counts. benchmarks/gpu_engine.py measures the artifact.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsv4c.buckets import gpu_buckets
from dsv4c.compile import Options, artifact_inputs, compile_artifact, lower, sampling_inputs, state_symbols
from dsv4c.config import FLASH, Target
from dsv4c.lanes import settle, tasks_of
from dsv4c.overlap import duration
from dsv4c.plan import plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--output", type=Path, help="folder of the artifact; without it nothing is compiled")
    parser.add_argument("--cache", type=Path, help="compiled kernels (default: beside the artifact)")
    args = parser.parse_args()
    config = FLASH.truncated(args.layers)
    options = Options(max_context=131072, max_tokens=8192, max_requests=256)
    target = Target("sm_90a")
    source = lower(config, options, arch=target.arch)
    inputs = (*artifact_inputs(config, source.layout), *sampling_inputs(config.vocab_size))
    shared = state_symbols(config, source.layout, options)
    table = Table("program", "calls", "in lanes", "waits", "chain us", "lanes us", "gain us", "arena MB")
    for bucket in gpu_buckets(options.max_tokens, options.max_requests):
        # each on its own: a kernel's cost in one program is not its cost in another
        sizes = bucket.symbols(config, shared)
        made = plan(source, "step", bucket.name, bucket.phase, target.arch, sizes, inputs)
        program = made.programs[bucket.name]
        calls = [call for segment in program.segments for call in segment.calls]
        moved = sum(call.lane > 0 for call in calls)
        if not moved:
            continue
        tasks = tasks_of(calls, [made.choices[call.kernel] for call in calls], program.buffers, made.states)
        chain = duration(tasks, settle(tasks, [0] * len(tasks))) * 1e6
        lanes = duration(tasks, settle(tasks, [call.lane for call in calls])) * 1e6
        waits, arena = sum(len(call.waits) for call in calls), program.arena_bytes / 1e6
        row = (len(calls), moved, waits, f"{chain:.1f}", f"{lanes:.1f}", f"{chain - lanes:.1f}", f"{arena:.1f}")
        table.add_row(bucket.name, *map(str, row))
    Console(width=120).print(table)
    if args.output is not None:
        whole = FLASH.num_hidden_layers
        compile_artifact(config, target, args.output, options, truncated_from=whole, cache=args.cache)


if __name__ == "__main__":
    main()
