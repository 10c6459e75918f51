"""Hashes of blocks: the same in every process, different for whatever differs before; and the tree's log of them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4c.runtime.blockkeys import KVEvent, block_hashes, block_key, tokens_of
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.request import Request
from tests.runtime.test_moving import BLOCK, drain, engine_of, greedy, text


def test_hashes_are_the_same_in_every_process() -> None:
    assert block_hashes(range(9), 4) == [5919486166599431679, 3142802598544154706]
    code = "from dsv4c.runtime.blockkeys import block_hashes; print(block_hashes(range(600), 256, 'a salt'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(block_hashes(list(range(600)), 256, "a salt"))


@given(st.lists(st.integers(0, 200_000), max_size=40), st.integers(1, 9), st.sampled_from([None, "a", b"a", 1]))
def test_a_hash_names_all_tokens_up_to_it(tokens: list[int], block: int, salt: object) -> None:
    found = block_hashes(tokens, block, salt)
    assert len(found) == len(tokens) // block and len(set(found)) == len(found)
    assert all(-(2**63) <= h < 2**63 for h in found)
    assert block_hashes(np.array(tokens, dtype=np.int64), block, salt) == found
    if found:
        others = [1, *tokens[1:]] if tokens[0] != 1 else [2, *tokens[1:]]
        assert not set(block_hashes(others, block, salt)) & set(found)
        assert not set(block_hashes(tokens, block, "another")) & set(found)
    assert tokens_of(block_key(np.array(tokens, dtype=np.int64))) == tuple(tokens)


def log_of(engine: Engine) -> tuple[list[int], list[int]]:
    events = engine.block_events()
    stored, removed = ([e.hash for e in events if e.kind == kind] for kind in ("stored", "removed"))
    assert engine.block_events() == []
    return stored, removed


@pytest.mark.parametrize("late", [False, True])
def test_the_tree_says_what_it_has(late: bool) -> None:
    engine, _ = engine_of()
    hashes = block_hashes(text(50), BLOCK)
    if not late:
        engine.track_blocks()
    engine.submit(Request("a", text(50), greedy(1)))
    drain(engine)
    assert engine.known_blocks() == (hashes if not late else [])
    engine.track_blocks()
    events = engine.block_events()
    assert [e.hash for e in events] == hashes == engine.known_blocks()
    assert [e.parent_hash for e in events] == [None, *hashes[:-1]]
    assert [t for e in events for t in e.tokens] == text(50)[:48]
    engine.submit(Request("b", text(50), greedy(1)))
    engine.submit(Request("c", text(50), greedy(1), salt="s"))
    drain(engine)
    assert log_of(engine) == (block_hashes(text(50), BLOCK, "s"), [])
    engine.scheduler.distrust()
    assert engine.block_events() == [KVEvent("cleared")] and engine.known_blocks() == []


def test_what_is_evicted_is_said() -> None:
    engine, _ = engine_of(requests=1, context=64)
    engine.track_blocks()
    for seed in range(6):
        engine.submit(Request("a", text(60, seed), greedy(1)))
        drain(engine)
    stored, removed = log_of(engine)
    assert len(stored) == 18 and len(removed) > 3
    assert sorted(set(stored) - set(removed)) == sorted(engine.known_blocks())
    assert removed[0] == block_hashes(text(60, 0), BLOCK)[-1], "the end of the oldest goes first"


def test_an_engine_without_a_cache_has_no_blocks() -> None:
    engine, _ = engine_of(snapshots=0)
    engine.track_blocks()
    assert engine.block_events() == engine.known_blocks() == []
