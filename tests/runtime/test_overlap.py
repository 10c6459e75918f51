"""Steps in flight: what the host may know late, what it must know early, and every order of events under both lags."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from dsv4c.errors import EngineError, RequestError, RunnerBroken
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.runner import HostRunner
from dsv4c.runtime.scheduler import Limits
from tests.runtime.lagged import LaggedRunner
from tests.runtime.standin import VOCAB, direct_greedy, kv_groups, make_engine

HORIZON = 8
SMALL = kv_groups(window_page=4, block=16, horizon=HORIZON, wide=8)
STEPS = 40  # a bound for tests that hang, far above what they need


def prompt_of(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(VOCAB) for _ in range(length)]


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)


def lagged(**options: Any) -> tuple[Engine, LaggedRunner]:
    engine, _ = make_engine(lag=1, **options)
    assert isinstance(engine.runner, LaggedRunner)
    return engine, engine.runner


def tokens_of(events: list[Event]) -> list[int]:
    return [t for e in events for t in e.tokens]


def drain(engine: Engine) -> list[Event]:
    events = []
    for _ in range(STEPS):
        if not engine.has_work:
            break
        events += engine.step()
        engine.audit()
    assert not engine.has_work
    return events


# --- one request, step by step ------------------------------------------------------------------------------------


def test_the_next_step_is_launched_before_the_last_one_is_known() -> None:
    engine, runner = lagged()
    one = Request("a", prompt_of(10), greedy(3))
    engine.submit(one)
    assert engine.step() == [] and (one.num_tokens, one.num_inflight, one.num_computed) == (10, 1, 10)
    assert (one.token(10), one.tokens().size, one.tokens(10, 11).tolist()) == (-1, 10, [-1])
    (event,) = engine.step()
    assert list(event.tokens) == direct_greedy(prompt_of(10), 1)
    assert (one.num_tokens, one.num_inflight, one.num_computed, one.pending, one.num_sampled) == (11, 1, 11, 1, 2)
    assert runner.launched == 2 and runner.most_in_flight == 2
    assert tokens_of(drain(engine)) == direct_greedy(prompt_of(10), 3)[1:]


def test_no_step_is_wasted_on_a_length() -> None:
    engine, runner = lagged()
    for i, count in enumerate((1, 5, 9)):
        engine.submit(Request(f"r{i}", prompt_of(10), greedy(count)))
    drain(engine)
    assert runner.launched == 9 and engine.stats().step_tokens == 30 + 4 + 8


@pytest.mark.parametrize("how", ["eos", "stop_token", "text", "cancel"])
def test_what_is_in_flight_after_a_stop_is_dropped(how: str) -> None:
    """The pages go back at once, and whoever takes them meanwhile is not disturbed by the step that still runs."""
    plain = direct_greedy(prompt_of(20), 12)
    at = next(i for i in range(3, 12) if plain[i] not in plain[:i])

    class Stop:
        def push(self, token_id: int) -> bool:
            return token_id == plain[at]

    engine, runner = lagged(eos=(plain[at],) if how == "eos" else (), limits=Limits(1, 64))
    params = greedy(12, stop_token_ids=(plain[at],) if how == "stop_token" else ())
    engine.submit(Request("a", prompt_of(20), params, text_stop=Stop() if how == "text" else None))
    engine.submit(Request("b", prompt_of(30), greedy(6, ignore_eos=True)))
    events = []
    while "a" in engine._requests:
        events += engine.step()
        engine.audit()
        if how == "cancel" and len(tokens_of(events)) == at + 1:
            cancelled = engine.cancel("a")
            assert cancelled is not None
            events.append(cancelled)
    assert tokens_of(events) == plain[: at + 1] and events[-1].end is not None
    assert events[-1].end.generated_tokens == at + 1
    assert runner.launched == at + 2 and engine.has_work
    assert not any(engine.pool.used_pages().values())
    assert tokens_of(drain(engine)) == direct_greedy(prompt_of(30), 6)


def test_a_stop_in_flight_alone_is_work_to_be_done() -> None:
    engine, _ = lagged()
    engine.submit(Request("a", prompt_of(20), greedy(9)))
    engine.step()
    engine.cancel("a")
    assert engine.has_work and not engine.scheduler.has_work
    assert engine.step() == [] and not engine.has_work and engine.step() == []


def test_min_tokens_counts_tokens_in_flight() -> None:
    stop = tuple(range(0, VOCAB, 2))
    for lag in (0, 1):
        engine, _ = make_engine(lag=lag)
        engine.submit(Request("a", prompt_of(20), greedy(30, min_tokens=9, stop_token_ids=stop)))
        tokens = tokens_of(drain(engine))
        assert all(t % 2 for t in tokens[:9])
        if lag == 0:
            expected = tokens
        assert tokens == expected


# --- preemption ---------------------------------------------------------------------------------------------------


def test_a_preempted_request_receives_its_token_before_it_is_admitted_again() -> None:
    engine, runner = lagged()
    one = Request("a", prompt_of(20), greedy(6))
    engine.submit(one)
    engine.step()
    (first,) = engine.step()
    engine.scheduler.preempt_newest()
    assert (one.status, one.num_inflight, one.num_computed) == ("waiting", 1, 0)
    (second,) = engine.step()
    assert one.status == "waiting" and runner.launched == 2, "its new slot does not hold the token in flight"
    engine.audit()
    assert engine.step() == [] and one.status == "running" and (one.num_computed, one.num_inflight) == (22, 1)
    assert tokens_of([first, second, *drain(engine)]) == direct_greedy(prompt_of(20), 6)


def test_a_request_preempted_with_its_last_token_in_flight_ends() -> None:
    engine, _ = lagged()
    engine.submit(Request("a", prompt_of(20), greedy(1)))
    engine.step()
    engine.scheduler.preempt_newest()
    (event,) = engine.step()
    assert event.end is not None and event.end.reason == "length"
    assert list(event.tokens) == direct_greedy(prompt_of(20), 1) and not engine.has_work
    engine.audit()


def test_prompt_logprobs_in_flight_are_not_kept_twice() -> None:
    seen = []
    for preempt in (False, True):
        engine, _ = lagged(limits=Limits(2, 16, max_logit_rows=16))
        engine.submit(Request("a", prompt_of(40), greedy(2, prompt_logprobs=1)))
        engine.step()
        if preempt:
            engine.scheduler.preempt_newest()
        events = drain(engine)
        assert len(events[0].prompt_logprobs) == 40
        seen.append([p and (p.token_id, round(p.logprob, 4)) for p in events[0].prompt_logprobs])
    assert seen[0] == seen[1]


# --- failures -----------------------------------------------------------------------------------------------------


def three(engine: Engine) -> None:
    for i in range(3):
        engine.submit(Request(f"r{i}", prompt_of(20 + i), greedy(6)))


def outcome(events: list[Event], name: str) -> tuple[list[int], str, str]:
    of = [e for e in events if e.request_id == name]
    end = of[-1].end
    assert end is not None and not any(e.end for e in of[:-1])
    return tokens_of(of), end.reason, end.error.message if end.error else ""


def test_a_failing_launch_fails_its_requests_and_no_other() -> None:
    engine, runner = lagged(limits=Limits(2, 64))
    runner.faults.launch = {4}
    three(engine)
    events = drain(engine)
    for i in range(2):  # two tokens were delivered, the third was in flight
        message = "the step failed: RuntimeError: stream exploded"
        assert outcome(events, f"r{i}") == (direct_greedy(prompt_of(20 + i), 2), "failed", message)
    assert outcome(events, "r2") == (direct_greedy(prompt_of(22), 6), "length", "")
    assert engine.stats().failed_steps == 1


def test_a_failing_result_fails_the_requests_of_every_step_in_flight() -> None:
    """r2 is admitted in step 3, when r0 has ended in step 1 and step 2 is in flight and fails when it is collected."""
    engine, runner = lagged(limits=Limits(2, 64))
    runner.faults.collect = {3}
    engine.submit(Request("r0", prompt_of(20), greedy(2)))
    engine.submit(Request("r1", prompt_of(21), greedy(6)))
    engine.submit(Request("r2", prompt_of(22), greedy(6)))
    engine.submit(Request("r3", prompt_of(23), greedy(6)))
    events = drain(engine)
    assert outcome(events, "r0") == (direct_greedy(prompt_of(20), 2), "length", "")
    assert outcome(events, "r1")[:2] == (direct_greedy(prompt_of(21), 2), "failed")
    assert outcome(events, "r2")[:2] == ([], "failed")
    assert outcome(events, "r3") == (direct_greedy(prompt_of(23), 6), "length", "")
    assert not any(engine.pool.used_pages().values())


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_broken_runner_fails_everything(where: str) -> None:
    engine, runner = lagged(limits=Limits(2, 64))
    setattr(runner.faults, where, {3})
    runner.faults.error = RunnerBroken("the device is lost")
    three(engine)
    events: list[Event] = []
    while engine.failure is None:
        events += engine.step()
    assert not engine.has_work and len(runner._uncollected) == 1, "nothing is asked of it again"
    engine.audit()
    assert sorted(e.request_id for e in events if e.end) == ["r0", "r1", "r2"]
    for i in range(3):
        assert outcome(events, f"r{i}")[1:] == ("failed", "the device is lost")
    assert engine.failure is runner.faults.error and engine.step() == []
    with pytest.raises(RequestError, match="the device is lost") as caught:
        engine.submit(Request("d", [1], greedy(2)))
    assert caught.value.status == 503


def test_a_token_that_is_not_the_next_is_refused() -> None:
    engine, _ = make_engine()
    one = Request("a", prompt_of(5), greedy(4))
    engine.submit(one)
    compute = engine.runner.launch

    def two(spans: Any) -> Any:
        one.append(3)
        return compute(spans)

    engine.runner.launch = two  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="which is not its next"):
        engine.step()


# --- the host's own runner ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1])
def test_states_are_copied_between_what_was_launched_before_and_after(lag: int) -> None:
    """Row 5 takes what request a's slot holds after step 2, though step 3 writes that slot before anybody looks."""
    engine, standin = make_engine(lag=lag, groups=None)
    engine.submit(Request("a", prompt_of(20), greedy(6)))
    engine.step()
    engine.step()
    slot = engine.scheduler.running[0].slot
    engine.runner.copy_states([(slot, 5), (5, 6)])
    drain(engine)
    tokens = prompt_of(20) + direct_greedy(prompt_of(20), 6)
    ring = standin.rings["c4"]

    def of(computed: int) -> list[int]:
        return [tokens[p] for p in sorted(range(computed - 8, computed), key=lambda p: p % 8)]

    assert ring[5].tolist() == of(21) and ring[slot].tolist() == of(25)
    assert ring[6, 0] == 10**9, "what row 5 held before"
    assert standin.rings["c128"][5, 0] == 10**9, "empty wherever a request resumes"


