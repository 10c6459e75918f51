"""The audit of machine code: what sound kernels hold, and what must be found in unsound ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dsv4c.artifact import Kernel
from dsv4c.schedules._gpu import Compiled, Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import OpNode, Schedule
from dsv4c.schedules.audit import Code, faults, read
from dsv4c.schedules.blackwell import experts
from dsv4c.schedules.hopper import hyper
from dsv4c.schedules.workloads.experts import node

from .test_experts import mx_node

pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def schedule_of(op: str) -> Schedule:
    return next(s for s in (*experts.schedules("sm_103a"), *hyper.schedules("sm_103a")) if s.op == op)


def built(what: OpNode, symbol: str, cache: Path, config: dict[str, object] | None = None) -> tuple[Kernel, Compiled]:
    """One launch of the op's schedule, and the record of its kernel."""
    schedule = schedule_of(what.op)
    config = config or dict(schedule.space(what, {"T": 4})[0])
    launch = next(
        one for one in schedule.build(what, config).launches
        if isinstance(one, TritonLaunch) and one.kernel.endswith(f":{symbol}")
    )  # fmt: skip
    values = (*what.inputs, *schedule.workspace(what, config), *what.outputs)
    made = compile_launch(Request(what.op, launch, values, "sm_103a"), cache)
    return Kernel(what.op, "gpu", what.op, schedule.name, "", 0.0, "", op_attrs=dict(what.attrs)), made


def found(kernel: Kernel, made: Compiled, code: Code | None = None) -> list[str]:
    return faults(kernel, made.record, code or read(made.image), "sm_103a")


@pytest.mark.parametrize(
    ("activations", "instruction"), [("mxfp8", "UTCQMMA"), ("mxfp4", "UTCOMMA"), ("bf16", "UTCHMMA")]
)
def test_experts_hold_the_matrix_instruction_of_their_format(activations: str, instruction: str, cache: Path) -> None:
    what = node("nano") if activations == "bf16" else mx_node("nano", activations)
    for symbol in ("grouped_up", "grouped_down"):
        kernel, made = built(what, symbol, cache)
        code = read(made.image)
        assert found(kernel, made, code) == [] and set(code.matrix) == {instruction}
        assert code.target == "sm_103a" and code.copies and not code.local


def test_a_tile_too_small_for_scaled_operands_is_found(cache: Path) -> None:
    """8 columns: Triton widens both operands to bfloat16, without a word."""
    kernel, made = built(
        mx_node("nano", "mxfp4"), "grouped_down", cache, {"columns": 8, "warps": 4, "stages": 2, "share": 1}
    )
    assert {"has no UTCOMMA, which it is written for"} < set(found(kernel, made))
    assert any("unexpected UTCHMMA" in fault for fault in found(kernel, made))


def test_eight_bit_products_of_four_bit_values_are_found(cache: Path) -> None:
    """As TileLang's packed FP4 and its groups of 16 compile: products of the wrong kind."""
    _, made = built(mx_node("nano", "mxfp8"), "grouped_down", cache)
    for op, attrs in (("experts_mx", {"activations": "mxfp4"}), ("experts_nvfp4", {})):
        kernel = Kernel(op, "gpu", op, "", "", 0.0, "", op_attrs=attrs)
        assert any("unexpected UTCQMMA" in fault for fault in found(kernel, made))
    kernel, made = built(mx_node("nano", "mxfp4"), "grouped_down", cache)
    nvfp4 = dataclasses.replace(kernel, op="experts_nvfp4")
    assert "has no UTCOMMA.BLOCK16, which it is written for" in found(nvfp4, made)


def test_legacy_products_are_found(cache: Path) -> None:
    """Tiles of 16 tokens, as Hopper takes them."""
    from dsv4c.schedules.workloads.hyper import workloads

    what = next(w.node for w in workloads() if w.op == "hc_head_norm" and w.label.startswith("nano"))
    config = {"tile": 16, "width": 32, "splits": 1, "warps": 4, "stages": 3, "finish_warps": 4}
    kernel, made = built(what, "project", cache, config)
    assert any("legacy HMMA" in fault for fault in found(kernel, made))
    kernel, made = built(what, "project", cache)
    assert found(kernel, made) == []


def test_limits_and_parameters(cache: Path) -> None:
    kernel, made = built(mx_node("nano"), "combine_pairs", cache)
    code = read(made.image)
    assert found(kernel, made, code) == [] and not code.matrix
    assert found(kernel, made, dataclasses.replace(code, local=8)) == ["keeps 8 bytes a thread in local memory"]
    assert "a multiprocessor has 65536" in found(kernel, made, dataclasses.replace(code, registers=600))[0]
    assert faults(kernel, made.record, code, "sm_100a") == ["is made for sm_103a, not for sm_100a"]
    wide = dataclasses.replace(made.record, shared=300 * 1024)
    assert "shared memory" in faults(kernel, wide, code, "sm_103a")[0]
    short = dataclasses.replace(made.record, args=made.record.args[:-1])
    assert "its record gives" in faults(kernel, short, code, "sm_103a")[0]
    other = dataclasses.replace(made.record.args[0], kind="i32")
    assert "parameter 0 has 8 bytes, its record gives 4" in faults(
        kernel, dataclasses.replace(made.record, args=(other, *made.record.args[1:])), code, "sm_103a"
    )
