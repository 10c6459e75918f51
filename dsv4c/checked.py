"""Running one pass and holding it to its contract: its rewrites, its facts, the graphs it leaves.

Whatever it breaks is a PassError that names the pass, the fact or graph, the nodes, and what ran before.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Mapping
from typing import Protocol

from torch import fx

from dsv4c.artifact import PassRecord
from dsv4c.errors import Dsv4cError, PassError
from dsv4c.facts import CHECKERS, Checker
from dsv4c.ops import Op
from dsv4c.ordering import Contract
from dsv4c.program import Program, target_name
from dsv4c.provenance import Watch

SHOWN = 3  # offending nodes that an error names


class Runnable(Contract, Protocol):
    """A pass as this file sees it."""

    @property
    def exact(self) -> bool: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def why(self) -> str: ...
    def tolerance_in(self, program: Program) -> float: ...
    def apply(self, program: Program) -> int: ...


def run_checked(one: Runnable, before: Program, program: Program, checkers: Mapping[str, Checker]) -> PassRecord:
    """Runs a pass on `program`, a clone of `before`; its record, which joins the program's history.

    `checkers`: of facts that are no facts of dsv4c's own. Raises PassError, or the pass's own Dsv4cError.
    """
    ran = tuple(record.name for record in before.history)
    hint = f"ran before: {', '.join(ran) or 'nothing'}"
    if not one.exact and not one.tolerance > 0:
        raise PassError(f"pass `{one.name}` is not exact and states no `tolerance`", hint="see `dsv4c.pipeline.Pass`")
    watch = Watch(program)
    try:
        rewrites = _apply(one, program, hint)
    finally:
        watch.close()
    _check_graphs(one, program, hint)
    watch.mark(one.name, (*ran, one.name))
    _check_rewrites(one, rewrites, before, program, hint)
    program.facts = (program.facts - one.breaks) | one.gives
    _check_facts(one, program, {**CHECKERS, **checkers}, hint)
    nodes = before.num_nodes(), program.num_nodes()
    record = PassRecord(one.name, rewrites, *nodes, one.exact, one.why, one.tolerance_in(program))
    program.history = (*program.history, record)
    return record


def _apply(one: Runnable, program: Program, hint: str) -> int:
    try:
        rewrites = one.apply(program)
    except Dsv4cError as error:
        hints = f"{error.hint}; {hint}" if error.hint else hint
        raise type(error)(f"pass `{one.name}`: {error.message}", hint=hints) from error
    except Exception as error:  # a border: a pass may be the user's, and whatever it raises is its fault
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise PassError(
            f"pass `{one.name}` raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})",
            hint=hint,
        ) from error
    if type(rewrites) is not int:
        raise PassError(f"pass `{one.name}` returned {rewrites!r}, not the number of its rewrites", hint=hint)
    return rewrites


def _check_graphs(one: Runnable, program: Program, hint: str) -> None:
    for name, graph in program.graphs.items():
        try:
            graph.eliminate_dead_code()
            graph.lint()
        except RuntimeError as error:
            raise PassError(f"pass `{one.name}` leaves graph `{name}` broken: {error}", hint=hint) from error
        untyped = [n for n in graph.nodes if isinstance(n.target, Op) and "type" not in n.meta]
        if untyped:
            raise PassError(
                f"pass `{one.name}` leaves {_shown(untyped)} without `meta['type']`",
                hint=f"a TensorType, or a tuple of them for an op with several outputs; {hint}",
            )


def _check_rewrites(one: Runnable, rewrites: int, before: Program, program: Program, hint: str) -> None:
    old, new = before.dump(), program.dump()
    if (old != new) == (rewrites > 0):
        return
    said = f"pass `{one.name}` reports {rewrites} rewrites but the program's text is "
    if old == new:
        raise PassError(f"{said}the same", hint=hint)
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    first = next(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))
    raise PassError(f"{said}changed, first at `{first}`", hint=hint)


def _check_facts(one: Runnable, program: Program, checkers: Mapping[str, Checker], hint: str) -> None:
    for fact in sorted(program.facts):
        if fact not in checkers:
            near = difflib.get_close_matches(fact, checkers, n=1)
            way = f"did you mean `{near[0]}`?" if near else "give the pass a checker of it, in `checkers`"
            raise PassError(f"after pass `{one.name}`: nothing checks the fact `{fact}`", hint=f"{way}; {hint}")
        offending = checkers[fact](program)
        if offending:
            raise PassError(
                f"after pass `{one.name}` the fact `{fact}` does not hold at {_shown(offending)}", hint=hint
            )


def _shown(nodes: list[fx.Node]) -> str:
    """The first few nodes, each with where it is in the model."""
    more = len(nodes) - SHOWN
    return ", ".join(f"`{_text(node)}`" for node in nodes[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _text(node: fx.Node) -> str:
    """`%linear_2 = aten.linear.default(to_3, w)  # head`, with the names that fx gives."""
    if node.op != "call_function":
        return f"%{node.name}"
    attrs = f" {dict(node.kwargs)}" if node.kwargs else ""
    scope = f"  # {node.meta['scope']}" if node.meta.get("scope") else ""
    return f"%{node.name} = {target_name(node.target)}({', '.join(map(str, node.args))}){attrs}{scope}"
