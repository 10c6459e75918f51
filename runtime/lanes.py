"""Lanes of a program as parallel branches of one CUDA graph.

    calls with lanes and waits --steps_of--> launches, records and waits, each on a lane --play--> branches

Lane k is stream k; a wait across lanes is an event. Every lane begins behind the start of the capture and joins lane 0
at its end, as a capture requires. Neighbouring launches of a lane are bound as one chain. Outside a capture calls run
on one stream in the order of the program, which gives the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from dsv4c.artifact import Call
from dsv4c.errors import ArtifactError


@dataclass(frozen=True)
class Part:
    """Launches [first, stop) of a call (stop None: to the end).

    `alone`: the first that is made comes behind an event, so it may not begin while the kernel before it drains: a
    programmatic launch knows only the kernel in front of it in its own stream.
    """

    call: Call
    first: int = 0
    stop: int | None = None
    alone: bool = False


@dataclass(frozen=True)
class Launches:
    lane: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Record:
    lane: int
    event: str


@dataclass(frozen=True)
class Wait:
    lane: int
    event: str


Step = Launches | Record | Wait
Bind = Callable[[Sequence[Part]], list[Callable[[], object]]]
"""Functions that make these launches in order on the current stream; none if all of their grids are empty."""


class Streams(Protocol):
    """The streams of the lanes; lane 0 is the one that captures."""

    def on(self, lane: int) -> AbstractContextManager[object]:
        """Makes the lane's stream the current one."""

    def record(self, lane: int) -> object:
        """An event behind all that the lane has so far."""

    def wait(self, lane: int, event: object) -> None:
        """What the lane gets from now on comes behind the event."""


class CudaStreams:
    """Lane 0 on `main`, every other on a stream of its own."""

    def __init__(self, main: torch.cuda.Stream, lanes: int) -> None:
        self._streams = [main, *(torch.cuda.Stream(main.device) for _ in range(lanes - 1))]

    def on(self, lane: int) -> torch.cuda.StreamContext:
        return torch.cuda.stream(self._streams[lane])

    def record(self, lane: int) -> torch.cuda.Event:
        event: torch.cuda.Event = self._streams[lane].record_event()
        return event

    def wait(self, lane: int, event: object) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._streams[lane].wait_event(event)


def steps_of(calls: Sequence[Call], start: int = 0) -> tuple[Step, ...]:
    """What a capture of these calls does, in order. `start`: the number of the first in its program.

    What they wait for from before it is over when the capture's graph is launched.
    """
    numbers = range(start, start + len(calls))
    awaited = {wait.call for call in calls for wait in call.waits}
    lanes = sorted({call.lane for call in calls} - {0})
    steps: list[Step] = [Record(0, "start"), *(Wait(lane, "start") for lane in lanes)] if lanes else []
    open_: dict[int, list[Part]] = {}  # lane -> parts that go into its next chain

    def close(lane: int) -> None:
        if parts := open_.pop(lane, None):
            steps.append(Launches(lane, tuple(parts)))

    for number, call in zip(numbers, calls, strict=True):
        waits = [wait for wait in call.waits if wait.call >= start]
        if any(wait.call >= number for wait in waits):
            raise ArtifactError(f"call {number} of `{call.kernel}` waits for a later one", hint="compile it again")
        cuts = sorted({0, *(wait.launch for wait in waits)})
        for first, stop in zip(cuts, [*cuts[1:], None], strict=True):
            for wait in waits:
                if wait.launch == first:
                    close(call.lane)
                    steps.append(Wait(call.lane, str(wait.call)))
            open_.setdefault(call.lane, []).append(Part(call, first, stop))
        if number in awaited:
            close(call.lane)
            steps.append(Record(call.lane, str(number)))
    for lane in sorted(open_):
        close(lane)
    for lane in lanes:
        steps += [Record(lane, f"end of {lane}"), Wait(0, f"end of {lane}")]
    return tuple(steps)


def play(steps: Sequence[Step], bind: Bind, streams: Streams) -> None:
    """Takes the steps. A launch behind a wait, or the first of a side lane, is not programmatic."""
    events: dict[str, object] = {}
    behind: set[int] = set()  # lanes whose last step was a wait
    for step in steps:
        if isinstance(step, Record):
            events[step.event] = streams.record(step.lane)
        elif isinstance(step, Wait):
            streams.wait(step.lane, events[step.event])
            behind.add(step.lane)
        else:
            first, *rest = step.parts
            runs = bind([replace(first, alone=step.lane in behind), *rest])
            with streams.on(step.lane):
                for run in runs:
                    run()
            if runs:
                behind.discard(step.lane)
