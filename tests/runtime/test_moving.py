"""Requests whose state is moved from one engine to another: the same tokens, and nothing left behind on either side."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dsv4c.errors import EngineError, RequestError
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.scheduler import Limits
from tests.runtime.joined import Copying, Followed, copy_state, tokens_of
from tests.runtime.standin import VOCAB, StandIn, direct_greedy, kv_groups, make_engine, state_groups

BLOCK, HORIZON, WIDE = 16, 8, 8
GROUPS = kv_groups(window_page=4, block=BLOCK, horizon=HORIZON, wide=WIDE)
STATES = state_groups(WIDE)
LAGS = pytest.mark.parametrize("lag", [0, 1])


class Arrays:
    """The pools of a stand-in."""

    def __init__(self, standin: StandIn) -> None:
        self._standin = standin

    def kv(self, group: str) -> Sequence[np.ndarray]:
        return [self._standin.pools[group]]

    def state(self, group: str) -> Sequence[np.ndarray]:
        return [self._standin.rings[group.replace("compressor_", "c")]]


class Pair:
    """A prefill engine and a decode engine."""

    def __init__(self, lag: int = 0, **options: Any) -> None:
        (self.prefill, one), (self.decode, two) = engine_of(lag, **options), engine_of(lag, **options)
        self.progress, self.transfers = Followed(self.prefill), Copying()
        self.prefill.connect(progress=self.progress)
        self.decode.connect(transfers=self.transfers)
        self.pools = Arrays(one), Arrays(two)

    def copy(self, request_id: str) -> None:
        arrival = self.transfers.begun[request_id]
        copy_state(self.prefill, self.prefill.kept[request_id], arrival, GROUPS, STATES, self.pools)

    def audit(self) -> None:
        self.prefill.audit()
        self.decode.audit()


def engine_of(
    lag: int = 0, *, pages: float = 1.0, snapshots: int = 8, requests: int = 4, context: int = 256, **options: Any
) -> tuple[Engine, StandIn]:
    limits = Limits(max_requests=requests, **{"max_step_tokens": 64, **options})
    sizes = PoolSizes.for_requests(GROUPS, requests, context, limits.max_step_tokens, snapshots)
    return make_engine(sizes, limits, GROUPS, horizon=HORIZON, lag=lag)


def text(length: int, seed: object = 0) -> list[int]:
    rng = random.Random(f"{seed}")
    return [rng.randrange(VOCAB) for _ in range(length)]


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)


def drain(engine: Engine) -> list[Event]:
    out = []
    while not engine.idle:
        out += engine.step()
    return out


@LAGS
@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 15, 16, 17, 40, 64, 65, 200])
def test_a_moved_request_goes_on_as_if_it_had_been_computed_here(lag: int, length: int) -> None:
    pair = Pair(lag)
    for turn in range(2):  # the second time both have its prefix
        pair.decode.submit(Request("a", text(length), greedy(30), moving=True))
        pair.prefill.submit(Request("a", text(length), greedy(1), keep=True))
        first = drain(pair.prefill)
        assert drain(pair.decode) == [] and pair.decode.idle and pair.decode.has_work
        arrival = pair.transfers.begun["a"]
        assert (arrival.start, arrival.target) == (length // BLOCK * BLOCK if turn else 0, length)
        assert list(pair.prefill.kept) == ["a"] and not pair.prefill.has_work
        pair.copy("a")
        pair.audit()
        events = pair.decode.arrived("a", first[-1])
        assert pair.prefill.let_go("a") and not pair.prefill.let_go("a")
        events += drain(pair.decode)
        assert tokens_of(events) == direct_greedy(text(length), 30, HORIZON, WIDE)
        assert events[-1].end and events[-1].end.reason == "length"
        pair.audit()
        assert not any(pair.prefill.pool.used_pages().values()) and not any(pair.decode.pool.used_pages().values())
        del pair.transfers.begun["a"]
    assert pair.decode.runner.executor.steps  # type: ignore[attr-defined]
    assert pair.prefill.stats().prefix_hit_tokens == (length - 1) // BLOCK * BLOCK


@LAGS
def test_what_is_lost_is_computed_here(lag: int) -> None:
    for busy in (False, True):
        pair = Pair(lag)
        pair.decode.submit(Request("a", text(40), greedy(10), moving=True))
        pair.decode.submit(Request("b", text(30), greedy(10)))
        for _ in range(3):
            pair.decode.step()
        assert pair.decode.lost("a", busy=busy) == []
        assert list(pair.decode.unsettled) == ["a"] * busy
        events = drain(pair.decode)
        assert tokens_of([e for e in events if e.request_id == "a"]) == direct_greedy(text(40), 10, HORIZON, WIDE)
        pair.audit()
        assert any(pair.decode.pool.used_pages().values()) == busy
        if busy:
            with pytest.raises(RequestError, match="in use"):
                pair.decode.submit(Request("a", text(40), greedy(10)))
            pair.decode.settle("a")
        pair.audit()
        assert not any(pair.decode.pool.used_pages().values())
        with pytest.raises(EngineError, match="not on its way"):
            pair.decode.lost("a")


@LAGS
@pytest.mark.parametrize("how", ["settle", "arrived", "lost", "busy"])
def test_the_pages_of_one_that_is_cancelled_stay_until_its_transfer_is_over(lag: int, how: str) -> None:
    pair = Pair(lag)
    pair.decode.submit(Request("a", text(40), greedy(10), moving=True))
    drain(pair.decode)
    event = pair.decode.cancel("a")
    assert event is not None and event.end is not None and event.end.reason == "cancelled"
    assert pair.transfers.abandoned == ["a"] and list(pair.decode.unsettled) == ["a"]
    assert any(pair.decode.pool.used_pages().values()) and not pair.decode.has_work
    pair.audit()
    if how == "busy":
        assert pair.decode.lost("a", busy=True) == [] and list(pair.decode.unsettled) == ["a"]
        pair.decode.settle("a")
    elif how == "settle":
        pair.decode.settle("a")
    elif how == "lost":
        assert pair.decode.lost("a") == []
    else:
        assert pair.decode.arrived("a", Event("a", (1,))) == []
    pair.audit()
    assert not any(pair.decode.pool.used_pages().values())


@LAGS
@pytest.mark.parametrize("at", [1, 2, 17, 29])
def test_generated_tokens_count_as_if_they_had_been_generated_here(lag: int, at: int) -> None:
    params = SamplingParams(
        max_tokens=30, seed=7, temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.4, min_tokens=20,
        stop_token_ids=(5, 6, 7), logprobs=2, prompt_logprobs=1,
    )  # fmt: skip
    engine, _ = engine_of(lag)
    engine.submit(Request("a", text(40), params))
    whole = drain(engine)
    engine.submit(Request("b", text(40), params, generated=tokens_of(whole)[:at]))
    rest = drain(engine)
    assert tokens_of(rest) == tokens_of(whole)[at:]
    assert [x for e in rest for x in e.logprobs] == [x for e in whole for x in e.logprobs][at:]
    assert not any(e.prompt_logprobs for e in rest)
    assert rest[-1].end == whole[-1].end
    with pytest.raises(RequestError, match="generated so far"):
        engine.submit(Request("c", text(40), params, generated=tokens_of(whole)))
