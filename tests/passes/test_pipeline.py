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
from dsv4c.errors import ConfigError, PassError, RaiseError
from dsv4c.interpret import run
from dsv4c.model import Transformer, init_state, make_step
from dsv4c.passes import FUSE, RAISE, WIDEN, CheckLowered, Quantise, default_pipeline
from dsv4c.pipeline import Pass, Pipeline, order
from dsv4c.program import Program
from dsv4c.weights import stored_formats
from tests.passes.conftest import LAYOUT, SMALL

ALL = (*RAISE, *FUSE, *WIDEN, Quantise(), CheckLowered())
LATE = Pipeline((*FUSE, *WIDEN, Quantise(), CheckLowered()))
"""What runs behind the stitch."""
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


def test_a_pass_that_says_nothing_of_its_rewrites_is_an_error_that_shows_the_first(stitched: Program) -> None:
    @dataclasses.dataclass(frozen=True)
    class Silent(Pass):
        name: ClassVar[str] = "silent"

        def run(self, graph: fx.Graph) -> int:
            for node in [n for n in graph.nodes if n.op == "call_function" and "rms_norm" in str(n.target)]:
                node.kwargs = {"eps": 0.5}
            return 0

    with pytest.raises(
        PassError, match=r"`silent` reports 0 rewrites but the program's text is changed, first at `-  %"
    ):
        Pipeline((Silent(),)).run(stitched)


def test_a_pass_that_raises_is_an_error_that_names_it_and_what_ran_before(captured: Program) -> None:
    @dataclasses.dataclass(frozen=True)
    class Faulty(Pass):
        name: ClassVar[str] = "faulty"

        def run(self, graph: fx.Graph) -> int:
            return len(graph.nodes) // 0

    with pytest.raises(
        PassError, match=r"pass `faulty` raised ZeroDivisionError: .* \(.*test_pipeline.py, line"
    ) as error:
        Pipeline.default("cpu").with_(Faulty(), after="canonicalize").run(captured)
    assert error.value.hint == "ran before: canonicalize"


def test_any_error_of_dsv4c_that_a_pass_raises_keeps_its_class_and_names_the_pass(stitched: Program) -> None:
    @dataclasses.dataclass(frozen=True)
    class Choosy(Pass):
        name: ClassVar[str] = "choosy"

        def run(self, graph: fx.Graph) -> int:
            raise ConfigError("no such format", hint="take fp8")

    with pytest.raises(ConfigError, match="pass `choosy`: no such format") as error:
        Pipeline((Choosy(),)).run(stitched)
    assert error.value.hint.startswith("take fp8; ran before: canonicalize, ")


def test_an_error_of_a_raising_pass_keeps_its_class_and_names_the_pass(captured: Program) -> None:
    changed = captured.clone()
    node = changed.find("aten.rsqrt.default")[0]
    node.target = torch.ops.aten.sqrt.default
    with pytest.raises(RaiseError, match=r"pass `raise-\w+`: module `.*` .* is not `dsv4\.") as error:
        Pipeline.default("cpu").run(changed)
    assert "ran before: canonicalize" in error.value.hint


@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (lambda graph: None, r"returned None, not the number of its rewrites"),
        (lambda graph: "all", r"returned 'all', not the number"),
    ],
)
def test_a_pass_that_counts_nothing_is_an_error(captured: Program, leave: object, message: str) -> None:
    @dataclasses.dataclass(frozen=True)
    class Uncounted(Pass):
        name: ClassVar[str] = "uncounted"

        def apply(self, program: Program) -> int:
            return leave(program)  # type: ignore[operator,no-any-return]

    with pytest.raises(PassError, match=f"pass `uncounted` {message}"):
        Pipeline((Uncounted(),)).run(captured)


def test_a_call_without_a_type_and_a_broken_graph_are_errors(stitched: Program) -> None:
    @dataclasses.dataclass(frozen=True)
    class Untyped(Pass):
        name: ClassVar[str] = "untyped"

        def run(self, graph: fx.Graph) -> int:
            found = [n for n in graph.nodes if n.op == "call_function" and "rms_norm" in str(n.target)]
            for node in found:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(node.target, node.args, node.kwargs))
            return len(found)

    @dataclasses.dataclass(frozen=True)
    class Backwards(Pass):
        name: ClassVar[str] = "backwards"

        def run(self, graph: fx.Graph) -> int:
            next(iter(graph.nodes)).prepend(next(n for n in graph.nodes if n.op == "call_function"))
            return 1

    with pytest.raises(PassError, match=r"`untyped` leaves `%.* = dsv4.rms_norm\(.*` .*without `meta\['type'\]`"):
        Pipeline((Untyped(),)).run(stitched)
    with pytest.raises(PassError, match=r"`backwards` leaves graph `step` broken"):
        Pipeline((Backwards(),)).run(stitched)


class Contract(Pass):
    """A pass that rewrites nothing, for its facts."""

    def __init__(self, name: str, needs: str = "", gives: str = "", breaks: str = "") -> None:
        for key, value in (("name", name), *((k, frozenset(v.split())) for k, v in
                           (("needs", needs), ("gives", gives), ("breaks", breaks)))):  # fmt: skip
            object.__setattr__(self, key, value)

    def run(self, graph: fx.Graph) -> int:
        return 0


