"""Every schedule of Blackwell has a check in the interpreter and one on an H200, or says why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv4c.schedules import blackwell

from . import on_hopper
from .coverage import COVERAGE
from .shared_cases import shared

SCHEDULES = blackwell.schedules("sm_103a")
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("arch", blackwell.TARGETS)
def test_every_schedule_has_its_checks(arch: str) -> None:
    names = [schedule.name for schedule in blackwell.schedules(arch)]
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(COVERAGE)
    assert all((REPOSITORY / f"tests/schedules/blackwell/{one.script}.py").exists() for one in COVERAGE.values())


def test_both_targets_list_the_same_configs() -> None:
    """What is checked with the configs of `sm_103a` is checked for `sm_100a`."""
    first, second = ({s.name: s for s in blackwell.schedules(arch)} for arch in blackwell.TARGETS)
    for family in on_hopper.FAMILIES:
        for work in on_hopper.workloads_of(family):
            for name, schedule in first.items():
                if schedule.op == work.op and schedule.accepts(work.node) is None:
                    assert schedule.space(work.node, work.symbols) == second[name].space(work.node, work.symbols)


def test_the_card_runs_what_the_table_says() -> None:
    ran = {"experts": {on_hopper.expert_choice(fmt, cases).schedule for fmt, cases in on_hopper.expert_cases()}}
    for family in on_hopper.FAMILIES:
        ran[family] = {choice.schedule for _, choice in on_hopper.map_choices(family)}
    said: dict[str, set[str]] = {part: set() for part in ran}
    for name, one in COVERAGE.items():
        if one.on_card:
            said[one.card].add(name)
        else:
            assert name in on_hopper.NOT_HERE and one.card == on_hopper.NOT_HERE[name]
    assert ran == said


def test_shared_schedules_in_the_interpreter() -> None:
    """With 200 cases of each: `python -m tests.schedules.blackwell.interpret_shared 200`."""
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    command = [sys.executable, "-m", "tests.schedules.blackwell.interpret_shared", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines() == ["ok   canaries", *(f"ok   {one.name}" for one in shared(SCHEDULES))]


@pytest.mark.parametrize("script", sorted({one.script for one in COVERAGE.values() if one.parts}))
def test_the_interpreters_scripts_have_these_parts(script: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; see the extra `gpu`")
    command = [sys.executable, "-m", f"tests.schedules.blackwell.{script}", "1", "no such part"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    known = done.stderr.strip().rpartition(", only ")[2].split(", ")
    parts = {part for one in COVERAGE.values() if one.script == script for part in one.parts}
    assert parts <= set(known), done.stderr
