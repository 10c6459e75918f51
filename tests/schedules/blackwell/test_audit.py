"""The audit of machine code: what sound kernels hold, and what must be found in unsound ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4c.artifact import Kernel, Launch
from dsv4c.errors import ArtifactError
from dsv4c.schedules._cubin import Cubin
from dsv4c.schedules._gpu import Compiled, Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import OpNode, Schedule
from dsv4c.schedules.audit import Code, faults, read, step
from dsv4c.schedules.blackwell import experts
from dsv4c.schedules.hopper import hyper
from dsv4c.schedules.workloads.experts import node

from .test_experts import mx_node, nvfp4_node

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
    ("activations", "instruction"),
    [("mxfp8", "UTCQMMA"), ("mxfp4", "UTCOMMA"), ("nvfp4", "UTCOMMA.BLOCK16"), ("bf16", "UTCHMMA")],
)
def test_experts_hold_the_matrix_instruction_of_their_format(activations: str, instruction: str, cache: Path) -> None:
    what = {"bf16": node("nano"), "nvfp4": nvfp4_node("nano")}.get(activations) or mx_node("nano", activations)
    for symbol in ("grouped_up", "grouped_down"):
        kernel, made = built(what, symbol, cache)
        code = read(made.image)
        assert found(kernel, made, code) == [] and set(code.matrix) == {instruction}
        assert code.target == "sm_103a" and code.copies and not code.local


def test_a_tile_too_small_for_scaled_operands_is_found(cache: Path) -> None:
    """8 columns: Triton widens both operands to bfloat16, without a word."""
    what = mx_node("nano", "mxfp4")
    config = {**experts._config(what, 8, 4), "down": "none"}
    kernel, made = built(what, "grouped_down", cache, config)
    assert {"has no UTCOMMA, which it is written for"} < set(found(kernel, made))
    assert any("unexpected UTCHMMA" in fault for fault in found(kernel, made))


def test_eight_bit_products_of_four_bit_values_are_found(cache: Path) -> None:
    """As TileLang's packed FP4 and its groups of 16 compile: products of the wrong kind."""
    _, made = built(mx_node("nano", "mxfp8"), "grouped_down", cache)
    for op, attrs in (("experts_mx", {"activations": "mxfp4"}), ("experts_nvfp4", {"activations": "nvfp4"})):
        kernel = Kernel(op, "gpu", op, "", "", 0.0, "", op_attrs=attrs)
        assert any("unexpected UTCQMMA" in fault for fault in found(kernel, made))
    kernel, made = built(mx_node("nano", "mxfp4"), "grouped_down", cache)
    nvfp4 = replace(kernel, op="experts_nvfp4")
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


def test_limits(cache: Path) -> None:
    kernel, made = built(mx_node("nano"), "combine_pairs", cache)
    code = read(made.image)
    assert found(kernel, made, code) == [] and not code.matrix and code.columns == 0
    assert found(kernel, made, replace(code, local=8)) == ["keeps 8 bytes a thread in local memory"]
    many = replace(code, cubin=replace(code.cubin, registers=600))
    assert any("a multiprocessor has 65536" in fault for fault in found(kernel, made, many))
    assert faults(kernel, made.record, code, "sm_100a") == ["is made for sm_103a, not for sm_100a"]
    assert "shared memory" in faults(kernel, replace(made.record, shared=300 * 1024), code, "sm_103a")[0]
    static = replace(code, cubin=replace(code.cubin, shared=229 * 1024))
    assert found(kernel, made, static) == ["takes 233472 bytes of shared memory, a block has 232448"]


@pytest.fixture(scope="module")
def scaled(cache: Path) -> tuple[Kernel, Compiled, Code]:
    """A kernel with all there is: tensor maps, block-scaled products, tensor memory, numbers and addresses."""
    kernel, made = built(mx_node("nano", "mxfp4"), "grouped_down", cache)
    return kernel, made, read(made.image)


def test_tensor_memory(scaled: tuple[Kernel, Compiled, Code]) -> None:
    kernel, made, code = scaled
    assert code.columns is not None and 0 < code.columns <= 512 and code.columns % 32 == 0
    for columns, fault in (
        (1024, "takes 1024 columns of tensor memory, there are 512"),
        (0, "sums into tensor memory that it never takes"),
        (None, "takes tensor memory of a size that its code does not say"),
    ):
        assert found(kernel, made, replace(code, columns=columns)) == [fault]


