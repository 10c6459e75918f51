"""The prefix tree over a pool: every order of events, with what pages and state rows contain followed beside it."""

from __future__ import annotations

from dataclasses import dataclass

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

from dsv4c.artifact import KVGroup
from dsv4c.errors import EngineError
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.prefix import Node, PrefixTree

BLOCK = 8
GROUPS = (KVGroup("window", 1, 2, 5, ()), KVGroup("wide", 1, 4, 11, ()), KVGroup("c4", 4, 8, None, ()))
GROUPS += (KVGroup("index", 1, 4, None, ()),)


@dataclass(eq=False)
class Running:
    """A request as the scheduler would have it: `text` is computed, a letter a token."""

    slot: int
    text: str
    node: Node


def tree_of(snapshots: int = 3, pages: int = 40, slots: int = 5, context: int = 64) -> PrefixTree:
    return PrefixTree(KVPool(GROUPS, PoolSizes({g.name: pages for g in GROUPS}, slots, context, snapshots)))


class World:
    """A tree with the contents of its pages and rows: what was computed there last, as text."""

    def __init__(self, tree: PrefixTree) -> None:
        self.tree, self.pool = tree, tree._pool
        self.pages: dict[tuple[str, int], str] = {}
        self.rows: dict[int, str] = {}
        self.running: list[Running] = []
        self.resumed = 0

    def start(self, text: str, salt: object = None) -> Running | None:
        """Admits a request for `text`, from the deepest snapshot that leaves a token to compute."""
        slot = self.pool.admit()
        if slot is None:
            return None
        keys = [text[i : i + BLOCK].encode() for i in range(0, len(text) - BLOCK, BLOCK)]
        found = [n for n in self.tree.find(keys, salt) if n.snapshot is not None]
        if found:
            self.resumed += 1
            self.tree.resume(found[-1], slot, self)
            self.copy()
            one = Running(slot, text[: found[-1].tokens], found[-1])
            assert self.rows[slot] == text[: found[-1].tokens], "the states are those of other tokens"
        else:
            one = Running(slot, "", self.tree.begin(salt))
        self.running.append(one)
        return one

    def copy(self) -> None:
        for pairs in self.tree.copies():
            assert len({t for _, t in pairs}) == len(pairs)
            self.rows.update([(t, self.rows.get(s, "")) for s, t in pairs])

    def compute(self, one: Running, text: str, keep: str = "", owner: object = None) -> bool:
        """Computes tokens until `text` is done or pages lack; every write goes to the request's own pages.

        `keep`: has an x in the place of each block after which to take a snapshot.
        """
        while len(one.text) < len(text):
            end = len(one.text) + 1
            if self.pool.fit(one.slot, end) < end:
                return False
            self.tree.make_room(one.slot, end)
            assert self.pool.grow(one.slot, end)
            one.text = text[:end]
            for group in GROUPS:
                page = int(self.pool.tables[group.name][one.slot, (end - 1) // group.page_tokens])
                group_of = self.pool._by_name[group.name]
                assert group_of.refs[page] == 1 and not group_of.held[page], "writes to a page that others read"
                self.pages[group.name, page] = one.text
            self.rows[one.slot] = one.text
            self.read(one)
            self.pool.evict(one.slot, end)
            if end % BLOCK == 0:
                one.node = self.tree.extend(one.node, text[end - BLOCK : end].encode(), one.slot)
                if keep[end // BLOCK - 1 : end // BLOCK] == "x" and one.node.snapshot is None:
                    assert self.tree.snapshot(one.node, one.slot, owner) == bool(self.tree._rows)
                    self.copy()
        return True

    def read(self, one: Running) -> None:
        """All that the last token reads is there: the end of every page's tokens is the page's content."""
        for group in GROUPS:
            size, computed = group.page_tokens, len(one.text) - 1
            first = 0 if group.horizon is None else max(0, computed + 1 - group.horizon) // size
            for column in range(first, computed // size + 1):
                page = int(self.pool.tables[group.name][one.slot, column])
                assert page and self.pages[group.name, page] == one.text[: (column + 1) * size], (group.name, column)

    def stop(self, one: Running) -> None:
        self.running.remove(one)
        self.tree.leave(one.node)
        self.pool.release(one.slot)

    def audit(self) -> None:
        self.tree.audit([r.node for r in self.running])
        self.pool.audit(self.tree.references())


texts = st.text("ab", min_size=1, max_size=6).map(lambda t: "".join(c * BLOCK for c in t))
keeps = st.text(" x", max_size=8)


class Lives(RuleBasedStateMachine):
    """Requests that begin alike come, go on, are kept and go, over pools for two or three of them."""

    resumed = 0

    @initialize(pages=st.integers(13, 34), snapshots=st.integers(0, 4))
    def make(self, pages: int, snapshots: int) -> None:
        self.world = World(tree_of(snapshots, pages))

    def pick(self, data: st.DataObject) -> Running:
        return data.draw(st.sampled_from(self.world.running))

    @rule(text=texts, rest=st.integers(1, BLOCK), keep=keeps, salt=st.sampled_from([None, None, "s"]))
    def start(self, text: str, rest: int, keep: str, salt: str | None) -> None:
        one = self.world.start(text + "c" * rest, salt)
        if one is not None and not self.world.compute(one, text + "c" * rest, keep):
            self.world.stop(one)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), more=st.text("ab", min_size=1, max_size=20), keep=keeps, move=st.booleans())
    def go_on(self, data: st.DataObject, more: str, keep: str, move: bool) -> None:
        one = self.pick(data)
        if not self.world.compute(one, (one.text + more)[:64], keep, one if move else None):
            self.world.stop(one)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.world.stop(self.pick(data))

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if self.world.tree._snapshots:
            self.world.tree.forget(data.draw(st.sampled_from(list(self.world.tree._snapshots))))

    @rule()
    def clear(self) -> None:
        """Everything at once, while requests run: they go on, at the root of an empty tree."""
        self.world.tree.clear()
        for one in list(self.world.running):
            self.world.pool.release(one.slot)
        self.world.running.clear()
        assert not any(self.world.pool.idle_pages().values())

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.audit()
        if not self.world.running:  # all that is not free can be had
            assert self.world.pool.available_pages() == self.world.pool.total_pages()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for one in list(self.world.running):
            self.world.stop(one)
        self.world.tree.clear()
        self.world.audit()
        Lives.resumed += self.world.resumed
        assert self.world.pool.free_pages() == self.world.pool.total_pages()


def test_no_order_of_events_leaks_or_mixes_contents() -> None:
    run_state_machine_as_test(Lives, settings=settings(max_examples=300, stateful_step_count=40, deadline=None))
    assert Lives.resumed > 50


def word(letters: str) -> str:
    return "".join(c * BLOCK for c in letters)


def computed(world: World, letters: str, snapshots: str = "") -> Running:
    """A request that has computed these blocks, with snapshots after the blocks whose place in `snapshots` is x."""
    one = world.start(word(letters) + "c")
    assert one is not None and world.compute(one, word(letters), snapshots)
    return one


def test_a_prompt_resumes_at_its_deepest_snapshot() -> None:
    world = World(tree_of())
    world.stop(computed(world, "aaab", " x"))
    assert world.tree.num_nodes == 4
    one = world.start(word("aaab") + "c")
    assert one is not None and len(one.text) == 2 * BLOCK
    assert world.pool.used_pages() == {"window": 2, "wide": 3, "c4": 2, "index": 4}
    two = world.start(word("aa") + "c")
    assert two is not None and len(two.text) == 2 * BLOCK, "both share the pages"
    assert world.pool.used_pages() == {"window": 2, "wide": 3, "c4": 2, "index": 4}
    three = world.start(word("aa"))
    assert three is not None and three.text == "", "a token must be left to compute"
    world.audit()


def test_salts_keep_prompts_apart() -> None:
    world = World(tree_of())
    world.stop(computed(world, "aa", "xx"))
    one = world.start(word("aaa"), salt="another")
    assert one is not None and one.text == ""
    world.stop(one)
    assert list(world.tree._roots) == [None]


def test_equal_blocks_become_one() -> None:
    world = World(tree_of())
    one, two = computed(world, "ab"), computed(world, "a")
    assert world.tree.num_nodes == 2
    assert (
        world.pool.used_pages()["c4"] == 2
        and world.pool.tables["c4"][one.slot, 0] == world.pool.tables["c4"][two.slot, 0]
    )
    world.compute(two, word("abb"))
    world.audit()
    world.stop(one)
    assert world.pool.used_pages()["c4"] == 3
    world.stop(two)
    assert world.pool.idle_pages()["c4"] == 3


def test_leaves_go_first_the_least_recently_used_one_before_all() -> None:
    world = World(tree_of(pages=80))
    for letters in ("aa", "ab", "b"):
        world.stop(computed(world, letters, "xx"))
    world.stop(computed(world, "aac"))
    gone = []
    while world.tree._idle:
        victim = next(iter(world.tree._idle))
        gone.append((victim.tokens // BLOCK, victim.key[:1].decode()))
        world.tree._evict(victim)
        world.audit()
    assert gone == [(2, "b"), (1, "b"), (3, "c"), (2, "a"), (1, "a")]
    assert not world.tree._roots


def test_what_a_request_uses_is_never_evicted() -> None:
    world = World(tree_of(pages=13))
    one = computed(world, "aab", "x")
    world.stop(computed(world, "b", "x"))
    two = world.start(word("ccccc"))
    assert two is not None and not world.compute(two, word("ccccc"))
    assert [n.tokens for n in world.tree.find([b"a" * 8, b"a" * 8, b"b" * 8])] == [8, 16, 24]
    assert not world.tree.find([b"b" * 8])
    world.stop(two)
    world.audit()
    assert world.compute(one, word("aab") + "c")


def test_a_lack_of_window_pages_costs_snapshots_and_no_block() -> None:
    pages = {"window": 9, "wide": 12, "c4": 40, "index": 80}
    world = World(PrefixTree(KVPool(GROUPS, PoolSizes(pages, 5, 64, 4))))
    world.stop(computed(world, "abc", "xx"))
    assert world.tree.num_snapshots == 2
    computed(world, "dd")
    computed(world, "ee")
    assert world.tree.num_nodes == 7 and world.tree.num_snapshots < 2
    world.audit()


def test_rows_go_from_the_least_recently_used_snapshot_to_the_next() -> None:
    world = World(tree_of(snapshots=2, pages=80))
    for letters in ("a", "b"):
        world.stop(computed(world, letters, "x"))
    one = world.start(word("ac"))
    assert one is not None and one.text == word("a")
    computed(world, "d", "x")
    kept = [letter for letter in "abd" for node in world.tree.find([letter.encode() * 8]) if node.snapshot]
    assert kept == ["a", "d"]


def test_copies_that_depend_on_each_other_are_apart() -> None:
    tree = tree_of()
    for pair in ((1, 9), (2, 10), (9, 3), (10, 4), (2, 9), (5, 9), (6, 5)):
        tree._queue_copy(*pair)
    assert [list(p) for p in tree.copies()] == [[(1, 9), (2, 10)], [(9, 3), (10, 4), (2, 9)], [(5, 9), (6, 5)]]
    assert not list(tree.copies())


def test_a_deep_tree_needs_no_recursion() -> None:
    groups = (KVGroup("w", 1, 1, 2, ()), KVGroup("c", 1, 1, None, ()))
    tree = PrefixTree(KVPool(groups, PoolSizes({"w": 5, "c": 20_003}, 3, 20_001, 2)))
    pool, node = tree._pool, tree.begin()
    slot = pool.admit()
    assert slot is not None
    for i in range(20_000):
        assert pool.grow(slot, i + 1)
        node = tree.extend(node, b"%d" % i, slot)
        pool.evict(slot, i + 1)
    assert tree.snapshot(node, slot, None)
    tree.leave(node)
    pool.release(slot)
    path = tree.find(b"%d" % i for i in range(20_000))
    slot = pool.admit()
    assert slot is not None
    tree.resume(path[-1], slot, None)
    pool.audit(tree.references())
    tree.audit(path[-1:])
    tree.leave(path[-1])
    pool.release(slot)
    tree.clear()
    del path, node
    pool.audit()


def test_faults_are_seen() -> None:
    world = World(tree_of())
    one = computed(world, "ab", "x")
    with pytest.raises(EngineError, match="is in use"):
        world.tree._evict(one.node)
    with pytest.raises(EngineError, match="no snapshot"):
        world.tree.resume(one.node, one.slot, None)
    with pytest.raises(EngineError, match="users of"):
        world.tree.audit([])
    world.tree._pool._by_name["c4"].hold(1)
    with pytest.raises(EngineError, match="`c4`"):
        world.audit()
