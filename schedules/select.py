"""Which schedule runs an op: the cheapest by roofline of those that accept it, with the reason recorded.

`SCHEDULES` is the whole registry: adding a schedule is one entry in the tuple of its file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsv4c.errors import ScheduleError
from dsv4c.schedules import (
    attention,
    blackwell,
    compress,
    dspark,
    gate,
    hopper,
    hyper,
    inductor,
    linear,
    moe,
    norm,
    paging,
)
from dsv4c.schedules._roofline import busy_seconds, seconds
from dsv4c.schedules._schedule import Choice, Config, OpNode, Schedule, apply_layout
from dsv4c.schedules._tuned import Tuned

SCHEDULES: tuple[Schedule, ...] = (
    *linear.SCHEDULES,
    *norm.SCHEDULES,
    *paging.SCHEDULES,
    *hyper.SCHEDULES,
    *compress.SCHEDULES,
    *attention.SCHEDULES,
    *dspark.SCHEDULES,
    *gate.SCHEDULES,
    *moe.SCHEDULES,
    *inductor.SCHEDULES,
    *hopper.SCHEDULES,
    *blackwell.SCHEDULES,
)


def candidates(
    node: OpNode, target: str, schedules: Sequence[Schedule] = SCHEDULES
) -> list[tuple[Schedule, str | None]]:
    """The schedules for this op and target, each with its reason for refusing the node (None: it accepts)."""
    known = [s for s in schedules if s.op in (node.op, "*") and target in s.targets]
    return [(schedule, schedule.accepts(node)) for schedule in known]


def choose(
    schedule: Schedule,
    node: OpNode,
    target: str,
    symbols: Mapping[str, int],
    reason: str,
    config: Config | None = None,
    measured: float | None = None,
) -> Choice:
    """The choice of this schedule for this node, whatever the others cost; by default with its first config."""
    config = schedule.space(node, symbols)[0] if config is None else config
    layouts = schedule.layouts(node)
    work = schedule.cost(node, symbols, config)
    inputs = tuple(v if v is None else apply_layout(v, layouts.get(i, ())) for i, v in enumerate(node.inputs))
    return Choice(
        node=node,
        schedule=schedule.name,
        reason=reason,
        seconds=seconds(work, target),
        layouts=layouts,
        inputs=inputs,
        workspace=schedule.workspace(node, config),
        build=schedule.build(node, config),
        tolerance=schedule.tolerance,
        capturable=schedule.capturable,
        config=config,
        busy=busy_seconds(work, target),
        measured=measured,
    )


def accepting(node: OpNode, target: str, schedules: Sequence[Schedule] = SCHEDULES) -> list[Schedule]:
    """The schedules that accept this node; ScheduleError naming op, shapes and every refusal if there is none."""
    tried = candidates(node, target, schedules)
    found = [schedule for schedule, refusal in tried if refusal is None]
    if not found:
        refusals = "; ".join(f"`{schedule.name}`: {refusal}" for schedule, refusal in tried) or "none is registered"
        raise ScheduleError(
            f"no schedule for `{node.describe()}` on `{target}`", hint=f"schedules that refuse it: {refusals}"
        )
    return found


def ranked(
    node: OpNode, target: str, symbols: Mapping[str, int], schedules: Sequence[Schedule] = SCHEDULES
) -> list[tuple[float, Schedule, Config]]:
    """Every config of every accepting schedule by its modelled seconds; the order of the registry breaks ties."""
    out = [
        (seconds(schedule.cost(node, symbols, config), target), schedule, config)
        for schedule in accepting(node, target, schedules)
        for config in schedule.space(node, symbols)
    ]
    return sorted(out, key=lambda row: row[0])


def select(
    node: OpNode,
    target: str,
    symbols: Mapping[str, int],
    tuned: Tuned | None = None,
    schedules: Sequence[Schedule] = SCHEDULES,
) -> Choice:
    """The fastest schedule at these symbol values by `tuned`'s measurements, else the cheapest by the cost model.

    `schedules` are those to choose from: the registry's, or a user's besides. Raises ScheduleError naming op, shapes
    and refusals if none accepts.
    """
    row = tuned.best(node, target, symbols) if tuned else None
    if row is not None:
        schedule = next((s for s in accepting(node, target, schedules) if s.name == row.schedule), None)
        if schedule is not None:
            return choose(schedule, node, target, symbols, row.reason(), row.config, row.microseconds * 1e-6)
    order = ranked(node, target, symbols, schedules)
    best, schedule, config = order[0]
    rivals = [(cost, other) for cost, other, _ in order[1:] if other is not schedule]
    if rivals:
        reason = f"model {best * 1e6:.1f} us, `{rivals[0][1].name}` {rivals[0][0] * 1e6:.1f} us"
    else:
        reason = "only one accepts"
    return choose(schedule, node, target, symbols, reason, config)
