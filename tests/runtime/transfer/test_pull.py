"""A pull, step by step, against a prefill side that computes, is preempted, loses pages to others, and ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.errors import HandleError, LeaseLost
from dsv4c.runtime.transfer.handle import Handle, tokens_sha256
from dsv4c.runtime.transfer.layout import Layout, Ranges, merge, weights_sha256
from dsv4c.runtime.transfer.local import Hub, LocalBackend
from dsv4c.runtime.transfer.pull import PullSteps, Steps
from tests.runtime.transfer.sides import COLUMNS, GROUPS, LAYOUT, MARKS, STATES, Side, Taker


class Pair:
    """Two sides in one process, and a pull of request `r` whose every step a test makes."""

    def __init__(self, seed: int, tokens: int, start: int = 0) -> None:
        self.hub, self.seed, self.tokens = Hub(), seed, tokens
        self.side, self.taker = Side(), Taker()
        self.side.noise()
        self.owner = LocalBackend(self.hub, LAYOUT, self.side.pools, self.side.ledger)
        reader = LocalBackend(self.hub, LAYOUT, self.taker.pools, Side().ledger)
        self.side.submit("r", seed, tokens)
        lease = self.side.leases.of("r")
        assert lease is not None
        self.place = self.taker.place(tokens, start)
        sha = tokens_sha256(self.side.requests["r"].tokens())
        self.handle = Handle(
            "local", self.owner.peer_id, lease.row, lease.number, tokens, sha, COLUMNS, LAYOUT.fingerprint,
            LAYOUT.fields, self.owner.describe(),
        )  # fmt: skip
        self.steps = PullSteps(LAYOUT, self.handle, self.place, reader.open(self.owner.describe()))
        self.run: Steps = self.steps.run()
        self.over = False

    def pull(self, most: int = 10_000) -> bool:
        """Makes at most so many steps, until it has to wait; whether all is there."""
        for _ in range(most):
            try:
                step = next(self.run)
            except StopIteration:
                self.over = True
                return True
            if isinstance(step, float):
                return False
            assert step.poll()
        return False


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_interleaving(data: st.DataObject) -> None:
    """Whatever the prefill side does between any two steps of the pull: right bytes at the end, or LeaseLost."""
    draw = data.draw
    tokens = draw(st.integers(1, 300))
    start = draw(st.integers(0, (tokens - 1) // 128)) * 128
    pair = Pair(draw(st.integers(1, 9)), tokens, start)
    side = pair.side
    gone = False

    def some() -> None:
        if not pair.over:
            pair.pull(draw(st.integers(0, 6)))

    try:
        while side.computed["r"] < tokens:
            some()
            match draw(st.sampled_from(("step", "step", "step", "exchange", "preempt", "fail"))):
                case "step":
                    end = draw(st.integers(side.computed["r"] + 1, tokens))
                    side.step("r", end, some)
                case "exchange" if side.computed["r"] >= 16:
                    side.exchange("r", "c4", draw(st.integers(0, side.computed["r"] // 16 - 1)))
                case "preempt":
                    side.preempt("r")
                    some()
                    side.admit("r")
                    some()
                case "fail" if draw(st.booleans()):
                    side.fail("r")
                    gone = True
                    break
        while not gone and not pair.over:
            some()
            what = draw(st.sampled_from(("pull", "pull", "exchange", "let go")))
            if what == "exchange" and tokens >= 16:
                side.exchange("r", "c4", draw(st.integers(0, tokens // 16 - 1)))
            if what == "let go" and draw(st.booleans()):
                side.let_go("r")
                gone = True
                if draw(st.booleans()):
                    side.submit("other", 10, tokens)
            elif what == "pull":
                pair.pull()
        while not pair.over:
            pair.pull()
    except LeaseLost:
        assert gone
        return
    pair.taker.check(pair.place, pair.seed)


def test_pages_move_while_the_prefill_runs() -> None:
    pair = Pair(3, 200)
    pair.side.step("r", 96)
    assert not pair.pull()
    assert pair.steps.moved.bytes == 96 // 16 * 2 * 4 * 12  # whole pages of c4 in two pools
    behind: list[int] = []

    def during() -> None:
        assert not pair.pull()
        behind.append(pair.steps.moved.bytes)

    pair.side.step("r", 200, during)
    assert behind[0] > 576 and behind[1] > behind[0]  # the pools of each mark, as it is passed
    assert behind[2] == behind[1]
    assert pair.pull()
    assert pair.steps.moved.bytes - behind[2] == 16, "after the step only the ring that is in no mark remained"
    pair.taker.check(pair.place, 3)


@pytest.mark.parametrize("pause", range(12))
def test_pages_that_are_exchanged_behind_the_readers_back(pause: int) -> None:
    """Wherever in its steps the pull stands while the pages it is about to read get other content."""
    pair = Pair(3, 200)
    pair.side.step("r", 160)
    pair.pull(pause)
    for column in range(10):
        pair.side.exchange("r", "c4", column)
    pair.pull()
    pair.side.step("r", 200)
    assert pair.pull()
    pair.taker.check(pair.place, 3)


@pytest.mark.parametrize("pause", range(1, 7))
@pytest.mark.parametrize("then", range(4))
def test_a_prefill_that_starts_over_on_the_same_pages(pause: int, then: int) -> None:
    pair = Pair(3, 200)
    pair.side.step("r", 160)
    pair.pull(pause)
    before = pair.side.pool.tables["c4"][pair.side.requests["r"].slot].copy()
    pair.side.preempt("r")
    pair.side.admit("r")
    pair.pull(then)
    pair.side.step("r", 160)
    assert np.array_equal(before, pair.side.pool.tables["c4"][pair.side.requests["r"].slot])
    pair.pull()
    pair.side.step("r", 200)
    assert pair.pull()
    pair.taker.check(pair.place, 3)


def test_what_is_here_is_not_pulled() -> None:
    whole, rest = Pair(3, 300), Pair(3, 300, start=256)
    for pair in (whole, rest):
        pair.side.step("r", 300)
        assert pair.pull()
        pair.taker.check(pair.place, 3)
    assert rest.steps.moved.bytes < whole.steps.moved.bytes / 3


def test_empty_states_stay() -> None:
    pair = Pair(1, 256)
    pair.side.step("r", 256)
    assert pair.pull()
    number = LAYOUT.pools.index("b.ring")
    assert not pair.taker.bytes[number].any()


def test_a_lease_whose_row_is_anothers() -> None:
    pair = Pair(1, 100)
    pair.side.let_go("r")
    for i in range(6):
        pair.side.submit(f"o{i}", 2, 10)
        if i < 5:
            pair.side.let_go(f"o{i}")
    with pytest.raises(LeaseLost, match="another"):
        pair.pull()


def test_a_replay_finds_nothing() -> None:
    pair = Pair(1, 100)
    pair.side.step("r", 100)
    assert pair.pull()
    pair.side.let_go("r")
    again = PullSteps(LAYOUT, pair.handle, pair.taker.place(100), pair.steps._peer)
    with pytest.raises(LeaseLost, match="let go"):
        for _ in again.run():
            pass


def test_rows_run_out() -> None:
    side = Side(words=np.zeros((1, Side().ledger.words.shape[1]), np.int64))
    side.submit("a", 1, 20)
    side.preempt("a")
    side.submit("b", 1, 20)  # takes the row of the one that waits
    assert side.leases.of("a") is None and side.leases.of("b") is not None
    assert side.leases.num_revoked == 1


@pytest.mark.parametrize("field", ["model_sha256", "kv_groups", "state_groups", "marks", "weights"])
def test_another_layout_is_named(field: str) -> None:
    mine = Layout(GROUPS, STATES, {"model_sha256": "a", "weights": "w"}, MARKS)
    other = Layout(
        GROUPS[:2] if field == "kv_groups" else GROUPS, STATES[:1] if field == "state_groups" else STATES,
        {"model_sha256": "b" if field == "model_sha256" else "a"} | ({} if field == "weights" else {"weights": "w"}),
        () if field == "marks" else MARKS,
    )  # fmt: skip
    mine.check(mine.fingerprint, mine.fields)
    with pytest.raises(HandleError, match=field):
        mine.check(other.fingerprint, other.fields)
    with pytest.raises(HandleError, match="fingerprint"):
        mine.check(other.fingerprint, mine.fields)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), unique_by=lambda p: p[1]), st.integers(1, 200))
def test_ranges_copy_what_pages_say(pairs: list[tuple[int, int]], most: int) -> None:
    source, target = (np.array([p[i] for p in pairs], np.int64) for i in (0, 1))
    assert merge(source, target)[2].sum() == source.size
    pools = LAYOUT.pools_of["c4"]
    wanted = {(p, int(s) * 48 + b, int(t) * 48 + b) for p in pools for s, t in pairs for b in range(48)}
    ranges = LAYOUT.ranges(pools, source, target)
    found = set()
    for piece in ranges.pieces(most):
        assert 0 < piece.total_bytes <= most
        columns = (piece.pool, piece.source, piece.target, piece.nbytes)
        for pool, of, at, n in zip(*(c.tolist() for c in columns), strict=True):
            found |= {(pool, of + b, at + b) for b in range(n)}
    assert found == wanted and ranges.total_bytes == 96 * len(pairs)
    assert not len(Ranges.join([]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version"), ({"row": -1}, "row"), ({"lease": "x"}, "lease"), ({"more": 1}, "more"),
        ({"columns": [0]}, "positive"), ({"at": None}, "at"), ({"target": 2**70}, "target"),
    ],
)  # fmt: skip
def test_malformed_handles(change: dict[str, object], said: str) -> None:
    good = Pair(1, 20).handle.to_json()
    assert Handle.from_json(good).to_json() == good
    with pytest.raises(HandleError, match=said):
        Handle.from_json({**good, **change})


def test_weights_are_told_apart() -> None:
    def made() -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(1)
        matrix = torch.randn(40, 30, generator=draw)
        return {
            "a": matrix, "b": matrix.t()[:, ::2], "c": matrix.to(torch.bfloat16), "d": torch.tensor(3.0),
            "e": torch.zeros(0, 4), "f": matrix.to(torch.float8_e4m3fn), "g": torch.arange(5),
        }  # fmt: skip

    one = weights_sha256(made())
    assert one == weights_sha256(made())
    for name in "abcdfg":
        other = made()
        other[name] = (other[name].float() * 2).to(other[name].dtype)
        assert weights_sha256(other) != one, name
    assert weights_sha256({**made(), "h": torch.zeros(1)}) != one
