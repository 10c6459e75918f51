"""The compiled nano model gives the plain model's greedy tokens, alone and in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4c.artifact import load_manifest
from dsv4c.checkpoint.reader import Checkpoint, load_model_state
from dsv4c.config import StateLayout
from dsv4c.model import Transformer, init_state, make_step
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.loader import load
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Limits

NUM_PROMPTS, NEW_TOKENS = 100, 64
LAYOUT = StateLayout()
CHUNK = 64  # the plain model gathers every token's expert weights: 50 MB at a time


def make_engine(artifact: Path, requests: int) -> Engine:
    manifest = load_manifest(artifact)
    tokens = manifest.programs["step"].symbols["T"]
    sizes = PoolSizes.for_requests(manifest.kv_groups, requests, 1024, step_tokens=tokens)
    executor = load(artifact, Checkpoint(artifact / "weights"), sizes, manifest=manifest)
    limits = Limits(max_requests=requests, max_step_tokens=tokens)
    return Engine.for_manifest(executor, manifest, sizes, limits=limits)


def generate(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.submit(Request(str(i), prompt, params))
    out: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for event in engine.step():
            assert event.end is None or event.end.error is None
            out[int(event.request_id)].extend(event.tokens)
    engine.audit()
    assert not any(engine.pool.used_pages().values())
    return out


@pytest.fixture(scope="module")
def prompts(nano_prompts: list[list[int]]) -> list[list[int]]:
    return nano_prompts[:NUM_PROMPTS]


@pytest.fixture(scope="module")
def completions(nano_artifact: Path, prompts: list[list[int]]) -> list[list[int]]:
    return generate(make_engine(nano_artifact, 32), prompts)


@torch.no_grad()
def test_greedy_tokens_equal_the_plain_models(
    nano_artifact: Path, prompts: list[list[int]], completions: list[list[int]]
) -> None:
    """The plain model, given a prompt and its completion at once, would have chosen every token of it."""
    checkpoint = Checkpoint(nano_artifact / "weights")
    model = Transformer(checkpoint.config, LAYOUT).eval()
    model.load_state_dict(load_model_state(checkpoint, torch.float32))
    wrong = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.tensor(prompt + completion[:-1])
        state, chosen = init_state(model.config, LAYOUT, 1, len(ids)), []
        for start in range(0, len(ids), CHUNK):
            step = make_step(model.config, LAYOUT, [(0, start, ids[start : start + CHUNK])], len(ids))
            logits, state = model(step, state)
            chosen += logits.argmax(-1).tolist()
        expected = chosen[len(prompt) - 1 :]
        if expected != completion:
            wrong.append((i, len(prompt), next(j for j in range(NEW_TOKENS) if expected[j] != completion[j])))
    assert not wrong, f"(prompt, its length, first token that differs): {wrong}"


def test_alone_and_in_a_batch_of_32_the_tokens_are_the_same(
    nano_artifact: Path, prompts: list[list[int]], completions: list[list[int]]
) -> None:
    alone = make_engine(nano_artifact, 1)
    for i in range(0, NUM_PROMPTS, 5):
        assert generate(alone, [prompts[i]]) == [completions[i]], f"prompt {i}"
