"""Which calls of a program may run at the same time: dependences, lanes, and the order that lanes and waits promise.

    calls --dependences--> tasks --dsv4c/overlap.py--> lane of every call --settle--> waits, and what comes before what

A lane is a stream of its own: its calls run in the order of the program, and where a call needs one of another lane,
it waits for the whole of that call. One call may be several launches, and then waits only before the launch that first
touches what it waits for: the shared expert runs beside the routed ones, whose last launch adds it. The order of the
program is valid for one stream too. What is read and written comes from the ops: a value, a buffer (views count as the
buffer) or a state tensor. Weights are never written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dsv4c import artifact
from dsv4c.schedules._launch import Desc, Ptr, TritonLaunch
from dsv4c.schedules._schedule import Choice


@dataclass(frozen=True)
class Access:
    """One call as dependences see it: the value behind each argument (None: nothing that is ever written)."""

    roots: tuple[str | None, ...]
    written: frozenset[int]
    """Arguments that it writes: outputs, workspace, and what it updates in place."""
    first_launch: tuple[int, ...]
    """The first launch that touches each argument."""


@dataclass(frozen=True)
class Part:
    """Launches of a call from `launch` on, up to the next part: they need these earlier calls besides the last part's.

    They take `seconds`, and keep the whole machine busy for `busy` of them. `pdl`: they begin while the launch before
    drains.
    """

    launch: int
    needs: frozenset[int]
    seconds: float = 0.0
    busy: float = 0.0
    pdl: bool = False


@dataclass(frozen=True)
class Task:
    """One call, as parts. `movable`: it may leave lane 0; vendor calls may not, their libraries keep scratch."""

    parts: tuple[Part, ...]
    movable: bool = True


@dataclass(frozen=True)
class Settled:
    """Calls on lanes. `before[i]`: bit j says that all of call j comes before anything of call i."""

    lanes: tuple[int, ...]
    waits: tuple[tuple[artifact.Wait, ...], ...]
    before: tuple[int, ...]


class _Buffer(Protocol):
    """A planned tensor, of the plan or of the manifest."""

    @property
    def name(self) -> str: ...

    @property
    def of(self) -> str | None: ...


def tasks_of(
    calls: Sequence[artifact.Call], choices: Sequence[Choice], buffers: Iterable[_Buffer], kept: Iterable[str]
) -> list[Task]:
    """Planned calls with the choice of each, as dependences and costs see them. `kept`: states and inputs."""
    roots = {b.name: b.of or b.name for b in buffers} | {name: name for name in kept}
    pairs = list(zip(calls, choices, strict=True))
    needs = dependences([access(call.args, choice, call.outputs, roots) for call, choice in pairs])
    return [task(choice, found) for (_, choice), found in zip(pairs, needs, strict=True)]


def access(args: Sequence[object], choice: Choice, outputs: int, roots: Mapping[str, str]) -> Access:
    """What a planned call touches. `roots`: value -> the buffer, state or input behind it, not for weights."""
    count = len(args)
    workspace = range(count - outputs - len(choice.workspace), count)
    first = [0] * count
    if choice.build.launches:
        touched = [_touched(launch) for launch in choice.build.launches]
        first = [next((i for i, found in enumerate(touched) if arg in found), 0) for arg in range(count)]
    names = tuple(roots.get(arg) if isinstance(arg, str) else None for arg in args)
    return Access(names, frozenset({*choice.node.mutates, *workspace}), tuple(first))


def task(choice: Choice, needs: Mapping[int, frozenset[int]]) -> Task:
    """A call by its choice, cut where a launch needs calls that no launch before it did. Launches cost alike."""
    launches, total = choice.build.launches, choice.seconds if choice.measured is None else choice.measured
    busy = min(choice.busy, total)
    if not launches:
        return Task((Part(0, needs[0], total, busy),), movable=False)
    starts = sorted(needs)
    parts = []
    for start, stop in zip(starts, [*starts[1:], len(launches)], strict=True):
        share = (stop - start) / len(launches)
        parts.append(Part(start, needs[start], total * share, busy * share, launches[start].pdl))
    return Task(tuple(parts), choice.capturable)


def _touched(launch: object) -> set[int]:
    if isinstance(launch, TritonLaunch):
        return {arg.arg for arg in launch.args.values() if isinstance(arg, Ptr | Desc)}
    return set(launch.tensors)  # type: ignore[attr-defined]


def dependences(calls: Sequence[Access]) -> list[dict[int, frozenset[int]]]:
    """For each call: launch -> the earlier calls that it needs and no launch before it does.

    A reader needs the last writer, a writer the last writer and every reader since.
    """
    writer: dict[str, int] = {}
    readers: dict[str, set[int]] = {}
    out = []
    for place, call in enumerate(calls):
        first: dict[int, int] = {}  # earlier call -> launch
        for arg, root in enumerate(call.roots):
            if root is None:
                continue
            needs = {writer[root]} if root in writer else set()
            if arg in call.written:
                needs |= readers.get(root, set())
            for need in needs:
                first[need] = min(first.get(need, call.first_launch[arg]), call.first_launch[arg])
        for arg, root in enumerate(call.roots):
            if root is not None and arg in call.written:
                writer[root] = place
                readers[root] = set()
        for root in call.roots:
            if root is not None and writer.get(root) != place:
                readers.setdefault(root, set()).add(place)
        launches = {0, *first.values()}
        out.append({launch: frozenset(n for n, at in first.items() if at == launch) for launch in sorted(launches)})
    return out


def settle(tasks: Sequence[Task], lanes: Sequence[int]) -> Settled:
    """Waits that keep every dependence, none for what others imply, and the order that follows. `tasks`: in order."""
    last: dict[int, int] = {}  # lane -> its last call so far
    after: list[int] = []  # what is over when call i is, itself included
    before, waits = [], []
    for place, (task, lane) in enumerate(zip(tasks, lanes, strict=True)):
        over = after[last[lane]] if lane in last else 0
        start, found = over, []
        for number, part in enumerate(task.parts):
            for need in sorted(part.needs, reverse=True):  # the latest implies what its lane did before
                if not over >> need & 1:
                    found.append(artifact.Wait(need, part.launch))
                    over |= after[need]
            if number == 0:
                start = over
        before.append(start)
        waits.append(tuple(found))
        after.append(over | 1 << place)
        last[lane] = place
    return Settled(tuple(lanes), tuple(waits), tuple(before))
