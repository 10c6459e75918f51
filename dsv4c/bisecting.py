"""From an observed difference to the first pass, op and schedule that cause it, in O(log n) runs.

    bisect_lineage(lineage, runs)        against the plain model: which pass breaks what it claims
    bisect_pair(one, other)              two artifacts: behind which pass, or in which kernel, they part

Stages are halved by how much of the observed difference they show. A pass that is to blame for most of it and keeps its
tolerance is set aside, and the search goes on before and behind it: log n runs more for each.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor

from dsv4c.aligned import Digests, FirstDifference
from dsv4c.artifact import Manifest
from dsv4c.compiled import Called, Compiled
from dsv4c.lineage import Lineage, Staged
from dsv4c.numerics import Check, Runs, broken, compare, first_op, on_equal_inputs

Watch = Callable[[str], object]
Kind = Literal["nothing", "model", "pass", "schedule"]


@dataclass(frozen=True)
class Bisection:
    """What causes an observed difference.

    `subject` is what was compared, `observed` how far apart it is at the end. `kind` says what `cause` names: a pass, a
    schedule, the captured model itself, or nothing that is to blame; `said` is how. `op` is the first call that gives
    other numbers, `schedule` the one that computes it in the artifact. `kept`: passes that differ as they may. `runs`:
    of whole programs.
    """

    subject: str
    observed: Check
    runs: int
    kind: Kind = "nothing"
    cause: str = ""
    said: str = ""
    op: str | None = None
    schedule: str | None = None
    kept: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is to blame."""
        return self.kind == "nothing"

    def to_json(self) -> str:
        """As JSON, for tools. Infinite errors are `Infinity`, as Python writes them."""
        return json.dumps(asdict(self), indent=1) + "\n"


def distance(found: Check) -> float:
    """How far apart: the largest of all results' errors; above zero wherever a bit differs."""
    if found.equal:
        return 0.0
    return math.inf if found.missing else max(found.max_rel, sys.float_info.min)


