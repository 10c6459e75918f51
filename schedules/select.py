"""Which schedule runs an op: the cheapest by roofline of those that accept it, with the reason recorded.

`SCHEDULES` is the whole registry: adding a schedule is one entry in the tuple of its file.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.errors import ScheduleError
from dsv4c.schedules import attention, compress, gate, hyper, inductor, linear, moe, norm, paging
from dsv4c.schedules._roofline import seconds
from dsv4c.schedules._schedule import Choice, OpNode, Schedule, apply_layout

SCHEDULES: tuple[Schedule, ...] = (
    *linear.SCHEDULES,
    *norm.SCHEDULES,
    *paging.SCHEDULES,
    *hyper.SCHEDULES,
    *compress.SCHEDULES,
    *attention.SCHEDULES,
    *gate.SCHEDULES,
    *moe.SCHEDULES,
    *inductor.SCHEDULES,
)


def candidates(node: OpNode, target: str) -> list[tuple[Schedule, str | None]]:
    """The schedules for this op and target, each with its reason for refusing the node (None: it accepts)."""
    known = [s for s in SCHEDULES if s.op in (node.op, "*") and target in s.targets]
    return [(schedule, schedule.accepts(node)) for schedule in known]


def choose(schedule: Schedule, node: OpNode, target: str, symbols: Mapping[str, int], reason: str) -> Choice:
    """The choice of this schedule for this node, whatever the others cost."""
    layouts = schedule.layouts(node)
    inputs = tuple(v if v is None else apply_layout(v, layouts.get(i, ())) for i, v in enumerate(node.inputs))
    return Choice(
        node=node,
        schedule=schedule.name,
        reason=reason,
        seconds=seconds(schedule.cost(node, symbols), target),
        layouts=layouts,
        inputs=inputs,
        workspace=schedule.workspace(node),
        build=schedule.build(node),
        tolerance=schedule.tolerance,
        capturable=schedule.capturable,
    )


def select(node: OpNode, target: str, symbols: Mapping[str, int]) -> Choice:
    """The cheapest schedule at these symbol values; ScheduleError naming op, shapes and refusals if none accepts."""
    tried = candidates(node, target)
    accepting = [schedule for schedule, refusal in tried if refusal is None]
    if not accepting:
        refusals = "; ".join(f"`{schedule.name}`: {refusal}" for schedule, refusal in tried) or "none is registered"
        raise ScheduleError(
            f"no schedule for `{node.describe()}` on `{target}`", hint=f"schedules that refuse it: {refusals}"
        )
    if len(accepting) == 1:
        return choose(accepting[0], node, target, symbols, "only one accepts")
    timed = sorted(
        ((seconds(s.cost(node, symbols), target), i) for i, s in enumerate(accepting)),
    )
    (best, first), (second, other) = timed[:2]
    reason = f"model {best * 1e6:.1f} us, `{accepting[other].name}` {second * 1e6:.1f} us"
    return choose(accepting[first], node, target, symbols, reason)
