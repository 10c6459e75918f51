"""Shared memory between real processes: what is pulled, and what becomes of it when the other side dies or hangs."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4c.errors import ConfigError, HandleError, LeaseLost, PeerGone, TransferError, TransferTimeout
from dsv4c.runtime.transfer.connector import Connector, Pull
from dsv4c.runtime.transfer.handle import tokens_sha256
from dsv4c.runtime.transfer.layout import Layout
from dsv4c.runtime.transfer.ledger import VERSION
from dsv4c.runtime.transfer.pull import Place
from dsv4c.runtime.transfer.shm import Segment, ShmBackend, remove_left_over
from tests.runtime.transfer.owner import Owner
from tests.runtime.transfer.sides import (
    COLUMNS,
    GROUPS,
    LAYOUT,
    MARKS,
    PAGES,
    SLOTS,
    STATES,
    Side,
    Taker,
    allocate,
    pools_bytes,
    sizes,
)


def sha(seed: int, tokens: int) -> str:
    return tokens_sha256(np.full(tokens, seed, np.int64))


class Reader:
    """The decode side, in the test's process."""

    def __init__(self, folder: Path, deadline_s: float = 30.0) -> None:
        size = sizes({name: count + 20 for name, count in PAGES.items()})
        self.segment = Segment.create(pools_bytes(size), SLOTS, COLUMNS, folder)
        pools = allocate(size, self.segment.memory)
        self.taker = Taker(size, pools)
        backend = ShmBackend(self.segment, LAYOUT, pools, Side(words=self.segment.words).ledger, folder)
        self.connector = Connector(backend, LAYOUT, COLUMNS, deadline_s=deadline_s)

    def pull(self, handle: dict[str, Any], seed: int, tokens: int) -> Waiting:
        place = self.taker.place(tokens)
        waiting = Waiting(place)
        checked = self.connector.check(handle, tokens, sha(seed, tokens))
        waiting.pull = self.connector.pull(checked, place, waiting.on_done, waiting.on_quiet)
        return waiting

    def give_back(self, waiting: Waiting) -> None:
        self.taker.pool.release(waiting.place.slot)


@dataclass
class Waiting:
    """What became of a pull."""

    place: Place
    pull: Pull | None = None
    calls: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    quiet: threading.Event = field(default_factory=threading.Event)

    def on_done(self, pull: Pull) -> None:
        self.calls.append("done")
        self.done.set()

    def on_quiet(self, pull: Pull) -> None:
        self.calls.append("quiet")
        self.quiet.set()

    def error(self) -> TransferError | None:
        """How it ended; waits for it."""
        assert self.done.wait(60) and self.quiet.wait(60) and self.pull is not None
        assert self.calls == ["done", "quiet"]
        return self.pull.error


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder of shared memory that no other test cleans up."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def reader(folder: Path) -> Iterator[Reader]:
    made = Reader(folder)
    yield made
    made.connector.close()
    assert not (folder / made.segment.name).exists()


@pytest.fixture
def owner(folder: Path) -> Iterator[Owner]:
    made = Owner(folder)
    yield made
    made.close()
    remove_left_over(folder)


def test_a_prompt_is_pulled_while_it_is_computed(reader: Reader, owner: Owner) -> None:
    handle = owner.do("submit", "r", 7, 300)
    waiting = reader.pull(handle, 7, 300)
    owner.do("crawl", "r", 0.0005)
    assert waiting.error() is None
    reader.taker.check(waiting.place, 7)
    reader.give_back(waiting)
    assert waiting.pull is not None and waiting.pull.moved.early_bytes > 0
    while not (released := owner.do("released")):
        time.sleep(0.01)
    assert released == [[handle["row"], handle["lease"]]]


def test_many_at_once(reader: Reader, owner: Owner) -> None:
    tokens = {f"r{i}": 20 * i + 13 for i in range(4)}
    handles = {r: owner.do("submit", r, i, n) for i, (r, n) in enumerate(tokens.items())}
    found = {r: reader.pull(handles[r], i, n) for i, (r, n) in enumerate(tokens.items())}
    for r in reversed(tokens):
        owner.do("crawl", r, 0)
    for i, (r, waiting) in enumerate(found.items()):
        assert waiting.error() is None
        reader.taker.check(waiting.place, i)
        owner.do("let_go", r)
        reader.give_back(waiting)


def test_a_peer_that_is_killed(reader: Reader, folder: Path) -> None:
    """At random moments, before, while and after it computes: all is there, or it is gone; never a wrong byte."""
    draw = random.Random(0)
    seen = set()
    owners = [Owner(folder) for _ in range(4)]
    for attempt, owner in enumerate(owners):
        waiting = reader.pull(owner.do("submit", "r", 5, 200), 5, 200)
        owner.start("crawl", "r", 0.0005)
        time.sleep((0, 0.02, 0.06, 0.3)[attempt] + draw.random() / 100)
        os.kill(owner.process.pid, signal.SIGKILL)
        owner.process.wait()
        error = waiting.error()
        seen.add(type(error))
        assert error is None or isinstance(error, PeerGone), attempt
        if error is None:
            reader.taker.check(waiting.place, 5)
        reader.give_back(waiting)
        owner.close()
    assert PeerGone in seen
    assert len(remove_left_over(folder)) == 4
    assert remove_left_over(folder) == []


