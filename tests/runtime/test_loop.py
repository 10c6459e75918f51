"""The engine's thread: events in order, cancellation, refusal, failures, and a clean end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping

import pytest
import torch

from dsv4c.errors import EngineError, RequestError, RunnerBroken
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import End, Event, Request
from dsv4c.runtime.scheduler import Limits
from tests.runtime.standin import StandIn, direct_greedy, make_engine

WAIT_S = 60  # a bound for a hung test, not a measure


def greedy(max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


class Reader:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.tokens: list[int] = []

    def wait(self) -> End:
        while True:
            event = self.events.get(timeout=WAIT_S)
            self.tokens += event.tokens
            if event.end is not None:
                assert self.events.empty(), "nothing comes after the end"
                return event.end


class Gate(StandIn):
    """A stand-in that waits for leave before every step."""

    leave: threading.Semaphore
    inside: threading.Semaphore

    def step(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.inside.release()
        assert self.leave.acquire(timeout=WAIT_S)
        return super().step(inputs)


@pytest.fixture(params=[0, 1], ids=["lag0", "lag1"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[EngineLoop, Engine, StandIn]]:
    engine, standin = make_engine(limits=Limits(max_requests=4, max_step_tokens=64, max_waiting=4), lag=request.param)
    loop = EngineLoop(engine).start()
    yield loop, engine, standin
    loop.close(drain=False)
    if loop.failure is None:
        engine.audit()
        assert not engine.has_work


def gated(max_waiting: int = 4, lag: int = 0) -> tuple[EngineLoop, Engine, Gate]:
    limits = Limits(max_requests=1, max_step_tokens=64, max_waiting=max_waiting)
    engine, standin = make_engine(limits=limits, lag=lag)
    standin.__class__ = Gate
    assert isinstance(standin, Gate)
    standin.leave, standin.inside = threading.Semaphore(0), threading.Semaphore(0)
    return EngineLoop(engine).start(), engine, standin


def submit(loop: EngineLoop, name: str, prompt: list[int], params: SamplingParams | None = None) -> Reader:
    reader = Reader()
    loop.submit(Request(name, prompt, params or greedy()), reader.events.put)
    return reader


def test_events_arrive_in_order_and_end_once(served: tuple[EngineLoop, Engine, StandIn]) -> None:
    loop, engine, _ = served
    readers = [submit(loop, f"r{i}", [i, 2, 3]) for i in range(4)]
    for i, reader in enumerate(readers):
        assert reader.wait().reason == "length"
        assert reader.tokens == direct_greedy([i, 2, 3], 8)
    assert loop.max_context == engine.max_context and loop.failure is None


def test_submitting_from_many_threads() -> None:
    engine, _ = make_engine(limits=Limits(max_requests=8, max_step_tokens=64))
    loop = EngineLoop(engine).start()
    readers: dict[int, Reader] = {}

    def client(i: int) -> None:
        readers[i] = submit(loop, f"r{i}", [i % 50, i % 7, 1], greedy(5))
        if i % 5 == 0:
            loop.cancel(f"r{i}")

    threads = [threading.Thread(target=client, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, reader in readers.items():
        assert reader.wait().reason in (("length", "cancelled") if i % 5 == 0 else ("length",))
        assert reader.tokens == direct_greedy([i % 50, i % 7, 1], 5)[: len(reader.tokens)]
    assert loop.close() and loop.stats().running == loop.stats().waiting == 0
    assert not any(loop.stats().pages_used.values())


def test_a_cancellation_is_read_before_the_next_step() -> None:
    loop, _, gate = gated()
    running, waiting = submit(loop, "a", [1, 2]), submit(loop, "b", [3])
    assert gate.inside.acquire(timeout=WAIT_S)
    loop.cancel("a")
    loop.cancel("b")
    loop.cancel("nobody")
    gate.leave.release()
    assert running.wait().reason == "cancelled" and len(running.tokens) == 1
    assert waiting.wait().reason == "cancelled" and not waiting.tokens
    assert loop.close() and gate.steps == 1


def test_refusals_are_raised_to_the_caller() -> None:
    loop, engine, gate = gated(max_waiting=2)
    with pytest.raises(RequestError) as caught:
        submit(loop, "x", [1] * 5000)
    assert caught.value.status == 400
    readers = [submit(loop, "a", [1])]
    assert gate.inside.acquire(timeout=WAIT_S)
    readers += [submit(loop, name, [1]) for name in ("b", "c")]
    assert loop.stats().waiting == 2
    with pytest.raises(RequestError) as caught:
        submit(loop, "d", [1])
    assert (caught.value.status, caught.value.code) == (503, "queue_full")
    with pytest.raises(RequestError, match="`b` is in use"):
        submit(loop, "b", [1])
    with pytest.raises(RequestError, match="`a` is in use"):
        submit(loop, "a", [1])
    gate.leave.release(100)
    assert [r.wait().reason for r in readers] == ["length"] * 3
    assert loop.close()
    engine.audit()


def test_a_failing_step_leaves_the_engine_serving(served: tuple[EngineLoop, Engine, StandIn]) -> None:
    loop, _, standin = served
    standin.fail_at = {2}
    end = submit(loop, "a", [1, 2]).wait()
    assert end.reason == "failed" and end.error and "kernel exploded" in end.error.message
    again = submit(loop, "b", [1, 2])
    assert again.wait().reason == "length" and again.tokens == direct_greedy([1, 2], 8)


def test_a_reader_that_raises_is_cancelled_alone(served: tuple[EngineLoop, Engine, StandIn]) -> None:
    loop, engine, _ = served

    def gone(event: Event) -> None:
        raise ConnectionError(event.request_id)

    loop.submit(Request("gone", [1, 2, 3], greedy(500)), gone)
    assert submit(loop, "b", [1, 2]).wait().reason == "length"
    assert submit(loop, "c", [1, 2]).wait().reason == "length"
    assert engine.stats().ended["cancelled"] == 1 and loop.failure is None


def test_a_fault_of_the_engine_ends_every_request_with_it() -> None:
    loop, engine, gate = gated()
    readers = [submit(loop, "a", [1]), submit(loop, "b", [2])]
    assert gate.inside.acquire(timeout=WAIT_S)
    engine.pool._owned[1] = False  # a corrupt pool
    gate.leave.release(100)
    for reader in readers:
        end = reader.wait()
        assert end.reason == "failed" and isinstance(end.error, EngineError)
    with pytest.raises(RequestError) as caught:
        submit(loop, "c", [1])
    assert caught.value.status == 503 and loop.failure is not None
    assert not loop.close()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_lost_device_fails_everything_and_stops_the_loop(lag: int) -> None:
    loop, engine, gate = gated(lag=lag)
    gate.fail_at, gate.fail_with = {3}, RunnerBroken("the device is lost", hint="look at its log")
    readers = [submit(loop, "a", [1]), submit(loop, "b", [2])]
    gate.leave.release(100)
    ends = [reader.wait() for reader in readers]
    assert [(e.reason, e.error and e.error.message) for e in ends] == [("failed", "the device is lost")] * 2
    assert [len(r.tokens) for r in readers] == [2, 0]
    assert not loop.close() and loop.failure is not None and "the device is lost" in loop.failure.message
    with pytest.raises(RequestError) as caught:
        submit(loop, "c", [1])
    assert caught.value.status == 503
    engine.audit()
    assert not engine.has_work and not any(engine.pool.used_pages().values())


@pytest.mark.parametrize("lag", [0, 1])
def test_closing_lets_requests_finish(lag: int) -> None:
    loop, _, gate = gated(lag=lag)
    readers = [submit(loop, "a", [1]), submit(loop, "b", [2])]
    closed: list[bool] = []
    thread = threading.Thread(target=lambda: closed.append(loop.close()))
    thread.start()
    gate.leave.release(100)
    assert [r.wait().reason for r in readers] == ["length"] * 2
    thread.join(WAIT_S)
    assert closed == [True]
    with pytest.raises(RequestError, match="shutting down"):
        submit(loop, "c", [1])


@pytest.mark.parametrize("lag", [0, 1])
def test_closing_without_draining_fails_what_is_left(lag: int) -> None:
    loop, engine, gate = gated(lag=lag)
    readers = [submit(loop, "a", [1]), submit(loop, "b", [2])]
    assert gate.inside.acquire(timeout=WAIT_S)
    gate.leave.release(1)
    thread = threading.Thread(target=lambda: loop.close(drain=True, timeout_s=0.01))
    thread.start()
    thread.join(0.2)
    gate.leave.release(100)
    thread.join(WAIT_S)
    for reader in readers:
        assert reader.wait().reason in ("failed", "length")
    engine.audit()
    assert not engine.has_work and not any(engine.pool.used_pages().values())


def test_closing_a_loop_that_never_started_and_one_that_idles() -> None:
    engine, _ = make_engine()
    assert EngineLoop(engine).close()
    assert EngineLoop(engine).start().close()