def test_a_runner_without_states_copies_nothing() -> None:
    engine, standin = make_engine()
    runner = HostRunner(standin, (), engine.pool, vocab_size=VOCAB)
    before = standin.states["c4"].clone()
    runner.copy_states([(1, 2)])
    assert torch.equal(standin.states["c4"], before)


# --- every order of events ----------------------------------------------------------------------------------------


@functools.cache
def reference(length: int, kind: int) -> tuple[int, ...]:
    """What a request gives when nothing disturbs it, on the host's own runner."""
    sizes = PoolSizes.for_requests(SMALL, 1, 128, 64)
    engine, _ = make_engine(sizes, Limits(1, 64), SMALL, horizon=HORIZON)
    engine.submit(Request("a", prompt_of(length), params_of(kind, 50)))
    tokens = []
    while engine.has_work:
        tokens += tokens_of(engine.step())
    return tuple(tokens)


def params_of(kind: int, max_tokens: int, **options: Any) -> SamplingParams:
    if kind == 0:
        return greedy(max_tokens, **options)
    penalty = {"frequency_penalty": 0.6, "repetition_penalty": 1.1} if kind == 2 else {}
    return SamplingParams(max_tokens=max_tokens, seed=kind, temperature=0.9, top_p=0.9, **penalty, **options)