def test_a_peer_that_hangs_times_out_and_may_come_back(folder: Path, owner: Owner) -> None:
    reader = Reader(folder, deadline_s=0.3)
    handle = owner.do("submit", "r", 5, 200)
    waiting = reader.pull(handle, 5, 200)
    owner.start("crawl", "r", 0.001)
    os.kill(owner.process.pid, signal.SIGSTOP)
    assert isinstance(waiting.error(), TransferTimeout)
    reader.give_back(waiting)
    os.kill(owner.process.pid, signal.SIGCONT)
    owner.answer()
    again = reader.pull(handle, 5, 200)
    assert again.error() is None  # it was still under its lease
    reader.taker.check(again.place, 5)
    assert reader.connector.stats().failed == {"TransferTimeout": 1}
    reader.connector.close()


def test_what_was_let_go_is_lost(reader: Reader, owner: Owner) -> None:
    handle = owner.do("submit", "r", 5, 200)
    owner.do("crawl", "r", 0)
    owner.do("let_go", "r")
    assert isinstance(reader.pull(handle, 5, 200).error(), LeaseLost)
    handle = owner.do("submit", "r", 5, 200)
    waiting = reader.pull(handle, 5, 200)
    owner.do("step", "r", 100)
    owner.do("fail", "r")
    assert isinstance(waiting.error(), LeaseLost)


def test_a_handle_for_other_tokens_or_another_layout(reader: Reader, owner: Owner) -> None:
    handle = owner.do("submit", "r", 5, 200)
    with pytest.raises(HandleError, match="other tokens"):
        reader.connector.check(handle, 200, sha(6, 200))
    other = Layout(GROUPS, STATES, {"format_version": "4", "model_sha256": "another"}, MARKS)
    for changed, said in (
        ({"layout": other.fingerprint, "fields": other.fields}, "model_sha256"),
        ({"kind": "nixl"}, "nixl"), ({"columns": [1]}, "groups"),
    ):  # fmt: skip
        with pytest.raises(HandleError, match=said):
            reader.connector.check({**handle, **changed}, 200, sha(5, 200))
    at = handle["at"]
    for peer, (changed, kind) in enumerate((
        ({"name": "../../etc/passwd"}, HandleError), ({"name": "dsv4c-0123456789abcdef"}, PeerGone),
        ({"offsets": at["offsets"][1:]}, HandleError), ({"offsets": [1 << 50] * 7}, HandleError),
        ({"bytes": [1] * 7}, LeaseLost), ({"bytes": "x"}, HandleError),
    )):  # fmt: skip
        changed = {**handle, "peer": str(peer), "at": {**at, **changed}}
        owner.do("step", "r", 200) if peer == 4 else None
        waiting = reader.pull(changed, 5, 200)
        assert type(waiting.error()) is kind, changed
        reader.give_back(waiting)


NO_HEADERS = [b"", b"garbage", b"\xff", b"[]", b'{"format": 0}', b'{"format": 1, "rows": "a", "words": 1, "pools": 1}']


@pytest.mark.parametrize("header", NO_HEADERS)
def test_a_segment_of_garbage_ends_its_pull_alone(reader: Reader, owner: Owner, folder: Path, header: bytes) -> None:
    handle = owner.do("submit", "r", 7, 300)
    name = "dsv4c-" + "0" * 16
    (folder / name).write_bytes(header.ljust(1 << 16, b"\n"))
    wrong = reader.pull({**handle, "peer": name + str(len(header)), "at": {**handle["at"], "name": name}}, 7, 300)
    right = reader.pull(handle, 7, 300)
    owner.do("crawl", "r", 0)
    assert type(wrong.error()) is HandleError and right.error() is None
    reader.give_back(wrong)
    reader.give_back(right)


def test_cancelled_and_gone(reader: Reader, owner: Owner) -> None:
    handle = owner.do("submit", "r", 5, 200)
    for end in (
        lambda p: reader.connector.cancel(p, TransferError("no more")),
        lambda p: reader.connector.peer_gone(p.peer_id),
    ):
        waiting = reader.pull(handle, 5, 200)
        assert waiting.pull is not None
        end(waiting.pull)
        assert waiting.error() is not None
        reader.give_back(waiting)
    owner.do("close")
    assert isinstance(reader.pull(handle, 5, 200).error(), PeerGone)


def test_the_segment_of_one_who_lives_stays(owner: Owner, folder: Path) -> None:
    name = owner.do("name")
    assert name not in remove_left_over(folder)
    assert (folder / name).stat().st_mode & 0o777 == 0o600
    owner.do("close")
    assert not (folder / name).exists()


def test_a_full_folder_is_refused(folder: Path) -> None:
    before = set(folder.iterdir())
    with pytest.raises(ConfigError, match="shared memory"):
        Segment.create(1 << 50, SLOTS, COLUMNS, folder)
    assert set(folder.iterdir()) == before


def test_a_row_is_read_whole_or_not_at_all() -> None:
    """A writer that never rests, in another thread: every copy that counts is of one moment."""
    side = Side()
    stop = threading.Event()

    def write() -> None:
        for n in range(1, 10**9):
            side.ledger.write(0, dict.fromkeys(range(1, 9), n), [np.full(c, n, np.int64) for c in COLUMNS])
            if stop.is_set():
                return

    thread = threading.Thread(target=write)
    thread.start()
    seen = 0
    try:
        for _ in range(20_000):
            head = side.ledger.words[0, :16].copy()
            rest = side.ledger.words[0, 16:].copy()
            after = side.ledger.words[0, :16].copy()
            if head[VERSION] % 2 == 0 and np.array_equal(head, after) and head[VERSION]:
                assert (rest[: sum(COLUMNS)] == head[1]).all() and (head[1:9] == head[1]).all()
                seen += 1
    finally:
        stop.set()
        thread.join()
    assert seen
