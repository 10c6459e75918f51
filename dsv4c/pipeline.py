"""Pass, its record, and the pipeline: order is solved from facts, and every claim is checked after every pass.

pipeline = Pipeline.default("cpu").without("fuse-hc-norm").with_(MyPass(), after="stitch")
for step in pipeline.steps(program):
    print(step.name, step.changed, sorted(step.facts)); print(step.diff())
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from dsv4c.artifact import PassRecord
from dsv4c.checked import run_checked
from dsv4c.config import Target
from dsv4c.errors import ConfigError
from dsv4c.facts import Checker
from dsv4c.ordering import order
from dsv4c.program import Program
from dsv4c.work import Sizes, Work, work_of

__all__ = ["Change", "Pass", "Pipeline", "Step", "order"]

if TYPE_CHECKING:
    from dsv4c.inputs import Inputs
    from dsv4c.numerics import Check


@dataclass(frozen=True)
class Pass:
    """A rewrite of graphs. Fields are its options; class variables its contract.

    `needs` must hold before, `gives` holds after, `breaks` may no longer hold. An `exact` pass changes no bit of any
    result. Another one says `why`, and its `tolerance`: the largest error of a row of what any call gives, relative to
    the row's size, where every call reads what it read without the pass (`dsv4c verify` measures it). A fact of its own
    comes with its checker: `checkers`, by name, a function from the program to the nodes where it does not hold.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 0.0
    why: ClassVar[str] = ""
    checkers: ClassVar[Mapping[str, Checker]] = {}

    def run(self, graph: fx.Graph) -> int:
        """Rewrites one graph in place; the number of rewrites."""
        raise NotImplementedError

    def tolerance_in(self, program: Program) -> float:
        """The tolerance of what the pass has made of this program; overridden where that is less than `tolerance`."""
        return self.tolerance

    def apply(self, program: Program) -> int:
        """Rewrites the program in place; the number of rewrites. Overridden by passes that need all of it."""
        return sum(self.run(graph) for graph in program.graphs.values())


@dataclass(frozen=True)
class Change:
    """The work of a program `before` and `after` a pass."""

    before: Work
    after: Work


@dataclass(frozen=True)
class Step:
    """One pass as it ran, by `name`: its `record`, and the programs `before` and `after` it."""

    name: str
    record: PassRecord
    before: Program
    after: Program
    machine: str = "cpu"
    """Whose roofline `work` predicts by, if it is not asked for another."""

    @property
    def changed(self) -> bool:
        """Whether the pass rewrote anything."""
        return self.record.rewrites > 0

    @property
    def facts(self) -> frozenset[str]:
        """The facts that hold after the pass, each checked."""
        return self.after.facts

    @property
    def work(self) -> Change:
        """Kernels, bytes, operations and predicted microseconds before and after, at the usual sizes: `Sizes.usual`."""
        return self.work_at()

    def work_at(self, sizes: Sizes | None = None, machine: str | None = None, entry: str = "step") -> Change:
        """The same for a step of these sizes on this machine (`cpu`, `sm_90a`). Raises ConfigError as `work_of`."""
        on = machine or self.machine
        return Change(work_of(self.before, sizes, on, entry), work_of(self.after, sizes, on, entry))

    def diff(self) -> str:
        """Unified diff of the program's text; a value's new number is no change."""
        return self.before.diff(self.after)

    def check(self, inputs: Inputs | None = None, seed: int = 0) -> Check:
        """The program before and after on the references of their ops: bit-equal, or how far apart and from where on.

        `inputs`: token ids and weights; by default seeded random ones. Costs two to six runs of the whole program.
        """
        from dsv4c.numerics import check_step  # it runs programs, which needs the passes

        return check_step(self, inputs, seed)


@dataclass(frozen=True)
class Pipeline:
    """`passes` in no order: it is solved from the facts that they need and give when they run."""

    passes: tuple[Pass, ...]
    after: tuple[tuple[str, str], ...] = ()
    """(pass, the pass that it runs directly after)."""
    waived: tuple[tuple[str, frozenset[str]], ...] = ()
    """(fact that only a removed pass gave, what that pass needed): who needs the one now needs the others."""
    machine: str = "cpu"
    """Whose roofline `Step.work` predicts by: `cpu` (one core), `sm_90a` (one H200) or another target."""

    @classmethod
    def default(cls, target: str | Target) -> Pipeline:
        """The passes that make a captured program of any model ready for `target` (`cpu`, `sm_90a`).

        Raises ConfigError with the nearest name for an unknown target.
        """
        from dsv4c.passes import default_pipeline  # every pass imports this file

        return default_pipeline(arch=(target if isinstance(target, Target) else Target(target)).arch)

    def run(self, program: Program, progress: Callable[[str], object] | None = None) -> Program:
        """The program after every pass; the argument is not changed. Raises as `steps` does."""
        for step in self.steps(program, progress):
            program = step.after
        return program

    def steps(self, program: Program, progress: Callable[[str], object] | None = None) -> Iterator[Step]:
        """Runs pass after pass, checking each one's contract; `progress` is told the name of the one that begins.

        Raises PassError for an order that cannot be solved and for a broken contract: it names the pass, the fact,
        the nodes and what ran before. A Dsv4cError of a pass keeps its class.
        """
        checkers = {fact: check for one in self.passes for fact, check in one.checkers.items()}
        for one in self.ordered(program.facts):
            if progress:
                progress(one.name)
            before, program = program, program.clone()
            yield Step(one.name, run_checked(one, before, program, checkers), before, program, self.machine)

    def ordered(self, facts: Iterable[str] = ()) -> tuple[Pass, ...]:
        """The passes in the order in which they run on a program of these facts. Raises PassError if there is none."""
        return order(self.passes, facts, after=dict(self.after), waived=dict(self.waived))

    def named(self, name: str) -> Pass:
        """The pass of this name; raises ConfigError with the nearest name if there is none."""
        names = [p.name for p in self.passes]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"unknown pass `{name}`", hint=f"did you mean `{near[0]}`?" if near else f"passes: {', '.join(names)}"
            )
        return self.passes[names.index(name)]

    def without(self, name: str) -> Pipeline:
        """The pipeline without one pass. Those that needed a fact which only it gave run all the same, behind
        what it needed.

        Raises ConfigError with the nearest name if there is no such pass, or if another is to run directly after it.
        """
        gone = self.named(name)
        behind = [one for one, place in self.after if place == name]
        if behind:
            raise ConfigError(
                f"pass `{behind[0]}` is to run directly after `{name}`", hint=f"remove `{behind[0]}` first"
            )
        left = tuple(p for p in self.passes if p is not gone)
        orphans = gone.gives.difference(*(p.gives for p in left))
        places = tuple(pair for pair in self.after if pair[0] != name)
        return replace(
            self, passes=left, after=places, waived=self.waived + tuple((fact, gone.needs) for fact in sorted(orphans))
        )

    def with_(self, one: Pass, *, after: str | None = None) -> Pipeline:
        """The pipeline with one pass more: directly after another, or where its needs put it.

        Raises ConfigError for a name that is taken, and with the nearest name if there is no pass `after`.
        """
        if any(p.name == one.name for p in self.passes):
            raise ConfigError(
                f"the pipeline has a pass `{one.name}` already", hint=f"use `.without({one.name!r})` first"
            )
        if after is not None:
            self.named(after)
        places = self.after if after is None else (*self.after, (one.name, after))
        return replace(
            self,
            passes=(*self.passes, one),
            after=places,
            waived=tuple(pair for pair in self.waived if pair[0] not in one.gives),
        )
