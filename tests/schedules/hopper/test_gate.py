"""The gates: their references, what judges their results, and their kernels' arithmetic in the interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4c.model.moe import gate_bias
from dsv4c.ops.linears import gate_linear_bias, linear_mixed
from dsv4c.schedules._workload import Workload
from dsv4c.schedules.hopper.gate import SCHEDULES
from dsv4c.schedules.workloads.gate import workloads

REPOSITORY = Path(__file__).parents[3]


def find(op: str, label: str) -> Workload:
    return next(w for w in workloads() if (w.op, w.label) == (op, label))


def judge(change: Callable[[Tensor], Tensor]) -> float:
    """The error of an ordinary row's gate with its ids changed."""
    work = find("gate_bias", "nano bias decode 1")
    generator = torch.Generator()
    generator.manual_seed(4)
    tensors = [t for t in work.make(generator) if t is not None]
    ids, weight = gate_bias(*tensors, **work.node.attrs)
    assert work.error is not None and work.reference is not None
    return work.error([change(ids), weight], list(work.reference(*tensors, **work.node.attrs)))


def test_the_fused_gate_is_the_product_and_the_gate() -> None:
    x, weight = torch.randn(5, 64).to(torch.bfloat16), torch.randn(16, 64).to(torch.bfloat16)
    bias = torch.randn(16)
    ids, gains = gate_linear_bias(x, weight, bias, topk=2, scaling=1.5)
    plain_ids, plain = gate_bias(linear_mixed(x, weight), bias, topk=2, scaling=1.5)
    assert ids.dtype == torch.int32 and torch.equal(ids.long(), plain_ids) and torch.equal(gains, plain)


def test_a_wrong_choice_is_seen() -> None:
    assert judge(lambda ids: ids) < 1e-6
    assert judge(lambda ids: (ids + 1) % 16) > 1e-3
    assert judge(lambda ids: ids * 0) == float("inf")


def test_who_accepts() -> None:
    for work in workloads():
        taking = [s for s in SCHEDULES if s.op == work.op and s.accepts(work.node) is None]
        assert taking, work.label
        for one in taking:
            assert 1 <= len(one.space(work.node, work.symbols)) <= 6


def test_the_kernels_choose_as_the_reference() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    script = [sys.executable, "-m", "tests.schedules.hopper.interpret_sampling"]
    cases = ["gate_bias nano bias decode 65", "gate_hash nano hash decode 3"]
    run = subprocess.run([*script, "gate", *cases], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok ") == 2 and "FAIL" not in run.stdout
