"""Pools: exact counts, all-or-nothing growth, eviction by horizon, sizes from requests and bytes, and the audit."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dsv4c.artifact import KVGroup, Pool, StateGroup
from dsv4c.errors import ConfigError, EngineError
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.poolsizes import (
    PoolSizes,
    block_tokens,
    first_page,
    page_bytes,
    peak_pages,
    slot_bytes,
    snapshot_states,
    step_pages,
    tail_pages,
)
from tests.runtime.standin import kv_groups


def pool_of(max_requests: int = 2, max_context: int = 1024, step_tokens: int = 256) -> KVPool:
    groups = kv_groups()
    return KVPool(groups, PoolSizes.for_requests(groups, max_requests, max_context, step_tokens))


def admitted(pool: KVPool) -> int:
    slot = pool.admit()
    assert slot is not None
    return slot


def test_grow_takes_exactly_what_pages_needed_says() -> None:
    pool = pool_of()
    slot = admitted(pool)
    assert pool.pages_needed(slot, 300) == {"window": 5, "c4": 2, "c128": 2, "index": 2}
    assert pool.grow(slot, 300)
    assert pool.used_pages() == {"window": 5, "c4": 2, "c128": 2, "index": 2}
    assert not any(pool.pages_needed(slot, 320).values())
    assert pool.pages_needed(slot, 321) == {"window": 1, "c4": 0, "c128": 0, "index": 0}
    assert (pool.tables["window"][slot, :5] > 0).all() and not pool.tables["window"][slot, 5:].any()
    pool.audit()


def test_growth_is_all_or_nothing() -> None:
    groups = kv_groups()
    pool = KVPool(groups, PoolSizes({"window": 20, "c4": 3, "c128": 9, "index": 9}, 3, 1024))
    slot = admitted(pool)
    assert pool.fit(slot, 1024) == 512
    assert not pool.grow(slot, 513)
    assert not any(pool.used_pages().values()) and not any(t.any() for t in pool.tables.values())
    assert pool.grow(slot, 512)
    pool.audit()


def test_window_pages_leave_when_nobody_can_read_them() -> None:
    pool = pool_of()
    slot = admitted(pool)
    most = 0
    for token in range(1000):
        assert pool.grow(slot, token + 1)
        window = pool.tables["window"][slot]
        # token t reads back to t - 127, and every page that it reads nothing of is gone
        assert (window[max(0, token - 127) // 64 : token // 64 + 1] > 0).all()
        assert not window[: max(0, token - 127) // 64].any()
        most = max(most, int((window > 0).sum()))
        pool.evict(slot, token + 1)
        assert pool.used_pages()["window"] == token // 64 + 1 - max(0, token - 126) // 64
    assert most == peak_pages(pool.groups[0], 1000) == 3
    pool.audit()
    pool.release(slot)
    assert not any(pool.used_pages().values())
    pool.audit()


@given(st.integers(1, 300), st.integers(1, 700), st.integers(1, 64), st.integers(1, 200))
def test_peak_pages_bounds_every_chunking(chunk: int, tokens: int, page: int, horizon: int) -> None:
    group = KVGroup("w", 1, page, horizon, ())
    pool = KVPool([group], PoolSizes({"w": 1 + peak_pages(group, tokens, chunk)}, 2, tokens))
    slot = admitted(pool)
    done = 0
    while done < tokens:
        done = min(done + chunk, tokens)
        assert pool.grow(slot, done)
        pool.evict(slot, done)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30))
def test_peak_pages_is_reached(chunk: int, page: int, horizon: int) -> None:
    """Some chunk of a long request holds as many pages as its bound says."""
    group = KVGroup("w", 1, page, horizon, ())
    most = 0
    for first in range(page):
        pool = KVPool([group], PoolSizes({"w": 200}, 2, 150))
        slot = admitted(pool)
        for end in (horizon + first, horizon + first + chunk):
            assert pool.grow(slot, end)
            most = max(most, pool.used_pages()["w"] if end > horizon + first else 0)
            pool.evict(slot, end)
    assert most == peak_pages(group, 150, chunk)


def most_pages(group: KVGroup, requests: int, tokens: int, step_tokens: int) -> int:
    """By trying: the most pages that requests hold in a step, over where each stands and how many tokens each gets."""
    size, horizon = group.page_tokens, group.horizon or 0
    held = [0] * (step_tokens + 1)  # by the tokens that one request gets
    for computed in range(tokens + 1):
        for given_ in range(min(step_tokens, tokens - computed) + 1):
            pages = -(-(computed + given_) // size) - max(0, computed + 1 - horizon) // size
            held[given_] = max(held[given_], pages)
    best = [0] * (step_tokens + 1)  # by the tokens of the step
    for _ in range(requests):
        best = [max(best[rest - n] + held[n] for n in range(rest + 1)) for rest in range(step_tokens + 1)]
    return best[-1]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 14), st.integers(1, 24))
def test_step_pages_is_the_most_that_can_be_held(requests: int, page: int, horizon: int, step_tokens: int) -> None:
    group = KVGroup("w", 1, page, horizon, ())
    assert step_pages(group, requests, 60, step_tokens) == most_pages(group, requests, 60, step_tokens)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 14), st.integers(1, 24), st.integers(1, 30))
def test_step_pages_bounds_short_requests(
    requests: int, page: int, horizon: int, step_tokens: int, tokens: int
) -> None:
    group = KVGroup("w", 1, page, horizon, ())
    most = most_pages(group, requests, tokens, step_tokens)
    assert most <= step_pages(group, requests, tokens, step_tokens) <= requests * -(-tokens // page)


@pytest.mark.parametrize("seed", range(40))
def test_for_requests_never_lacks_a_page(seed: int) -> None:
    rng = random.Random(seed)
    groups = kv_groups(window_page=8, block=32, horizon=16)
    pool = KVPool(groups, PoolSizes.for_requests(groups, 4, 128, 40))
    slots = {admitted(pool): 0 for _ in range(4)}
    while any(n < 128 for n in slots.values()):
        budget, spans = 40, {}
        for slot, done in rng.sample(sorted(slots.items()), 4):
            take = min(rng.randint(0, budget), 128 - done)
            budget -= take
            assert pool.grow(slot, done + take), "sizes for all requests lacked a page"
            spans[slot] = done + take
        for slot, end in spans.items():
            pool.evict(slot, end)
            slots[slot] = end
    pool.audit()


def test_slots_and_pages_run_out_without_an_error() -> None:
    pool = pool_of(max_requests=2)
    assert admitted(pool) != admitted(pool)
    assert pool.admit() is None
    pool.audit()


def test_releasing_twice_is_an_error() -> None:
    pool = pool_of()
    slot = admitted(pool)
    pool.grow(slot, 100)
    pool.release(slot)
    with pytest.raises(EngineError, match=f"slot {slot} is not owned"):
        pool.release(slot)
    for null_or_foreign in (0, 99):
        with pytest.raises(EngineError):
            pool.grow(null_or_foreign, 1)
    pool.audit()


def test_growing_past_the_context_is_an_error() -> None:
    pool = pool_of(max_context=256)
    slot = admitted(pool)
    with pytest.raises(EngineError, match="cannot grow to 257 tokens"):
        pool.grow(slot, 257)


@pytest.mark.parametrize("fault", ["leak", "double", "stray", "null"])
def test_audit_sees(fault: str) -> None:
    pool = pool_of()
    one, two = admitted(pool), admitted(pool)
    pool.grow(one, 200)
    pool.grow(two, 200)
    table: np.ndarray = pool.tables["c4"]
    if fault == "leak":
        pool._groups[1].free.pop()
    elif fault == "double":
        table[two, 0] = table[one, 0]
    elif fault == "stray":
        table[one, 3] = 1
    else:
        table[one, 0] = 0
    with pytest.raises(EngineError, match="c4"):
        pool.audit()


GROUPS = (
    KVGroup("window", 1, 64, 128, (Pool("w", (512,), "bfloat16"), Pool("w2", (512,), "bfloat16"))),
    KVGroup("c4", 4, 256, None, (Pool("c", (512,), "bfloat16"),)),
    KVGroup("c128", 128, 256, None, (Pool("h", (512,), "float32"),)),
)
STATES = (StateGroup("ring", (Pool("r", (8, 512), "float32"),)),)


def test_bytes_of_pages_and_slots() -> None:
    assert [page_bytes(g) for g in GROUPS] == [64 * 2 * 1024, 64 * 1024, 2 * 2048]
    assert slot_bytes(STATES) == 8 * 512 * 4


@given(st.integers(1, 16), st.integers(1, 4096), st.integers(0, 10**9), st.integers(1, 512))
def test_for_bytes_fills_the_budget(requests: int, context: int, budget: int, step: int) -> None:
    full = PoolSizes.for_requests(GROUPS, requests, context, step)
    try:
        sizes = PoolSizes.for_bytes(GROUPS, STATES, budget, requests, context, step)
    except ConfigError as error:
        assert str(budget) in error.message and error.hint
        one = {g.name: full.pages[g.name] if g.horizon else 1 + -(-context // g.page_tokens) for g in GROUPS}
        assert PoolSizes(one, full.slots, context).total_bytes(GROUPS, STATES) > budget
        return
    assert sizes.total_bytes(GROUPS, STATES) <= budget
    assert KVPool(GROUPS, sizes).holds(context)
    if sizes.pages != full.pages:  # one block more would not fit
        more = {n: p + (n != "window") for n, p in sizes.pages.items()}
        assert PoolSizes(more, sizes.slots, context).total_bytes(GROUPS, STATES) > budget


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_requests"):
        PoolSizes.for_requests(GROUPS, 0, 100)
    with pytest.raises(ConfigError, match="at least 2 pages"):
        KVPool(GROUPS, PoolSizes({"window": 2, "c4": 1, "c128": 2}, 2, 64))
    with pytest.raises(ConfigError, match="reads at least itself"):
        KVPool([KVGroup("w", 1, 4, 0, ())], PoolSizes({"w": 2}, 2, 64))
    with pytest.raises(ConfigError, match="dtype `float3` is unknown"):
        page_bytes(KVGroup("g", 1, 4, None, (Pool("p", (1,), "float3"),)))


def test_snapshots_have_rows_and_window_pages_of_their_own() -> None:
    states = (*STATES, StateGroup("whole", (Pool("h", (100,), "float32"),), empty_every=128))
    assert (block_tokens(GROUPS), [tail_pages(g) for g in GROUPS]) == (256, [2, 0, 0])
    assert snapshot_states(states, GROUPS) == STATES, "at a block's end, 256 tokens, the other is empty"
    plain = PoolSizes.for_requests(GROUPS, 4, 1024, 256)
    more = PoolSizes.for_requests(GROUPS, 4, 1024, 256, snapshots=10)
    assert {n: more.pages[n] - plain.pages[n] for n in plain.pages} == {"window": 20, "c4": 0, "c128": 0}
    added = more.total_bytes(GROUPS, states) - plain.total_bytes(GROUPS, states)
    assert added == 10 * slot_bytes(STATES) + 20 * page_bytes(GROUPS[0])
    budget = more.total_bytes(GROUPS, states)
    assert PoolSizes.for_bytes(GROUPS, states, budget, 4, 1024, 256, snapshots=10) == more
    with pytest.raises(ConfigError, match="`snapshots` must be at least 0"):
        PoolSizes.for_requests(GROUPS, 1, 100, snapshots=-1)


# --- shared pages -------------------------------------------------------------------------------------------------


def test_adopted_pages_are_shared_and_grown_behind() -> None:
    pool = pool_of(max_requests=3)
    one, two = admitted(pool), admitted(pool)
    pool.grow(one, 600)
    pages = {g.name: pool.pages_of(one, g.name, 384 if g.horizon else 0, 512) for g in pool.groups}
    pool.adopt(two, pages, 512)
    assert pool.used_pages() == {"window": 10, "c4": 3, "c128": 3, "index": 3}
    assert pool.tables["window"][two, :9].tolist() == [0] * 6 + list(pages["window"]) + [0]
    assert pool.pages_needed(two, 513) == {"window": 1, "c4": 1, "c128": 1, "index": 1}
    assert pool.grow(two, 513)
    pool.audit()
    pool.release(one)
    assert pool.used_pages() == {"window": 3, "c4": 3, "c128": 3, "index": 3}
    pool.audit()
    pool.release(two)
    assert not any(pool.used_pages().values())


@pytest.mark.parametrize("fault", ["window", "c4", "late", "partial", "free"])
def test_what_cannot_be_adopted_is_refused(fault: str) -> None:
    pool = pool_of(max_requests=3)
    one, two = admitted(pool), admitted(pool)
    pool.grow(one, 600)
    pages = {g.name: list(pool.pages_of(one, g.name, 384 if g.horizon else 0, 512)) for g in pool.groups}
    if fault in pages:
        pages[fault].pop()  # the next token would read a page that is not there
    if fault == "late":
        pool.grow(two, 1)
    if fault == "free":
        pool.release(one)
    with pytest.raises(EngineError):
        pool.adopt(two, pages, 500 if fault == "partial" else 512)


def test_held_pages_are_idle_when_no_request_has_them() -> None:
    pool = pool_of(step_tokens=1024)
    one = admitted(pool)
    pool.grow(one, 256)
    pages = pool.pages_of(one, "c4", 0, 256)
    pool.hold("c4", pages)
    pool.hold("c4", pages)
    assert pool.idle_pages()["c4"] == 0
    with pytest.raises(EngineError, match="`c4`"):
        pool.audit()
    pool.audit({"c4": pages * 2})
    pool.release(one)
    total = pool.total_pages()["c4"]
    assert (pool.idle_pages()["c4"], pool.free_pages()["c4"], pool.used_pages()["c4"]) == (1, total - 1, 0)
    assert pool.available_pages()["c4"] == total
    pool.audit({"c4": pages * 2})
    two = admitted(pool)
    assert pool.fit(two, 1024) == 1024 and not pool.lacking(two, 1024)
    pool.let_go("c4", pages)
    assert pool.idle_pages()["c4"] == 1
    pool.let_go("c4", pages)
    assert pool.free_pages()["c4"] == total
    for call in (pool.let_go, pool.hold):
        with pytest.raises(EngineError, match=f"page {pages[0]}"):
            call("c4", pages)
    pool.audit()


def test_idle_pages_count_as_room_and_must_be_let_go_first() -> None:
    groups = kv_groups()
    pool = KVPool(groups, PoolSizes({"window": 40, "c4": 3, "c128": 9, "index": 9}, 3, 1024))
    one = admitted(pool)
    pool.grow(one, 256)
    pages = pool.pages_of(one, "c4", 0, 256)
    pool.hold("c4", pages)
    pool.release(one)
    two = admitted(pool)
    assert pool.fit(two, 1024) == 512 and not pool.grow(two, 512)
    assert pool.lacking(two, 512) == {"c4": 1}
    pool.let_go("c4", pages)
    assert pool.grow(two, 512)
    pool.audit()


def test_equal_pages_are_exchanged() -> None:
    pool = pool_of(step_tokens=1024)
    one, two = admitted(pool), admitted(pool)
    for slot in (one, two):
        pool.grow(slot, 512)
    pool.exchange(two, "c4", 1, pool.pages_of(one, "c4", 256, 512))
    assert pool.tables["c4"][two, 1] == pool.tables["c4"][one, 1] != pool.tables["c4"][two, 0]
    assert pool.used_pages()["c4"] == 3
    pool.audit()
    for column in (-1, 2):
        with pytest.raises(EngineError, match="`c4`"):
            pool.exchange(two, "c4", column, pool.pages_of(one, "c4", 0, 256))


def test_table_writes_are_tracked_in_order_and_zeroes_are_not() -> None:
    groups = kv_groups()
    pool = KVPool(groups, PoolSizes.for_requests(groups, 2, 1024, 256), track=True)
    mirror = {name: np.zeros_like(table) for name, table in pool.tables.items()}
    rng = random.Random(2)
    slots = {admitted(pool): 0}
    for _ in range(200):
        slot = next(iter(slots))
        slots[slot] = min(1024, slots[slot] + rng.randint(1, 90))
        pool.grow(slot, slots[slot])
        pool.evict(slot, slots[slot])
        if rng.random() < 0.2:
            pool.release(slot)
            slots = {admitted(pool): 0}
        if rng.random() < 0.5:
            for name, updates in pool.drain_updates().items():
                for at, column, page in updates:
                    assert page > 0
                    mirror[name][at, column] = page
            for name, table in pool.tables.items():
                assert (mirror[name][table > 0] == table[table > 0]).all()
    pool.drain_updates()
    assert pool.drain_updates() == {g.name: [] for g in groups}
    untracked = pool_of()
    untracked.grow(admitted(untracked), 100)
    assert not any(untracked.drain_updates().values())


class Shared(RuleBasedStateMachine):
    """Slots and holders of pages in every order; what is there is counted beside the pool."""

    @initialize(pages=st.integers(4, 30))
    def make(self, pages: int) -> None:
        self.groups = (KVGroup("w", 1, 2, 5, ()), KVGroup("c", 4, 8, None, ()))
        self.pool = KVPool(self.groups, PoolSizes({"w": pages, "c": pages}, 5, 64))
        self.done: dict[int, int] = {}
        self.held: list[tuple[str, tuple[int, ...]]] = []

    def slot(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.done)))

    @rule()
    def admit(self) -> None:
        slot = self.pool.admit()
        assert (slot is None) == (len(self.done) == 4)
        if slot is not None:
            self.done[slot] = 0

    @precondition(lambda self: self.done)
    @rule(data=st.data(), tokens=st.integers(1, 20))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        slot = self.slot(data)
        end = min(64, self.done[slot] + tokens)
        lacking = self.pool.lacking(slot, end)
        grown = self.pool.grow(slot, end)
        assert grown == (not lacking)
        if grown:
            self.done[slot] = end
            self.pool.evict(slot, end)

    @precondition(lambda self: any(n >= 8 for n in self.done.values()))
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """The last whole block of a slot, in one group."""
        slot = data.draw(st.sampled_from(sorted(s for s, n in self.done.items() if n >= 8)))
        name = data.draw(st.sampled_from(["w", "c"]))
        end = self.done[slot] // (2 if name == "w" else 8) * (2 if name == "w" else 8)
        pages = self.pool.pages_of(slot, name, end - (2 if name == "w" else 8), end)
        self.pool.hold(name, pages)
        self.held.append((name, pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.pool.let_go(*self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: any(n >= 8 for n in self.done.values()) and len(self.done) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """A new slot goes on from the whole blocks of another, if its window pages are still there."""
        slot = data.draw(st.sampled_from(sorted(s for s, n in self.done.items() if n >= 8)))
        end = self.done[slot] // 8 * 8
        if first_page(self.groups[0], end) * 2 < first_page(self.groups[0], self.done[slot]) * 2:
            return
        other = self.pool.admit()
        assert other is not None
        pages = {
            "w": self.pool.pages_of(slot, "w", first_page(self.groups[0], end) * 2, end),
            "c": self.pool.pages_of(slot, "c", 0, end),
        }
        self.pool.adopt(other, pages, end)
        self.done[other] = end

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = self.slot(data)
        del self.done[slot]
        self.pool.release(slot)

    @invariant()
    def everything_is_counted(self) -> None:
        if not hasattr(self, "pool"):
            return
        held: dict[str, list[int]] = {"w": [], "c": []}
        for name, pages in self.held:
            held[name] += pages
        self.pool.audit(held)
        total, used, idle = self.pool.total_pages(), self.pool.used_pages(), self.pool.idle_pages()
        assert all(total[n] == used[n] + idle[n] + self.pool.free_pages()[n] for n in total)
        if not self.done:
            assert not any(used.values()) and idle == {n: len(set(p)) for n, p in held.items()}

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for slot in self.done:
            self.pool.release(slot)
        for name, pages in self.held:
            self.pool.let_go(name, pages)
        self.pool.audit()
        assert self.pool.free_pages() == self.pool.total_pages()


def test_no_order_of_sharing_leaks_or_frees_twice() -> None:
    run_state_machine_as_test(Shared, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))
