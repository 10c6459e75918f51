"""Lanes: what calls need of each other, the waits that keep it, memory that is never shared by calls side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c import artifact
from dsv4c.arena import Need, place
from dsv4c.lanes import Access, Part, Settled, Task, dependences, settle
from dsv4c.overlap import LANES, LEAST_S, assign, duration
from dsv4c.plan import LANE_TOKENS
from tests.runtime.manifests import Options, flash_manifest


def reads_writes(reads: str, writes: str = "", late: str = "", launch: int = 1) -> Access:
    """A call that reads and writes one-letter values; those in `late` are touched first by that launch."""
    roots = tuple(reads + writes)
    written = frozenset(range(len(reads), len(roots)))
    return Access(roots, written, tuple(launch if root in late else 0 for root in roots))


def test_a_reader_needs_the_writer_and_a_writer_needs_both() -> None:
    calls = [reads_writes("x", "a"), reads_writes("a", "b"), reads_writes("a", "c"), reads_writes("", "a")]
    assert [dict(d) for d in dependences(calls)] == [
        {0: frozenset()}, {0: {0}}, {0: {0}}, {0: {0, 1, 2}},
    ]  # fmt: skip


def test_what_nothing_writes_orders_nothing() -> None:
    assert (
        dependences([reads_writes("w"), reads_writes("w"), Access((None, None), frozenset(), (0, 0))])
        == [{0: frozenset()}] * 3
    )


def test_a_state_written_in_place_orders_its_users() -> None:
    write = Access(("pool", "x"), frozenset({0}), (0, 0))
    read = Access(("pool", "out"), frozenset({1}), (0, 0))
    needs = dependences([write, read, read, write, read])
    assert [set().union(*d.values()) for d in needs] == [set(), {0}, {0, 1}, {0, 1, 2}, {3, 2}]


def test_a_late_launch_needs_late() -> None:
    calls = [reads_writes("", "a"), reads_writes("", "b"), reads_writes("ab", "c", late="b", launch=3)]
    assert dependences(calls)[2] == {0: {0}, 3: {1}}


def test_waits_that_others_imply_are_left_out() -> None:
    tasks = [_task(), _task({0}), _task({0}), _task({1}), _task({0, 1, 2, 3})]
    done = settle(tasks, [0, 1, 0, 1, 0])
    assert done.waits == ((), (artifact.Wait(0),), (), (), (artifact.Wait(3),))
    assert done.before[4] == 0b1111 and done.before[3] == 0b11


def test_a_call_that_waits_late_is_not_behind_what_it_waits_for() -> None:
    late = Task((Part(0, frozenset({0})), Part(3, frozenset({1}))))
    done = settle([_task(), _task(), late, _task({2})], [0, 1, 0, 0])
    assert done.waits[2] == (artifact.Wait(1, 3),)
    assert done.before[2] == 0b1 and done.before[3] == 0b111


def _task(needs: Any = (), seconds: float = 10e-6, busy: float = 0.0, movable: bool = True) -> Task:
    return Task((Part(0, frozenset(needs), seconds, busy),), movable)


def test_two_idle_chains_run_side_by_side() -> None:
    tasks = [_task(), _task({0}), _task({1}), _task({0}), _task({3}), _task({2, 4})]
    done = assign(tasks)
    assert sorted({done.lanes[1], done.lanes[3]}) == [0, 1] and done.lanes[1] == done.lanes[2]
    assert duration(tasks, settle(tasks, [0] * 6)) - duration(tasks, done) > LEAST_S


@pytest.mark.parametrize(
    "why", [{"busy": 10e-6}, {"seconds": 2e-6}, {"movable": False}], ids=["full", "short", "kept in lane 0"]
)
def test_a_fork_that_wins_nothing_is_not_made(why: Mapping[str, Any]) -> None:
    tasks = [_task(), _task({0}, **why), _task({0}, **why), _task({1, 2})]
    assert assign(tasks).lanes == (0, 0, 0, 0)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Access], list[int]]:
    """Random calls over a few states and buffers written once, as a planner makes them, and random lanes."""
    count = draw(st.integers(1, 14))
    calls = []
    for i in range(count):
        values = [f"b{j}" for j in range(i)] + ["s0", "s1"]
        reads = draw(st.lists(st.sampled_from(values), max_size=4))
        kept = draw(st.lists(st.sampled_from(["s0", "s1"]), max_size=1))
        roots = (*reads, *kept, f"b{i}")
        written = frozenset(range(len(reads), len(roots)))
        calls.append(Access(roots, written, tuple(draw(st.sampled_from([0, 0, 1, 2])) for _ in roots)))
    return calls, draw(st.lists(st.integers(0, LANES - 1), min_size=count, max_size=count))


def _reachable(calls: Sequence[tuple[int, Sequence[artifact.Wait]]]) -> list[list[bool]]:
    """By brute force, [i][j]: all of call i is over when call j begins. Every call has 3 launches."""
    edges: dict[tuple[int, int], set[tuple[int, int]]] = {(i, k): set() for i in range(len(calls)) for k in range(3)}
    last: dict[int, int] = {}
    for i, (lane, waits) in enumerate(calls):
        for k in range(2):
            edges[i, k].add((i, k + 1))
        if lane in last:
            edges[last[lane], 2].add((i, 0))
        last[lane] = i
        for wait in waits:
            edges[wait.call, 2].add((i, wait.launch))

    def from_(node: tuple[int, int]) -> set[tuple[int, int]]:
        seen, todo = set(), [node]
        while todo:
            for other in edges[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    found = [from_((i, 2)) for i in range(len(calls))]
    return [[(j, 0) in found[i] for j in range(len(calls))] for i in range(len(calls))]


def _settled(calls: Sequence[Access], lanes: Sequence[int]) -> tuple[list[Task], Settled]:
    tasks = [Task(tuple(Part(launch, needs, 5e-6) for launch, needs in d.items())) for d in dependences(calls)]
    return tasks, settle(tasks, lanes)


@settings(max_examples=150, deadline=None)
@given(programs())
def test_waits_keep_every_dependence_and_promise_no_more(program: tuple[list[Access], list[int]]) -> None:
    calls, lanes = program
    tasks, done = _settled(calls, lanes)
    order = _reachable(list(zip(lanes, done.waits, strict=True)))
    for j, task in enumerate(tasks):
        assert [bool(done.before[j] >> i & 1) for i in range(len(calls))] == [order[i][j] for i in range(len(calls))]
        assert all(need < j for part in task.parts for need in part.needs)  # the order of the program serves one stream
        for part in task.parts:  # what a part needs is over by then: before the call, or by a wait up to this launch
            over = done.before[j]
            for wait in done.waits[j]:
                over |= (done.before[wait.call] | 1 << wait.call) if wait.launch <= part.launch else 0
            reached = {i for i in range(len(calls)) if over >> i & 1}
            reached |= {i for r in list(reached) for i in range(len(calls)) if order[i][r]}
            ends = {w.call for r in list(reached) for w in done.waits[r]}  # a call that is over waited late, too
            assert part.needs <= reached | ends | {i for e in ends for i in range(len(calls)) if order[i][e]}


@settings(max_examples=150, deadline=None)
@given(programs(), st.lists(st.integers(1, 4), min_size=14, max_size=14))
def test_memory_is_shared_only_by_what_is_ordered(program: tuple[list[Access], list[int]], sizes: list[int]) -> None:
    calls, lanes = program
    _, done = _settled(calls, lanes)
    uses = {f"b{i}": {j for j, call in enumerate(calls) if f"b{i}" in call.roots} for i in range(len(calls))}
    uses["b0"].add(len(calls))  # an output
    needs = [Need(name, sizes[i] * 256, frozenset(used)) for i, (name, used) in enumerate(uses.items())]
    offsets, top = place(needs, done.before)
    order = _reachable(list(zip(lanes, done.waits, strict=True)))
    _check_memory({n.name: (offsets[n.name], n.size, n.uses) for n in needs}, order, top)


def _check_memory(
    placed: Mapping[str, tuple[int, int, frozenset[int]]], order: Sequence[Sequence[bool]], top: int
) -> None:
    end = len(order)

    def before(ones: frozenset[int], others: frozenset[int]) -> bool:
        return all(j == end != i or (i < end and j < end and order[i][j]) for i in ones for j in others)

    spans = list(placed.values())
    for n, (low, size, uses) in enumerate(spans):
        assert low + size <= top
        for low2, size2, uses2 in spans[:n]:
            if low < low2 + size2 and low2 < low + size:
                assert before(uses, uses2) or before(uses2, uses)


def test_in_one_lane_lives_are_intervals() -> None:
    needs = [Need("a", 256, frozenset({0, 1})), Need("b", 256, frozenset({1, 2})), Need("c", 256, frozenset({2, 3}))]
    assert place(needs, [0, 1, 3, 7]) == ({"a": 0, "b": 256, "c": 0}, 512)
    assert place(needs, [0, 1, 1, 7]) == ({"a": 0, "b": 256, "c": 512}, 768)  # call 2 runs beside call 1


@pytest.fixture(scope="module")
def flash() -> artifact.Manifest:
    return flash_manifest(4, Options(max_context=8192, max_tokens=128, max_requests=96))


def test_flash_decodes_in_lanes_and_never_fills_them_with_prompts(flash: artifact.Manifest) -> None:
    for name, program in flash.programs.items():
        calls = [call for segment in program.segments for call in segment.calls]
        small = program.phase == "decode" and program.symbols["T"] <= LANE_TOKENS
        assert any(call.lane for call in calls) == small, name
        if not small:
            assert not any(call.waits for call in calls)
            continue
        scopes = {(call.scope.partition(".")[2], flash.kernels[call.kernel].op) for call in calls if call.lane}
        assert ("ffn", "swiglu_quantise") in scopes  # the shared expert, beside the routed ones
        experts = [call for call in calls if flash.kernels[call.kernel].op == "experts_fp4"]
        launches = {len(flash.kernels[call.kernel].launches) for call in experts}
        assert all(any(w.launch + 1 in launches for w in call.waits) for call in experts), name


def test_the_memory_of_flash_is_sound(flash: artifact.Manifest) -> None:
    for name in ("decode.1", "decode.16", "decode.64"):
        program = flash.programs[name]
        calls = [call for segment in program.segments for call in segment.calls]
        settled = _clocks(calls)
        of = {b.name: b.of or b.name for b in program.buffers}
        uses: dict[str, set[int]] = {}
        for i, call in enumerate(calls):
            for arg in call.args:
                if arg in of:
                    uses.setdefault(of[str(arg)], set()).add(i)
        for value in program.outputs.values():
            uses[of[value]].add(len(calls))
        sizes = {"float32": 4, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "float8_e4m3fn": 1}
        placed = {}
        for b in program.buffers:
            if b.of is None:
                count = 1
                for size in b.shape:
                    count *= program.symbols[size] if isinstance(size, str) else size
                width = sizes.get(b.dtype, 1)
                placed[b.name] = (b.offset or 0, count * width, frozenset(uses[b.name]))
        _check_memory(placed, settled, program.arena_bytes)


def _clocks(calls: Sequence[artifact.Call]) -> list[list[bool]]:
    """[i][j]: all of call i is over when call j begins, from lanes and waits alone."""
    begun: list[set[int]] = []
    over: list[set[int]] = []
    last: dict[int, int] = {}
    for i, call in enumerate(calls):
        start = set(over[last[call.lane]]) if call.lane in last else set()
        for wait in call.waits:
            assert wait.call < i and calls[wait.call].lane != call.lane
            if wait.launch == 0:
                start |= over[wait.call]
        begun.append(start)
        over.append(start.union({i}, *(over[wait.call] for wait in call.waits)))
        last[call.lane] = i
    return [[i in begun[j] for j in range(len(calls))] for i in range(len(calls))]


def test_lanes_and_waits_survive_the_manifest(flash: artifact.Manifest) -> None:
    again = artifact.manifest_from_json(artifact.manifest_to_json(flash))
    assert again.programs == dataclasses.replace(flash).programs
