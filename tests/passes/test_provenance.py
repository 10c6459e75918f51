"""Every call of a final program knows the model's lines and the passes that it comes from."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

import pytest
from torch import fx

import dsv4c.model
from dsv4c.ops import OPS
from dsv4c.passes import FUSE, WIDEN, CheckLowered, Quantise
from dsv4c.pipeline import Pass, Pipeline
from dsv4c.program import Program, is_op
from dsv4c.provenance import is_call, origin_of, passes_of

LATE = Pipeline((*FUSE, *WIDEN, Quantise(), CheckLowered()))
MODEL = Path(dsv4c.model.__file__).parent


@pytest.fixture(scope="session")
def lowered(stitched: Program) -> Program:
    return LATE.run(stitched)


def places(program: Program, op: str, scope: str) -> list[tuple[str, ...]]:
    return [origin_of(n) for n in program.find(f"dsv4.{op}") if n.meta["scope"] == scope]


def texts(origin: tuple[str, ...]) -> list[str]:
    return [place.split(" ")[0] for place in origin]


def test_every_captured_call_in_a_leaf_names_a_line_of_the_model(captured: Program) -> None:
    for node in captured.nodes():
        if is_call(node) and "leaf" in node.meta:
            (place,) = origin_of(node)
            assert passes_of(node) == ()
            file, line = re.fullmatch(r"(\w+\.py):[\w.<>]+ `(.+)`", place).groups()  # type: ignore[union-attr]
            assert line in (MODEL / file).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("without", [None, "fuse-hc-norm", "fuse-linears", "fuse-norm-rope-write"])
def test_no_call_of_a_final_program_is_without(stitched: Program, without: str | None) -> None:
    program = (LATE.without(without) if without else LATE).run(stitched)
    names = {record.name for record in program.history}
    calls = [n for n in program.nodes() if is_call(n)]
    assert calls
    for node in calls:
        assert origin_of(node) and not any(place.startswith("pass ") for place in origin_of(node)), node.format_node()
        assert passes_of(node) and set(passes_of(node)) <= names
        assert list(origin_of(node)) == sorted(set(origin_of(node)))
        assert list(passes_of(node)) == [r.name for r in program.history if r.name in passes_of(node)]


def test_a_fused_call_has_the_lines_of_its_parts_and_no_others(lowered: Program) -> None:
    (attention,), (ffn,) = (
        places(lowered, "hc_post_pre_norm", "L02.attn"),
        places(lowered, "hc_post_pre_norm", "L02.ffn"),
    )
    assert [place.split(" ", 1)[1] for place in attention] == [
        "`x, post, comb = self.attn_hc_pre(x_TND, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)`",
        "`y, state = self.attn(self.attn_norm(x), state, step)`",
        "`out: Tensor = self.ffn_hc_post(y, x_TND, post, comb)`",
    ]
    assert texts(attention) == ["block.py:Block.attention"] * 2 + ["block.py:Block.feed_forward"]
    assert texts(ffn) == ["block.py:Block.attention"] + ["block.py:Block.feed_forward"] * 2
    node = next(n for n in lowered.find("dsv4.hc_post_pre_norm") if n.meta["scope"] == "L02.attn")
    assert passes_of(node) == ("raise-hyper", "raise-norm", "stitch", "fuse-hc-norm", "fuse-hc-post-pre")


def test_one_call_for_several_and_what_reads_it_know_whose_they_are(lowered: Program) -> None:
    linear = next(n for n in lowered.find("dsv4.linear") if n.meta["scope"] == "L00.attn" and len(n.users) > 1)
    columns = [n for n in linear.users if is_op(n, "columns")]
    assert {place for n in columns for place in origin_of(n)} == set(origin_of(linear))
    assert {len(origin_of(n)) for n in columns} == {1} and len(origin_of(linear)) == 2


def test_a_call_untouched_since_the_stitch_says_so(lowered: Program) -> None:
    (attend,) = (n for n in lowered.find("dsv4.attend_hca"))
    assert passes_of(attend) == ("raise-attention", "stitch")
    assert texts(origin_of(attend)) == ["attention.py:Attention.forward"]


@dataclasses.dataclass(frozen=True)
class SwapNorms(Pass):
    """Plain fx, with no thought of provenance: new nodes in place of old ones."""

    name: ClassVar[str] = "swap-norms"
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1.0

    def run(self, graph: fx.Graph) -> int:
        norms = [n for n in graph.nodes if is_op(n, "rms_norm")]
        for node in norms:
            with graph.inserting_before(node):
                new = graph.call_function(OPS["rms_norm"], node.args, {"eps": 0.5})
            new.meta = {"type": node.meta["type"]}
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return len(norms)


@dataclasses.dataclass(frozen=True)
class SetEps(Pass):
    """Changes nodes where they are."""

    name: ClassVar[str] = "set-eps"
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1.0

    def run(self, graph: fx.Graph) -> int:
        norms = [n for n in graph.nodes if is_op(n, "rms_norm")]
        for node in norms:
            node.kwargs = {"eps": 0.25}
            node.meta = {"type": node.meta["type"], "scope": node.meta["scope"]}
        return len(norms)


@dataclasses.dataclass(frozen=True)
class AddSwiglu(Pass):
    """Adds what the model does not have: a nonlinearity behind every attention over the window alone."""

    name: ClassVar[str] = "add-swiglu"
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1.0

    def run(self, graph: fx.Graph) -> int:
        attends = [n for n in graph.nodes if is_op(n, "attend_window")]
        for node in attends:
            with graph.inserting_after(node):
                new = graph.call_function(OPS["swiglu"], (node, node), {"limit": 10.0})
            new.meta = {"type": node.meta["type"], "scope": node.meta["scope"]}
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        return len(attends)


def test_a_pass_of_the_user_keeps_provenance_without_helping(stitched: Program) -> None:
    program = Pipeline((SwapNorms(),)).run(stitched)
    latent = next(n for n in program.find("dsv4.rms_norm") if "q_norm" in str(n.args[1]))
    assert texts(origin_of(latent)) == ["attention.py:Attention.queries"]
    assert passes_of(latent) == ("raise-norm", "stitch", "swap-norms")
    program = LATE.with_(SetEps(), after="fuse-norm-rope-write").run(stitched)
    latent = next(n for n in program.find("dsv4.rms_norm") if "q_norm" in str(n.args[1]))
    assert texts(origin_of(latent)) == ["attention.py:Attention.queries"]
    assert passes_of(latent) == ("raise-norm", "stitch", "set-eps")


def test_what_a_pass_adds_to_the_model_names_the_pass(stitched: Program) -> None:
    program = Pipeline((AddSwiglu(),)).run(stitched)
    added = next(n for n in program.find("dsv4.swiglu") if is_op(n.args[0], "attend_window"))
    assert origin_of(added) == ("pass add-swiglu",) and passes_of(added) == ("add-swiglu",)
    (attend, *_) = program.find("dsv4.attend_window")
    assert passes_of(attend) == ("raise-attention", "stitch")


def test_the_text_of_a_program_does_not_depend_on_provenance(lowered: Program) -> None:
    bare = lowered.clone()
    for node in bare.nodes():
        node.meta.pop("origin", None)
        node.meta.pop("passes", None)
    assert bare.dump() == lowered.dump()
