"""Hyper-connections of few tokens: which form each number takes, their code, and the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv4c.artifact import Kernel
from dsv4c.schedules import blackwell
from dsv4c.schedules._schedule import OpNode, Schedule
from dsv4c.schedules.hopper import hyper_few
from dsv4c.schedules.select import select
from dsv4c.schedules.workloads.hyper import node

REPOSITORY = Path(__file__).parents[3]
FUSED = "hc_post_pre_norm_quantise"
CARD = [schedule for schedule in blackwell.SCHEDULES if "sm_103a" in schedule.targets]


def _way(op: str, model: str, tokens: int) -> tuple[str, object, bool]:
    choice = select(node(op, model), "sm_103a", {"T": tokens}, None, CARD)
    return choice.schedule.partition(".")[2], choice.config.get("tile"), bool(choice.config.get("turned"))


def test_one_launch_for_few_tokens_then_small_tiles_then_large() -> None:
    for op in (FUSED, "hc_pre_norm_quantise", "hc_head_norm"):
        assert _way(op, "flash", 1) == _way(op, "flash", 7) == _way(op, "pro", 1) == ("triton_cluster", None, False)
        assert _way(op, "flash", 32) == _way(op, "flash", 64) == ("triton_split", 16, True)
        assert _way(op, "pro", 64) == _way(op, "flash", 256) == ("triton_split", 32, True)
        assert _way(op, "flash", 8192) == ("triton_split", 64, False)


def test_turns_count_what_a_card_holds() -> None:
    what, config = node(FUSED, "flash"), {"blocks": 16, "warps": 4}
    assert [hyper_few.turns(what, tokens, config, 132) for tokens in (0, 1, 7, 8, 14, 15)] == [0, 1, 1, 2, 2, 3]
    assert hyper_few.turns(node("hc_head", "flash"), 14, config, 132) == 1
    assert hyper_few.turns(node(FUSED, "pro"), 4, {"blocks": 16, "warps": 8}, 132) == 2


def test_channels_that_no_cluster_holds_are_refused() -> None:
    (schedule,) = (s for s in hyper_few.schedules("sm_103a") if s.op == "hc_pre")
    what = node("hc_pre", "pro")
    wide = OpNode(what.op, what.attrs, (_wider(what), *what.inputs[1:]), what.outputs)
    assert "of which a cluster holds 8192" in str(schedule.accepts(wide))


def _wider(what: OpNode) -> object:
    import dataclasses

    value = what.inputs[0]
    assert value is not None
    return dataclasses.replace(value, shape=("T", 4, 16384))


def _audited(schedule: Schedule, what: OpNode, tokens: int, cache: Path) -> dict[str, int]:
    """Matrix instructions of the schedule's launches by name; nothing else may be wrong with them."""
    from dsv4c.schedules._gpu import Request, compile_launch
    from dsv4c.schedules.audit import faults, read

    config = schedule.space(what, {"T": tokens})[0]
    values = (*what.inputs, *schedule.workspace(what, config), *what.outputs)
    kernel = Kernel(what.op, "gpu", what.op, schedule.name, "", 0.0, "", op_attrs=dict(what.attrs))
    matrix: dict[str, int] = {}
    for launch in schedule.build(what, config).launches:
        made = compile_launch(Request(what.op, launch, values, "sm_103a"), cache)
        code = read(made.image)
        assert faults(kernel, made.record, code, "sm_103a") == []
        matrix |= code.matrix
        assert made.record.cluster[0] == config.get("blocks", 1)
    return matrix


@pytest.mark.parametrize(("op", "model"), [(FUSED, "flash"), (FUSED, "pro"), ("hc_head_norm", "nano")])
def test_code_of_the_cluster_has_no_matrix_instruction(op: str, model: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    (schedule,) = (s for s in CARD if s.name == f"{op}.triton_cluster")
    assert _audited(schedule, node(op, model), 1, tmp_path) == {}


@pytest.mark.parametrize("tokens", [16, 64, 128])
def test_code_of_small_tiles_has_the_matrix_instruction_of_this_card(tokens: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    (schedule,) = (s for s in CARD if s.name == f"{FUSED}.triton_split")
    assert set(_audited(schedule, node(FUSED, "flash"), tokens, tmp_path)) == {"UTCHMMA"}


def test_few_tokens_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    command = [sys.executable, "-m", "tests.schedules.blackwell.interpret_hyper", "3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all(line.startswith("ok") for line in lines)
