"""TileLang kernels built without a GPU: what a launch record says, that bytes repeat, what is refused, with names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from dsv4c import artifact
from dsv4c.errors import ScheduleError
from dsv4c.schedules._gpu import Compiled, Request, compile_launch
from dsv4c.schedules._launch import Expr, Grid, TileLaunch
from dsv4c.schedules._schedule import Value

pytest.importorskip("tilelang", reason="TileLang is not installed; see the extra `gpu`")

from dsv4c.schedules._tilelang import compile_tile, evaluate, lower

A, B, C = Value(("T", 512), "bfloat16"), Value((256, 512), "bfloat16", "weight"), Value(("T", 256), "float32")
SIZES = {"N": 256, "K": 512, "BM": 64, "BN": 64}
GRID: Grid = ("cdiv(a0_0, 64)", 4, 1)


def product(
    grid: Grid = GRID, symbols: dict[str, Expr] | None = None, pdl: bool = False, **constants: Any
) -> TileLaunch:
    names = {"M": "a0_0"} if symbols is None else symbols
    return TileLaunch(
        "tests.schedules.hopper.tile_factories:product", (0, 1, 2), {**SIZES, **constants}, grid, 128, names, pdl
    )


def build(launch: TileLaunch, cache: Path) -> Compiled:
    return compile_launch(Request("product", launch, (A, B, C), "sm_90a"), cache)


def test_a_record_says_all_that_a_launcher_needs(tmp_path: Path) -> None:
    made = build(product(), tmp_path)
    record = made.record
    assert [(a.kind, a.arg) for a in record.args[:3]] == [("map", 0), ("map", 1), ("ptr", 2)]
    assert (record.args[3].kind, record.args[3].value) == ("i32", "a0_0")
    assert record.args[0].map == artifact.TensorMap("bfloat16", ("a0_0", 512), (512, 1), (64, 64), 128)
    assert record.args[1].map == artifact.TensorMap("bfloat16", (256, 512), (512, 1), (64, 64), 128)
    assert record.threads == 256 and record.shared == 2 * 2 * 64 * 64 * 2 and record.cluster == (1, 1, 1)
    assert [evaluate(size, {"a0_0": 129}) for size in record.grid] == [3, 4, 1]
    assert record.sha256 == hashlib.sha256(made.image).hexdigest() and 0 < record.registers <= 255


def test_the_cache_and_a_fresh_build_give_the_same_bytes(tmp_path: Path) -> None:
    first, again = (build(product(), tmp_path / "one") for _ in range(2))
    fresh = build(product(), tmp_path / "two")
    assert first == again == fresh


def test_plain_pointers_keep_the_kernels_own_order() -> None:
    value = Value(("T", 64), "float32")
    launch = TileLaunch(
        "tests.schedules.hopper.tile_factories:scale", (1, 0), {"D": 64, "rows": 4}, ("cdiv(a0_0, 4)", 1, 1), 128,
        {"M": "a0_0"},
    )  # fmt: skip
    lowered = lower(launch, (value, value), "sm_90a")
    named = {(a.kind, a.arg) for a in lowered.args}
    assert named == {("ptr", 0), ("ptr", 1), ("i32", None)}
    order = lowered.source.split("scale_kernel_kernel(")[1].split(")")[0]
    assert [a.arg for a in lowered.args if a.kind == "ptr"] == (
        [1, 0] if order.index("x,") < order.index("y,") else [0, 1]
    )


def test_clusters_and_dependent_launches_are_read_off() -> None:
    lowered = lower(product(pdl=True, waits=True, cluster=2), (A, B, C), "sm_90a")
    assert lowered.cluster == (1, 2, 1) and lowered.waits and "cudaGridDependencySynchronize" in lowered.source


def test_a_gemm_runs_on_wgmma_or_not_at_all() -> None:
    assert "wgmma" in lower(product(), (A, B, C), "sm_90a").source
    with pytest.raises(ScheduleError, match=r"tile_factories:product.*BM=16.*fell back to `mma_sync`"):
        lower(product(("cdiv(a0_0, 16)", 4, 1), BM=16), (A, B, C), "sm_90a")


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (product(grid=(1, 4, 1)), r"its grid is \[0, 4, 1\] where the launch says \[1, 4, 1\]"),
        (product(symbols={}), "does not say what its size `M` is"),
        (product(pdl=True), "does not wait for the kernel before it"),
        (product(N=128), r"its tensor `b` has 131072 bytes where argument 1 has 262144"),
        (
            TileLaunch("tests.schedules.hopper.tile_factories:none", (0, 1, 2), SIZES, GRID, 128, {"M": "a0_0"}),
            "no such factory",
        ),
    ],
)
def test_a_launch_that_disagrees_with_its_kernel_is_refused(launch: TileLaunch, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        lower(launch, (A, B, C), "sm_90a")


def test_an_absent_argument_is_named() -> None:
    with pytest.raises(ScheduleError, match="tensor `b` is argument 1, which is absent"):
        lower(product(), (A, None, C), "sm_90a")


def test_slow_code_and_too_much_shared_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="needs 328704 bytes of shared memory, a block has 232448"):
        compile_tile(product(stages=20), (A, B, C), "sm_90a", tmp_path)
    with pytest.raises(ScheduleError, match=r"spills|serialised"):
        compile_tile(product(("cdiv(a0_0, 128)", 1, 1), BM=128, BN=256), (A, B, C), "sm_90a", tmp_path)


def test_expressions_are_sizes_and_nothing_else() -> None:
    assert evaluate("cdiv(a0_0 * 3 + 1, 4) - min(a1_2, 5) // 2 % 3", {"a0_0": 5, "a1_2": 9}) == 4 - 2
    with pytest.raises(ValueError, match="not an expression"):
        evaluate("a0_0.real", {"a0_0": 1})
