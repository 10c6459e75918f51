"""Requests whose state is moved from one engine to another: the same tokens, and nothing left behind on either side."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dsv4c.errors import ConfigError, EngineError, RequestError
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.moving import Arrival
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
    lag: int = 0, *, snapshots: int = 8, requests: int = 4, context: int = 256, pages: int = 0, **options: Any
) -> tuple[Engine, StandIn]:
    """`pages`: of the groups without a horizon, if not as many as all requests need."""
    limits = Limits(max_requests=requests, **{"max_step_tokens": 64, **options})
    sizes = PoolSizes.for_requests(GROUPS, requests, context, limits.max_step_tokens, snapshots)
    if pages:
        sizes = replace(sizes, pages={**dict.fromkeys(sizes.pages, pages), "window": sizes.pages["window"]})
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


# --- refusals -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_moved_is_refused() -> None:
    pair = Pair()
    with pytest.raises(EngineError, match="not to be kept"):
        pair.decode.submit(Request("a", text(9), greedy(2), moving=True, keep=True))
    with pytest.raises(EngineError, match="has transfers"):
        pair.prefill.submit(Request("a", text(9), greedy(2), moving=True))
    pair.decode.submit(Request("a", text(9), greedy(2), moving=True))
    with pytest.raises(EngineError, match="before the first request"):
        pair.decode.connect()
    with pytest.raises(EngineError, match="not on its way in"):
        pair.decode.arrived("a", Event("a", (1,)))  # its transfer has not begun
    drain(pair.decode)
    for name in ("a", "b"):
        with pytest.raises(EngineError, match="nothing to settle"):
            pair.decode.settle(name)
    with pytest.raises(EngineError, match="not on its way in"):
        pair.decode.lost("b")
    with pytest.raises(ConfigError, match="`budget_tokens`"):
        Limits(budget_tokens=-1)


@pytest.mark.parametrize("first", [Event("a"), Event("a", (VOCAB,)), Event("a", (-1,)), Event("a", (1, 2))])
def test_a_request_that_comes_with_nonsense_fails_alone(first: Event) -> None:
    pair = Pair()
    pair.decode.submit(Request("a", text(40), greedy(5, logprobs=1), moving=True))
    pair.decode.submit(Request("b", text(40), greedy(5)))
    drain(pair.decode)
    (event,) = pair.decode.arrived("a", first)
    assert event.end is not None and event.end.reason == "failed" and "came with" in str(event.end.error)
    pair.audit()
    assert not any(pair.decode.pool.used_pages().values())


@pytest.mark.parametrize("stop", ["token", "text", "hook"])
def test_generated_tokens_that_end_the_request_are_refused(stop: str) -> None:
    class Hook:
        def push(self, token: int) -> bool:
            if stop == "hook" and token == 3:
                raise ValueError("no such token")
            return stop == "text" and token == 3

    engine, _ = engine_of()
    ids = (3,) if stop == "token" else ()
    request = Request("a", text(9), greedy(9, stop_token_ids=ids), text_stop=Hook(), generated=[1, 2, 3, 4])
    with pytest.raises(RequestError, match="the stop hook failed" if stop == "hook" else "at the 3th of 4"):
        engine.submit(request)
    assert not engine.has_work
    for generated in ([VOCAB], [-1], [1] * 9):
        with pytest.raises(RequestError):
            engine.submit(Request("a", text(9), greedy(9), generated=generated))


# --- who holds what -----------------------------------------------------------------------------------------------


@LAGS
def test_an_engine_waits_for_pages_that_are_kept(lag: int) -> None:
    pair = Pair(lag, pages=6, requests=3, context=80, snapshots=0)
    for name in ("a", "b"):
        pair.prefill.submit(Request(name, text(40, name), greedy(1), keep=True))
    pair.prefill.submit(Request("c", text(30), greedy(3)))
    drain(pair.prefill)
    assert sorted(pair.prefill.kept) == ["a"] and pair.prefill.idle and pair.prefill.has_work, "b needs 3 of 2 pages"
    assert pair.prefill.step() == [] and pair.prefill.idle
    assert pair.prefill.let_go("a") and not pair.prefill.idle
    drain(pair.prefill)
    assert (sorted(pair.prefill.kept) == ["b"] and not pair.prefill.idle) or pair.prefill.let_go("b")
    drain(pair.prefill)
    pair.prefill.let_go("b")
    assert not pair.prefill.has_work
    pair.audit()


@LAGS
def test_a_running_request_waits_for_pages_of_one_that_arrives(lag: int) -> None:
    pair = Pair(lag, pages=6, requests=3, context=80, snapshots=0)
    pair.decode.submit(Request("b", text(30, "b"), greedy(40)))
    events = pair.decode.step()
    pair.decode.submit(Request("a", text(40), greedy(6), moving=True))
    events += drain(pair.decode)
    assert pair.decode.idle and list(pair.decode.arriving) == ["a"] and len(pair.decode.scheduler.running) == 1
    pair.prefill.submit(Request("a", text(40), greedy(1), keep=True))
    first = drain(pair.prefill)
    pair.copy("a")
    events += pair.decode.arrived("a", first[-1])
    assert not pair.decode.idle
    events += drain(pair.decode)
    for name, prompt, count in (("a", text(40), 6), ("b", text(30, "b"), 40)):
        tokens = tokens_of([e for e in events if e.request_id == name])
        assert tokens == direct_greedy(prompt, count, HORIZON, WIDE)
    assert pair.decode.stats().preemptions >= 1, "it could preempt what had arrived"
    pair.audit()


@pytest.mark.parametrize(("budget", "admitted"), [(None, 4), (0, 4), (16, 3), (1000, 2)])
def test_admission_counts_what_requests_may_yet_generate(budget: int | None, admitted: int) -> None:
    """A prompt is 2 pages of 16 tokens, the budget of 16 one more, and all 4; there are 9."""
    for moving in (False, True):
        pair = Pair(pages=10, requests=4, context=128, snapshots=0, budget_tokens=budget, max_step_tokens=200)
        for i in range(4):
            pair.decode.submit(Request(f"{i}", text(30, i), greedy(34), moving=moving))
        pair.decode.step()
        held = len(pair.decode.scheduler.running) + len(pair.decode.arriving)
        assert held == admitted
        pair.audit()


@LAGS
def test_what_a_prefill_makes_final_is_told(lag: int) -> None:
    pair = Pair(lag)
    for turn in range(2):
        pair.prefill.submit(Request("a", text(150), greedy(1), keep=True))
        drain(pair.prefill)
        pair.prefill.let_go("a")
        ends = [(64, 128, 144, 150), (144, 150)][turn]
        log = [("computed", "a", end) for end in ends[lag * turn :]]
        assert pair.progress.log == [("admitted", "a"), *log, ("ended", "a", True)]
        pair.progress.log.clear()
    pair.prefill.submit(Request("b", text(90, 1), greedy(9), keep=True))
    pair.prefill.step()
    pair.prefill.step()
    pair.prefill.scheduler.preempt_newest()
    pair.prefill.step()
    pair.prefill.cancel("b")
    kinds = [entry[0] for entry in pair.progress.log]
    assert (
        kinds.count("admitted") == 2
        and kinds.count("preempted") == 1
        and pair.progress.log[-1] == ("ended", "b", False)
    )
    assert not pair.prefill.kept
    drain(pair.prefill)
    pair.audit()


def test_pages_of_a_request_to_be_kept_are_never_exchanged() -> None:
    pair = Pair(max_step_tokens=200)
    for name in ("a", "b"):
        pair.prefill.submit(Request(name, text(60), greedy(1), keep=True))
    drain(pair.prefill)
    one, two = (set(pair.prefill.pool.columns_of(r.slot)["c4"][1]) for r in pair.prefill.kept.values())
    assert len(one) == len(two) == 4 and not one & two
    pair.audit()
    pair.prefill.let_go("a")
    pair.prefill.submit(Request("c", text(60), greedy(1), keep=True))
    drain(pair.prefill)
    pair.audit()
    assert pair.prefill.let_go("b") and pair.prefill.let_go("c")
    pair.audit()
    assert not any(pair.prefill.pool.used_pages().values())


# --- when a transfer may begin ------------------------------------------------------------------------------------


class AtOnce(Copying):
    """Transfers that are over as soon as they are begun."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def begin(self, arrival: Arrival, /) -> None:
        super().begin(arrival)
        self.pair.copy(arrival.request.id)


