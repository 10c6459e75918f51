"""The scheduling policy, rule by rule, and a state machine that looks for leaks in every order of events."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dsv4c.errors import ConfigError, EngineError, RequestError
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Limits, Scheduler, Span
from tests.runtime.standin import kv_groups


def scheduler_of(limits: Limits, pages: dict[str, int] | None = None, max_context: int = 1024) -> Scheduler:
    groups = kv_groups()
    sizes = PoolSizes.for_requests(groups, limits.max_requests, max_context, limits.max_step_tokens)
    if pages is not None:
        sizes = PoolSizes(pages, sizes.slots, max_context)
    return Scheduler(KVPool(groups, sizes), limits)


def request(name: str, length: int, max_tokens: int | None = 8, **options: object) -> Request:
    return Request(name, [1] * length, SamplingParams(max_tokens=max_tokens, **options))  # type: ignore[arg-type]


def run(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step; every sampling request gets a token. Returns (id, start, end) of the spans."""
    spans = scheduler.schedule()
    scheduler.commit(spans)
    for span in spans:
        if span.samples:
            span.request.arrive(1)
            span.request.append(2)
    scheduler.audit()
    return [(s.request.id, s.start, s.end) for s in spans]


def test_prompts_are_chunked_under_the_budget_beside_decodes() -> None:
    scheduler = scheduler_of(Limits(max_requests=4, max_step_tokens=100))
    scheduler.submit(request("a", 30))
    scheduler.submit(request("b", 250))
    scheduler.submit(request("c", 10))
    assert run(scheduler) == [("a", 0, 30), ("b", 0, 70)]
    assert run(scheduler) == [("a", 30, 31), ("b", 70, 169)]
    assert run(scheduler) == [("a", 31, 32), ("b", 169, 250), ("c", 0, 10)]
    assert run(scheduler) == [("a", 32, 33), ("b", 250, 251), ("c", 10, 11)]


def test_waiting_requests_are_admitted_in_order_and_nobody_overtakes() -> None:
    scheduler = scheduler_of(
        Limits(max_requests=8, max_step_tokens=512), {"window": 40, "c4": 4, "c128": 4, "index": 4}
    )
    scheduler.submit(request("a", 300))
    scheduler.submit(request("b", 300))
    scheduler.submit(request("c", 10))
    assert [s[0] for s in run(scheduler)] == ["a"], "c would fit, but b is first"
    a = scheduler.running[0]
    scheduler.remove(a)
    assert [s[0] for s in run(scheduler)] == ["b", "c"]


def test_the_newest_is_preempted_and_returns_to_the_front() -> None:
    scheduler = scheduler_of(
        Limits(max_requests=8, max_step_tokens=512), {"window": 40, "c4": 3, "c128": 9, "index": 9}
    )
    for name, length in (("a", 255), ("b", 200), ("c", 5)):
        scheduler.submit(request(name, length, 100))
    assert [s[0] for s in run(scheduler)] == ["a", "b"]
    assert run(scheduler) == [("a", 255, 256), ("b", 200, 201)]
    assert run(scheduler) == [("a", 256, 257)], "a needs a second c4 page: b, the newest, gives its own"
    assert [r.id for r in scheduler.waiting] == ["b", "c"]
    b = scheduler.waiting[0]
    assert (b.num_computed, b.num_tokens, b.num_preemptions, b.slot) == (0, 202, 1, 0)
    scheduler.remove(scheduler.running[0])
    assert run(scheduler) == [("b", 0, 202), ("c", 0, 5)]


def test_chunks_shrink_to_the_window_pages_there_are() -> None:
    scheduler = scheduler_of(Limits(max_requests=1, max_step_tokens=512), {"window": 5, "c4": 9, "c128": 9, "index": 9})
    scheduler.submit(request("a", 700))
    assert run(scheduler) == [("a", 0, 256)]
    assert run(scheduler) == [("a", 256, 384)]
    assert scheduler.num_preemptions == 0


def test_prompt_logprobs_bound_the_chunk_by_logit_rows() -> None:
    scheduler = scheduler_of(Limits(max_requests=2, max_step_tokens=64, max_logit_rows=12))
    scheduler.submit(request("a", 25, prompt_logprobs=0))
    scheduler.submit(request("b", 5, prompt_logprobs=0))
    spans = scheduler.schedule()
    assert [(s.request.id, s.start, s.end, s.prompt_rows) for s in spans] == [("a", 0, 10, range(0, 10))]
    scheduler.commit(spans)
    spans[0].request.prompt_logprobs.extend([None] * 10)
    assert [(s.request.id, s.start, s.end) for s in scheduler.schedule()] == [("a", 10, 20)]


