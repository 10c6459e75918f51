"""Prompts that begin alike go to the worker that has computed the beginning."""

from __future__ import annotations

import random
from pathlib import Path

from dsv4c.artifact import load_manifest
from dsv4c.runtime.poolsizes import block_tokens
from tests.runtime.cluster.live import PATIENCE_S, Cluster, wait_for

PREFIX = 640
PREFIXES = 10
REPEATS = 5


def test_repeated_prefixes_land_where_they_are(nano_artifact: Path) -> None:
    manifest = load_manifest(nano_artifact)
    draw = random.Random(3)
    block = block_tokens(manifest.kv_groups)
    whole = PREFIX // block * block

    def text(count: int) -> list[int]:
        return [draw.randrange(4, manifest.vocab_size) for _ in range(count)]

    prefixes = [text(PREFIX) for _ in range(PREFIXES)]
    with Cluster(nano_artifact, 2, 1) as cluster:
        for prefix in prefixes:
            first = cluster.ask(prefix + text(draw.randint(1, 60)), max_tokens=2, temperature=0.0)
            assert first.over.wait(PATIENCE_S) and first.outputs[0].cached_tokens == 0
        computing = [m for m in cluster.router.members if m.role == "prefill"]
        wait_for(lambda: sum(len(m.blocks) for m in computing) >= PREFIXES * whole // block, "blocks to be told")
        assert all(m.blocks for m in computing), "prompts were not spread"
        hits = 0
        again = [prefix for prefix in prefixes for _ in range(REPEATS)]
        draw.shuffle(again)
        for one, other in zip(again[::2], again[1::2], strict=True):  # two at a time
            pair = [cluster.ask(p + text(draw.randint(1, 60)), max_tokens=2, temperature=0.0) for p in (one, other)]
            for asked in pair:
                assert asked.over.wait(PATIENCE_S)
                hits += asked.outputs[0].cached_tokens >= whole
        assert hits >= 0.9 * len(again), f"{hits} of {len(again)} repeats found their prefix"
        cluster.check_clean()
