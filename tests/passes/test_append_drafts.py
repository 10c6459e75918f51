"""Drafting inside the step: a graph for every number of drafts, of which each knows where it comes from."""

from __future__ import annotations

import pytest

from dsv4c.capturing import capture
from dsv4c.config import StateLayout, preset
from dsv4c.errors import PassError
from dsv4c.ops import Op
from dsv4c.passes import AppendDrafts, default_pipeline
from dsv4c.program import Program, is_op
from dsv4c.provenance import origin_of, passes_of

CONTEXT, MOST = 512, 2


@pytest.fixture(scope="module")
def lowered() -> Program:
    captured = capture(preset("nano"), StateLayout(extra_ring=16))
    return default_pipeline(arch="sm_90a", drafts=MOST, max_context=CONTEXT).run(captured)


def ops_of(program: Program, graph: str) -> list[str]:
    return [n.target.name for n in program.graphs[graph].nodes if isinstance(n.target, Op)]


def test_a_graph_for_every_number_of_drafts(lowered: Program) -> None:
    assert list(lowered.graphs) == ["step", "step+1", "step+2"]
    for drafts, name in enumerate(lowered.graphs):
        ops = ops_of(lowered, name)
        assert ops.count("sample_drafted") == ops.count("accept_drafts") == 1
        assert ops.count("sample") == ops.count("keep_draft") == ops.count("add_embedding") == drafts
        assert ops.count("place_tokens") == min(drafts, 1)
        outputs = lowered.graphs[name].output_node().meta["outputs"]
        assert {"logits", "tokens", "accepted", "state.sampling.pending", "state.sampling.length"} <= set(outputs)


def test_later_drafts_are_of_one_row_a_request_and_end_with_the_context(lowered: Program) -> None:
    graph = lowered.graphs["step+2"]
    gathers = [n for n in graph.nodes if is_op(n, "add_embedding")]
    assert [n.meta["type"].shape[0] for n in gathers] == ["T", "D"]
    drawn = [n for n in graph.nodes if is_op(n, "sample")]
    assert [n.meta["type"].shape for n in drawn] == [("D",), ("D",)]
    ends = [n.kwargs["end"] for n in graph.nodes if is_op(n, "accept_drafts") or is_op(n, "advance_rows")]
    assert set(ends) == {CONTEXT}


def test_streams_are_rows_where_kernels_read_them(lowered: Program) -> None:
    for node in lowered.nodes():
        if is_op(node, "rms_norm_quantise") or is_op(node, "linear_fp8"):
            kinds = node.meta["type"]
            assert all(len(kind.shape) == 2 for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


def test_every_call_knows_where_it_comes_from(lowered: Program) -> None:
    for node in lowered.nodes():
        if isinstance(node.target, Op):
            assert passes_of(node), node
            assert origin_of(node) or "append-drafts" in passes_of(node), node
    drafting = [n for n in lowered.graphs["step+1"].nodes if n.meta.get("scope", "").startswith("draft1.MTP")]
    assert drafting and all(any("mtp" in place or "Block" in place for place in origin_of(n)) for n in drafting[:1])


def test_a_model_without_the_block_is_refused() -> None:
    captured = capture(preset("nano"), StateLayout(extra_ring=16))
    del captured.recipes["mtp"]
    with pytest.raises(PassError, match="has no graph `mtp` to draft with"):
        default_pipeline(arch="sm_90a", drafts=1, max_context=CONTEXT).run(captured)
    assert AppendDrafts(max_tokens=1, max_context=8).exact
