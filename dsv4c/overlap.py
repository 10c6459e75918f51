"""Which calls leave lane 0: those whose absence there shortens a step by more than what waiting costs.

A small model of the machine plays a stretch of the program: each lane runs its calls in order, calls side by side slow
down where together they keep the memory or the arithmetic busier than it can be, and every wait across lanes costs. All
runs of calls up to `LONGEST` are tried in a side lane, the best is kept, and again until none gains.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from dsv4c.lanes import Settled, Task, settle

LANES = 3  # the longest antichain of a layer that pays has three: queries, compressed entries, index keys
LONGEST = 10  # calls: the prelude has eight that nothing waits for at first
BEHIND = 6  # calls played after the first that needs the run: what it delays
WAIT_S = 1.5e-6  # an edge between branches of a CUDA graph, in place of one within a stream (H200)
PDL_S = 1.0e-6  # what a launch loses that may not begin while the one before drains (H200: 8.6 and 9.6 us)
LEAST_S = 1.5e-6  # gain for which a fork is worth its risk: the model ignores caches


def assign(tasks: Sequence[Task]) -> Settled:
    """Lanes for these calls."""
    search = _Search(tasks)
    while search.round():
        pass
    return settle(tasks, search.lanes)


def duration(tasks: Sequence[Task], settled: Settled) -> float:
    """Seconds that the model gives these calls, from the first to the end of all lanes."""
    return _Machine(tasks, settled).play()


class _Search:
    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.lanes = [0] * len(tasks)
        self._needs = [frozenset[int]().union(*(part.needs for part in task.parts)) for task in tasks]
        self._narrow = _narrow(self._needs)
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}
        self._stretches: dict[tuple[int, int], int] = {}  # the same calls at two places share a number
        self._numbers: dict[tuple[Task, ...], int] = {}

    def round(self) -> bool:
        """Moves runs to side lanes, the best first; whether any was."""
        heap = [(-gain, run) for run in self._runs() if (gain := self._gain(*run)) > LEAST_S]
        heapq.heapify(heap)
        moved = False
        while heap:
            promised, run = heapq.heappop(heap)
            gain = self._gain(*run)
            if gain <= LEAST_S:
                continue
            if gain < -promised - 1e-9:
                heapq.heappush(heap, (-gain, run))
                continue
            start, stop, lane = run
            self.lanes[start:stop] = [lane] * (stop - start)
            moved = True
        return moved

    def _runs(self) -> Iterable[tuple[int, int, int]]:
        for start in range(len(self.tasks)):
            for stop in range(start + 1, min(start + LONGEST, len(self.tasks)) + 1):
                last = stop - 1
                if self.lanes[last] or not self.tasks[last].movable or self._narrow[last]:
                    break
                yield from ((start, stop, lane) for lane in range(1, LANES))

    def _gain(self, start: int, stop: int, lane: int) -> float:
        """Seconds won by moving calls [start, stop) of lane 0 to this lane."""
        if any(self.lanes[start:stop]):
            return 0.0
        low = max(self._needs[start], default=start)  # what it forks from is played too
        user = next((i for i in range(stop, len(self.tasks)) if any(start <= n < stop for n in self._needs[i])), stop)
        high = min(user + BEHIND, len(self.tasks), stop + 4 * LONGEST)
        now = self.lanes[low:high]
        if lane > 1 and lane - 1 not in now:
            return 0.0  # the lane before is as good
        then = [*now[: start - low], *[lane] * (stop - start), *now[stop - low :]]
        return self._seconds(low, high, now) - self._seconds(low, high, then)

    def _seconds(self, low: int, high: int, lanes: Sequence[int]) -> float:
        if (low, high) not in self._stretches:
            tasks = tuple(_within(task, low) for task in self.tasks[low:high])
            self._stretches[low, high] = self._numbers.setdefault(tasks, len(self._numbers))
        key = (self._stretches[low, high], tuple(lanes))
        if key not in self._known:
            tasks = tuple(_within(task, low) for task in self.tasks[low:high])
            self._known[key] = duration(tasks, settle(tasks, lanes))
        return self._known[key]


def _narrow(needs: Sequence[frozenset[int]]) -> list[bool]:
    """Calls that need all calls nearby before them, and all behind them need: nothing runs beside these."""
    above: list[int] = []
    for found in needs:
        mask = 0
        for need in found:
            mask |= above[need] | 1 << need
        above.append(mask)
    count = len(needs)
    return [
        all(above[i] >> j & 1 for j in range(max(0, i - LONGEST), i))
        and all(above[j] >> i & 1 for j in range(i + 1, min(count, i + LONGEST + 1)))
        for i in range(count)
    ]


def _within(task: Task, low: int) -> Task:
    """A call of a stretch that begins at `low`: everything before is over."""
    parts = tuple(
        type(p)(p.launch, frozenset(n - low for n in p.needs if n >= low), p.seconds, p.busy, p.pdl) for p in task.parts
    )
    return Task(parts, task.movable)


class _Machine:
    """Lanes that run parts of calls side by side and share the machine."""

    def __init__(self, tasks: Sequence[Task], settled: Settled) -> None:
        self._queues: dict[int, list[tuple[int, float, float, tuple[int, ...], bool]]] = {}
        for call, (task, lane, waits) in enumerate(zip(tasks, settled.lanes, settled.waits, strict=True)):
            queue = self._queues.setdefault(lane, [])
            for number, part in enumerate(task.parts):
                on = tuple(w.call for w in waits if w.launch == part.launch)
                seconds = part.seconds + (PDL_S if on and part.pdl else 0.0)
                share = part.busy / seconds if seconds else 0.0
                queue.append((call, seconds, share, on, number == len(task.parts) - 1))

    def play(self) -> float:
        now = 0.0
        done: dict[int, float] = {}  # call -> when it was over
        running: dict[int, tuple[float, float, int, bool]] = {}  # lane -> seconds left, share, call, its last part
        heads = dict.fromkeys(self._queues, 0)
        while running or any(heads[lane] < len(queue) for lane, queue in self._queues.items()):
            ready = []
            for lane, queue in self._queues.items():
                if lane in running or heads[lane] == len(queue):
                    continue
                call, seconds, share, on, final = queue[heads[lane]]
                if not all(need in done for need in on):
                    continue
                begin = max((done[need] + WAIT_S for need in on), default=now)
                if begin > now:
                    ready.append(begin)
                    continue
                running[lane] = (seconds, share, call, final)
                heads[lane] += 1
            rate = 1 / max(1.0, sum(share for _, share, _, _ in running.values()))
            step = min([left / rate for left, _, _, _ in running.values()] + [begin - now for begin in ready])
            now += step
            for lane, (left, share, call, final) in list(running.items()):
                left -= step * rate
                if left > 1e-12:
                    running[lane] = (left, share, call, final)
                    continue
                del running[lane]
                if final:
                    done[call] = now
        return now
