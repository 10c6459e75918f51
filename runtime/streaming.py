"""Bytes from a source to a device, several buffers ahead of whoever uses them.

    job --read (threads)--> host buffer --upload--> device --whatever is made of them-->
                               ^                |
                               +---- fence -----+   a buffer is filled again only after its upload has finished

A `Lane` is the device's side of it. On a card its work runs in order on a stream of its own, beside the caller; on the
host everything is done when the call returns, and nothing is pinned or copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

Fence = Callable[[], None]
"""Returns once everything that was given to the lane before has finished. Any thread may call it."""

Job = TypeVar("Job")

THREAD_NAME = "load"


class Lane(Protocol):
    """A device that takes bytes and works on them in order, while the context is entered."""

    device: torch.device

    def __enter__(self) -> Lane: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Returns when everything has finished."""

    def buffer(self, nbytes: int) -> Tensor:
        """Host memory to upload from, uint8 [nbytes]."""

    def upload(self, host: Tensor) -> Tensor:
        """These bytes on the device: valid for work given to the lane before the next upload."""

    def fence(self) -> Fence: ...


class HostLane:
    """The CPU: work is done when it is given, and bytes are used where they were read."""

    device = torch.device("cpu")

    def __enter__(self) -> HostLane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def upload(self, host: Tensor) -> Tensor:
        return host

    def fence(self) -> Fence:
        return _nothing


class CudaLane:
    """A card: copies from pinned memory and kernels on one side stream, `largest` bytes at most in one upload.

    What is allocated inside comes from that stream's part of the allocator and is given back to the card at the end.
    """

    def __init__(self, device: torch.device, largest: int) -> None:
        self.device = device
        self._largest = largest
        self._stream = torch.cuda.Stream(device)
        self._scope = torch.cuda.stream(self._stream)
        self._staged: Tensor | None = None

    def __enter__(self) -> CudaLane:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._scope.__enter__()
        self._staged = torch.empty(self._largest, dtype=torch.uint8, device=self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staged = None
        self._scope.__exit__(kind, error, trace)
        self._stream.synchronize()
        torch.cuda.empty_cache()

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, host: Tensor) -> Tensor:
        assert self._staged is not None, "the lane is not entered"
        staged = self._staged[: host.numel()]
        return staged.copy_(host, non_blocking=True)

    def fence(self) -> Fence:
        event = torch.cuda.Event(blocking=True)  # the thread sleeps
        event.record(self._stream)
        return event.synchronize


def lane(device: torch.device, largest: int) -> Lane:
    """The lane of a device."""
    return HostLane() if device.type == "cpu" else CudaLane(device, largest)


def _nothing() -> None:
    """What the host has to wait for."""


class Readers(Generic[Job]):
    """Threads that fill buffers with the bytes of jobs, and give them out in the jobs' order.

        with Readers(jobs, fill, buffers, threads=2) as filled:
            for job, buffer in filled:
                ...                                 # what `fill` raised for this job is raised here
                filled.give_back(buffer, fence)     # it is filled again once `fence` returns

    Leaving the context, for whatever reason, waits for the threads: at most the jobs at hand are finished.
    """

    def __init__(
        self, jobs: Sequence[Job], fill: Callable[[Job, Tensor], None], buffers: Sequence[Tensor], threads: int
    ) -> None:
        self._todo = iter(jobs)
        self._fill = fill
        self._buffers = buffers
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=THREAD_NAME)
        self._filling: deque[tuple[Job, Tensor, Future[None]]] = deque()

    def __enter__(self) -> Readers[Job]:
        for buffer in self._buffers:
            self.give_back(buffer, _nothing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Job, Tensor]]:
        while self._filling:
            job, buffer, done = self._filling.popleft()
            done.result()
            yield job, buffer

    def give_back(self, buffer: Tensor, fence: Fence) -> None:
        """The buffer may be used for the next job after `fence`."""
        job = next(self._todo, None)
        if job is not None:
            self._filling.append((job, buffer, self._pool.submit(self._refill, job, buffer, fence)))

    def _refill(self, job: Job, buffer: Tensor, fence: Fence) -> None:
        fence()
        self._fill(job, buffer)
