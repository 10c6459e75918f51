"""Two engines under every order of events: chunks, preemption, cancellation, failures, transfers that end or do not.

What a transfer has not filled yet is full of garbage, and what is unsettled goes on being written. What the prefill
engine says is final is read at once, as a stream would, and must be the same when all is done.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from dsv4c.runtime.engine import Engine
from dsv4c.runtime.moving import Arrival
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.sampler import SamplerState, sample
from dsv4c.runtime.scheduler import Limits
from tests.runtime.joined import Copying, Followed, copy_state, tokens_of
from tests.runtime.oracle import Oracle
from tests.runtime.standin import VOCAB, StandIn, direct_logits, kv_groups, make_engine, state_groups
from tests.runtime.test_moving import Arrays

BLOCK, HORIZON, WIDE = 16, 8, 8
GROUPS = kv_groups(window_page=4, block=BLOCK, horizon=HORIZON, wide=WIDE)
STATES = state_groups(WIDE)
CONTEXT = 128
KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.0, "prompt_logprobs": 1, "logprobs": 0},
    {"temperature": 1.1, "seed": 5, "top_k": 20, "stop_token_ids": (3, 4, 5)},
    {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.4, "presence_penalty": 0.5, "min_tokens": 6,
     "stop_token_ids": (7, 8, 9, 10)},
)  # fmt: skip


def params_of(kind: int, count: int) -> SamplingParams:
    options: Any = dict(KINDS[kind])
    options["min_tokens"] = min(count, options.get("min_tokens", 0))
    return SamplingParams(max_tokens=count, **options)


def text(length: int, family: int) -> list[int]:
    """Prompts of a family begin alike."""
    rng = random.Random(family)
    return [rng.randrange(VOCAB) for _ in range(length)]


@functools.cache
def expected(length: int, family: int, kind: int, count: int) -> tuple[int, ...]:
    """All tokens of such a request, by direct computation."""
    params, tokens = params_of(kind, count), text(length, family)
    state = SamplerState(params, np.array(tokens), params.stop_token_ids)
    while len(tokens) < length + count:
        token = sample(torch.from_numpy(direct_logits(tokens, HORIZON, WIDE))[None], [state])[0][0]
        assert token is not None
        tokens.append(token)
        state.accept(token)
        if token in params.stop_token_ids:
            break
    return tuple(tokens[length:])


@dataclass
class Case:
    """One client's request."""

    expected: tuple[int, ...]
    events: list[Event] = field(default_factory=list)
    first: Event | None = None
    """What the prefill engine has said."""
    doomed: bool = False
    """Whether it was cancelled."""


