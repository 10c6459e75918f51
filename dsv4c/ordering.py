"""In which order passes run: every need holds, and every permutation of a pipeline gives the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from dsv4c.errors import PassError


class Contract(Protocol):
    """What order depends on: a pass without its rewrite."""

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def gives(self) -> frozenset[str]: ...
    @property
    def breaks(self) -> frozenset[str]: ...


P = TypeVar("P", bound=Contract)


def order(
    passes: Iterable[P],
    facts: Iterable[str] = (),
    *,
    after: Mapping[str, str] | None = None,
    waived: Mapping[str, frozenset[str]] | None = None,
) -> tuple[P, ...]:
    """The passes in an order in which every need holds; the same for every permutation of the input.

    Among passes that could run, one that breaks a fact another waiting pass needs comes later; then by name. `after`
    says which pass follows directly behind which. A `waived` fact, which no pass gives any more, stands for those that
    it maps to: what its giver needed.
    Raises PassError that names what is missing or the cycle, and what ran before.
    """
    all_passes = sorted(passes, key=lambda p: p.name)
    _no_doubles(all_passes)
    after = after or {}
    behind = {place: [p for p in all_passes if after.get(p.name) == place] for place in after.values()}
    left = [p for p in all_passes if p.name not in after]
    known, out = {*facts}, list[P]()

    def missing(one: Contract) -> frozenset[str]:
        return _unmet(one.needs, known, waived or {})

    def run(one: P) -> None:
        if missing(one):
            raise PassError(
                f"pass `{one.name}` is to run directly after `{after[one.name]}` but needs {_names(missing(one))}, "
                "which does not hold there",
                hint=_before(out),
            )
        known.difference_update(one.breaks)
        known.update(one.gives)
        out.append(one)
        for follower in behind.get(one.name, ()):
            run(follower)

    while left:
        ready = [p for p in left if not missing(p)]
        if not ready:
            waiting = [p for p in all_passes if all(p is not q for q in out)]
            raise _stuck(left, waiting, missing, out)
        calm = [p for p in ready if not any(p.breaks & q.needs for q in left if q is not p)] or ready
        left = [p for p in left if p is not calm[0]]
        run(calm[0])
    return tuple(out)


def _unmet(needs: Iterable[str], known: set[str], waived: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """The needs that do not hold, with what waived facts stand for in their place."""
    out, todo, seen = set[str](), [*needs], set[str]()
    while todo:
        fact = todo.pop()
        if fact in known or fact in seen:
            continue
        seen.add(fact)
        if fact in waived:
            todo += waived[fact]
        else:
            out.add(fact)
    return frozenset(out)


def _no_doubles(passes: Sequence[Contract]) -> None:
    names = [p.name for p in passes]
    double = next((n for n in names if names.count(n) > 1), None)
    if double is not None:
        raise PassError(f"pass `{double}` is listed twice")


def _stuck(
    left: Sequence[Contract],
    waiting: Sequence[Contract],
    unmet: Callable[[Contract], frozenset[str]],
    ran: Sequence[Contract],
) -> PassError:
    """Why none of these can run: a need that nothing gives, or a cycle of needs."""

    def givers(one: Contract) -> list[tuple[str, Contract]]:
        return [(fact, p) for fact in sorted(unmet(one)) for p in waiting if fact in p.gives]

    for one in left:
        missing = [fact for fact in sorted(unmet(one)) if not any(fact in p.gives for p in waiting)]
        if missing:
            message = f"pass `{one.name}` needs {_names(missing)}, which nothing before it gives"
            return PassError(message, hint=f"add the pass that gives it; {_before(ran)}")
    one, names, links = left[0], list[str](), list[str]()
    while one.name not in names:
        names.append(one.name)
        fact, giver = givers(one)[0]
        links.append(f"`{one.name}` needs `{fact}` of `{giver.name}`")
        one = giver
    cycle = ", ".join(links[names.index(one.name) :])
    return PassError(f"passes need each other in a cycle: {cycle}", hint=_before(ran))


def _names(facts: Iterable[str]) -> str:
    return "`" + "`, `".join(sorted(facts)) + "`"


def _before(ran: Sequence[Contract]) -> str:
    return f"ran before: {', '.join(p.name for p in ran) or 'nothing'}"
