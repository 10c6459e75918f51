"""NaN and infinity through kernels in Triton's interpreter beside the references: `interpret_poisons.py FAMILY`.

`FAMILY` is one of Hopper's, or `blackwell.` and one of Blackwell's. A line for each bad value of each kernel's smallest
workload, `ok` or `FAIL`. In a process of its own, as interpret.py.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import interpret  # first: sets TRITON_INTERPRET and repairs the interpreter

# isort: on
import argparse
import importlib
import random
import sys
import types
import warnings
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from dsv4c.ops import OPS
from dsv4c.runtime import layouts
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import Config, Schedule
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.triton import attend_wide, gate, noise, sampling
from tests.schedules.poisons import Args, decoded, judge, poisons


@triton.jit
def log1p(x):
    return tl.log(1.0 + x)


@triton.jit
def fast_log2f(x):
    return tl.log2(x)


@triton.jit
def above(p, cut):
    """In two sums: the interpreter walks a reduction by a function of one's own in Python."""
    over = p >= cut
    return tl.sum(over.to(tl.int32), 0), tl.sum(tl.where(over, p, 0.0), 0)


@triton.jit
def widen(x, factor):
    """What attend_wide.WIDEN does: to it the bytes of NaN are 480 like those of any other number."""
    byte = x.to(tl.int32)
    value = (byte & 0x80 | tl.minimum(byte & 0x7F, 0x7E)).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    value = tl.where((byte & 0x7F) == 0x7F, tl.where(byte > 127, -480.0, 480.0), value)
    return (value * 2.0**-120 * factor.to(tl.float32)).to(tl.bfloat16)


attend_wide.widen = widen
gate.libdevice, noise.libdevice = types.SimpleNamespace(log1p=log1p), types.SimpleNamespace(fast_log2f=fast_log2f)
sampling._above = above
MOST = 200  # tokens of a call: the interpreter is slow


def results_of(workload: Workload, schedule: Schedule, config: Config, args: Args) -> list[Tensor]:
    """What the kernels give on copies of these inputs."""
    op, written = OPS[workload.op], workload.node.mutates
    kept = [a.clone() if a is not None and i in written else a for i, a in enumerate(args)]
    by_index = schedule.layouts(workload.node)
    laid = [a if a is None or i not in by_index else layouts.apply(a, by_index[i]) for i, a in enumerate(kept)]
    buffers = []
    space = schedule.workspace(workload.node, config)
    for value in (*space, *workload.node.outputs):
        tensor = torch.empty(value.sizes(workload.symbols), dtype=getattr(torch, value.dtype))
        tensor.view(torch.uint8).fill_(0xFF)
        buffers.append(tensor)
    for launch in schedule.build(workload.node, config).launches:
        assert isinstance(launch, TritonLaunch)
        interpret.run(launch, [*laid, *buffers])
    fresh = iter(buffers[len(space) :])
    found = [laid[op.parameters.index(op.in_place[i])] if i in op.in_place else next(fresh) for i in range(op.outputs)]
    return [one for one in found if one is not None]


def expected_of(workload: Workload, args: Args) -> list[Tensor]:
    given = OPS[workload.op].reference(*[a if a is None else a.clone() for a in args], **workload.node.attrs)
    return list(given) if isinstance(given, tuple) else [given]


def run_one(workload: Workload, schedule: Schedule, seed: int, few: int | None) -> int:
    """How many bad values were kept badly; of a call's, only `few` drawn ones are tried."""
    config = schedule.space(workload.node, workload.symbols)[0]
    build = schedule.build(workload.node, config)
    if not all(isinstance(one, TritonLaunch) and one.cluster == 1 and interpreted(one) for one in build.launches):
        return 0
    op, attrs, failed = OPS[workload.op], workload.node.attrs, 0
    generator = torch.Generator().manual_seed(seed)
    args = workload.make(generator)

    def both(given: Args) -> tuple[list[Tensor], list[Tensor]]:
        out, ref = results_of(workload, schedule, config, given), expected_of(workload, given)
        return decoded(op, attrs, given, out), decoded(op, attrs, given, ref)

    clean, clean_expected = both(args)
    tried = list(poisons(op, attrs, args, generator))
    for poison in random.Random(seed).sample(tried, min(few or len(tried), len(tried))):
        verdict = judge(clean, clean_expected, *both(poison.args))
        failed += not verdict.good
        word = "ok  " if verdict.good else "FAIL"
        print(f"{word} {schedule.name} {workload.label} | {poison.name}: {verdict}", flush=True)
    return failed


def interpreted(launch: TritonLaunch) -> bool:
    """Gluon's kernels are not."""
    module, _, name = launch.kernel.partition(":")
    return isinstance(getattr(importlib.import_module(module), name), InterpretedFunction)


def tokens_of(workload: Workload) -> int:
    """Rows of a call; one alone shows less than a few, and comes last."""
    count = workload.symbols.get("T", workload.symbols.get("S", 1))
    return count if count > 1 else MOST + 1 - count


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family")
    parser.add_argument("--op", default="", help="a part of names of ops")
    parser.add_argument("--label", default="nano", help="a part of workloads' labels")
    parser.add_argument("--few", type=int, help="so many bad values of each kernel")
    parser.add_argument("--seed", type=int, default=17)
    given = parser.parse_args()
    cards, _, family = given.family.rpartition(".")
    module = importlib.import_module(f"dsv4c.schedules.{cards or 'hopper'}.{family}")
    schedules: Sequence[Schedule] = module.schedules("sm_103a") if cards == "blackwell" else module.SCHEDULES
    workloads = importlib.import_module(f"dsv4c.schedules.workloads.{family}").workloads()
    failed, done = 0, set()
    for workload in sorted(workloads, key=tokens_of):
        wanted = given.label in workload.label and given.op in workload.op
        if not wanted or not 0 < tokens_of(workload) <= MOST:
            continue
        for schedule in schedules:
            key = (schedule.name, tuple(sorted(workload.node.attrs.items())))
            if key in done or schedule.op != workload.op or schedule.accepts(workload.node) is not None:
                continue
            done.add(key)
            failed += run_one(workload, schedule, given.seed, given.few)
    return int(failed > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(main())
