"""Predicted steps for people and as JSON. Returns rich renderables and plain data, prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv4c.describe import new_table
from dsv4c.predict import OpCost, StepCost
from dsv4c.schedules._roofline import MACHINES


def steps_table(steps: Sequence[StepCost]) -> Table:
    """A row a step: how long, between what, and what it moves and computes."""
    table = new_table(
        "step", "context", "ms", "from", "to", "tokens/s", "GB", "TFLOP", "bound by", text=(0, 8)
    )  # fmt: skip
    for step in steps:
        table.add_row(
            title(step), f"{step.context:,}", f"{1e3 * step.seconds:.2f}", f"{1e3 * step.low:.2f}",
            f"{1e3 * step.high:.2f}", f"{step.tokens / step.seconds:,.0f}", f"{step.bytes / 1e9:.1f}",
            f"{step.flops / 1e12:.2f}", _longest(step),
        )  # fmt: skip
    return table


def title(step: StepCost) -> str:
    """`decode 64` or `prefill 8,192`."""
    return f"{step.phase} {step.tokens:,}"


def _longest(step: StepCost) -> str:
    whole, first = sum(op.seconds for op in step.ops), step.ops[0]
    return f"{first.op} {100 * first.seconds / whole:.0f} %"


def ops_table(step: StepCost) -> RenderableType:
    """A row an op of one step, the longest first."""
    table = new_table(
        "op", "schedule", "calls", "us a call", "ms", "from", "to", "%", "GB", "TFLOP", "unit", "rates of",
        text=(0, 1, 10, 11)
    )  # fmt: skip
    whole = sum(op.seconds for op in step.ops)
    for op in step.ops:
        table.add_row(
            op.op, op.schedule.partition(".")[2], str(op.calls), f"{1e6 * op.seconds / op.calls:.1f}",
            f"{1e3 * op.seconds:.3f}", f"{1e3 * op.low:.3f}", f"{1e3 * op.high:.3f}", f"{100 * op.seconds / whole:.1f}",
            f"{op.bytes / 1e9:.2f}", f"{op.flops / 1e12:.3f}", op.unit if op.flops else "", _source(op),
        )  # fmt: skip
    heading = f"\n{title(step)} at a context of {step.context:,}: calls one after another"
    return Group(Text(heading, style="bold"), table)


def _source(op: OpCost) -> str:
    return "itself" if op.measured else "its like"


def notes(target: str, steps: Sequence[StepCost]) -> str:
    """What a reader must know of these numbers."""
    machine, weights = MACHINES[target], max(step.weights for step in steps)
    lines = ["`from`: the maker's stated rates with nothing exposed but launches."]
    if machine.measured:
        lines.append("The error on measured steps and ops is in docs/predicted.md.")
    else:
        lines += [
            "`to`: kernels that no card has run reach half of what their likes reach on an H200.",
            f"No `{target}` was measured: its rates are stated ones times the share that an H200 reaches.",
        ]
    if weights > machine.memory_bytes:
        lines.append(
            f"The weights are {weights / 1e9:,.0f} GB, a card has {machine.memory_bytes / 1e9:,.0f}: "
            "these are times of one card as if it held them."
        )
    return "\n".join(lines)


def steps_json(model: str, target: str, steps: Sequence[StepCost]) -> dict[str, Any]:
    """The same as data: seconds, bytes and operations."""
    return {"model": model, "target": target, "measured": MACHINES[target].measured, "steps": [_step(s) for s in steps]}


def _step(step: StepCost) -> dict[str, Any]:
    return {
        "phase": step.phase, "program": step.program, "tokens": step.tokens, "requests": step.requests,
        "context": step.context, "seconds": _short(step.seconds), "low": _short(step.low), "high": _short(step.high),
        "bytes": round(step.bytes), "flops": round(step.flops), "weight_bytes": round(step.weights),
        "ops": [
            {
                "op": op.op, "schedule": op.schedule, "calls": op.calls, "seconds": _short(op.seconds),
                "low": _short(op.low), "high": _short(op.high), "bytes": round(op.bytes), "flops": round(op.flops),
                "unit": op.unit, "rates": _source(op),
            }
            for op in step.ops
        ],
    }  # fmt: skip


def _short(seconds: float) -> float:
    return float(f"{seconds:.4g}")
