"""Chunks, events for the router, the watchdog, versions."""

from __future__ import annotations

import pytest

from dsv4c.errors import ConfigError, EngineError
from dsv4c.runtime.blockkeys import KVEvent
from dsv4c.runtime.dynamo.chunks import apart, chunk_of, failure_of
from dsv4c.runtime.dynamo.publish import batch_of
from dsv4c.runtime.dynamo.version import TESTED, check_versions
from dsv4c.runtime.dynamo.watchdog import MISSED, UNSEEN, Watchdog
from dsv4c.runtime.request import End, Event
from dsv4c.runtime.sampler import TokenLogprob


def test_events_that_come_together_are_one_chunk() -> None:
    events = [Event("a", (5, 6)), Event("a", (7,), end=End("stop", 3, 3, 7))]
    chunk = chunk_of(events, 1, 3, 2, scored=False)
    assert chunk["token_ids"] == [5, 6, 7] and chunk["index"] == 1 and chunk["finish_reason"] == "stop"
    assert chunk["completion_usage"] == {
        "prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip
    tokens, end = apart(chunk)
    assert tokens == {"token_ids": [5, 6, 7], "index": 1}
    assert end["token_ids"] == [] and end["finish_reason"] == "stop" and end["index"] == 1


def test_logprobs_have_the_chosen_token_first_and_its_rank() -> None:
    score = TokenLogprob(9, -2.0, ((5, -0.5), (9, -2.0)))
    outside = TokenLogprob(8, -5.0, ((5, -0.5), (9, -2.0)))
    prompt = (None, TokenLogprob(6, -1.0, ((7, -0.1),)))
    event = Event("a", (9, 8), (score, outside), prompt)
    chunk = chunk_of([event], 0, 2, 0, scored=True)
    assert chunk["log_probs"] == [-2.0, -5.0]
    first, second = chunk["top_logprobs"]
    assert [(t["token_id"], t["rank"]) for t in first] == [(9, 2), (5, 1)]
    assert [(t["token_id"], t["rank"]) for t in second] == [(8, 0), (5, 1), (9, 2)]
    assert chunk["engine_data"]["prompt_logprobs"] == [
        None,
        {"7": {"logprob": -0.1, "rank": 1}, "6": {"logprob": -1.0}},
    ]
    assert "log_probs" not in chunk_of([event], 0, 2, 0, scored=False)


def test_failures() -> None:
    error = EngineError("no")
    assert failure_of(Event("a", end=End("failed", 1, 0, error=error))) is error
    assert failure_of(Event("a", end=End("failed", 1, 0))) is not None
    assert failure_of(Event("a", end=End("length", 1, 0))) is None and failure_of(Event("a", (1,))) is None


def test_blocks_are_told_in_order_and_all_gone_when_the_cache_is_cleared() -> None:
    stored: set[int] = set()
    events = [KVEvent("stored", 11, None, (1, 2)), KVEvent("stored", 12, 11, (3, 4)), KVEvent("removed", 12)]
    batch = list(batch_of(events, stored, 2))
    assert [b["type"] for b in batch] == ["stored", "stored", "removed"]
    assert batch[1] == {
        "type": "stored", "token_ids": [3, 4], "num_block_tokens": [2], "block_hashes": [12], "parent_hash": 11,
    }  # fmt: skip
    assert stored == {11}
    again = list(batch_of([KVEvent("stored", 13, 11, (5, 6)), KVEvent("cleared"), KVEvent("cleared")], stored, 2))
    assert again[1:] == [{"type": "removed", "block_hashes": [11, 13]}] and not stored


def test_the_watchdog_tells_once_a_worker_is_gone_and_not_before() -> None:
    listed, told = {7}, []
    watchdog = Watchdog(7, lambda: listed, lambda: told.append(True))
    assert not watchdog.look()
    listed.clear()
    assert [watchdog.look() for _ in range(MISSED - 1)] == [False] * (MISSED - 1)
    listed.add(7)
    assert not watchdog.look()
    listed.clear()
    assert [watchdog.look() for _ in range(MISSED)] == [False] * (MISSED - 1) + [True] and told == [True]


def test_the_watchdog_gives_registering_its_time() -> None:
    told: list[bool] = []
    watchdog = Watchdog(7, tuple, lambda: told.append(True))
    assert not any(watchdog.look() for _ in range(UNSEEN - 1)) and not told
    assert watchdog.look() and told == [True]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"ai-dynamo": None, "ai-dynamo-runtime": "1.6.1"}, "`ai-dynamo`"),
        ({"ai-dynamo": "1.6.1", "ai-dynamo-runtime": None}, "`ai-dynamo-runtime`"),
        ({"ai-dynamo": "1.5.0", "ai-dynamo-runtime": "1.5.0"}, "1.5.0"),
        ({"ai-dynamo": "1.6.1", "ai-dynamo-runtime": "1.7.0"}, "1.7.0"),
    ],
)
def test_other_versions_are_refused(found: dict[str, str | None], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        check_versions(found)
    assert "CONTRIBUTING.md" in error.value.hint


def test_tested_versions_are_taken() -> None:
    for version in TESTED:
        assert check_versions({"ai-dynamo": version, "ai-dynamo-runtime": version}) == version
