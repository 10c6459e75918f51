"""Every pass does to the numbers what it claims: exact ones nothing, the others no more than their tolerance."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from torch import fx

from dsv4c.checkpoint.source import load_model_state
from dsv4c.config import StateLayout
from dsv4c.errors import ConfigError, PassError
from dsv4c.inputs import Inputs
from dsv4c.model import Transformer, init_state
from dsv4c.numerics import Check, Runs, broken, compare, on_equal_inputs
from dsv4c.passes import RAISE
from dsv4c.pipeline import Pass, Pipeline, Step
from dsv4c.program import Program, is_op
from dsv4c.schedules.select import SCHEDULES
from tests.numerics.conftest import ARCHS, SEEDS, Captured, Steps, random_config


def stitched(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """From the stitched program on."""
    return steps[next(i for i, step in enumerate(steps) if step.name == "stitch") + 1 :]


def complaints(program: Program, steps: tuple[Step, ...], runs: Runs) -> list[str]:
    """Of every pass whose claim does not hold on these inputs."""
    out = []
    last = runs.results(program)
    if not compare(last, runs.plain()).equal:
        out.append("capture")
    for step in steps:
        got = runs.results(step.after)
        found = compare(got, last)
        if not found.equal and not step.record.exact:
            found = on_equal_inputs(found, step.before, step.after, runs)
        if (wrong := broken(step.record, found)) is not None:
            out.append(f"{step.name}: {wrong}")
        last = got
    return out


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_pass_keeps_its_claim_on_random_configs(steps_of: Steps, seed: int, arch: str) -> None:
    """Capturing and raising are the same for every target: once is enough."""
    steps = steps_of(seed, arch)
    steps = steps if arch == "cpu" else stitched(steps)
    assert complaints(steps[0].before, steps, Runs(Inputs.random(random_config(seed), seed))) == []


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_reported_on_ten_seeds(steps_of: Steps, arch: str) -> None:
    steps = stitched(steps_of(SEEDS[-1], arch))
    for seed in range(10):
        runs = Runs(Inputs.random(steps[0].before.config, 100 + seed))
        assert complaints(steps[0].before, steps, runs) == [], f"seed {seed}"


def test_every_inexact_pass_and_every_schedule_states_a_number() -> None:
    for arch in ARCHS:
        for one in Pipeline.default(arch).passes:
            assert one.exact or (one.tolerance > 0 and one.why), one.name
            assert not one.exact or not one.tolerance, one.name
    assert all(0 <= s.tolerance < 1 for s in SCHEDULES)


def test_the_manifest_says_what_passes_claim(steps_of: Steps) -> None:
    steps = steps_of(SEEDS[0], "sm_90a")
    said = {s.name: s.record.tolerance for s in steps if not s.record.exact}
    assert said.keys() == {"fuse-stored-linears", "pack-state", "store-linears", "store-experts", "narrow-activations"}
    assert all(said.values())


@dataclasses.dataclass(frozen=True)
class HalveEps(Pass):
    """A fault that claims to be none."""

    name: ClassVar[str] = "halve-eps"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched"})
    scope: str = "L01.attn"

    def run(self, graph: fx.Graph) -> int:
        found = [n for n in graph.nodes if is_op(n, "rms_norm") and n.meta["scope"] == self.scope]
        for node in found:
            node.kwargs = {"eps": node.kwargs["eps"] / 2}
        return len(found)


class Careless(HalveEps):
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 0.5


class Silent(HalveEps):
    exact: ClassVar[bool] = False


def checked(one: Pass, program: Program) -> tuple[Step, Check]:
    for step in Pipeline((*RAISE, one)).steps(program):
        if step.name == one.name:
            return step, step.check(seed=3)
    raise AssertionError(one.name)


def test_a_step_says_what_changed_and_where_from(captured_config: Captured) -> None:
    step, found = checked(HalveEps(), captured_config(1))
    assert not found.equal and 0 < found.max_rel < 1 and found.max_abs > 0 and 0.9 < found.cosine < 1
    assert found.first_op == "`dsv4.rms_norm` in `L01.attn`"
    assert broken(step.record, found) == f"claims to be exact, and {found}"
    assert "first differs: `dsv4.rms_norm` in `L01.attn`" in str(found)


def test_an_inexact_pass_is_judged_on_equal_inputs(captured_config: Captured) -> None:
    step, found = checked(Careless(), captured_config(1))
    assert found.equal_inputs is not None and 0.01 < found.equal_inputs < 0.5
    assert found.worst_op == "`dsv4.rms_norm` in `L01.attn`"
    assert broken(step.record, found) is None
    strict = dataclasses.replace(step.record, tolerance=1e-12)
    assert "claims 1e-12 on equal inputs" in str(broken(strict, found))


def test_an_inexact_pass_without_a_tolerance_is_refused(captured_config: Captured) -> None:
    with pytest.raises(PassError, match="`halve-eps` is not exact and states no `tolerance`"):
        checked(Silent(), captured_config(1))


def test_a_step_that_changes_nothing_is_bit_equal(captured_config: Captured) -> None:
    steps = Pipeline.default("cpu").steps(captured_config(1))
    assert str(next(s for s in steps if s.name == "raise-hyper").check()) == "bit-equal"


def test_a_program_runs_at_any_stage(captured_config: Captured) -> None:
    """In pieces and lowered: the plain model's numbers."""
    program = captured_config(2)
    inputs = Inputs.random(program.config, 5)
    plain = Runs(inputs).plain()
    captured = program.run(inputs)
    lowered = Pipeline.default("cpu").run(program).run(inputs)
    rows = sum(len(ids) - 1 for ids in inputs.ids)
    assert captured["logits"].shape == (rows, program.config.vocab_size)
    assert set(captured) == set(plain) and all(torch.equal(captured[k], plain[k]) for k in plain)
    torch.testing.assert_close(lowered["mtp.logits"], plain["mtp.logits"], rtol=1e-4, atol=1e-4)
    assert torch.equal(program.run(seed=5)["logits"], captured["logits"])


def test_random_inputs_meet_the_clamp_and_every_kind_of_entry() -> None:
    config = random_config(1)
    inputs = Inputs.random(config, 0)
    assert len(inputs.ids[0]) > 2 * max(config.ratios)
    steps = inputs.steps(StateLayout())
    assert [len(step["seq_starts"]) for step in steps] == [1, 2, 2] and len(steps[2]["token_ids"]) == 2
    assert sum(len(step["token_ids"]) for step in steps) == sum(len(ids) - 1 for ids in inputs.ids)
    gates = []
    model = Transformer(config).eval()
    for layer in model.layers:
        layer.ffn.shared_experts.act.register_forward_pre_hook(lambda _, args: gates.append(args[0].detach()))
    model.load_state_dict(load_model_state(inputs.source))
    with torch.no_grad():
        model.run(steps[0], init_state(config, StateLayout(), 2, inputs.tokens))
    assert 0.02 < (torch.cat(gates) > config.swiglu_limit).float().mean() < 0.5


def test_inputs_of_one_token_are_refused() -> None:
    with pytest.raises(ConfigError, match="two tokens or more"):
        Inputs((torch.tensor([1]),), Inputs.random(random_config(1)).source)
