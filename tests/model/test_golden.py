"""The plain model against the official reference's float32 results on a tiny checkpoint (model.md 7)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.config import StateLayout
from dsv4c.model import Transformer, init_state, make_step

TOLERANCE = 5e-5
LAYOUT = StateLayout()
LENGTH = 300


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(golden_dir / "tiny_expected_fp32.pt", weights_only=True)


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Transformer:
    checkpoint = Checkpoint(golden_dir / "tiny")
    model = Transformer(checkpoint.config, LAYOUT)
    model.load_state_dict(load_model_state(checkpoint, torch.float32))
    return model.eval()


def both(ids: torch.Tensor, start: int, stop: int) -> list[tuple[int, int, torch.Tensor]]:
    return [(r, start, ids[r, start:stop]) for r in range(ids.shape[0])]


@torch.no_grad()
def test_one_shot_prefill_gives_logits_and_streams(model: Transformer, golden: dict[str, torch.Tensor]) -> None:
    ids = golden["ids"]
    state = init_state(model.config, LAYOUT, 2, LENGTH)
    streams, _ = model.run(make_step(model.config, LAYOUT, both(ids, 0, LENGTH), LENGTH), state)
    for layer, expected in enumerate(golden["streams"]):
        assert (streams[layer].view_as(expected) - expected).abs().max() < TOLERANCE, f"after {layer} layers"
    logits = model.logits(streams[-1], torch.arange(2 * LENGTH))
    assert (logits.view_as(golden["logits"]) - golden["logits"]).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    "cuts", [[0, 150, *range(151, 301)], [0, 37, 100, 101, 256, 300]], ids=["decode", "ragged-chunks"]
)
def test_chunks_give_the_same_logits(model: Transformer, golden: dict[str, torch.Tensor], cuts: list[int]) -> None:
    state, parts = init_state(model.config, LAYOUT, 2, LENGTH), []
    for start, stop in itertools.pairwise(cuts):
        step = make_step(model.config, LAYOUT, both(golden["ids"], start, stop), LENGTH)
        logits, state = model(step, state)
        parts.append(logits.view(2, stop - start, -1))
    assert (torch.cat(parts, 1) - golden["logits"]).abs().max() < TOLERANCE


@torch.no_grad()
def test_mixed_batch_of_different_lengths(model: Transformer, golden: dict[str, torch.Tensor]) -> None:
    """Request 0 decodes while request 1 prefills in chunks, out of order of their rows."""
    ids, got = golden["ids"], torch.zeros_like(golden["logits"])
    state = init_state(model.config, LAYOUT, 2, LENGTH)
    plan = [[(0, 0, 40)], [(1, 0, 129), (0, 40, 41)], [(0, 41, 42), (1, 129, 130)], [(1, 130, 300), (0, 42, 260)]]
    for spans in plan:
        step = make_step(model.config, LAYOUT, [(r, a, ids[r, a:b]) for r, a, b in spans], LENGTH)
        logits, state = model(step, state)
        row = 0
        for r, a, b in spans:
            got[r, a:b] = logits[row : row + b - a]
            row += b - a
    expected = golden["logits"].clone()
    expected[0, 260:] = 0
    assert (got - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_mtp_logits(model: Transformer, golden: dict[str, torch.Tensor]) -> None:
    ids = golden["ids"]
    state = init_state(model.config, LAYOUT, 2, LENGTH)
    step = make_step(model.config, LAYOUT, both(ids, 0, LENGTH - 1), LENGTH)
    streams, state = model.run(step, state)
    logits, _ = model.mtp_logits(streams[-1], ids[:, 1:].flatten(), step, state)
    assert (logits.view_as(golden["mtp_logits"]) - golden["mtp_logits"]).abs().max() < TOLERANCE
