"""DSpark compiled for this CPU: step, absorb and draft equal the plain model on the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4c.artifact import Input
from dsv4c.capturing import capture
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.checkpoint.writer import write_checkpoint
from dsv4c.compile import Options, artifact_inputs, largest_symbols
from dsv4c.drafting import block_plans
from dsv4c.errors import CompileError
from dsv4c.model import Transformer, init_state, make_draft, make_step
from dsv4c.passes import default_pipeline
from dsv4c.plan import Plan, plan
from dsv4c.weights import stored_formats
from tests.compiled import Compiled
from tests.dspark import LAYOUT, PLAIN, TINY, tiny_model

TOKENS, REQUESTS = 128, 4
TOLERANCE = 5e-5
OPTIONS = Options(max_context=TOKENS, max_tokens=TOKENS, max_requests=REQUESTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As DeepSeek stores it: FP4 experts, FP8 linears, BF16."""
    folder = tmp_path_factory.mktemp("dspark") / "tiny"
    write_checkpoint(folder, TINY, tiny_model(2).state_dict())
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Transformer:
    model = Transformer(TINY, LAYOUT).eval()
    model.load_state_dict(load_model_state(checkpoint))
    return model


@pytest.fixture(scope="module")
def made() -> Plan:
    program = default_pipeline(stored_formats(TINY)).run(capture(TINY, LAYOUT))
    inputs, symbols = artifact_inputs(TINY, LAYOUT), largest_symbols(TINY, LAYOUT, OPTIONS)
    step = plan(program, "step", "step", "mixed", "cpu", symbols, inputs, hidden=True)
    return Plan.joined((step, *block_plans(program, "cpu", symbols, inputs)))


@pytest.fixture
def compiled(
    made: Plan, checkpoint: Checkpoint, tmp_path: Path, request: pytest.FixtureRequest
) -> Compiled:  # fmt: skip
    cache = Path(request.config.cache.mkdir("kernels"))
    return Compiled(made, checkpoint, init_state(TINY, LAYOUT, REQUESTS, TOKENS), tmp_path, cache)


def test_the_plan_says_what_each_program_takes_and_gives(made: Plan) -> None:
    step, absorb, draft = (made.programs[name] for name in ("step", "dspark.absorb", "dspark.draft"))
    assert set(step.outputs) == {"logits", "hidden"}
    assert (absorb.phase, absorb.outputs) == ("draft", {})
    assert Input("tap", "hidden", ("T", 192), dtype="float32") in absorb.inputs
    assert {i.kind for i in absorb.inputs} == {"positions", "request_rows", "page_table", "hidden"}
    assert (draft.phase, set(draft.outputs), draft.symbols["T"]) == ("draft", {"drafts", "confidences"}, 20)
    assert {i.kind for i in draft.inputs} == {"token_ids", "positions", "request_rows", "page_table", "block_rows"}
    chosen = {choice.node.op: choice.schedule for choice in made.choices.values()}
    assert chosen["attend_block"] == "attend_block.cpp_tiles"
    assert chosen["markov_draft"] == "markov_draft.cpp_packed"


@torch.no_grad()
def test_step_absorb_and_draft_equal_the_plain_model(compiled: Compiled, model: Transformer) -> None:
    """Three requests of different lengths, in chunks, drafting whenever all of one's tokens are in."""
    draw = torch.Generator().manual_seed(4)
    ids = [torch.randint(0, 95, (n,), generator=draw) for n in (50, 9, 1)]
    state = init_state(TINY, LAYOUT, REQUESTS, TOKENS)
    for plans in ([(0, 0, 21), (1, 0, 9)], [(2, 0, 1), (0, 21, 50)]):
        step = make_step(TINY, LAYOUT, [(r, a, ids[r][a:b]) for r, a, b in plans], TOKENS)
        streams, state = model.run(step, state)
        tap = model.tap(streams)
        got = compiled.run("step", step)
        assert (got["logits"] - model.logits(streams[-1], step["logit_rows"])).abs().max() < TOLERANCE
        assert (got["hidden"] - tap).abs().max() < TOLERANCE
        state = model.absorb(tap, step, state)
        compiled.run("dspark.absorb", {**step, "tap": got["hidden"]})
        for i in range(3):
            name = f"mtp.{i}.window"
            assert (compiled.state[name] - state[name]).abs().max() < TOLERANCE
        accepted = [(r, b, 3 * r + 1) for r, _, b in plans if b == len(ids[r])]
        draft = make_draft(TINY, LAYOUT, accepted, TOKENS)
        drafts, confidences = model.draft(draft, state)
        said = compiled.run("dspark.draft", draft)
        assert torch.equal(said["drafts"], drafts)
        assert (said["confidences"].dtype, said["confidences"].shape) == (torch.float32, confidences.shape)
        assert (said["confidences"] - confidences).abs().max() < TOLERANCE
    assert all(
        torch.equal(t, u) for t, u in zip(said.values(), compiled.run("dspark.draft", draft).values(), strict=True)
    )


def test_a_model_without_dspark_has_no_such_programs() -> None:
    program = capture(PLAIN, LAYOUT, only=["head"])
    with pytest.raises(CompileError, match="the model has no DSpark drafter"):
        block_plans(program, "cpu", {}, ())
