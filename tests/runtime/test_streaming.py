"""Streaming: order, buffers that are never filled too early, and no thread left behind, whatever happens."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsv4c.artifact import Weight
from dsv4c.errors import CheckpointError
from dsv4c.runtime import weights as module
from dsv4c.runtime.streaming import THREAD_NAME, Fence, HostLane, Readers
from dsv4c.runtime.weights import LoadProgress, ReadAhead, load_weights
from tests.runtime.memory_source import MemorySource

UNIT = ReadAhead(64, 3, 2)


def load_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not load_threads()


class SlowLane(HostLane):
    """A card whose copies take their time: they end one by one, and look at the host's bytes only then."""

    def __init__(self, overtaken: list[int]) -> None:
        self._draw = random.Random(0)
        self._uploads: list[tuple[Tensor, Tensor, threading.Event]] = []
        self._more = threading.Semaphore(0)
        self._copier = threading.Thread(target=self._copy)
        self._closed = False
        self.overtaken = overtaken

    def __enter__(self) -> SlowLane:
        self._copier.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        self._more.release()
        self._copier.join()

    def upload(self, host: Tensor) -> Tensor:
        seen = host.clone()
        self._uploads.append((host, seen, threading.Event()))
        self._more.release()
        return seen

    def fence(self) -> Fence:
        done = self._uploads[-1][2]
        return lambda: done.wait() and None

    def _copy(self) -> None:
        at = 0
        while self._more.acquire() and (at < len(self._uploads) or not self._closed):
            time.sleep(self._draw.random() * 2e-3)
            host, seen, done = self._uploads[at]
            if not torch.equal(host, seen):
                self.overtaken.append(at)
            done.set()
            at += 1


def many(count: int) -> tuple[list[Weight], MemorySource]:
    draw = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(5, 7, generator=draw) for i in range(count)}
    return [Weight(n, (5, 7), "float32", (n,), ()) for n in tensors], MemorySource(**tensors)


@pytest.mark.parametrize(("buffers", "readers"), [(2, 1), (3, 2), (6, 4)])
def test_no_buffer_is_filled_before_its_copy_has_finished(
    monkeypatch: pytest.MonkeyPatch, buffers: int, readers: int
) -> None:
    overtaken: list[int] = []
    monkeypatch.setattr(module, "lane", lambda device, largest: SlowLane(overtaken))
    made, source = many(20)
    got, _ = load_weights(made, source, ahead=ReadAhead(64, buffers, readers))
    assert not overtaken
    assert all(torch.equal(got[name], tensor) for name, tensor in source.tensors.items())


def test_without_fences_the_check_above_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(SlowLane):
        def fence(self) -> Fence:
            return lambda: None

    overtaken: list[int] = []
    monkeypatch.setattr(module, "lane", lambda device, largest: Careless(overtaken))
    load_weights(*many(20), ahead=ReadAhead(64, 2, 1))
    assert overtaken


def test_jobs_come_in_order_though_later_ones_are_read_sooner() -> None:
    def fill(job: int, buffer: Tensor) -> None:
        time.sleep(2e-3 * (job % 3))
        buffer.fill_(job)

    buffers = [torch.zeros(4, dtype=torch.uint8) for _ in range(3)]
    seen = []
    with Readers(range(25), fill, buffers, 3) as filled:
        for job, buffer in filled:
            assert buffer.tolist() == [job] * 4
            seen.append(job)
            filled.give_back(buffer, lambda: None)
    assert seen == list(range(25))


def test_a_reader_that_fails_is_heard_at_its_place() -> None:
    made, source = many(20)
    source.broken = "t11"
    seen: list[LoadProgress] = []
    with pytest.raises(CheckpointError, match="`t11` cannot be read"):
        load_weights(made, source, seen.append, ahead=UNIT)
    assert {now.name for now in seen} == {f"t{i}" for i in range(11)}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_who_listens_may_break_off(error: type[BaseException]) -> None:
    def stop(now: LoadProgress) -> None:
        if now.weights == 3:
            raise error

    with pytest.raises(error):
        load_weights(*many(20), stop, ahead=UNIT)


def test_an_interrupt_while_waiting_for_a_reader() -> None:
    class Interrupting(MemorySource):
        def read(self, name: str, start: int, into: Tensor) -> None:
            super().read(name, start, into)
            if name == "t9" and start == 0:
                os.kill(os.getpid(), signal.SIGINT)  # to the main thread, which waits
                time.sleep(0.05)

    made, source = many(20)
    gc.disable()  # an interrupt that falls into a callback of the collector, which hypothesis has, is lost
    try:
        with pytest.raises(KeyboardInterrupt):
            load_weights(made, Interrupting(**source.tensors), ahead=UNIT)
    finally:
        gc.enable()


def test_nothing_to_load() -> None:
    assert load_weights([], MemorySource())[0] == {}
