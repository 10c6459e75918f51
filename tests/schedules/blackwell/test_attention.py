"""Attention and index scores in tensor memory: what is accepted, numerics in the interpreter, machine code."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4c.artifact import Kernel
from dsv4c.schedules._gpu import Compiled, Request, compile_launch
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import Config, OpNode, Schedule, Value
from dsv4c.schedules.audit import Code, faults, read
from dsv4c.schedules.blackwell import attention, index
from dsv4c.schedules.workloads.attention import Case, Kind, node, workload
from dsv4c.schedules.workloads.index import Case as IndexCase
from dsv4c.schedules.workloads.index import scores

REPOSITORY = Path(__file__).resolve().parents[3]
SCHEDULES = (*attention.schedules("sm_103a"), *index.schedules("sm_103a"))
KINDS: tuple[Kind, ...] = ("window", "csa", "hca")


def schedule_of(name: str) -> Schedule:
    return next(s for s in SCHEDULES if s.name == name)


def answers(what: OpNode) -> dict[str, str | None]:
    return {s.name.partition(".")[2]: s.accepts(what) for s in SCHEDULES if s.op == what.op}


@pytest.mark.parametrize("kind", KINDS)
def test_wide_entries_have_a_kernel_of_their_own(kind: Kind) -> None:
    for model in ("flash", "pro"):
        found = answers(node(model, kind))
        assert found["triton_wide"] is None and "512 channels" in str(found["triton_gather"])
    nano = answers(node("nano", kind))
    assert nano == {"triton_wide": "entries of 64 channels, 32 of them rotated: not 512 and 64", "triton_gather": None}


def test_refusals_name_the_reason() -> None:
    one = node("flash", "csa")
    odd = dataclasses.replace(one, attrs={**one.attrs, "entries_per_page": 48})
    strided = dataclasses.replace(
        one, inputs=(Value(("T", 64, 512), "bfloat16", strides=(65536, 512, 1)), *one.inputs[1:])
    )
    assert answers(odd)["triton_wide"] == "48 entries a page are no power of two"
    assert answers(strided)["triton_wide"] == "q is strided"


@pytest.mark.parametrize(("tokens", "shares"), [(0, 10), (1, 10), (16, 9), (64, 2), (128, 1), (4096, 1)])
def test_few_tokens_share_out_their_keys(tokens: int, shares: int) -> None:
    one, schedule = workload(Case("flash", "csa", ((8191, 1),), "x")), schedule_of("attend_csa_packed.triton_wide")
    configs = schedule.space(one.node, {**one.symbols, "T": tokens})
    assert configs[0]["shares"] == shares
    assert len(schedule.build(one.node, configs[0]).launches) == (2 if shares > 1 else 1)


def built(what: OpNode, name: str, config: Config, cache: Path) -> tuple[Compiled, Code, list[str]]:
    """The first launch of a schedule, its code, and what breaks its promise."""
    schedule = schedule_of(name)
    launch = schedule.build(what, config).launches[0]
    assert isinstance(launch, TritonLaunch)
    values = (*what.inputs, *schedule.workspace(what, config), *what.outputs)
    made = compile_launch(Request(what.op, launch, values, "sm_103a"), cache)
    code = read(made.image)
    kernel = Kernel(what.op, "gpu", what.op, name, "", 0.0, "", op_attrs=dict(what.attrs))
    return made, code, faults(kernel, made.record, code, "sm_103a")


@pytest.mark.parametrize(("model", "kind", "shares"), [("flash", "csa", 2), ("pro", "hca", 1)])
def test_sums_stay_in_tensor_memory(model: str, kind: Kind, shares: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    config = {"warps": 8, "stages": 4, "shares": shares}
    made, code, found = built(node(model, kind), f"attend_{kind}_packed.triton_wide", config, tmp_path)
    assert found == [] and not code.local
    # scores: 32 products of 16 channels; values: 4 of 16 keys for each of 4 parts of the channels; the loop is peeled
    assert code.matrix["UTCHMMA"] % (32 + 16) == 0
    # queries, one tile of keys and the bytes of the next: keys lie in shared memory once
    assert 64 * 512 * 2 * 2 + 64 * 576 < made.record.shared < 3 * 64 * 512 * 2


@pytest.mark.parametrize(("way", "form"), [("tiles", "fp4"), ("runs", "fp4"), ("runs", "fp8")])
def test_keys_are_multiplied_as_they_lie(way: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    what = scores(IndexCase("flash", form, ((8191, 1),), "x"))  # type: ignore[arg-type]
    config = schedule_of(f"index_scores.triton_{way}").space(what.node, what.symbols)[0]
    _, code, found = built(what.node, f"index_scores.triton_{way}", config, tmp_path)
    assert found == [] and set(code.matrix) == {"UTCQMMA"}


@pytest.mark.parametrize(("script", "cases", "lines"), [
    ("interpret_attention", "3", ["ok   widen", "ok   attention"]), ("interpret_index", "2", ["ok   fp8", "ok   fp4"]),
])  # fmt: skip
def test_kernels_give_what_float64_gives_in_the_interpreter(script: str, cases: str, lines: list[str]) -> None:
    """With 200 cases of each kind: `python -m tests.schedules.blackwell.interpret_attention 200`, and `_index`."""
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    command = [sys.executable, "-m", f"tests.schedules.blackwell.{script}", cases]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines() == lines
