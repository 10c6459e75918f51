"""The pipeline's contract: solved order, checked claims, and numerics pass by pass against the plain model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

from dsv4c.capturing import capture
from dsv4c.errors import ConfigError, PassError
from dsv4c.interpret import run
from dsv4c.model import Transformer, init_state, make_step
from dsv4c.passes import FUSE, RAISE, WIDEN, CheckLowered, Quantise, default_pipeline
from dsv4c.pipeline import Pass, Pipeline, order
from dsv4c.program import Program
from dsv4c.weights import stored_formats
from tests.passes.conftest import LAYOUT, SMALL

ALL = (*RAISE, *FUSE, *WIDEN, Quantise(), CheckLowered())
TOKENS = 60


@given(st.permutations(ALL))
def test_any_permutation_gives_one_order(passes: list[Pass]) -> None:
    assert [p.name for p in order(passes)] == [p.name for p in order(ALL)]


@torch.no_grad()
def test_every_pass_keeps_its_promise_on_numbers(captured: Program, model: Transformer) -> None:
    """Exact passes keep every bit of logits, streams and state; the others stay within 1e-5."""
    ids = torch.randint(0, SMALL.vocab_size, (2, TOKENS))
    state = init_state(SMALL, LAYOUT, 2, TOKENS)
    first = make_step(SMALL, LAYOUT, [(0, 0, ids[0, :37]), (1, 0, ids[1, :20])], TOKENS)
    second = make_step(SMALL, LAYOUT, [(1, 20, ids[1, 20:]), (0, 37, ids[0, 37:38])], TOKENS)
    weights = dict(model.state_dict())
    _, state = model(first, state)
    streams, after = model.run(second, state)
    last = {"logits": model.logits(streams[-1], second["logit_rows"]), "streams": streams[-1]}
    last.update({f"state.{k}": v for k, v in after.items() if not k.startswith("mtp")})
    checked = 0
    for step in default_pipeline(stored_formats(SMALL)).steps(captured):
        if "stitched" not in step.after.facts:
            continue
        got = run(step.after, "step", second, state, weights)
        assert set(got) == set(last)
        for name, expected in last.items():
            if step.record.exact:
                assert torch.equal(got[name], expected), f"{step.name} changed {name}"
            else:
                torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-5, msg=f"{step.name}: {name}")
        last, checked = got, checked + 1
    assert checked >= 8


@torch.no_grad()
def test_mtp_program_equals_the_plain_model(captured: Program, model: Transformer) -> None:
    ids = torch.randint(0, SMALL.vocab_size, (1, TOKENS))
    state = init_state(SMALL, LAYOUT, 1, TOKENS)
    step = make_step(SMALL, LAYOUT, [(0, 0, ids[0, :-1])], TOKENS)
    streams, state = model.run(step, state)
    expected, _ = model.mtp_logits(streams[-1], ids[0, 1:], step, state)
    lowered = default_pipeline(stored_formats(SMALL)).run(captured)
    inputs = {**step, "streams": streams[-1], "next_ids": ids[0, 1:]}
    got = run(lowered, "mtp", inputs, state, dict(model.state_dict()))
    torch.testing.assert_close(got["logits"], expected, rtol=1e-5, atol=1e-5)


def test_lowered_program_has_only_ops_of_the_dialect(captured: Program) -> None:
    lowered = default_pipeline(stored_formats(SMALL)).run(captured)
    assert "aten." not in lowered.dump()
    assert "lowered" in lowered.facts
    assert [r.name for r in lowered.history] == [p.name for p in order(ALL)]


def test_the_same_program_prints_the_same_text(captured: Program) -> None:
    pipeline = default_pipeline(stored_formats(SMALL))
    assert pipeline.run(captured).dump() == pipeline.run(captured).dump()


def test_passes_change_nothing_when_run_again(captured: Program) -> None:
    lowered = default_pipeline(stored_formats(SMALL)).run(captured)
    for one in (*FUSE, *WIDEN):
        again = lowered.clone()
        assert one.apply(again) == 0, one.name
        assert again.dump() == lowered.dump()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=5)
@given(st.permutations((*FUSE, *WIDEN)))
def test_without_some_fusions_the_rest_still_runs(captured: Program, fusions: list[Pass]) -> None:
    kept = [p for p in fusions[:2] if p.needs <= {"stitched"}]
    assert Pipeline((*RAISE, *kept)).run(captured).history


@dataclasses.dataclass(frozen=True)
class Liar(Pass):
    name: ClassVar[str] = "liar"

    def run(self, graph: fx.Graph) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class Boaster(Pass):
    name: ClassVar[str] = "boaster"
    gives: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: fx.Graph) -> int:
        return 0


def test_a_wrong_rewrite_count_is_an_error(captured: Program) -> None:
    with pytest.raises(PassError, match=r"`liar` reports \d+ rewrites but the program's text is the same"):
        Pipeline((Liar(),)).run(captured)


def test_a_false_fact_is_an_error_that_names_the_pass_and_a_node(captured: Program) -> None:
    with pytest.raises(PassError, match=r"after pass `boaster` the fact `lowered` does not hold at `%.*aten"):
        Pipeline((Boaster(),)).run(captured)


def test_a_need_that_nothing_gives_is_an_error() -> None:
    with pytest.raises(PassError, match="`raise-norm` needs `canonical`, which nothing before it gives"):
        order([p for p in RAISE if p.name == "raise-norm"])


def test_an_unknown_pass_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean `fuse-hc-norm`"):
        default_pipeline({}).without("fuse-hc-nrom")


def test_fake_quantisation_lowers_too_and_stays_between_rotation_and_write() -> None:
    captured = capture(SMALL, LAYOUT, fake_quant=True)
    lowered = default_pipeline(stored_formats(SMALL)).run(captured)
    writes = lowered.find("dsv4.page_write")
    assert writes and not lowered.find("dsv4.norm_rope_write")
    assert {w.args[2].target.name for w in writes} == {"quantise_kv", "quantise_index"}
