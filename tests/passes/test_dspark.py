"""DSpark through the passes: its entry points equal the plain model, alone and beside the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4c.capturing import capture, dspark_inputs
from dsv4c.config import FLASH_0731
from dsv4c.errors import PassError, RaiseError
from dsv4c.interpret import run
from dsv4c.model import Transformer, dspark, init_state, make_draft, make_step
from dsv4c.passes import RAISE, default_pipeline
from dsv4c.pipeline import Pipeline
from dsv4c.program import Program
from dsv4c.weights import stored_formats
from tests.dspark import LAYOUT, TINY, tiny_model

TOKENS = 60


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(TINY, LAYOUT)


@pytest.fixture(scope="module")
def lowered(captured: Program) -> Program:
    return default_pipeline(stored_formats(TINY)).run(captured)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(1)


@torch.no_grad()
@pytest.mark.parametrize("fake_quant", [False, True])
def test_every_entry_point_equals_the_plain_model(captured: Program, fake_quant: bool) -> None:
    """After every pass from stitching on; bit for bit as long as no pass was inexact."""
    torch.manual_seed(2)
    model = tiny_model(1)
    program = captured
    if fake_quant:
        program = capture(TINY, LAYOUT, fake_quant=True)
        quantising = Transformer(TINY, LAYOUT, fake_quant=True).eval()
        quantising.load_state_dict(model.state_dict())
        model = quantising
    weights = dict(model.state_dict())
    ids = torch.randint(0, TINY.vocab_size, (2, TOKENS))
    step = make_step(TINY, LAYOUT, [(0, 0, ids[0, :37]), (1, 0, ids[1, :5])], TOKENS)
    begun = init_state(TINY, LAYOUT, 2, TOKENS)
    streams, state = model.run(step, begun)
    tap = model.tap(streams)
    after = model.absorb(tap, step, state)
    draft = make_draft(TINY, LAYOUT, [(1, 5, 7), (0, 37, 8)], TOKENS)
    drafts, confidences = model.draft(draft, after)
    exact, checked = True, 0
    for one in default_pipeline(stored_formats(TINY)).steps(program):
        exact = exact and one.record.exact
        if "stitched" not in one.after.facts:
            continue
        got = [run(one.after, "step", step, begun, weights)["tap"]]
        written = run(one.after, "dspark.absorb", {**step, "tap": tap}, state, weights)
        assert set(written) == {f"state.mtp.{i}.window" for i in range(3)}
        got += written.values()
        said = run(one.after, "dspark.draft", draft, after, weights)
        assert set(said) == {"drafts", "confidences"}
        got.append(said["confidences"])
        windows = [after[name.removeprefix("state.")] for name in written]
        for found, expected in zip(got, [tap, *windows, confidences], strict=True):
            if exact:
                assert torch.equal(found, expected), one.name
            else:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=one.name)
        assert torch.equal(said["drafts"], drafts), one.name
        checked += 1
    assert checked >= 8


def test_entry_points_ask_for_what_they_read(lowered: Program) -> None:
    def inputs(name: str) -> set[str]:
        nodes = (n for n in lowered.graphs[name].nodes if n.op == "placeholder")
        return {n.meta["value"].name for n in nodes if n.meta["value"].kind in ("input", "streams")}

    where = {"positions", "request_rows", "pages_window"}
    assert inputs("dspark.absorb") == where | {"tap"}
    assert inputs("dspark.draft") == where | {"token_ids", "block_rows"}
    assert set(dspark_inputs(TINY)) == {"tap", "block_rows"}
    assert not lowered.find("dsv4.page_write")
    assert len(lowered.find("dsv4.attend_block")) == len(lowered.find("dsv4.norm_rope_write")) - 4 - 5 == 3


def test_the_stages_keys_are_one_linear_map(lowered: Program) -> None:
    graph = lowered.graphs["dspark.absorb"]
    names = [n.meta["value"].name for n in graph.nodes if n.op == "placeholder" and n.meta["value"].kind == "weight"]
    assert "mtp.0.attn.wkv.weight+1.attn.wkv.weight+2.attn.wkv.weight" in names


def test_without_a_drafter_the_step_is_the_models(captured: Program) -> None:
    program = capture(TINY, LAYOUT, drafter=False)
    assert set(program.recipes) == {"step"}
    assert not any("tap" in i.piece for i in program.recipes["step"])
    step = default_pipeline(stored_formats(TINY)).run(program)
    assert "tap" not in step.graphs["step"].output_node().meta["outputs"]
    assert not step.find("dsv4.mean_streams") and not step.find("dsv4.attend_block")


def test_packed_entries_are_refused(captured: Program) -> None:
    with pytest.raises(PassError, match=r"attend_block.* has no form that reads packed entries") as error:
        default_pipeline(stored_formats(TINY), "sm_90a").run(captured)
    assert error.value.hint.startswith("DSpark drafts on `cpu` only: capture without the drafter")


def test_the_main_model_compiles_for_a_card() -> None:
    config = FLASH_0731.truncated(3)
    lowered = default_pipeline(stored_formats(config), "sm_90a").run(capture(config, drafter=False))
    assert {"lowered", "samples-inside"} <= lowered.facts


def _causal(self: dspark.AttendBlock, *tensors: Tensor) -> Tensor:
    q, pool, pages, own, rows, positions, first, sink = tensors
    return dspark.attend_block(
        q, pool, pages, own, rows, positions, first + 0, sink, window=self.window, page=self.page, block=self.block
    )


def test_a_changed_module_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dspark.AttendBlock, "forward", _causal)
    program = capture(TINY, LAYOUT, only=["dspark.attention"])
    with pytest.raises(RaiseError, match=r"AttendBlock\) is not `dsv4.attend_block`"):
        Pipeline(tuple(p for p in RAISE if p.name != "stitch")).run(program)
