"""Pass, its record, and the pipeline: order is solved from facts, and every claim is checked after every pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsv4c.artifact import PassRecord
from dsv4c.errors import ConfigError, PassError
from dsv4c.facts import CHECKERS
from dsv4c.program import Program


@dataclass(frozen=True)
class Pass:
    """A rewrite of graphs. Fields are its options; class variables its contract.

    `needs` must hold before, `gives` holds after, `breaks` may no longer hold. An `exact` pass changes no bit of any
    result; another one says `why` and by how much.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = True
    why: ClassVar[str] = ""

    def run(self, graph: fx.Graph) -> int:
        """Rewrites one graph in place; the number of rewrites."""
        raise NotImplementedError

    def apply(self, program: Program) -> int:
        """Rewrites the program in place; the number of rewrites. Overridden by passes that need all of it."""
        return sum(self.run(graph) for graph in program.graphs.values())


def order(passes: Iterable[Pass], facts: Iterable[str] = ()) -> tuple[Pass, ...]:
    """The passes in an order in which every need holds; the same for every permutation of the input.

    Among passes that could run, one that breaks a fact another waiting pass needs comes later; then by name.
    Raises PassError that names what is missing or the cycle.
    """
    left = sorted(passes, key=lambda p: p.name)
    names = [p.name for p in left]
    if len(set(names)) != len(names):
        raise PassError(f"pass `{next(n for n in names if names.count(n) > 1)}` is listed twice")
    known, out = set(facts), []
    while left:
        ready = [p for p in left if p.needs <= known]
        if not ready:
            stuck = left[0]
            missing = sorted(stuck.needs - known)
            givers = [p.name for p in left if p.gives & set(missing)]
            raise PassError(
                f"pass `{stuck.name}` needs `{'`, `'.join(missing)}`, which nothing before it gives",
                hint=f"cycle through {', '.join(givers)}" if givers else "add the pass that gives it",
            )
        waiting = set().union(*(p.needs for p in left))
        calm = [p for p in ready if not any(p.breaks & q.needs for q in left if q is not p)] or ready
        chosen = calm[0]
        assert waiting >= set()
        left.remove(chosen)
        known = (known - chosen.breaks) | chosen.gives
        out.append(chosen)
    return tuple(out)


@dataclass(frozen=True)
class Step:
    """One pass as it ran: the program before and after."""

    name: str
    record: PassRecord
    before: Program
    after: Program

    @property
    def changed(self) -> bool:
        return self.record.rewrites > 0

    def diff(self) -> str:
        """Unified diff of the program's text."""
        return self.before.diff(self.after)


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes."""

    passes: tuple[Pass, ...]

    def run(self, program: Program, progress: Callable[[str], None] | None = None) -> Program:
        """The program after every pass; the argument is not changed."""
        for step in self.steps(program, progress):
            program = step.after
        return program

    def steps(self, program: Program, progress: Callable[[str], None] | None = None) -> Iterator[Step]:
        """Runs pass after pass, checking each one's contract."""
        ran: list[str] = []
        for one in order(self.passes, program.facts):
            if progress:
                progress(one.name)
            before, program = program, program.clone()
            record = _run_checked(one, before, program, ran)
            ran.append(one.name)
            yield Step(one.name, record, before, program)

    def without(self, name: str) -> Pipeline:
        """The pipeline without one pass; raises ConfigError with the nearest name if there is none."""
        names = [p.name for p in self.passes]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"unknown pass `{name}`", hint=f"did you mean `{near[0]}`?" if near else f"passes: {', '.join(names)}"
            )
        return Pipeline(tuple(p for p in self.passes if p.name != name))


def _run_checked(one: Pass, before: Program, program: Program, ran: list[str]) -> PassRecord:
    after_names = f"ran before: {', '.join(ran) or 'nothing'}"
    rewrites = one.apply(program)
    for graph in program.graphs.values():
        graph.eliminate_dead_code()
        graph.lint()
    changed = before.dump() != program.dump()
    if changed != (rewrites > 0):
        said = f"{rewrites} rewrites but the program's text is {'changed' if changed else 'the same'}"
        raise PassError(f"pass `{one.name}` reports {said}", hint=after_names)
    program.facts = (program.facts - one.breaks) | one.gives
    for fact in sorted(program.facts):
        offending = CHECKERS[fact](program)
        if offending:
            raise PassError(
                f"after pass `{one.name}` the fact `{fact}` does not hold at `{offending[0].format_node()}`"
                + (f" and {len(offending) - 1} more" if len(offending) > 1 else ""),
                hint=after_names,
            )
    record = PassRecord(one.name, rewrites, before.num_nodes(), program.num_nodes(), one.exact, one.why)
    program.history = (*program.history, record)
    return record