@pytest.mark.parametrize(
    ("length", "max_tokens", "status", "code", "param"),
    [
        (0, 8, 400, "invalid_value", "prompt"),
        (1024, 1, 400, "context_length_exceeded", "prompt"),
        (1025, None, 400, "context_length_exceeded", "prompt"),
        (1000, 25, 400, "context_length_exceeded", "max_tokens"),
        (500, 400, 503, "out_of_pages", "max_tokens"),
        (900, None, 503, "out_of_pages", "prompt"),
    ],
)
def test_requests_that_can_never_run_are_refused(
    length: int, max_tokens: int | None, status: int, code: str, param: str
) -> None:
    scheduler = scheduler_of(Limits(max_requests=2, max_step_tokens=64), {"window": 9, "c4": 4, "c128": 9, "index": 9})
    with pytest.raises(RequestError) as caught:
        scheduler.submit(request("a", length, max_tokens))
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, param)
    assert not scheduler.has_work


def test_without_max_tokens_a_request_fills_what_there_is() -> None:
    scheduler = scheduler_of(Limits(max_requests=2, max_step_tokens=64), {"window": 9, "c4": 4, "c128": 9, "index": 9})
    one = request("a", 100, None)
    scheduler.submit(one)
    assert one.max_tokens_total == 768


def test_a_full_queue_refuses() -> None:
    scheduler = scheduler_of(Limits(max_requests=1, max_step_tokens=64, max_waiting=2))
    scheduler.submit(request("a", 5))
    scheduler.check(request("b", 5))
    with pytest.raises(RequestError, match="waiting already"):
        scheduler.check(request("b", 5), ahead=1)
    scheduler.submit(request("b", 5))
    with pytest.raises(RequestError) as caught:
        scheduler.submit(request("c", 5))
    assert (caught.value.status, caught.value.code) == (503, "queue_full")


def test_limits_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="fewer than `max_requests`"):
        Limits(max_requests=10, max_step_tokens=9)
    with pytest.raises(ConfigError, match="max_logit_rows"):
        Limits(max_requests=10, max_step_tokens=20, max_logit_rows=5)
    with pytest.raises(ConfigError, match="max_waiting"):
        Limits(max_waiting=0)
    groups = kv_groups()
    with pytest.raises(ConfigError, match="3 slots"):
        Scheduler(KVPool(groups, PoolSizes.for_requests(groups, 3, 64)), Limits(max_requests=4))


def test_removing_twice_is_an_error() -> None:
    scheduler = scheduler_of(Limits(max_requests=1, max_step_tokens=64))
    one = request("a", 5)
    scheduler.submit(one)
    scheduler.remove(one)
    with pytest.raises(EngineError, match="is ended"):
        scheduler.remove(one)
    with pytest.raises(EngineError, match="submitted before"):
        scheduler.submit(one)