def halved(low: int, high: int, shows: Callable[[int], bool]) -> int:
    """The first index in (low, high] that shows it, if all behind the first do; `high` is known to."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class _Found:
    stage: int
    said: str
    op: str | None


class _Search:
    """Stages that changed something, numbered from 1; 0 is the plain model. Each runs once at most for its results."""

    def __init__(self, lineage: Lineage, runs: Runs, fake_quant: bool, watch: Watch) -> None:
        self.stages = [stage for stage in lineage if stage.changed]
        self.runs, self.watch = runs, watch
        self.fake_quant = fake_quant
        self.kept: list[str] = []
        self._results: dict[int, dict[str, Tensor]] = {}

    def stage(self, index: int) -> Staged:
        return self.stages[index - 1]

    def results(self, index: int) -> dict[str, Tensor]:
        if index not in self._results:
            self.watch(self.stage(index).name if index else "plain model")
            layout = self.stages[0].program.layout
            plain = index == 0
            found = (
                self.runs.plain(layout, fake_quant=self.fake_quant)
                if plain
                else self.runs.results(self.stage(index).program)
            )
            self._results[index] = found
        return self._results[index]

    def check(self, index: int, base: int) -> Check:
        return compare(self.results(index), self.results(base))

    def first_broken(self, low: int, high: int) -> _Found | None:
        """The first of the stages in (low, high] found to break its claim."""
        if low >= high:
            return None
        observed = distance(self.check(high, low))
        if not observed:
            return None
        most = halved(low, high, lambda i: distance(self.check(i, low)) >= observed / 2)
        earlier = self.first_broken(low, most - 1)
        if earlier is not None:
            return earlier
        found = self._blame(most)
        if found is None:
            self.kept.append(self.stage(most).name)
            found = self.first_broken(most, high)
        return found

    def _blame(self, index: int) -> _Found | None:
        """What this stage breaks, if anything. Two runs if a bit differs."""
        stage, found = self.stage(index), self.check(index, index - 1)
        if stage.record is None:
            return _Found(index, f"is not the plain model: {found}", None)
        before = self.stage(index - 1).program
        if stage.exact:
            op = None if found.equal else first_op(before, stage.program, self.runs)
        else:
            found = on_equal_inputs(found, before, stage.program, self.runs, stage.record.tolerance)
            op = found.first_op or found.worst_op
        wrong = broken(stage.record, found)
        return None if wrong is None else _Found(index, wrong, op)


def bisect_lineage(
    lineage: Lineage,
    runs: Runs,
    *,
    compiled: Compiled | None = None,
    fake_quant: bool = False,
    subject: str = "",
    watch: Watch | None = None,
) -> Bisection:
    """The first pass of `lineage` that breaks its claim against the plain model, and its first op; or a schedule.

    `runs`: of programs on the inputs to be used. `fake_quant`: the plain model that was captured quantises as in
    training. Only if every pass keeps its claim are the kernels of `compiled` run: one run beside their references
    tells all. `subject` is how the result calls what was compared; `watch` is told what begins. Raises ConfigError
    where the inputs do not fit the kernels.
    """
    tell = watch or (lambda name: None)
    before = runs.count
    search = _Search(lineage, runs, fake_quant, tell)
    last = len(search.stages)
    observed = search.check(last, 0)
    found = search.first_broken(0, last)
    kept = tuple(search.kept)
    if found is not None:
        name = search.stage(found.stage).name
        kind: Kind = "model" if found.stage == 1 else "pass"
        schedule = _schedule_of(compiled.manifest, found.op) if compiled is not None else None
        return Bisection(subject, observed, runs.count - before, kind, name, found.said, found.op, schedule, kept)
    if compiled is None:
        return Bisection(subject, observed, runs.count - before, kept=kept)
    tell("compiled program")
    results, shadow = compiled.results(runs.inputs)
    plain = search.results(0)
    observed = compare(results, {name: plain[name] for name in results if name in plain})
    count = runs.count - before + 1
    if not shadow.differences:
        return Bisection(subject, observed, count, kept=kept)
    first = shadow.differences[0]
    op = f"`dsv4.{first.op}` in `{first.scope}`"
    return Bisection(subject, observed, count, "schedule", first.schedule, str(first), op, first.schedule, kept)


def _schedule_of(manifest: Manifest, op: str | None) -> str | None:
    """The schedule of the first call in the same scope that computes this op."""
    for program in manifest.programs.values():
        for call in (c for segment in program.segments for c in segment.calls):
            kernel = manifest.kernels[call.kernel]
            if op is not None and op.startswith(f"`dsv4.{kernel.op}` in `{call.scope}`"):
                return kernel.schedule
    return None


@dataclass(frozen=True)
class Side:
    """One of two programs: its `name`, its `lineage` of stages, its `runs` (on the same token ids as the other's), and
    its kernels, `compiled`, if they can run here."""

    name: str
    lineage: Lineage
    runs: Runs
    compiled: Compiled | None = None


class _Pair:
    """Stages that two lineages have in common, by name; the last is the end of both."""

    def __init__(self, one: Side, other: Side, watch: Watch) -> None:
        self.one, self.other, self.watch = one, other, watch
        names, others = ([stage.name for stage in side.lineage] for side in (one, other))
        blocks = difflib.SequenceMatcher(None, names, others, autojunk=False).get_matching_blocks()
        self.common = [(b.a + i, b.b + i) for b in blocks for i in range(b.size)]
        ends = len(names) - 1, len(others) - 1
        if self.common[-1] != ends:
            self.common.append(ends)
        self._checks: dict[int, Check] = {}
        self._results: dict[tuple[int, int], dict[str, Tensor]] = {}

    def check(self, index: int) -> Check:
        if index not in self._checks:
            a, b = (self._of(side, i) for side, i in enumerate(self.common[index]))
            self._checks[index] = compare(b, a)
        return self._checks[index]

    def _of(self, side: int, index: int) -> dict[str, Tensor]:
        it = (self.one, self.other)[side]
        while not it.lineage[index].changed:
            index -= 1
        if (side, index) not in self._results:
            self.watch(f"{it.lineage[index].name} of {it.name}")
            self._results[side, index] = it.runs.results(it.lineage[index].program)
        return self._results[side, index]

    def between(self, index: int) -> str:
        """The passes that changed something since the common stage before this one: first those that only one has."""
        (a0, b0), (a1, b1) = self.common[index - 1], self.common[index]
        ours = [s.name for s in self.one.lineage[a0 + 1 : a1 + 1] if s.changed]
        theirs = [s.name for s in self.other.lineage[b0 + 1 : b1 + 1] if s.changed]
        apart = [f"{n} (only in {self.one.name})" for n in ours if n not in theirs]
        apart += [f"{n} (only in {self.other.name})" for n in theirs if n not in ours]
        return ", ".join([*apart, *(n for n in theirs if n in ours)])

    def op(self, index: int) -> str | None:
        """The first call of the other's stage that gives what this one's has nowhere. Two runs."""
        a, b = self.common[index]
        digests = Digests()
        self.one.runs.results(self.one.lineage[a].program, digests.watch)
        first = FirstDifference(digests)
        self.other.runs.results(self.other.lineage[b].program, first.watch)
        return first.op()


def bisect_pair(one: Side, other: Side, *, watch: Watch | None = None) -> Bisection:
    """The first pass behind which `one` and `other`, two programs of one model, part, and its first op; or a schedule.

    The observed difference is that of their last stages; where these agree bit for bit, that of their kernels. `watch`
    is told what begins. Raises ConfigError where the inputs do not fit the kernels.
    """
    pair = _Pair(one, other, watch or (lambda name: None))
    counts = one.runs.count, other.runs.count

    def runs() -> int:
        return one.runs.count - counts[0] + other.runs.count - counts[1]

    subject = f"{one.name} and {other.name}"
    last = len(pair.common) - 1
    observed = pair.check(last)
    if far := distance(observed):
        first = halved(-1, last, lambda i: distance(pair.check(i)) >= far / 2)
        op = pair.op(first)
        if first == 0:
            return Bisection(subject, observed, runs(), "model", "capture", "the captured models or weights differ", op)
        schedule = _schedule_of(other.compiled.manifest, op) if other.compiled is not None else None
        said = f"{pair.check(first)}"
        return Bisection(subject, observed, runs(), "pass", pair.between(first), said, op, schedule)
    if one.compiled is None or other.compiled is None:
        return Bisection(subject, observed, runs())
    return _kernels(subject, one.compiled, other.compiled, one.runs, other.runs, runs() + 2)


def _kernels(subject: str, one: Compiled, other: Compiled, runs: Runs, others: Runs, count: int) -> Bisection:
    """The first call whose kernel gives other bits: until then both read the same. A run of each."""
    a, seen_a = one.results(runs.inputs)
    b, seen_b = other.results(others.inputs)
    observed = compare(b, a)
    if observed.equal:
        return Bisection(subject, observed, count)
    call, said = _first_apart(seen_a.called, seen_b.called)
    op = None if call is None else f"`dsv4.{call.op}` in `{call.scope}`"
    schedule = None if call is None else call.schedule
    return Bisection(subject, observed, count, "schedule", schedule or "", said, op, schedule)


def _first_apart(one: Sequence[Called], other: Sequence[Called]) -> tuple[Called | None, str]:
    """Calls are matched in order."""
    for a, b in zip(one, other, strict=False):
        if (a.op, a.scope) != (b.op, b.scope):
            return b, f"`{b.op}` in `{b.scope}` where the other has `{a.op}` in `{a.scope}`"
        if a.digests != b.digests:
            other_way = "" if a.schedule == b.schedule else f", there computed by `{a.schedule}`"
            return b, f"`{b.op}` in `{b.scope}` gives other bits on the same inputs{other_way}"
    return None, "all calls that both make give the same bits"
