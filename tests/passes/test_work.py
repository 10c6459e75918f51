"""The least work of a program: exact where it can be counted by hand, and the same however the program is cut."""

from __future__ import annotations

import itertools

import pytest

from dsv4c.config import FLASH, StateLayout
from dsv4c.errors import CompileError, ConfigError
from dsv4c.ops import TensorType
from dsv4c.passes import FUSE, WIDEN, CheckLowered, Quantise
from dsv4c.pipeline import Pipeline
from dsv4c.program import Program
from dsv4c.work import Sizes, Work, node_work, sizes_of, work_of
from tests.passes.conftest import SMALL

SIZES = Sizes.decode(4, 64)


def of(program: Program, op: str, index: int = 0, sizes: Sizes = SIZES, machine: str = "cpu") -> Work:
    return node_work(program.find(op)[index], sizes.symbols(program.config, program.layout), machine)


def test_a_linear_map_reads_its_weight_and_rows_once(stitched: Program) -> None:
    node = next(n for n in stitched.find("dsv4.linear") if "wq_a" in str(n.args[1]))
    work = node_work(node, SIZES.symbols(SMALL, stitched.layout))
    assert work.kernels == 1
    assert work.bytes_moved == 4 * (4 * 32 + 16 * 32 + 4 * 16)
    assert work.flops == 2 * 4 * 32 * 16
    assert work.microseconds == pytest.approx(1e6 * (work.bytes_moved / 40e9 + 0.1e-6))


def test_of_tables_and_pools_only_the_rows_that_are_touched_count(stitched: Program) -> None:
    assert of(stitched, "dsv4.embed_streams").bytes_moved == 4 * 8 + 4 * 32 * 4 + 4 * 4 * 32 * 4
    keys, entry = SMALL.sliding_window, 16 * 4
    dense = 2 * 4 * 4 * entry + 4 * SIZES.symbols(SMALL, stitched.layout)["P_window"] * 8 + 2 * 4 * 8 + 4 * 4
    assert of(stitched, "dsv4.attend_window").bytes_moved == 4 * keys * entry + dense
    few, many = of(stitched, "dsv4.experts", sizes=Sizes.decode(1, 64)), of(stitched, "dsv4.experts")
    whole = 3 * 4 * 4 * 16 * 32
    assert few.bytes_moved < 0.5 * whole < many.bytes_moved


def test_views_and_placeholders_are_free(stitched: Program) -> None:
    symbols = SIZES.symbols(SMALL, stitched.layout)
    placeholders = [n for n in stitched.nodes() if n.op != "call_function"]
    for node in (*placeholders, *stitched.find("dsv4.split_heads")):
        assert node_work(node, symbols) == Work()


def test_pieces_count_as_often_as_the_model_has_them(captured: Program) -> None:
    steps = {step.name: step for step in Pipeline.default("cpu").steps(captured)}
    pieces, whole = work_of(steps["stitch"].before, SIZES), work_of(steps["stitch"].after, SIZES)
    assert pieces.kernels == whole.kernels
    assert pieces.bytes_moved == pytest.approx(whole.bytes_moved) and pieces.flops == pytest.approx(whole.flops)
    change = steps["raise-hyper"].work_at(SIZES)
    assert change.after.kernels < 0.6 * change.before.kernels
    usual = steps["raise-hyper"].work
    assert usual.before.bytes_moved > change.before.bytes_moved and usual.after.kernels == change.after.kernels


def test_no_fusion_adds_kernels_bytes_or_time(stitched: Program) -> None:
    for sizes, machine in itertools.product((SIZES, Sizes.prefill(64)), ("cpu", "sm_90a")):
        for step in Pipeline((*FUSE, *WIDEN, Quantise(), CheckLowered())).steps(stitched):
            change = step.work_at(sizes, machine)
            assert change.after.kernels <= change.before.kernels, step.name
            assert change.after.bytes_moved <= change.before.bytes_moved, step.name
            assert change.after.microseconds <= change.before.microseconds, step.name


@pytest.mark.parametrize("sizes", [Sizes(1, 1, 1), Sizes.decode(3, 512), Sizes.prefill(511), Sizes(100, 3, 200, 50)])
def test_every_size_of_every_stage_is_known(captured: Program, stitched: Program, sizes: Sizes) -> None:
    for program, entry in itertools.product((captured, stitched), ("step", "mtp")):
        work = work_of(program, sizes, "sm_90a", entry)
        assert work.kernels > 0 and work.bytes_moved > 0 and work.flops > 0 and work.microseconds > 0


def test_usual_sizes_fit_the_model() -> None:
    assert Sizes.usual(SMALL) == Sizes(64, 64, 512) and Sizes.usual(FLASH) == Sizes(64, 64, 8192)
    symbols = Sizes.prefill(1000, 2).symbols(FLASH, StateLayout())
    assert (symbols["T"], symbols["S"], symbols["R"], symbols["Z"], symbols["context"]) == (1000, 2, 2, 3, 500)
    assert (symbols["E_4"], symbols["E_128"], symbols["P_window"], symbols["P_c4"]) == (250, 8, 8, 2)


def test_sizes_can_be_expressions() -> None:
    assert sizes_of(TensorType(("T", "64*P_index", "2*T + 128"), "int64"), {"T": 3, "P_index": 2}) == (3, 128, 134)
    with pytest.raises(CompileError, match="cannot tell the size `Q`"):
        sizes_of(TensorType(("Q + 1",), "int64"), {"T": 3})


def test_what_cannot_be_asked_is_an_error(stitched: Program) -> None:
    with pytest.raises(ConfigError, match="no step has 4 tokens of 8 requests"):
        work_of(stitched, Sizes(4, 8, 16))
    with pytest.raises(ConfigError, match="more than the model's 512"):
        work_of(stitched, Sizes.decode(4, 1024))
    with pytest.raises(ConfigError, match="unknown machine `sm_80`"):
        work_of(stitched, SIZES, "sm_80")
    with pytest.raises(ConfigError, match="no entry point `decode`"):
        work_of(stitched, SIZES, entry="decode")