class Lifecycles(RuleBasedStateMachine):
    """Every order of submit, step, finish, cancel and failure over small, oversubscribed pools.

    Prompts are equal but for their lengths: with snapshots, all of them share what they can.
    """

    steps = 0

    @initialize(
        pages=st.tuples(st.integers(6, 14), st.integers(4, 6), st.integers(4, 6)),
        requests=st.integers(1, 8),
        step_tokens=st.integers(8, 40),
        snapshots=st.integers(0, 4),
    )
    def make(self, pages: tuple[int, int, int], requests: int, step_tokens: int, snapshots: int) -> None:
        groups = kv_groups(window_page=4, block=16, horizon=8)
        window, c4, c128 = pages
        sizes = PoolSizes({"window": window, "c4": c4, "c128": c128, "index": c4}, requests + 1, 96, snapshots)
        self.scheduler = Scheduler(
            KVPool(groups, sizes), Limits(max_requests=requests, max_step_tokens=step_tokens, max_waiting=10)
        )
        self.known: list[Request] = []
        self.made = 0
        self.order: list[str] = []

    def live(self) -> list[Request]:
        return [r for r in self.known if r.status in ("waiting", "running")]

    def plan(self) -> list[Span]:
        spans = self.scheduler.schedule()
        assert spans or not self.scheduler.has_work, "work, but no progress"
        assert sum(s.length for s in spans) <= self.scheduler.limits.max_step_tokens
        assert all(s.start == s.request.num_computed < s.end <= s.request.num_tokens for s in spans)
        assert len({s.request.id for s in spans}) == len(spans)
        ages = [self.order.index(r.id) for r in (*self.scheduler.running, *self.scheduler.waiting)]
        assert ages == sorted(ages), "age is the order of submission"
        return spans

    @rule(length=st.integers(1, 40), max_tokens=st.integers(1, 90))
    def submit(self, length: int, max_tokens: int) -> None:
        self.made += 1
        one = request(f"r{self.made}", length, max_tokens)
        try:
            self.scheduler.submit(one)
        except RequestError:
            assert one.status == "new"
            return
        self.known.append(one)
        self.order.append(one.id)

    @rule(count=st.integers(1, 40))
    def step(self, count: int) -> None:
        for _ in range(count):
            spans = self.plan()
            self.scheduler.commit(spans)
            for span in spans:
                if not span.samples:
                    continue
                span.request.arrive(1)
                span.request.append(1)
                if span.request.num_tokens == span.request.max_tokens_total:
                    self.scheduler.remove(span.request)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.scheduler.remove(data.draw(st.sampled_from(self.live())))

    @precondition(lambda self: any(0 < r.num_computed < r.num_prompt for r in self.live()))
    @rule()
    def abort_mid_prefill(self) -> None:
        self.scheduler.remove(next(r for r in self.live() if 0 < r.num_computed < r.num_prompt))

    @precondition(lambda self: self.live())
    @rule()
    def fail_a_step(self) -> None:
        for span in self.plan():
            self.scheduler.remove(span.request)

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def preempt(self) -> None:
        newest = self.scheduler.running[-1]
        assert self.scheduler.preempt_newest() is newest is self.scheduler.waiting[0]
        assert newest.slot == newest.num_computed == 0

    @rule()
    def plan_without_running(self) -> None:
        """A step abandoned before the executor: the next plan must be able to repeat it."""
        self.plan()

    @precondition(lambda self: len(self.scheduler.running) > 1)
    @rule()
    def crowd_out(self) -> None:
        """The oldest request decodes until it ends; whoever is in its way is preempted."""
        oldest = self.scheduler.running[0]
        while oldest.status == "running":
            self.step(1)

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.scheduler.audit()
        for one in self.known:
            assert (one.slot > 0) == (one.status == "running")
        if not self.scheduler.running:
            assert not any(self.scheduler.pool.used_pages().values())
        Lifecycles.steps += 1

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for one in self.live():
            self.scheduler.remove(one)
        self.scheduler.audit()
        assert not any(self.scheduler.pool.used_pages().values())


def test_no_order_of_events_leaks_or_frees_twice() -> None:
    run_state_machine_as_test(Lifecycles, settings=settings(max_examples=300, stateful_step_count=50, deadline=None))
    assert Lifecycles.steps >= 10_000


@pytest.mark.parametrize("seed", range(4))
def test_a_long_life_over_pools_that_are_too_small(seed: int) -> None:
    """3,000 steps under constant pressure, where the state machine's short lives seldom get."""
    rng = random.Random(seed)
    groups = kv_groups(window_page=4, block=16, horizon=8)
    sizes = PoolSizes({"window": 24, "c4": 12, "c128": 14, "index": 12}, 9, 160)
    scheduler = Scheduler(KVPool(groups, sizes), Limits(max_requests=8, max_step_tokens=24, max_waiting=12))
    made, ended = 0, 0
    for _ in range(3000):
        while len(scheduler.waiting) < 4:
            made += 1
            scheduler.submit(request(f"r{made}", rng.randint(1, 60), rng.randint(1, 100)))
        spans = scheduler.schedule()
        scheduler.audit()
        assert spans
        if rng.random() < 0.02:  # the executor failed
            for span in spans:
                scheduler.remove(span.request)
            continue
        scheduler.commit(spans)
        for span in spans:
            if span.samples:
                span.request.arrive(1)
                span.request.append(1)
            if span.request.num_tokens == span.request.max_tokens_total or rng.random() < 0.004:
                scheduler.remove(span.request)
                ended += 1
        if rng.random() < 0.01:
            scheduler.remove(rng.choice([*scheduler.running, *scheduler.waiting]))
        scheduler.audit()
    assert ended > 100 and scheduler.num_preemptions > 50
    for one in [*scheduler.running, *scheduler.waiting]:
        scheduler.remove(one)
    scheduler.audit()
    assert not any(scheduler.pool.used_pages().values())
