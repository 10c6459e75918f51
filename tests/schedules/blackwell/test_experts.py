"""Experts on block-scaled matrix units: formats, what is refused, numerics in the interpreter, machine code."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4c.ops import OPS
from dsv4c.ops.mx import LARGEST, MxFormat, dequantise_mx, mx_group, quantise_mx, rounded_mx
from dsv4c.schedules._schedule import OpNode, Schedule, Value
from dsv4c.schedules.blackwell.experts import schedules
from dsv4c.schedules.workloads.experts import make, node

REPOSITORY = Path(__file__).resolve().parents[3]
BY_OP = {schedule.op: schedule for schedule in schedules("sm_103a")}
FORMATS: tuple[MxFormat, ...] = ("mxfp8", "mxfp4", "nvfp4")


def mx_node(model: str, activations: str = "mxfp8") -> OpNode:
    """The op as the pass leaves it."""
    plain = node(model)
    return dataclasses.replace(plain, op="experts_mx", attrs={**plain.attrs, "activations": activations})


def nvfp4_node(model: str) -> OpNode:
    """The op of an NVFP4 checkpoint."""
    plain = node(model)
    inputs = list(plain.inputs[:3])
    for data, scale in zip(plain.inputs[3:9:2], plain.inputs[4:9:2], strict=True):
        assert data is not None and scale is not None
        *lead, groups = scale.shape
        narrow = dataclasses.replace(scale, shape=(*lead, 2 * int(groups)), dtype="float8_e4m3fn")
        inputs += [data, narrow, Value(data.shape[:1], "float32", "weight")]
    inputs += [Value((1,), "float32", "weight"), inputs[-1], plain.inputs[-1]]
    attrs = {**plain.attrs, "activations": "nvfp4"}
    return dataclasses.replace(plain, op="experts_nvfp4", attrs=attrs, inputs=tuple(inputs))


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_a_format_holds_stays_what_it_is(fmt: MxFormat) -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 6, 5).unsqueeze(1)
    once = rounded_mx(x, fmt)
    if fmt != "nvfp4":  # its scale is rounded, so a group's largest value may saturate, and the next time again
        assert torch.equal(rounded_mx(once, fmt), once)
    group = mx_group(fmt)
    most = x.abs().unflatten(-1, (-1, group)).amax(-1).repeat_interleave(group, -1)
    coarse = {"mxfp8": 2.0**-4, "mxfp4": 2.0**-2, "nvfp4": 2.0**-2}[fmt]
    kept = torch.ones_like(most, dtype=torch.bool)
    if fmt == "nvfp4":  # where its scale is a normal E4M3
        kept = (most < 6 * 448) & (most > 6 * 2.0**-6)
    assert ((once - x).abs() <= coarse * x.abs() + most * coarse)[kept].all()


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4"])
def test_scales_are_the_smallest_powers_of_two_that_fit(fmt: MxFormat) -> None:
    for most in (LARGEST[fmt], LARGEST[fmt] * 1.001, 1e-30, 2.0**100, 0.0, 2.0**-126):
        x = torch.zeros(1, 32)
        x[0, 7] = most
        data, scale = quantise_mx(x, fmt)
        byte = int(scale[0, 0])
        assert 1 <= byte <= 254 and most <= LARGEST[fmt] * 2.0 ** (byte - 127)
        assert byte == 1 or most > LARGEST[fmt] * 2.0 ** (byte - 128)
        assert float(dequantise_mx(data, scale, fmt)[0, 7]) == pytest.approx(most, rel=0.25, abs=2.0**-127)


def test_narrower_activations_move_the_result_further() -> None:
    what = node("nano")
    args = make(what, 24, "even", torch.Generator().manual_seed(5))
    exact = OPS["experts_fp4"](*args, limit=10.0).float()
    errors = []
    for fmt in ("mxfp8", "mxfp4"):
        found = OPS["experts_mx"](*args, limit=10.0, activations=fmt).float()
        errors.append(float((found - exact).norm() / exact.norm()))
    assert 0 < errors[0] < 0.05 < errors[1] < 0.5


@pytest.mark.parametrize("op", sorted(BY_OP))
def test_every_size_has_configs_and_a_cost(op: str) -> None:
    nodes = {"experts_fp4": node("flash"), "experts_mx": mx_node("pro", "mxfp4"), "experts_nvfp4": nvfp4_node("flash")}
    what, schedule, last = nodes[op], BY_OP[op], 0.0
    assert schedule.accepts(what) is None
    for tokens in (1, 4, 64, 512, 4096):
        for config in schedule.space(what, {"T": tokens}):
            assert len(schedule.build(what, config).launches) == (4 if config["sort"] else 5)
        moved = schedule.cost(what, {"T": tokens}, schedule.space(what, {"T": tokens})[0]).bytes_moved
        assert moved > last
        last = moved


def test_it_says_what_it_does_not_take() -> None:
    good, schedule = mx_node("flash"), BY_OP["experts_mx"]

    def changed(index: int, what: OpNode = good, use: Schedule = schedule, **changes: Any) -> str | None:
        inputs = list(what.inputs)
        value = inputs[index]
        assert value is not None
        inputs[index] = dataclasses.replace(value, **changes)
        return use.accepts(dataclasses.replace(what, inputs=tuple(inputs)))

    assert "written for bfloat16 rows and weights of uint8 and uint8" in str(changed(4, dtype="float8_e4m3fn"))
    assert "no multiples of 128" in str(changed(0, shape=("T", 4000)))
    assert "input 6 has no scale for each 32 channels" in str(changed(6, shape=(256, 2048, 256)))  # groups of 16
    assert "strided" in str(changed(0, strides=(8192, 1)))
    nvfp4 = dataclasses.replace(good, op="experts_nvfp4", attrs={"limit": 10.0, "activations": "nvfp4"})
    assert "float8_e4m3fn and float32" in str(BY_OP["experts_nvfp4"].accepts(nvfp4))  # an MXFP4 checkpoint's weights
    nvfp4 = nvfp4_node("flash")
    assert "has no scale for each 16 channels" in str(changed(4, nvfp4, BY_OP["experts_nvfp4"], shape=(256, 2048, 128)))
    assert "written for" in str(changed(5, nvfp4, BY_OP["experts_nvfp4"], dtype="bfloat16"))


def test_kernels_are_exact_models_of_themselves_in_the_interpreter() -> None:
    """Stage by stage beside float64, over tails, empty experts and extreme scales; canaries of the patches first."""
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    command = [sys.executable, "-m", "tests.schedules.blackwell.interpret_experts", "3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert lines == ["ok   canaries", *(f"ok   {fmt}" for fmt in (*FORMATS, "bf16"))]


def test_linear_maps_and_gates_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    command = [sys.executable, "-m", "tests.schedules.blackwell.interpret_linear", "3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and all(line.startswith("ok") for line in lines)
