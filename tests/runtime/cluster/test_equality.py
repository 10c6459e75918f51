"""Prefill and decode in workers of their own give, token for token, what one engine gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.artifact import load_manifest
from dsv4c.runtime.params import SamplingParams
from tests.runtime.cluster.live import PATIENCE_S, Cluster, all_of, alone, mixed

REQUESTS = 200

Expected = list[tuple[list[int], SamplingParams, list[int]]]


@pytest.fixture(scope="module")
def expected(nano_artifact: Path) -> Expected:
    """200 requests of 1 to 1,500 tokens, and what one engine says to them."""
    asked = mixed(REQUESTS, 6, load_manifest(nano_artifact).vocab_size)
    found = alone(nano_artifact, asked)
    return [(prompt, params, tokens) for (prompt, params), tokens in zip(asked, found, strict=True)]


@pytest.mark.parametrize("transfer", ["shm", "local", "nixl"])
def test_two_and_two_are_one(transfer: str, nano_artifact: Path, expected: Expected) -> None:
    if transfer == "nixl":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed; see the extra `dynamo`")
    with Cluster(nano_artifact, 2, 2, transfer=transfer) as cluster:
        asked = [cluster.send(prompt, params) for prompt, params, _ in expected]
        for one, (prompt, _, tokens) in zip(asked, expected, strict=True):
            assert one.over.wait(PATIENCE_S), cluster.router.states()
            assert one.tokens == tokens, f"a prompt of {len(prompt)} tokens"
        cluster.check_clean()
        pulled = [m.beat.transfers for m in cluster.router.members if m.role == "decode"]
        assert sum(p["recomputed"] + p["failed"] for p in pulled) == 0, pulled


def test_all_else_that_is_said_is_the_same(nano_artifact: Path) -> None:
    """Log-probabilities of prompts and answers, how they end, and what stops them."""
    vocab = load_manifest(nano_artifact).vocab_size
    plain = [prompt for prompt, _ in mixed(12, 8, vocab, longest=300)]
    asked = []
    for i, prompt in enumerate(plain):
        params = SamplingParams(
            max_tokens=1 + i, min_tokens=1, temperature=0.7 * (i % 2), seed=i, logit_bias={5 + i: 3.0}, logprobs=i % 3,
            prompt_logprobs=2 if i % 4 < 2 else None, stop_token_ids=tuple(range(i, vocab, 7)) if i > 6 else (),
        )  # fmt: skip
        asked.append((prompt, params))
    expected = all_of(nano_artifact, asked)
    with Cluster(nano_artifact, 1, 1) as cluster:
        found = [cluster.send(prompt, params) for prompt, params in asked]
        for one, outputs in zip(found, expected, strict=True):
            assert one.over.wait(PATIENCE_S)
            assert len(one.outputs) == len(outputs)
            for ours, theirs in zip(one.outputs, outputs, strict=True):
                assert (ours.token_id, ours.finish_reason) == (theirs.token_id, theirs.finish_reason)
                assert ours.score == theirs.score
                assert ours.prompt_scores == theirs.prompt_scores
        cluster.check_clean()