class EndsAt:
    """A stop hook that nobody can foresee."""

    def __init__(self, count: int) -> None:
        self.left = count

    def push(self, token: int) -> bool:
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("length", [24, 33, 40])
def test_no_step_in_flight_writes_what_has_arrived(others: int, length: int) -> None:
    pair = Pair(1, requests=2, snapshots=0)
    pair.transfers = AtOnce(pair)
    pair.decode.connect(transfers=pair.transfers)
    pair.prefill.submit(Request("a", text(length), greedy(1), keep=True))
    first = drain(pair.prefill)[-1]
    if others:
        pair.decode.submit(Request("y", text(9, "y"), greedy(60)))
        pair.decode.step()
    # it ends where `a` will stand, with a step in flight that writes its place in the ring and on the window's page
    pair.decode.submit(Request("x", text(length - 4, "x"), greedy(60), text_stop=EndsAt(4)))
    events = []
    while not any(e.end for e in events):
        events += pair.decode.step()
    assert len(pair.decode._flights) == 1
    pair.decode.submit(Request("a", text(length), greedy(9), moving=True))
    while "a" not in pair.transfers.begun:
        events += pair.decode.step()
    events += pair.decode.arrived("a", first)
    events += drain(pair.decode)
    assert tokens_of([e for e in events if e.request_id == "a"]) == direct_greedy(text(length), 9, HORIZON, WIDE)
    pair.audit()


