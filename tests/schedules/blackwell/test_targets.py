"""The Blackwell targets: what they are made for, which families they have, and that what is missing is refused."""

from __future__ import annotations

import pytest

from dsv4c.compile import Options, lower, plan_artifact
from dsv4c.config import ARCHS, NANO, Target
from dsv4c.errors import ScheduleError
from dsv4c.ops import VIEWS, Op
from dsv4c.program import Program
from dsv4c.schedules import blackwell
from dsv4c.schedules._gpu import ARCHS as TOOLCHAIN
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules.select import SCHEDULES

OPTIONS = Options(max_context=1024, max_tokens=64, max_requests=4)


@pytest.fixture(scope="module")
def nano() -> Program:
    return lower(NANO, OPTIONS, arch="sm_103a")


def test_every_target_has_a_machine_and_a_toolchain() -> None:
    assert set(ARCHS) == set(MACHINES) == {"cpu", *TOOLCHAIN}
    for arch in blackwell.TARGETS:
        machine = MACHINES[arch]
        assert machine.multiprocessors == 148 and not machine.measured
        assert machine.bytes_per_s > MACHINES["sm_90a"].bytes_per_s
        rates = machine.flops_per_s
        assert rates["fp32"] < rates["bf16"] < rates["fp8"] < rates["fp4"]
    assert MACHINES["sm_103a"].flops_per_s["fp4"] > 1.5 * MACHINES["sm_100a"].flops_per_s["fp4"]
    assert MACHINES["sm_103a"].memory_bytes > MACHINES["sm_100a"].memory_bytes


def test_grids_and_tiles_are_made_for_this_card() -> None:
    """Not for Hopper's 132 multiprocessors, nor with tiles that its matrix units alone take."""
    hyper = next(s for s in blackwell.SCHEDULES if s.name == "hc_pre_norm.triton_split")
    old = next(s for s in SCHEDULES if s.name == hyper.name and "sm_90a" in s.targets)
    assert hyper is not old and hyper.name == old.name
    queries = [s for s in SCHEDULES if s.name == "index_query.triton_rows"]
    assert sorted(target for s in queries for target in s.targets) == ["sm_100a", "sm_103a", "sm_90a"]


def test_no_schedule_of_a_gpu_is_on_offer_for_ops_it_lacks() -> None:
    for arch in blackwell.TARGETS:
        assert not [s.name for s in SCHEDULES if arch in s.targets and ("cpu" in s.targets or s.op == "*")]


def test_ops_without_a_native_schedule_are_refused_all_by_name(nano: Program) -> None:
    known = {s.op for s in SCHEDULES if "sm_103a" in s.targets}
    missing = {n.target.name for n in nano.nodes() if isinstance(n.target, Op)} - VIEWS - known
    if not missing:
        assert plan_artifact(nano, Target("sm_103a"), OPTIONS).choices
        return
    with pytest.raises(ScheduleError) as error:
        plan_artifact(nano, Target("sm_103a"), OPTIONS)
    assert all(f"`{op}`" in error.value.message for op in missing)