def test_a_cycle_of_needs_is_an_error_that_shows_it() -> None:
    passes = [Contract("a", "x", "y"), Contract("b", "y", "z"), Contract("c", "z", "x"), Contract("start", gives="s")]
    with pytest.raises(PassError, match="`a` needs `x` of `c`, `c` needs `z` of `b`, `b` needs `y` of `a`") as error:
        order(passes)
    assert error.value.hint == "ran before: start"


def test_a_fact_without_a_checker_is_an_error_and_a_pass_may_bring_one(captured: Program) -> None:
    @dataclasses.dataclass(frozen=True)
    class Tidy(Contract):
        name: ClassVar[str] = "tidy"
        gives: ClassVar[frozenset[str]] = frozenset({"tidy"})

    @dataclasses.dataclass(frozen=True)
    class Checked(Tidy):
        checkers = {"tidy": lambda program: program.find("dsv4.rope")[:1]}  # noqa: RUF012

    with pytest.raises(PassError, match="after pass `tidy`: nothing checks the fact `tidy`"):
        Pipeline((Tidy(),)).run(captured)
    assert "tidy" in Pipeline((Checked(),)).run(captured).facts
    ropes = Pipeline(tuple(p for p in RAISE if p.name in ("canonicalize", "raise-rope")))
    with pytest.raises(
        PassError, match=r"after pass `raise-rope` the fact `tidy` does not hold at `%\w+ = dsv4.rope\("
    ):
        ropes.with_(Checked(), after="canonicalize").run(captured)


def test_a_pass_can_run_directly_after_another() -> None:
    pipeline = Pipeline.default("cpu").with_(Contract("mine"), after="fuse-hc-norm").with_(Contract("zz"), after="mine")
    names = [p.name for p in pipeline.ordered()]
    assert names[names.index("fuse-hc-norm") :][:3] == ["fuse-hc-norm", "mine", "zz"]
    assert [n for n in names if n not in ("mine", "zz")] == [p.name for p in Pipeline.default("cpu").ordered()]


@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
def test_without_a_pass_the_others_keep_their_order(target: str) -> None:
    """Whoever needed what only it gave runs where it would have run, not before what that needed."""
    pipeline = Pipeline.default(target)
    for name in (p.name for p in pipeline.passes):
        rest = [p for p in pipeline.ordered() if p.name != name]
        shorter = pipeline.without(name).ordered()
        given: set[str] = set()
        for one in shorter:
            mine = {f for p in pipeline.passes if p.name == name for f in p.gives}
            assert one.needs - mine <= given, f"`{one.name}` without `{name}`"
            if one.needs & mine:
                assert pipeline.named(name).needs <= given, f"`{one.name}` without `{name}`"
            given |= one.gives
        assert sorted(p.name for p in shorter) == sorted(p.name for p in rest)


def test_passes_removed_one_after_the_other_leave_what_the_first_needed() -> None:
    chain = Pipeline((Contract("a", "", "x"), Contract("b", "x", "y"), Contract("c", "y", "z"), Contract("aa", "z")))
    assert [p.name for p in chain.without("b").without("c").ordered()] == ["a", "aa"]
    assert [p.name for p in chain.without("c").without("b").ordered()] == ["a", "aa"]
    assert [p.name for p in chain.without("b").with_(Contract("bb", "x", "y")).ordered()] == ["a", "bb", "c", "aa"]
    late = chain.without("b").ordered({"y"})
    assert [p.name for p in late] == ["a", "c", "aa"]


def test_where_a_pass_cannot_run_is_an_error() -> None:
    pipeline = Pipeline.default("cpu")
    with pytest.raises(PassError, match="`mine` is to run directly after `canonicalize` but needs `stitched`, which"):
        pipeline.with_(Contract("mine", "stitched"), after="canonicalize").ordered()
    with pytest.raises(ConfigError, match="has a pass `stitch` already"):
        pipeline.with_(Contract("stitch"))
    with pytest.raises(ConfigError, match="did you mean `stitch`"):
        pipeline.with_(Contract("mine"), after="stich")
    with pytest.raises(ConfigError, match="`mine` is to run directly after `stitch`"):
        pipeline.with_(Contract("mine"), after="stitch").without("stitch")
    with pytest.raises(ConfigError, match="did you mean `cpu`"):
        Pipeline.default("cpuu")


@torch.no_grad()
@pytest.mark.parametrize("name", [p.name for p in (*FUSE, *WIDEN)])
def test_without_any_fusion_the_pipeline_still_lowers_to_the_same_logits(
    stitched: Program, model: Transformer, name: str
) -> None:
    ids = torch.randint(0, SMALL.vocab_size, (TOKENS,))
    step, state = make_step(SMALL, LAYOUT, [(0, 0, ids)], TOKENS), init_state(SMALL, LAYOUT, 1, TOKENS)
    logits, _ = model(step, state)
    lowered = LATE.without(name).run(stitched)
    assert "lowered" in lowered.facts and name not in [r.name for r in lowered.history]
    got = run(lowered, "step", step, state, dict(model.state_dict()))
    torch.testing.assert_close(got["logits"], logits, rtol=1e-5, atol=1e-5)


def test_a_step_knows_the_facts_after_it(captured: Program) -> None:
    steps = {step.name: step for step in Pipeline.default("cpu").steps(captured)}
    assert steps["stitch"].facts == steps["raise-rope"].facts | {"stitched"}
    assert not steps["raise-quant"].changed and steps["stitch"].changed