@LAGS
def test_copies_of_states_are_made_before_a_transfer_writes_the_row(lag: int) -> None:
    pair = Pair(lag, requests=1)
    pair.transfers = AtOnce(pair)
    pair.decode.connect(transfers=pair.transfers)
    pair.prefill.submit(Request("a", text(41), greedy(1), keep=True))
    first = drain(pair.prefill)[-1]
    pair.decode.submit(Request("x", text(20, "x"), greedy(13)))
    answer = tokens_of(drain(pair.decode))
    assert pair.decode.scheduler.copies_due, "it left a snapshot at 32 tokens, which is still to be copied"
    pair.decode.submit(Request("a", text(41), greedy(9), moving=True))
    drain(pair.decode)
    events = [*pair.decode.arrived("a", first), *drain(pair.decode)]
    assert tokens_of(events) == direct_greedy(text(41), 9, HORIZON, WIDE)
    more = [*text(20, "x"), *answer, 1, 2, 3]
    pair.decode.submit(Request("z", more, greedy(9)))
    events = drain(pair.decode)
    assert sum(e.cached_tokens for e in events) == 32
    assert tokens_of(events) == direct_greedy(more, 9, HORIZON, WIDE)


# --- in a thread --------------------------------------------------------------------------------------------------


@LAGS
def test_a_loop_sleeps_while_requests_arrive(lag: int) -> None:
    pair = Pair(lag)
    pair.prefill.submit(Request("a", text(40), greedy(1), keep=True))
    first = drain(pair.prefill)[-1]
    steps, step = [], pair.decode.step
    pair.decode.step = lambda: steps.append(1) or step()  # type: ignore[method-assign,func-returns-value]
    begun, done, events = threading.Event(), threading.Event(), []
    begin = pair.transfers.begin
    pair.transfers.begin = lambda arrival: (begin(arrival), begun.set())[0]  # type: ignore[method-assign]

    def sink(event: Event) -> None:
        events.append(event)
        if event.end is not None:
            done.set()

    loop = EngineLoop(pair.decode).start()
    loop.submit(Request("a", text(40), greedy(9), moving=True), sink)
    assert begun.wait(60)
    woken = threading.Event()
    assert loop.call(lambda engine: woken.set())
    assert woken.wait(60)
    assert len(steps) <= 4, "it does not spin"

    def arrive(engine: Engine) -> list[Event]:
        pair.copy("a")
        return engine.arrived("a", first)

    assert loop.call(arrive)
    assert done.wait(60)
    assert tokens_of(events) == direct_greedy(text(40), 9, HORIZON, WIDE)
    assert loop.close()
    assert not loop.call(lambda engine: None)


@pytest.mark.parametrize("drain_first", [False, True])
def test_a_loop_that_closes_waits_for_what_arrives_if_it_drains(drain_first: bool) -> None:
    pair = Pair()
    begun, events = threading.Event(), []
    begin = pair.transfers.begin
    pair.transfers.begin = lambda arrival: (begin(arrival), begun.set())[0]  # type: ignore[method-assign]
    loop = EngineLoop(pair.decode).start()
    loop.submit(Request("a", text(40), greedy(9), moving=True), events.append)
    assert begun.wait(60)
    if drain_first:
        threading.Timer(0.2, lambda: loop.call(lambda engine: engine.lost("a"))).start()
    assert loop.close(drain=drain_first) == drain_first
    end = events[-1].end
    assert end is not None and end.reason == ("length" if drain_first else "failed")
    assert list(pair.decode.unsettled) == ([] if drain_first else ["a"])
    for name in pair.transfers.abandoned:
        pair.decode.settle(name)
    pair.audit()
    assert not any(pair.decode.pool.used_pages().values())


def test_a_task_that_raises_is_a_fault_of_the_engine() -> None:
    pair = Pair()
    loop, events = EngineLoop(pair.decode).start(), []
    loop.submit(Request("a", text(40), greedy(9), moving=True), events.append)
    assert loop.call(lambda engine: engine.settle("nobody"))
    loop.close()
    assert loop.failure is not None and "nothing to settle" in loop.failure.message
    assert events[-1].end is not None and events[-1].end.reason == "failed"
