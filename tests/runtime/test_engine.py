"""The engine against direct computation: paging, batching, chunking and preemption never change a token."""

from __future__ import annotations

import random

import pytest

from dsv4c.errors import EngineError, RequestError
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.kvpool import PoolSizes
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Event, Request, expand
from dsv4c.runtime.scheduler import Limits
from tests.runtime.standin import VOCAB, direct_greedy, direct_logits, kv_groups, make_engine


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length}/{seed}")
    return [rng.randrange(VOCAB) for _ in range(length)]


def greedy(max_tokens: int, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)  # type: ignore[arg-type]


def drain(engine: Engine, audit: bool = True) -> dict[str, list[Event]]:
    """Steps to the end; events by request. Checks that each ends once, and last."""
    events: dict[str, list[Event]] = {}
    while engine.has_work:
        for event in engine.step():
            assert not (events.get(event.request_id) and events[event.request_id][-1].end)
            events.setdefault(event.request_id, []).append(event)
        if audit:
            engine.audit()
    assert all(list_[-1].end for list_ in events.values())
    assert not any(engine.pool.used_pages().values())
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [t for e in events for t in e.tokens]


@pytest.mark.parametrize("length", [1, 3, 4, 63, 64, 127, 128, 129, 255, 300, 700])
def test_greedy_equals_direct_computation(length: int) -> None:
    engine, _ = make_engine()
    prompt = prompt_of(length)
    engine.submit(Request("a", prompt, greedy(40)))
    events = drain(engine)["a"]
    assert tokens_of(events) == direct_greedy(prompt, 40)
    assert events[-1].end and events[-1].end.reason == "length"
    assert (events[-1].end.prompt_tokens, events[-1].end.generated_tokens) == (length, 40)
