"""Each of twelve faults is caught by verify, which names its pass, and found by bisect, down to the op."""

from __future__ import annotations

import dataclasses
import math
from itertools import chain

import pytest

from dsv4c.bisecting import Side, bisect_lineage, bisect_pair, halved
from dsv4c.inputs import Inputs
from dsv4c.lineage import of_steps
from dsv4c.numerics import Runs
from dsv4c.pipeline import Pipeline
from dsv4c.verifying import Case, verify_lineage
from tests.numerics.conftest import ARCHS, Steps, random_config
from tests.numerics.faults import FAULTS, Fault

CONFIG = 1  # its first layer sees a window alone, its second all entries, its third picks


def runs(seed: int = 0) -> Runs:
    return Runs(Inputs.random(random_config(CONFIG), seed))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_is_caught_and_named(steps_of: Steps, fault: Fault) -> None:
    lineage = fault.lineage(steps_of(CONFIG, fault.arch))
    found = verify_lineage(lineage, [Case("random", runs())])
    assert [row.name for row in found.broken] == [fault.at], found.broken
    asked = runs()
    named = bisect_lineage(lineage, asked)
    assert (named.kind, named.cause) == ("pass", fault.at), named
    assert named.op is not None and f"`dsv4.{fault.op}` in `{fault.scope}`" in named.op, named
    stages = sum(stage.changed for stage in lineage)
    assert named.runs == asked.count <= few(stages, len(named.kept)), named
    print(f"{fault.name}: {named.runs} runs of {stages} stages; {named.op}")


def few(stages: int, kept: int) -> int:
    """Both ends, a halving and two looks at the pass that is named; as much for every pass that keeps its claim."""
    return 2 + (kept + 1) * (math.ceil(math.log2(stages)) + 2)


@pytest.mark.parametrize("arch", ARCHS)
def test_bisect_blames_nothing_where_every_claim_holds(steps_of: Steps, arch: str) -> None:
    """On ten seeds; so does verify: tests/numerics/test_claims.py."""
    lineage = of_steps(steps_of(CONFIG, arch))
    inexact = {stage.name for stage in lineage if not stage.exact}
    for seed in range(10):
        found = bisect_lineage(lineage, runs(seed))
        assert found.ok and not found.cause and set(found.kept) <= inexact, found
        assert found.runs <= few(len(lineage), len(found.kept)), found


def test_verify_reports_nothing_on_an_unmutated_pipeline(steps_of: Steps) -> None:
    lineage = of_steps(steps_of(CONFIG, "cpu"))
    found = verify_lineage(lineage, [Case(f"seed {seed}", runs(seed)) for seed in range(10)])
    assert found.ok and not found.broken


@pytest.mark.parametrize("fault", [FAULTS[0], FAULTS[5], FAULTS[9]], ids=lambda fault: fault.name.replace(" ", "-"))
def test_two_programs_part_behind_the_pass_that_differs(steps_of: Steps, fault: Fault) -> None:
    steps = steps_of(CONFIG, fault.arch)
    right, wrong = Side("right", of_steps(steps), runs()), Side("wrong", fault.lineage(steps), runs())
    found = bisect_pair(right, wrong)
    assert (found.kind, found.cause) == ("pass", fault.at)
    assert found.op is not None and fault.scope in found.op
    assert found.runs == right.runs.count + wrong.runs.count <= 2 * (math.ceil(math.log2(len(steps))) + 2)


def test_two_programs_of_other_weights_part_at_once(steps_of: Steps) -> None:
    lineage = of_steps(steps_of(CONFIG, "cpu"))
    config = random_config(CONFIG)
    other = Inputs(Inputs.random(config, 0).ids, Inputs.random(config, 1).source)
    found = bisect_pair(Side("a", lineage, runs()), Side("b", lineage, Runs(other)))
    assert (found.kind, found.cause) == ("model", "capture") and "weights" in found.said


def test_a_pass_of_only_one_of_two_programs_is_named(steps_of: Steps) -> None:
    steps = steps_of(CONFIG, "cpu")
    index = [step.name for step in steps].index("fuse-linears")
    rest = Pipeline.default("cpu").without("fuse-linears")
    left = {step.name for step in steps[:index]}
    rest = dataclasses.replace(rest, passes=tuple(p for p in rest.passes if p.name not in {*left, "check-lowered"}))
    apart = of_steps(chain(steps[:index], rest.steps(steps[index].before)))
    found = bisect_pair(Side("a", apart, runs()), Side("b", of_steps(steps), runs()))
    assert found.kind == "pass" and found.cause.startswith("fuse-linears (only in b)"), found
    assert 0 < found.observed.max_rel < 1e-4


@pytest.mark.parametrize("count", [1, 2, 3, 10, 31])
def test_halving_asks_few_questions(count: int) -> None:
    for first in range(1, count + 1):
        asked: list[int] = []

        def shows(index: int, first: int = first, asked: list[int] = asked) -> bool:
            asked.append(index)
            return index >= first

        assert halved(0, count, shows) == first
        assert len(asked) <= math.ceil(math.log2(count)) if count > 1 else not asked
