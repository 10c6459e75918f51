"""The schedules that Blackwell shares with Hopper, with Blackwell's configs, in Triton's interpreter beside the ops'
references: `interpret_shared [CASES] [PART] [SEED]`. A part is a schedule, or a beginning of their names.

In a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated. Gluon kernels run as numpy
(gluon_numpy.py). Outputs and workspace are poisoned, programs run first to last or last to first.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import interpret, interpret_sampling  # first: replaces what is the card's own

# isort: on
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.experimental.gluon._runtime import GluonJITFunction

from dsv4c.agreement import largest_error
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import Build, Config, Schedule
from dsv4c.schedules._tuned import node_key
from dsv4c.schedules._workload import Args, Workload
from dsv4c.schedules.blackwell import index, schedules
from dsv4c.schedules.select import select
from dsv4c.tune import workloads_of
from tests.schedules.blackwell.checks import Check, random_cases, run_checks
from tests.schedules.blackwell.on_hopper import FAMILIES
from tests.schedules.blackwell.shared_cases import CASES, shared
from tests.schedules.hopper import gluon_numpy

assert interpret_sampling
ARCH = "sm_103a"
SCHEDULES = {s.name: s for s in shared(schedules(ARCH))}
MANY = 100
SIZES = (1, 64, 256, 1024, 8192)
"""Tokens for which a schedule lists configs: any of them must be right at any number."""


@dataclass(frozen=True, repr=False)
class Call:
    """One drawn call."""

    workload: Workload
    config: Config
    seed: int

    def __repr__(self) -> str:
        node, symbols = self.workload.node.describe(), dict(self.workload.symbols)
        return f"{node} {symbols}, config {dict(self.config)}, seed {self.seed}"


def configs(schedule: Schedule, workload: Workload) -> list[Config]:
    """All that the schedule lists for this node, at this size and at others."""
    sizes = [workload.symbols, *({**workload.symbols, "T": count} for count in SIZES)]
    found = [config for symbols in sizes for config in schedule.space(workload.node, symbols)]
    return [config for i, config in enumerate(found) if config not in found[:i]]


@st.composite
def calls(draw: st.DrawFn, schedule: Schedule) -> Call:
    workload = draw(CASES[schedule.op].filter(lambda one: schedule.accepts(one.node) is None))
    config = draw(st.sampled_from(configs(schedule, workload)))
    return Call(workload, config, draw(st.integers(0, 2**31)))


def build(schedule: Schedule, call: Call) -> Build:
    """The launches; of index scores with so few programs that they go round."""
    make = schedule.build
    if isinstance(make, partial) and make.func is index.build_topk:
        return make.func(call.workload.node, call.config, sms=1, score=index._launch)
    return make(call.workload.node, call.config)


def run(launch: TritonLaunch, args: Args) -> None:
    """One launch, of Triton or of Gluon."""
    function, grid, values = interpret.bound(launch, args)
    if 0 in grid:
        return
    if isinstance(function, GluonJITFunction):
        gluon_numpy.run(function, grid, values)
    else:
        function[grid](**values)


def check(schedule: Schedule, call: Call) -> None:
    """The kernels' results within the schedule's tolerance of the reference's."""
    work = call.workload
    interpret._order.reverse = bool(call.seed & 1)
    results, expected = interpret.outputs_of(
        work, build(schedule, call), schedule.layouts(work.node), call.seed,
        schedule.workspace(work.node, call.config), run,
    )  # fmt: skip
    error = (work.error or largest_error)(results, expected)
    assert error <= schedule.tolerance, f"error {error:.3e}, allowed {schedule.tolerance:.1e}"


def picked(schedule: Schedule) -> list[tuple[str, Config]]:
    """(node, config) of every workload for which selection takes this schedule."""
    found = []
    for family in FAMILIES:
        for work in workloads_of(family):
            if work.op == schedule.op:
                choice = select(work.node, ARCH, work.symbols)
                if choice.schedule == schedule.name and (one := (node_key(work.node), choice.config)) not in found:
                    found.append(one)
    return found


def cases(schedule: Schedule, count: int, number: int) -> Check:
    """Random calls; with many of them, besides, whatever config selection takes and chance did not."""
    drawn: dict[str, list[Call]] = {}

    def one(call: Call) -> None:
        drawn.setdefault(node_key(call.workload.node), []).append(call)
        check(schedule, call)

    def every() -> None:
        random_cases(given(calls(schedule))(one), count, number)()
        if count < MANY:
            return
        known = [call.config for calls_ in drawn.values() for call in calls_]
        for key, config in picked(schedule):
            alike = drawn.get(key)  # other vocabularies differ in nothing that a config says
            if config not in ([call.config for call in alike] if alike else known):
                example = (alike or next(iter(drawn.values())))[-1]
                check(schedule, Call(example.workload, config, number))

    return every


@triton.jit
def _canary(integers, floats, narrow, out, wide, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    square = i * N + j
    x = tl.load(integers + square).to(tl.bfloat16)
    tl.store(out + square, tl.dot(x, tl.load(narrow + square)))
    tl.store(wide + square, tl.load(narrow + square).to(tl.float32))
    tl.store(narrow + square, tl.load(floats + square).to(tl.bfloat16))


def _canary_errors() -> list[bool]:
    """Whether sums of products, subnormal bfloat16 widened and float32 narrowed are what torch says."""
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-8, 9, (16, 16), generator=generator, dtype=torch.int32)
    floats = torch.randn(16, 16, generator=generator)
    narrow = torch.randn(16, 16, generator=generator).to(torch.bfloat16)
    narrow[0] *= 2.0**-130
    first, out, wide = narrow.clone(), torch.empty(16, 16), torch.empty(16, 16)
    _canary[(1,)](integers, floats, narrow, out, wide, N=16)
    return [
        not torch.allclose(out, integers.float() @ first.float(), rtol=1e-5, atol=1e-5),
        not torch.equal(wide, first.float()),
        not torch.equal(narrow, floats.to(torch.bfloat16)),
    ]


def canaries() -> None:
    """The interpreter is right with what interpret.py replaces, and wrong in each of these without it."""
    assert not any(_canary_errors())
    with interpret.unpatched():
        assert all(_canary_errors()), "a patch of the interpreter is no longer needed"


def main(count: int, part: str, number: int) -> int:
    checks: dict[str, Check] = {"canaries": canaries}
    for name, schedule in SCHEDULES.items():
        checks[name] = cases(schedule, count, number)
    chosen = {name: check for name, check in checks.items() if name.startswith(part)}
    return run_checks(chosen or checks, "" if chosen else part)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count, part, number = (*sys.argv[1:], *("20", "", "5")[len(sys.argv) - 1 :])
    sys.exit(main(int(count), part, int(number)))
