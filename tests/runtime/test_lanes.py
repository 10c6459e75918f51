"""Branches of a graph: which streams and events a capture takes, and which launches lose their programmatic start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4c.artifact import Call, Kernel, Launch, Wait
from dsv4c.errors import ArtifactError
from dsv4c.runtime.gpu import GpuKernels
from dsv4c.runtime.lanes import Launches, Part, Record, Step, play, steps_of
from dsv4c.runtime.lanes import Wait as WaitStep


def call(name: str, lane: int = 0, *waits: tuple[int, int]) -> Call:
    return Call(name, (), 0, "", lane, tuple(Wait(*wait) for wait in waits))


class Log:
    """Streams and a binder that write down what they are asked. `empty`: kernels whose grids are empty."""

    def __init__(self, empty: str = "") -> None:
        self.lines: list[str] = []
        self.lane = 0
        self.empty = empty

    @contextlib.contextmanager
    def on(self, lane: int) -> Iterator[None]:
        before, self.lane = self.lane, lane
        yield
        self.lane = before

    def record(self, lane: int) -> object:
        self.lines.append(f"{lane} record e{len(self.lines)}")
        return f"e{len(self.lines) - 1}"

    def wait(self, lane: int, event: object) -> None:
        self.lines.append(f"{lane} wait {event}")

    def bind(self, parts: Sequence[Part]) -> list[Callable[[], object]]:
        shown = " ".join(_shown(part) for part in parts if part.call.kernel not in self.empty)
        return [lambda: self.lines.append(f"{self.lane} {shown}")] if shown else []


def _shown(part: Part) -> str:
    cut = "" if part.first == 0 and part.stop is None else f"[{part.first}:{part.stop or ''}]"
    return ("!" if part.alone else "") + part.call.kernel + cut


def played(calls: Sequence[Call], start: int = 0, empty: str = "") -> list[str]:
    log = Log(empty)
    play(steps_of(calls, start), log.bind, log)
    return log.lines


def test_one_lane_is_one_chain() -> None:
    assert played([call("a"), call("b"), call("c")]) == ["0 a b c"]


def test_lanes_fork_and_join_by_events() -> None:
    calls = [call("a"), call("b", 1, (0, 0)), call("c", 1), call("d"), call("e", 0, (2, 0))]
    assert played(calls) == [
        "0 record e0", "1 wait e0",  # every lane begins inside the capture
        "0 a", "0 record e3", "1 wait e3",
        "1 !b c", "1 record e6",
        "0 d", "0 wait e6", "0 !e",
        "1 record e10", "0 wait e10",  # and ends inside it
    ]  # fmt: skip


def test_a_call_may_wait_before_a_later_launch() -> None:
    calls = [call("a"), call("b", 1, (0, 0)), call("c", 0, (1, 3))]
    assert played(calls)[4:] == [
        "1 wait e3", "1 !b", "1 record e6", "0 c[0:3]", "0 wait e6", "0 !c[3:]", "1 record e10", "0 wait e10",
    ]  # fmt: skip


def test_what_came_before_the_piece_needs_no_event() -> None:
    assert played([call("c", 0, (1, 0)), call("d")], start=2) == ["0 c d"]


def test_launches_that_are_left_out_pass_the_rule_on() -> None:
    calls = [call("a"), call("b", 1, (0, 0)), call("c", 1), call("d", 0, (1, 0)), call("e", 0, (2, 0))]
    lines = played(calls, empty="b")
    assert [line for line in lines if line[2:] == "!c"] == ["1 !c"]


def test_a_wait_for_a_later_call_is_refused() -> None:
    with pytest.raises(ArtifactError, match="call 0 of `a` waits for a later one"):
        steps_of([call("a", 0, (1, 0)), call("b", 1)])


@st.composite
def _calls(draw: st.DrawFn) -> list[Call]:
    out = []
    for i in range(draw(st.integers(1, 12))):
        targets = draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        out.append(call(f"k{i}", draw(st.integers(0, 2)), *((t, draw(st.integers(0, 2))) for t in targets)))
    return out


@given(_calls())
def test_every_launch_is_made_once_in_order_and_every_lane_joins(calls: list[Call]) -> None:
    steps: Sequence[Step] = steps_of(calls)
    made = [(part.call, part.first, part.stop) for step in steps if isinstance(step, Launches) for part in step.parts]
    for one in calls:
        cuts = [(first, stop) for owner, first, stop in made if owner == one]
        assert cuts[0][0] == 0 and cuts[-1][1] is None
        assert [stop for _, stop in cuts[:-1]] == [first for first, _ in cuts[1:]]
    for lane in {one.lane for one in calls}:
        mine = [p.call for s in steps if isinstance(s, Launches) and s.lane == lane for p in s.parts if p.first == 0]
        assert mine == [one for one in calls if one.lane == lane]
    recorded: set[str] = set()
    for step in steps:  # an event is recorded once, before anything waits for it
        if isinstance(step, Record):
            assert step.event not in recorded
            recorded.add(step.event)
        elif isinstance(step, WaitStep):
            assert step.event in recorded
    last = {step.lane: i for i, step in enumerate(steps) if isinstance(step, Launches)}
    for lane in {one.lane for one in calls} - {0}:
        assert steps.index(WaitStep(0, f"end of {lane}")) > last[lane]


class Launcher:
    """Stands for the loaded code: a launch shows its name and whether it is programmatic."""

    def get_function(self, name: str) -> Any:
        assert name == "chain"
        return lambda launches: lambda stream: launches


def _kernels(**launches: tuple[Launch, ...]) -> GpuKernels:
    out = GpuKernels.__new__(GpuKernels)
    out._kernels = {name: Kernel(name, "gpu", "op", "", "", 0.0, "", launches=made) for name, made in launches.items()}
    out._launcher = Launcher()

    def loaded(symbol: str) -> Any:
        return lambda threads, grid, cluster, pdl, kinds, values: (symbol, pdl)

    out._loaded = {("", one.symbol, 0): loaded(one.symbol) for made in launches.values() for one in made}
    return out


def _launch(symbol: str, grid: int = 1, pdl: bool = True) -> Launch:
    return Launch("", "", symbol, (), (grid, 1, 1), 32, 0, pdl=pdl)


def test_only_the_first_launch_behind_an_event_is_not_programmatic() -> None:
    kernels = _kernels(a=(_launch("a0", grid=0), _launch("a1"), _launch("a2")), b=(_launch("b0"),))
    run: Any = kernels.bind_parts([(Part(call("a"), alone=True), []), (Part(call("b")), [])])
    assert run(0) == [("a1", False), ("a2", True), ("b0", True)]
    run = kernels.bind_parts([(Part(call("a"), 0, 1, alone=True), []), (Part(call("b")), [])])
    assert run(0) == [("b0", False)]
    run = kernels.bind_parts([(Part(call("a"), 2), [])])
    assert run(0) == [("a2", True)]
    assert kernels.bind_parts([(Part(call("a"), 0, 1), [])]) is None