class Reader(Followed):
    """Reads whole pages as soon as they are final, and compares them in the end."""

    def __init__(self, engine: Engine, pools: Arrays) -> None:
        super().__init__(engine)
        self.pools = pools
        self.read: dict[str, dict[tuple[str, int], tuple[int, np.ndarray]]] = {}

    def admitted(self, request: Request, /) -> None:
        super().admitted(request)
        self.read[request.id] = {}

    def computed(self, request: Request, tokens: int, /) -> None:
        super().computed(request, tokens)
        for group in (g for g in GROUPS if g.horizon is None):
            for column in range(tokens // group.page_tokens):
                if (group.name, column) not in self.read[request.id]:
                    page = int(self.engine.pool.tables[group.name][request.slot, column])
                    self.read[request.id][group.name, column] = page, self.page(group.name, page)

    def page(self, group: str, page: int) -> np.ndarray:
        n = next(g.entries_per_page for g in GROUPS if g.name == group)
        return self.pools.kv(group)[0][page * n : (page + 1) * n].copy()

    def check(self, request: Request) -> None:
        """Pages are where they were, with what they held."""
        for (group, column), (page, content) in self.read[request.id].items():
            assert self.engine.pool.tables[group][request.slot, column] == page
            assert (self.page(group, page) == content).all()


class Lives(RuleBasedStateMachine):
    """Engine 0 computes prompts for engine 1; both have requests of their own."""

    steps = moved = lost = preempted = 0

    @initialize(
        lag=st.sampled_from([0, 1]), drafts=st.sampled_from([0, 0, 2]), step_tokens=st.integers(9, 40),
        share=st.sampled_from([0.3, 0.5, 1.0]), snapshots=st.sampled_from([0, 2, 8]),
        budget=st.sampled_from([None, None, 4, 1000]), seed=st.integers(0, 99),
        may_fail=st.sampled_from([False, False, True]),
    )  # fmt: skip
    def make(
        self, lag: int, drafts: int, step_tokens: int, share: float, snapshots: int, budget: int | None, seed: int,
        may_fail: bool,
    ) -> None:  # fmt: skip
        self.engines: list[Engine] = []
        self.standins: list[StandIn] = []
        for _ in range(2):
            limits = Limits(3, max(step_tokens, 3 * (1 + drafts)), speculative_tokens=drafts, budget_tokens=budget)
            sizes = PoolSizes.for_requests(GROUPS, 5, CONTEXT, step_tokens, snapshots)
            least = PoolSizes.for_requests(GROUPS, 1, CONTEXT, 40).pages
            pages = {name: max(least[name], int(count * share)) for name, count in sizes.pages.items()}
            sizes = PoolSizes(pages, 6, CONTEXT, snapshots)
            drafter = Oracle(0.3, 0.2, seed, horizon=HORIZON, wide=WIDE) if drafts else None
            engine, standin = make_engine(sizes, limits, GROUPS, horizon=HORIZON, lag=lag, drafter=drafter)
            self.engines.append(engine)
            self.standins.append(standin)
        self.rng = np.random.default_rng(seed)
        self.pools = Arrays(self.standins[0]), Arrays(self.standins[1])
        self.reader = Reader(self.engines[0], self.pools[0])
        self.transfers = Copying()
        self.engines[0].connect(progress=self.reader)
        self.engines[1].connect(transfers=self.transfers)
        self.failing, self.may_fail = False, may_fail
        for engine in self.engines:
            engine.track_blocks()
        self.blocks: list[set[int]] = [set(), set()]
        self.cases: dict[str, Case] = {}
        self.writing: dict[str, Arrival] = {}
        """Transfers that nobody has stopped."""

    def take(self, which: int, events: list[Event]) -> None:
        for event in events:
            case = self.cases[event.request_id.removesuffix("'")]
            if event.request_id.endswith("'"):
                if event.end is not None and event.end.reason in ("stop", "length"):
                    case.first = event
                continue
            assert not case.events or case.events[-1].end is None
            case.events.append(event)
            if event.end is not None and event.end.reason in ("stop", "length"):
                given = len(case.expected) - len(tokens_of(case.events))
                assert given >= 0 and tuple(tokens_of(case.events)) == case.expected[given:], event.request_id
            elif event.end is not None:
                assert case.doomed if event.end.reason == "cancelled" else self.failing, event

    @rule(
        which=st.integers(0, 1), moving=st.sampled_from([True, True, False]), length=st.integers(1, 60),
        family=st.integers(0, 2), kind=st.integers(0, len(KINDS) - 1), count=st.integers(1, 24),
        given=st.integers(0, 8),
    )  # fmt: skip
    def submit(self, which: int, moving: bool, length: int, family: int, kind: int, count: int, given: int) -> None:
        tokens = expected(length, family, kind, count)
        given = min(given, len(tokens) - 1) if given % 2 else 0
        name, params = f"r{len(self.cases)}", params_of(kind, count)
        generated, prompt = tokens[:given], text(length, family)
        self.cases[name] = Case(tokens)
        if moving:
            few = dataclasses.replace(params, max_tokens=given + 1, min_tokens=min(params.min_tokens, given + 1))
            self.engines[0].submit(Request(f"{name}'", prompt, few, generated=generated, keep=True))
            which = 1
        self.engines[which].submit(Request(name, prompt, params, generated=generated, moving=moving))

    @rule(count=st.integers(2, 9))
    def step_both(self, count: int) -> None:
        for _ in range(count):
            self.step(0, 1)
            self.step(1, 1)

    @rule(which=st.integers(0, 1), count=st.integers(1, 3))
    def step(self, which: int, count: int) -> None:
        engine = self.engines[which]
        for _ in range(count):
            idle, launched, flights = engine.idle, engine.stats().steps, len(engine._flights)
            events = engine.step()
            if idle:
                assert not events and engine.stats().steps == launched and engine.idle
            else:
                assert flights or engine.stats().steps > launched or engine.idle or events or engine.arriving
            self.take(which, events)
            engine.audit()
            self.follow_blocks(which)
            self.write_garbage()

    def follow_blocks(self, which: int) -> None:
        known = self.blocks[which]
        for event in self.engines[which].block_events():
            if event.kind == "cleared":
                known.clear()
            elif event.kind == "removed":
                known.remove(event.hash)
            else:
                assert event.parent_hash is None or event.parent_hash in known
                assert event.hash not in known and len(event.tokens) == BLOCK
                known.add(event.hash)
        assert sorted(known) == sorted(self.engines[which].known_blocks())

    def write_garbage(self) -> None:
        """What transfers have not ended may write what they like, where they may."""
        for name, arrival in self.transfers.begun.items():
            if name not in self.writing:
                self.writing[name] = arrival
        for arrival in self.writing.values():
            for group in GROUPS:
                _, pages = arrival.tables[group.name]
                own = 0 if group.horizon else arrival.start // group.page_tokens
                n = group.entries_per_page
                for page in pages[own:]:
                    self.standins[1].pools[group.name][page * n : (page + 1) * n] = self.rng.integers(10**9)
            for ring in self.standins[1].rings.values():
                ring[arrival.slot] = self.rng.integers(10**9)

    def there(self) -> list[str]:
        """Transfers of requests that wait for them, whose state is complete."""
        kept, arriving = self.engines[0].kept, self.engines[1].arriving
        return [n for n in sorted(self.writing) if n in arriving and f"{n}'" in kept and self.cases[n].first]

    @precondition(lambda self: self.there())
    @rule(data=st.data(), late=st.booleans())
    def finish(self, data: st.DataObject, late: bool) -> None:
        self.finish_one(data.draw(st.sampled_from(self.there())), late)

    def finish_one(self, name: str, late: bool) -> None:
        """A transfer is done."""
        arrival, kept, first = self.writing.pop(name), self.engines[0].kept[f"{name}'"], self.cases[name].first
        del self.transfers.begun[name]
        assert first is not None
        self.reader.check(kept)
        copy_state(self.engines[0], kept, arrival, GROUPS, STATES, self.pools)
        self.take(1, self.engines[1].arrived(name, first))
        if not late:
            self.engines[0].let_go(f"{name}'")
        type(self).moved += 1

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), chance=st.integers(0, 3), busy=st.booleans(), settle=st.booleans())
    def lose(self, data: st.DataObject, chance: int, busy: bool, settle: bool) -> None:
        """A transfer is given up; if it is busy it goes on writing."""
        if not chance:
            self.lose_one(data.draw(st.sampled_from(sorted(self.writing))), busy, settle)

    def lose_one(self, name: str, busy: bool, settle: bool) -> None:
        """See `lose`."""
        busy = busy and name in self.engines[1].arriving
        if not busy:
            del self.transfers.begun[name], self.writing[name]
        if settle and name in self.engines[1].unsettled:
            if busy:
                return
            self.engines[1].settle(name)
        elif name in self.engines[1].arriving or not busy:
            assert self.engines[1].lost(name, busy=busy) == [] and (name in self.engines[1].unsettled) == busy
        self.engines[1].audit()
        type(self).lost += 1

    @precondition(lambda self: self.engines[0].kept)
    @rule(data=st.data(), chance=st.integers(0, 3))
    def let_go(self, data: st.DataObject, chance: int) -> None:
        if chance:
            return
        assert self.engines[0].let_go(data.draw(st.sampled_from(sorted(self.engines[0].kept))))

    @rule(which=st.integers(0, 1), data=st.data(), chance=st.integers(0, 2))
    def cancel(self, which: int, data: st.DataObject, chance: int) -> None:
        names = sorted(self.engines[which]._requests)
        if chance or not names:
            return
        name = data.draw(st.sampled_from(names))
        if not name.endswith("'"):
            self.cases[name].doomed = True
        event = self.engines[which].cancel(name)
        assert event is not None and event.end is not None
        self.take(which, [event])

    @rule(which=st.integers(0, 1), chance=st.integers(0, 2))
    def preempt(self, which: int, chance: int) -> None:
        scheduler = self.engines[which].scheduler
        if not chance and scheduler.running:
            scheduler.preempt_newest()
            type(self).preempted += 1

    @precondition(lambda self: self.may_fail)
    @rule(which=st.integers(0, 1), ahead=st.integers(1, 3))
    def fail(self, which: int, ahead: int) -> None:
        self.standins[which].fail_at.add(self.standins[which].steps + ahead)
        self.failing = True

    @invariant()
    def everything_is_accounted_for(self) -> None:
        for engine in self.engines:
            engine.audit()
        type(self).steps += 1

    def teardown(self) -> None:
        if not hasattr(self, "engines"):
            return
        for standin in self.standins:
            standin.fail_at.clear()
        for _ in range(3000):
            for which in (0, 1):
                self.step(which, 1)
            if self.engines[0].idle and self.engines[1].idle:
                for name in sorted(self.writing):
                    del self.transfers.begun[name], self.writing[name]
                    self.take(1, self.engines[1].lost(name))
                for name in list(self.engines[0].kept):
                    if not any(e._requests for e in self.engines) or self.engines[0].has_work:
                        self.engines[0].let_go(name)
            if not any(e.has_work for e in self.engines) and not self.writing:
                break
        for name in list(self.engines[0].kept):
            self.engines[0].let_go(name)
        for engine in self.engines:
            assert not engine.has_work and not engine.scheduler.holders and not any(engine.pool.used_pages().values())
            engine.scheduler.distrust()
            engine.audit()
            assert engine.pool.free_pages() == engine.pool.total_pages()
        for name, case in self.cases.items():
            assert case.events and case.events[-1].end is not None, name