def test_counts_of_products_and_copies(scaled: tuple[Kernel, Compiled, Code]) -> None:
    kernel, made, code = scaled
    whole = step(kernel, made.record, "UTCOMMA")
    assert whole > 1 and code.matrix["UTCOMMA"] % whole == 0
    fewer = replace(code, matrix={"UTCOMMA": code.matrix["UTCOMMA"] - 1})
    assert found(kernel, made, fewer) == [f"has {fewer.matrix['UTCOMMA']} UTCOMMA, a step of its tiles takes {whole}"]
    maps = sum(arg.kind == "map" for arg in made.record.args)
    assert found(kernel, made, replace(code, copies=0)) == [f"takes {maps} tensor maps and copies through none"]
    none = replace(made.record, args=tuple(arg for arg in made.record.args if arg.kind != "map"))
    assert any("that it does not take" in fault for fault in faults(kernel, none, code, "sm_103a"))


def test_packed_values_multiplied_as_bytes_are_found(scaled: tuple[Kernel, Compiled, Code], cache: Path) -> None:
    """TileLang's packed FP4 tiles: the map's elements and the instruction's do not go together."""
    _, made = built(mx_node("nano", "mxfp8"), "grouped_down", cache)
    kernel = Kernel("e", "gpu", "experts_mx", "", "", 0.0, "", op_attrs={"activations": "mxfp8"})
    assert found(kernel, made) == []
    packed = faults(kernel, with_maps(made, "uint8"), read(made.image), "sm_103a")
    assert any("as if it were 8 bits wide" in fault for fault in packed)
    kernel, made, code = scaled
    wide = faults(kernel, with_maps(made, "float4_e2m1fn_x2"), code, "sm_103a")
    assert any("with a byte for each value" in fault for fault in wide)


def with_maps(made: Compiled, dtype: str) -> Launch:
    """The launch with its tensor maps over elements of another kind."""
    args = (a if a.map is None else replace(a, map=replace(a.map, dtype=dtype)) for a in made.record.args)
    return replace(made.record, args=tuple(args))


def changed(launch: Launch, at: int, **values: Any) -> Launch:
    args = list(launch.args)
    args[at] = replace(args[at], **values)
    return replace(launch, args=tuple(args))


def test_a_launch_that_packs_other_parameters_is_found(scaled: tuple[Kernel, Compiled, Code]) -> None:
    kernel, made, code = scaled
    record, kinds = made.record, [arg.kind for arg in made.record.args]
    assert kinds[-2:] == ["null", "null"]
    ptr, tile, i32, i64 = (kinds.index(kind) for kind in ("ptr", "map", "i32", "i64"))

    def wrong(launch: Launch, cubin: Cubin = code.cubin) -> list[str]:
        return faults(kernel, launch, replace(code, cubin=cubin), "sm_103a")

    count = len(kinds)
    assert wrong(replace(record, args=record.args[:-1])) == [
        f"takes {count} parameters, its record gives {count - 1}"
    ]  # a scratch pointer left out
    swapped = list(record.args)
    swapped[tile], swapped[ptr] = swapped[ptr], swapped[tile]
    assert any("bytes, its record gives 128" in fault for fault in wrong(replace(record, args=tuple(swapped))))
    assert wrong(changed(record, ptr, kind="i64")) == [f"parameter {ptr} is an address, its record: i64"]
    assert wrong(changed(record, i64, kind="null")) == [f"parameter {i64} is a number, its record: null"]
    assert wrong(changed(record, count - 1, kind="i64")) == [f"parameter {count - 1} is an address, its record: i64"]
    assert f"parameter {i32} has 4 bytes, its record gives 8" in wrong(changed(record, i32, kind="i64"))
    assert wrong(replace(record, threads=record.threads * 2)) == [
        f"is launched with {2 * record.threads} threads, its code is made for {record.threads}"
    ]
    assert wrong(replace(record, symbol="other"))[-1] == "is launched as `other`, its code is `grouped_down`"
    assert "is recorded with 7 registers" in wrong(replace(record, registers=7))[0]
    moved = list(code.cubin.parameters)
    moved[-1] = replace(moved[-1], offset=moved[-1].offset + 8)
    assert "its record puts it at" in wrong(record, replace(code.cubin, parameters=tuple(moved)))[0]
    more = code.cubin.parameter_bytes + 8
    assert f"takes {more} bytes of parameters" in wrong(record, replace(code.cubin, parameter_bytes=more))[0]


def test_what_is_no_cubin_is_refused(scaled: tuple[Kernel, Compiled, Code]) -> None:
    image = scaled[1].image
    for broken in (b"", b"not a cubin", image[:64], image[:2000]):
        with pytest.raises(ArtifactError, match="cubin"):
            read(broken)
