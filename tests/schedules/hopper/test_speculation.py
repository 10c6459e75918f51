"""Drafts on the device: kernels in the interpreter beside the references, and cubins for the card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4c.ops import OPS
from dsv4c.schedules._gpu import Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.hopper.speculation import SCHEDULES
from dsv4c.schedules.select import choose
from dsv4c.schedules.workloads.speculation import DRAFTS, workloads

REPOSITORY = Path(__file__).parents[3]
WORK = workloads()
LARGEST = {work.label.rpartition(" ")[0]: work for work in WORK}


def test_every_kernel_has_a_workload() -> None:
    assert {s.op for s in SCHEDULES} == {work.op for work in WORK}
    for work in WORK:
        (schedule,) = (s for s in SCHEDULES if s.op == work.op)
        assert schedule.accepts(work.node) is None


def test_histories_of_every_length_are_among_the_inputs() -> None:
    (work,) = (w for w in WORK if w.op == "accept_drafts" and w.label.endswith(" 200"))
    args = work.make(torch.Generator().manual_seed(17))
    accepted, *_ = OPS["accept_drafts"](*args, **work.node.attrs)
    limits, tokens = args[6], args[0]
    assert limits is not None and tokens is not None
    pairs = set(zip(limits.tolist(), accepted.tolist(), strict=True))
    assert pairs == {(limit, a) for limit in range(DRAFTS + 1) for a in range(1, limit + 2)}
    assert bool((tokens < 0).any())


def test_the_kernels_give_what_the_references_give() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    script = [sys.executable, "-m", "tests.schedules.hopper.interpret_speculation"]
    run = subprocess.run(script, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok ") == len(WORK) - 1 and "FAIL" not in run.stdout


@pytest.mark.parametrize("work", LARGEST.values(), ids=LARGEST.keys())
def test_kernels_build_for_the_card(work: Workload, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    (schedule,) = (s for s in SCHEDULES if s.op == work.op)
    choice = choose(schedule, work.node, "sm_90a", work.symbols, "test")
    for launch in choice.build.launches:
        assert isinstance(launch, TritonLaunch)
        values = (*choice.inputs, *choice.workspace, *work.node.outputs)
        assert compile_launch(Request(work.op, launch, values, "sm_90a"), tmp_path).spills == 0