def test_no_order_of_events_changes_a_token_or_leaks_a_page() -> None:
    machine: Callable[[], Lives] = type("Counted", (Lives,), {"steps": 0})
    run_machine(machine, settings=settings(max_examples=50, stateful_step_count=40, deadline=None))
    assert machine.steps > 1000  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(4))
def test_a_long_life_over_pools_that_are_too_small(seed: int) -> None:
    """Hundreds of steps under constant pressure, with a reference for every token."""
    rng = random.Random(seed)
    machine = type("Pressed", (Lives,), {"moved": 0, "lost": 0})()
    drafts, budget = (0, 2)[seed // 2], (None, 12)[seed % 2]
    machine.make(seed % 2, drafts, 24, 0.3, (0, 8)[seed % 2], budget, seed, False)
    for _ in range(500):
        if min(len(e.scheduler.waiting) for e in machine.engines) < 3:
            machine.submit(
                rng.randrange(2), rng.random() < 0.8, rng.randint(1, 60), rng.randrange(3), rng.randrange(len(KINDS)),
                rng.randint(1, 24), rng.randrange(9),
            )  # fmt: skip
        for which in (0, 1):
            machine.step(which, rng.randrange(3))
            machine.preempt(which, rng.randrange(30))
        for name in machine.there():
            if rng.random() < 0.4:
                machine.finish_one(name, rng.random() < 0.2)
        for name in list(machine.engines[0].kept):
            if rng.random() < (0.02 if name.removesuffix("'") in machine.engines[1]._requests else 0.3):
                machine.engines[0].let_go(name)
        for name in sorted(machine.writing):
            if name not in machine.there() and f"{name}'" not in machine.engines[0]._requests and rng.random() < 0.3:
                machine.lose_one(name, rng.random() < 0.3, True)
    machine.teardown()
    counts = machine.moved, machine.lost, sum(e.stats().preemptions for e in machine.engines)
    assert machine.moved > 40 and min(counts) > 5, counts
