"""TileLang's schedules: what they accept, that their configs fit a block, and that each builds on the matrix units."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dsv4c.schedules._gpu import SHARED_LIMIT, Compiled, Request, compile_launch
from dsv4c.schedules._launch import TileLaunch
from dsv4c.schedules._schedule import OpNode, Schedule
from dsv4c.schedules.hopper import tile
from dsv4c.schedules.workloads import attention, linear

SCHEDULES = {schedule.name: schedule for schedule in tile.SCHEDULES}
LINEARS = [shape.node() for model in ("flash", "pro") for shape in linear.shapes(model) if shape.mixed]
ATTENTION = [attention.node(model, kind) for model in ("flash", "pro") for kind in ("window", "csa", "hca")]


def schedules_of(node: OpNode) -> list[Schedule]:
    return [schedule for schedule in tile.SCHEDULES if schedule.op == node.op]


def build(schedule: Schedule, node: OpNode, config: Mapping[str, Any], cache: Path) -> Compiled:
    values = (*node.inputs, *schedule.workspace(node, config), *node.outputs)
    (launch,) = schedule.build(node, config).launches
    return compile_launch(Request(node.describe(), launch, values, "sm_90a"), cache)


def sass(image: bytes, folder: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    file = folder / "kernel.cubin"
    file.write_bytes(image)
    return subprocess.run([str(tool), "-c", str(file)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("node", [*LINEARS, *ATTENTION], ids=lambda node: node.describe())
def test_every_map_of_the_large_models_has_a_schedule(node: OpNode) -> None:
    assert [s.name for s in schedules_of(node) if s.accepts(node) is None]


@pytest.mark.parametrize("node", LINEARS, ids=lambda node: node.describe())
@pytest.mark.parametrize("tokens", [1, 64, 129, 8192])
def test_configs_of_linears_are_distinct_and_fit_a_block(node: OpNode, tokens: int) -> None:
    for schedule in schedules_of(node):
        if schedule.accepts(node) is not None:
            continue
        configs = schedule.space(node, {"T": tokens})
        assert len({tuple(sorted(c.items())) for c in configs}) == len(configs) <= 12
        for config in configs:
            (launch,) = schedule.build(node, config).launches
            assert isinstance(launch, TileLaunch) and launch.symbols == {"M": "a0_0"}
            assert schedule.cost(node, {"T": tokens}, config).flops >= 2.0 * tokens
            assert int(config["stages"]) * (int(config["BM"]) + int(config["BN"])) * 128 <= SHARED_LIMIT


def test_a_cluster_shares_a_tokens_keys_only_where_blocks_are_few() -> None:
    node = attention.node("flash", "csa")
    sizes = {"R": 1, "P_window": 128, "P_c4": 32, "N_window": 64, "N_c4": 64}
    (schedule,) = schedules_of(node)
    assert next(c["splits"] for c in schedule.space(node, {**sizes, "T": 64})) == 2
    assert next(c["splits"] for c in schedule.space(node, {**sizes, "T": 4096})) == 1


def changed(node: OpNode, index: int, **fields: Any) -> OpNode:
    value = node.inputs[index]
    assert value is not None
    inputs = list(node.inputs)
    inputs[index] = dataclasses.replace(value, **fields)
    return dataclasses.replace(node, inputs=tuple(inputs))


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (attention.node("nano", "csa"), "heads of 64 channels"),
        (changed(attention.node("flash", "csa"), 0, shape=("T", 48, 512)), "48 heads are no multiple of 64"),
        (changed(attention.node("flash", "csa"), 0, strides=(65536, 512, 1)), "q is strided"),
        (changed(attention.node("flash", "csa"), 5, shape=("T", 100)), "100 picks are no multiple of 64"),
        (changed(LINEARS[0], 0, strides=(8192, 1)), "strided"),
        (changed(LINEARS[0], 1, shape=(1536, 96)), "1536 x 96 is no multiple of 64 x 64"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(node: OpNode, reason: str) -> None:
    for schedule in schedules_of(node):
        assert re.search(reason, str(schedule.accepts(node))), schedule.name


def _shape(name: str) -> OpNode:
    return next(shape.node() for shape in linear.shapes("flash") if shape.name == name)


@pytest.mark.parametrize(
    ("name", "node", "config"),
    [
        ("linear_mixed.tile_ring", _shape("csa_compress"), {"BM": 128, "BN": 256, "stages": 4, "panel": 8}),
        ("attend_csa_packed.tile_pair", attention.node("flash", "csa"), {"splits": 2}),
        ("attend_hca_packed.tile_pair", attention.node("pro", "hca"), {"splits": 1}),
    ],
)
def test_kernels_build_on_the_matrix_units(name: str, node: OpNode, config: Mapping[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tilelang", reason="TileLang is not installed; see the extra `gpu`")
    made = build(SCHEDULES[name], node, config, tmp_path)
    text = sass(made.image, tmp_path)
    assert re.search(r"\b[HQ]GMMA\b", text) and not re.search(r"\b(STL|LDL|HMMA)\b", text)
    assert made.record.shared <= SHARED_LIMIT and made.record.threads % 128 == 0
    assert made.record.cluster[0] == config.get("cluster", config.get("splits", 1))


def test_zero_tokens_make_an_empty_grid() -> None:
    from dsv4c.schedules._tilelang import evaluate

    for node in (*LINEARS, *ATTENTION):
        for schedule in schedules_of(node):
            if schedule.accepts(node) is not None:
                continue
            symbols = {s: 1 for v in node.inputs if v for s in v.shape if isinstance(s, str)}
            for config in schedule.space(node, symbols):
                (launch,) = schedule.build(node, config).launches
                assert 0 in [evaluate(size, {"a0_0": 0}) for size in launch.grid]
