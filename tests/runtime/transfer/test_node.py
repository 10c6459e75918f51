"""Two nodes: the same tokens as one engine, whatever is lost on the way, and nothing left behind on either side."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest

from dsv4c.errors import EngineError, PeerGone, RequestError
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.transfer.backend import Backend, Peer, Read
from dsv4c.runtime.transfer.layout import Int64Array, Ranges
from dsv4c.runtime.transfer.node import Granted, Prefilled, prefill_params
from tests.runtime.standin import direct_greedy
from tests.runtime.transfer.nodes import HORIZON, WIDE, Client, Pair, text

LAGS = pytest.mark.parametrize("lag", [0, 1])


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)


def expected(prompt: list[int], count: int) -> list[int]:
    return direct_greedy(prompt, count, HORIZON, WIDE)


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


class Slow:
    """A backend whose reads of pools take until it is told: then they are made, or fail."""

    def __init__(self, backend: Backend) -> None:
        self.of = backend
        self.kind, self.peer_id, self.released_poll_s = backend.kind, backend.peer_id, backend.released_poll_s
        self.go = threading.Event()
        self.fails = False
        self.begun = 0
        self.closed = False

    def describe(self) -> dict[str, Any]:
        return self.of.describe()

    def open(self, description: Mapping[str, Any]) -> Peer:
        return SlowPeer(self, self.of.open(description))

    def poll_released(self) -> Iterable[tuple[int, int]]:
        return self.of.poll_released()

    def close(self) -> None:
        self.closed = True
        self.of.close()


class SlowPeer:
    def __init__(self, backend: Slow, of: Peer) -> None:
        self.backend, self.of = backend, of
        self.check, self.close, self.release = of.check, of.close, of.release

    def words(self, row: int, first: int, out: Int64Array) -> Read:
        return self.of.words(row, first, out)

    def read(self, ranges: Ranges) -> Read:
        self.backend.begun += 1
        return SlowRead(self, ranges)


class SlowRead:
    def __init__(self, peer: SlowPeer, ranges: Ranges) -> None:
        self.peer, self.ranges = peer, ranges

    def poll(self) -> bool:
        if not self.peer.backend.go.is_set():
            return False
        if self.peer.backend.fails:
            raise PeerGone("the read has failed")
        return self.peer.of.read(self.ranges).poll()


@pytest.fixture
def slow() -> Iterator[tuple[Pair, Slow]]:
    made: list[Slow] = []

    def wrap(backend: Backend) -> Backend:
        made.append(Slow(backend))
        return made[0]

    pair = Pair(wrap=wrap, deadline_s=0.2)
    yield pair, made[0]
    made[0].go.set()
    pair.decode.close()
    pair.prefill.close()


@LAGS
def test_the_same_tokens_as_one_engine(lag: int) -> None:
    pair = Pair(lag)
    lengths = [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 128, 200, 200, 200]
    clients = [(n, pair.serve(f"r{i}", text(n), greedy(20))) for i, n in enumerate(lengths)]
    for n, client in clients:
        assert client.wait() == expected(text(n), 20), n
    stats = pair.decode.stats()
    assert (stats.moved, stats.recomputed) == (len(lengths), 0)
    until(pair.prefill.quiescent)
    pair.assert_empty()
    pair.close()


def test_log_probabilities_and_counts_come_with_the_first_event() -> None:
    pair = Pair()
    one = pair.serve("a", text(40), greedy(5, logprobs=2, prompt_logprobs=1))
    one.wait()
    again = pair.serve("b", text(40), greedy(5))
    again.wait()
    alone = Client()
    pair.decode.decode(Request("c", text(40), greedy(5, logprobs=2, prompt_logprobs=1)), None, alone)
    alone.wait()
    first, plain = one.events[0], alone.events[0]
    assert first.logprobs == plain.logprobs and first.prompt_logprobs == plain.prompt_logprobs
    assert again.events[0].cached_tokens == 32
    pair.close()


def test_generated_tokens_count_as_generated_on_both_sides() -> None:
    pair = Pair()
    params = SamplingParams(max_tokens=20, seed=5, frequency_penalty=0.5, min_tokens=3)
    whole = pair.serve("a", text(30), params).wait()
    for n in (1, 7, 19):
        rest = pair.serve(f"b{n}", text(30), params, generated=whole[:n]).wait()
        assert whole[:n] + rest == whole
    pair.close()


@LAGS
@pytest.mark.parametrize("seed", range(3))
def test_cancelled_at_any_moment(lag: int, seed: int) -> None:
    draw = random.Random(seed)
    pair = Pair(lag, requests=(3, 4))
    clients = []
    for i in range(25):
        n = draw.randint(1, 200)
        client = pair.serve(f"r{i}", text(n), greedy(draw.randint(1, 15)))
        clients.append((n, client))
        if draw.random() < 0.5:
            time.sleep(draw.random() * 0.01)
            victim = f"r{draw.randint(0, i)}"
            for node in draw.choice(((pair.prefill, pair.decode), (pair.decode,), (pair.prefill,))):
                node.cancel(victim)
        if draw.random() < 0.2:
            pair.audit()
    for n, client in clients:
        if client.never_began():
            continue  # cancelled before it had its pages: nobody told the decode node of it
        tokens = client.wait()
        assert tokens == expected(text(n), 15)[: len(tokens)]
    until(pair.prefill.quiescent)
    until(lambda: not pair.decode.stats().moving)
    pair.assert_empty()
    pair.close()


def test_a_first_token_that_never_comes() -> None:
    pair = Pair(deadline_s=0.1)
    client = pair.serve("a", text(50), greedy(9), first=False)
    assert client.wait() == expected(text(50), 9)
    assert pair.decode.stats().recomputed == 1
    pair.assert_empty()
    pair.close()


def test_a_lease_that_nobody_reads() -> None:
    pair = Pair(ttl_s=0.05)
    heard: list[Granted | Prefilled | Event] = []
    pair.prefill.prefill(Request("a", text(50), prefill_params(greedy(9)), keep=True), heard.append)
    until(lambda: pair.prefill.stats().expired == 1)
    until(pair.prefill.quiescent)
    granted, prefilled = heard
    assert isinstance(granted, Granted) and isinstance(prefilled, Prefilled)
    client = Client()
    pair.decode.decode(Request("a", text(50), greedy(9)), granted.handle, client, first=prefilled)
    assert client.wait() == expected(text(50), 9)
    assert pair.decode.stats().transfer.failed == {"LeaseLost": 1}
    pair.assert_empty()
    pair.close()


def test_everything_known_at_once_and_a_handle_used_twice() -> None:
    pair = Pair()
    heard: list[Granted | Prefilled | Event] = []
    pair.prefill.prefill(Request("a", text(50), prefill_params(greedy(9)), keep=True), heard.append)
    until(lambda: len(heard) == 2)
    granted, prefilled = heard
    assert isinstance(granted, Granted) and isinstance(prefilled, Prefilled)
    for attempt in range(2):
        client = Client()
        pair.decode.decode(Request(f"d{attempt}", text(50), greedy(9)), granted.handle, client, first=prefilled)
        assert client.wait() == expected(text(50), 9)
        until(pair.prefill.quiescent)
    stats = pair.decode.stats()
    assert (stats.moved, stats.recomputed) == (1, 1)
    pair.assert_empty()
    pair.close()


def test_a_handle_that_is_not_used() -> None:
    pair = Pair()
    heard: list[Granted | Prefilled | Event] = []
    pair.prefill.prefill(Request("a", text(50), prefill_params(greedy(9)), keep=True), heard.append)
    until(lambda: len(heard) == 2)
    assert isinstance(heard[0], Granted) and not pair.prefill.quiescent()
    pair.decode.forgo({"version": 99})
    pair.decode.forgo(heard[0].handle)
    until(pair.prefill.quiescent)
    with pytest.raises(RequestError):  # refused: its handle is of no use to it either
        pair.prefill.prefill(Request("b", text(50), prefill_params(greedy(9)), keep=True), heard.append)
        until(lambda: len(heard) == 4)
        assert isinstance(heard[2], Granted)
        pair.decode.decode(Request("b", text(50), greedy(900)), heard[2].handle, Client())
    until(pair.prefill.quiescent)
    pair.assert_empty()
    pair.close()


def test_a_handle_of_another_model() -> None:
    pair = Pair(model="another")
    assert pair.serve("a", text(50), greedy(9)).wait() == expected(text(50), 9)
    stats = pair.decode.stats()
    assert (stats.moved, stats.recomputed, stats.transfer.pulled) == (0, 1, 0)
    pair.prefill.release(pair.handles["a"]["lease"])
    until(pair.prefill.quiescent)
    pair.assert_empty()
    pair.close()


def test_a_peer_that_has_closed() -> None:
    pair = Pair()
    heard: list[Granted | Prefilled | Event] = []
    pair.prefill.prefill(Request("a", text(50), prefill_params(greedy(9)), keep=True), heard.append)
    until(lambda: len(heard) == 2)
    assert isinstance(heard[0], Granted)
    pair.prefill.close(drain=False)
    client = Client()
    pair.decode.decode(Request("a", text(50), greedy(9)), heard[0].handle, client)
    assert client.wait() == expected(text(50), 9)
    assert pair.decode.stats().transfer.failed == {"PeerGone": 1}
    assert pair.decode.close()


@pytest.mark.parametrize("fails", [False, True])
def test_pages_of_a_read_that_hangs_are_nobodys(slow: tuple[Pair, Slow], fails: bool) -> None:
    pair, backend = slow
    client = pair.serve("a", text(50), greedy(9))
    assert client.wait() == expected(text(50), 9)  # after the deadline, computed here
    engine = pair.engines[1][0]
    assert pair.decode.stats().transfer.quarantined == 1 and list(engine.unsettled) == ["a"]
    assert any(engine.pool.used_pages().values())
    pair.audit()
    with pytest.raises(RequestError, match="in use"):
        pair.decode.decode(Request("a", text(50), greedy(9)), pair.handles["a"], Client())
    backend.fails = fails
    backend.go.set()
    until(lambda: not pair.decode.stats().transfer.quarantined)
    until(lambda: not pair.decode.stats().moving)
    until(pair.prefill.quiescent)
    pair.assert_empty()


def test_cancelled_while_a_read_hangs(slow: tuple[Pair, Slow]) -> None:
    pair, backend = slow
    client = pair.serve("a", text(50), greedy(9))
    until(lambda: backend.begun > 0)
    pair.decode.cancel("a")
    assert client.wait() == []
    pair.audit()
    assert list(pair.engines[1][0].unsettled) == ["a"]
    backend.go.set()
    until(lambda: not pair.decode.stats().moving)
    until(pair.prefill.quiescent)
    pair.assert_empty()


def test_a_peer_said_to_be_gone(slow: tuple[Pair, Slow]) -> None:
    pair, backend = slow
    clients = [pair.serve(f"r{i}", text(50), greedy(9)) for i in range(4)]
    until(lambda: len(pair.handles) == 4)
    pair.decode.peer_gone(pair.handles["r0"]["peer"])
    for client in clients:
        assert client.wait() == expected(text(50), 9)
    backend.go.set()
    until(lambda: not pair.decode.stats().moving)
    pair.audit()


def test_a_prefill_that_fails() -> None:
    pair = Pair()
    pair.engines[0][1].fail_at = {1}
    assert pair.serve("a", text(50), greedy(9)).wait() == expected(text(50), 9)
    until(pair.prefill.quiescent)
    pair.assert_empty()
    pair.close()


def test_prefills_are_preempted_and_start_over() -> None:
    """Few pages: kept requests hold them, others wait or are thrown out; all end with the right tokens."""
    pair = Pair(requests=(4, 4), context=64)
    clients = [(n, pair.serve(f"r{n}", text(n, n), greedy(5))) for n in range(20, 55)]
    for n, client in clients:
        assert client.wait() == expected(text(n, n), 5)
    until(pair.prefill.quiescent)
    pair.assert_empty()
    pair.close()


def test_closing_waits_for_readers(slow: tuple[Pair, Slow]) -> None:
    pair, backend = slow
    client = pair.serve("a", text(50), greedy(9))
    until(lambda: backend.begun > 0)
    assert not pair.prefill.close(timeout_s=0.01)
    assert client.wait() == expected(text(50), 9)


def test_what_is_no_prefill_is_refused() -> None:
    pair = Pair()
    for request in (Request("a", text(5), greedy(1)), Request("a", text(5), greedy(2), keep=True)):
        with pytest.raises(EngineError, match="no prefill"):
            pair.prefill.prefill(request, lambda said: None)
    with pytest.raises(RequestError):
        pair.prefill.prefill(Request("a", [], prefill_params(greedy(1)), keep=True), lambda said: None)
    pair.close()


@LAGS
@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once(lag: int, seed: int) -> None:
    """Reads that hang and fail, leases that expire, peers said to be gone, cancellations, steps that fail."""
    draw = random.Random(seed)
    made: list[Slow] = []

    def wrap(backend: Backend) -> Backend:
        made.append(Slow(backend))
        return made[0]

    pair = Pair(lag, wrap=wrap, deadline_s=0.03, ttl_s=0.1, requests=(4, 5))
    (backend,) = made
    backend.go.set()
    clients = []
    for i in range(60):
        n = draw.choice((1, 7, 16, 40, 64, 120, 200))
        client = pair.serve(f"r{i}", text(n, draw.randrange(3)), greedy(12), first=draw.random() < 0.9)
        clients.append((f"r{i}", n, client))
        what = draw.random()
        if what < 0.1:
            backend.go.clear()
        elif what < 0.3:
            backend.go.set()
        elif what < 0.4:
            backend.fails = not backend.fails
        elif what < 0.5:
            draw.choice((pair.prefill, pair.decode)).cancel(f"r{draw.randint(0, i)}")
        elif what < 0.6 and pair.handles:
            pair.decode.peer_gone(next(iter(pair.handles.values()))["peer"])
        elif what < 0.65:
            pair.engines[0][1].fail_at.add(pair.engines[0][1].steps + 2)
        elif what < 0.8:
            time.sleep(0.02 * draw.random())
        elif what < 0.85:
            pair.audit()
    backend.go.set()
    for _, _, client in clients:
        if not client.never_began():
            client.wait()
            reasons = {e.end.reason for e in client.events if e.end is not None}
            assert reasons <= {"length", "cancelled"}
    until(pair.prefill.quiescent)
    until(lambda: not pair.decode.stats().moving)
    pair.assert_empty()
    stats = pair.decode.stats()
    assert stats.moved + stats.recomputed > 20
    pair.close()
    right = {n: [expected(text(n, s), 12) for s in range(3)] for n in {n for _, n, _ in clients}}
    for name, n, client in clients:
        assert any(client.tokens == tokens[: len(client.tokens)] for tokens in right[n]), name
