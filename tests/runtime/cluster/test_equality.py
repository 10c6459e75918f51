"""Prefill and decode in workers of their own give, token for token, what one engine gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.artifact import load_manifest
from dsv4c.runtime.params import SamplingParams
from tests.runtime.cluster.live import PATIENCE_S, Cluster, alone, mixed

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