class StopAt:
    """A text hook that ends its request at a count of tokens."""

    def __init__(self, count: int) -> None:
        self.left = count

    def push(self, token_id: int) -> bool:
        self.left -= 1
        return self.left == 0


class Lives(RuleBasedStateMachine):
    """Small, oversubscribed pools. Every request gives a prefix of its reference, and ends once and for the reason.

    Without snapshots there is no prefix cache; with them, requests of equal lengths share their prompts.
    """

    lag = 0
    steps = 0

    @initialize(
        pages=st.tuples(st.integers(10, 24), st.integers(8, 16)),
        requests=st.integers(1, 5),
        step_tokens=st.integers(5, 40),
        snapshots=st.integers(0, 4),
    )
    def make(self, pages: tuple[int, int], requests: int, step_tokens: int, snapshots: int) -> None:
        counts = {"window": pages[0], **dict.fromkeys(("c4", "c128", "index"), pages[1])}
        sizes = PoolSizes(counts, requests + 1, 112, snapshots)
        limits = Limits(requests, step_tokens, max_waiting=8)
        self.engine, self.standin = make_engine(sizes, limits, SMALL, horizon=HORIZON, lag=self.lag)
        self.events: dict[str, list[Event]] = {}
        self.expected: dict[str, tuple[int, int, int]] = {}
        self.stops: dict[str, int] = {}
        self.failing = False
        self.made = 0

    def take(self, events: list[Event]) -> None:
        assert len({e.request_id for e in events}) == len(events), "one event a request"
        for event in events:
            of = self.events.setdefault(event.request_id, [])
            assert not of or of[-1].end is None, "nothing after the end"
            of.append(event)
            length, kind, count = self.expected[event.request_id]
            tokens = tokens_of(of)
            assert tokens == list(reference(length, kind)[: len(tokens)]), event.request_id
            stop = self.stops.get(event.request_id, 10**9)
            assert len(tokens) <= min(count, stop)
            if event.end is None:
                continue
            assert event.end.generated_tokens == len(tokens)
            whole = {"length": count, "stop": stop}.get(event.end.reason)
            assert whole in (None, len(tokens))
            assert event.end.reason != "failed" or self.failing

    @rule(
        length=st.sampled_from([1, 4, 9, 17, 30]),
        kind=st.integers(0, 2),
        count=st.integers(1, 50),
        stop=st.none() | st.integers(1, 20),
    )
    def submit(self, length: int, kind: int, count: int, stop: int | None) -> None:
        self.made += 1
        name = f"r{self.made}"
        hook = None if stop is None else StopAt(stop)
        try:
            self.engine.submit(Request(name, prompt_of(length), params_of(kind, count), text_stop=hook))
        except RequestError as error:
            assert error.status == 503
            return
        self.expected[name] = length, kind, count
        if stop is not None:
            self.stops[name] = stop

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            launched = self.engine.stats().steps
            busy, flights = self.engine.has_work, len(self.engine._flights)
            self.take(self.engine.step())
            self.engine.audit()
            assert not busy or flights or self.engine.stats().steps > launched, "work, but no progress"

    @precondition(lambda self: self.engine._requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        event = self.engine.cancel(data.draw(st.sampled_from(sorted(self.engine._requests))))
        assert event is not None and event.end is not None and event.end.reason == "cancelled"
        self.take([event])

    @precondition(lambda self: self.engine.scheduler.running)
    @rule()
    def preempt(self) -> None:
        self.engine.scheduler.preempt_newest()

    @rule(how=st.sampled_from(["executor", "launch", "collect"]), ahead=st.integers(1, 3))
    def fail(self, how: str, ahead: int) -> None:
        runner = self.engine.runner
        if how == "executor" or not isinstance(runner, LaggedRunner):
            self.standin.fail_at.add(self.standin.steps + ahead)
        else:
            getattr(runner.faults, how).add(runner.launched + ahead)
        self.failing = True

    @rule()
    def fail_all(self) -> None:
        self.failing = True
        self.take(self.engine.fail_all(EngineError("closed")))
        assert not self.engine.scheduler.has_work

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.engine.audit()
        if not self.engine.scheduler.running:
            assert not any(self.engine.pool.used_pages().values())
        type(self).steps += 1

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work and not any(self.engine.pool.used_pages().values())
        self.engine.scheduler.distrust()
        self.engine.audit()
        assert self.engine.pool.free_pages() == self.engine.pool.total_pages()
        assert all(self.events[name][-1].end is not None for name in self.expected)


@pytest.mark.parametrize("lag", [0, 1])
def test_no_order_of_events_leaks_mixes_or_repeats(lag: int) -> None:
    machine: Callable[[], Lives] = type(f"Lives{lag}", (Lives,), {"lag": lag, "steps": 0})
    run_machine(machine, settings=settings(max_examples=200, stateful_step_count=30, deadline=None))
    assert machine.steps > 1000  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_a_long_life_over_pools_that_are_too_small(seed: int) -> None:
    """Hundreds of steps under constant pressure: preemption by need, failures, and a reference for every token."""
    rng = random.Random(seed)
    machine = type("Pressed", (Lives,), {"lag": 1, "steps": 0})()
    machine.make((16, 10), 5, 24, 3)
    machine.engine.scheduler.limits = Limits(5, 24, max_waiting=6)
    for _ in range(400):
        if len(machine.engine.scheduler.waiting) < 3:
            stop = rng.randint(1, 20) if rng.random() < 0.3 else None
            machine.submit(rng.choice([1, 4, 9, 17, 30]), rng.randrange(3), rng.randint(1, 50), stop)
        machine.step(1)
        if rng.random() < 0.02:
            machine.fail(rng.choice(["executor", "launch", "collect"]), 1)
    machine.teardown()
    stats = machine.engine.stats()
    assert stats.preemptions > 10 and all(stats.ended[r] > 5 for r in ("length", "stop", "failed"))
