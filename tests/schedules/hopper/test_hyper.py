"""Hyper-connections on Hopper: references, what schedules accept, what the builds are made of, and the interpreter."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4c.ops import OPS
from dsv4c.ops.formats import dequantise_rows
from dsv4c.schedules._schedule import OpNode, Schedule, Value
from dsv4c.schedules.hopper.hyper import SCHEDULES
from dsv4c.schedules.workloads import hyper as workloads

BY_NAME = {schedule.name: schedule for schedule in SCHEDULES}
FUSED = "hc_post_pre_norm_quantise"


def _args(op: str, tokens: int) -> list[torch.Tensor | None]:
    generator = torch.Generator()
    generator.manual_seed(3)
    return workloads.make(workloads.node(op, "nano"), tokens, False, generator)


def test_quantised_variants_add_the_rows_of_the_plain_ones() -> None:
    node = workloads.node(FUSED, "nano")
    args = _args(FUSED, 5)
    attrs = dict(node.attrs)
    *plain, data, scale = OPS[FUSED](*args, **attrs)
    attrs.pop("group")
    for ours, theirs in zip(plain, OPS["hc_post_pre_norm"](*args, **attrs), strict=True):
        assert torch.equal(ours, theirs)
    apart = (dequantise_rows(data, scale) - plain[1].float()).abs()
    assert (apart <= plain[1].float().abs() / 16 + scale.repeat_interleave(128, 1) / 512).all()


def test_the_error_of_a_workload_sees_quantised_rows_that_are_not_those_beside_them() -> None:
    workload = workloads.workload(FUSED, "nano", 5)
    args = _args(FUSED, 5)
    expected = OPS[FUSED](*args, **workload.node.attrs)
    assert workload.error is not None and workload.error(expected, expected) == 0
    wrong = [*expected[:-1], expected[-1] * 2]
    assert workload.error(wrong, expected) == float("inf")


@pytest.mark.parametrize("op", sorted({schedule.op for schedule in SCHEDULES}))
@pytest.mark.parametrize("model", ["nano", "flash", "pro"])
def test_some_schedule_accepts_every_preset(op: str, model: str) -> None:
    node = workloads.node(op, model)
    assert any(schedule.accepts(node) is None for schedule in SCHEDULES if schedule.op == op)


def _with_input(node: OpNode, index: int, value: Value) -> OpNode:
    inputs = list(node.inputs)
    inputs[index] = value
    return dataclasses.replace(node, inputs=tuple(inputs))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def test_schedules_say_why_they_refuse(schedule: Schedule) -> None:
    node = workloads.node(schedule.op, "flash")
    streams = 1 if "post" in schedule.op else 0
    for value, reason in (
        (Value(("T", 4, 4096), "float32"), "not bfloat16"),
        (Value(("T", 2, 4096), "bfloat16"), "2 streams"),
        (Value(("T", 4, 4096), "bfloat16", strides=(32768, 4096, 1)), "strided"),
    ):
        assert reason in (schedule.accepts(_with_input(node, streams, value)) or "")
    assert "written for 4096" in (BY_NAME[f"{FUSED}.gluon_cluster"].accepts(workloads.node(FUSED, "pro")) or "")


def test_spaces_are_small_and_split_the_channels_evenly() -> None:
    for schedule in SCHEDULES:
        for model in ("nano", "flash", "pro"):
            node = workloads.node(schedule.op, model)
            if schedule.accepts(node) is not None:
                continue
            for tokens in (0, 1, 64, 513, 16384):
                space = schedule.space(node, {"T": tokens})
                assert 1 <= len(space) <= 12
                for config in space:
                    assert schedule.cost(node, {"T": tokens}, config).bytes_moved >= 0
                    dim = int(next(v for v in node.inputs if v is not None and len(v.shape) == 3).shape[2])
                    assert dim % (64 * int(config.get("splits", 1))) == 0


@pytest.mark.parametrize("op", ["hc_post_pre_norm", "hc_pre_norm_quantise"])
def test_the_cluster_kernel_fits_a_block_and_uses_what_it_claims(op: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from dsv4c.schedules._gpu import SHARED_LIMIT, Request, compile_launch

    node, schedule = workloads.node(op, "flash"), BY_NAME[f"{op}.gluon_cluster"]
    config = schedule.space(node, {"T": 8192})[0]
    (launch,) = schedule.build(node, config).launches
    built = compile_launch(Request(op, launch, (*node.inputs, *node.outputs), "sm_90a"), tmp_path)
    assert built.spills == 0
    assert built.record.shared <= SHARED_LIMIT
    assert built.record.cluster == (16, 1, 1)
    text = next(tmp_path.rglob("*.ptx")).read_text()
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in text
    assert "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32" in text


def test_the_plain_kernels_are_right_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parent / "interpret.py"
    labels = [f"{op} nano decode 1" for op in (FUSED, "hc_post", "hc_head_norm")]
    ran = subprocess.run([sys.executable, str(script), "hyper", *labels], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "ok" in ran.stdout
