"""The memory plan for people and for programs: tables, one sentence, JSON. Prints nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from dsv4c.runtime.memory import Fit, MemoryPlan, Room, requests_fit, text_of
from dsv4c.runtime.poolsizes import PoolSizes, page_bytes, peak_pages, slot_bytes

PARTS = 6  # of the weights that are named


def memory_tables(plan: MemoryPlan, room: Room, sizes: PoolSizes) -> RenderableType:
    """What is held whoever is served, what every pool costs and takes at these `sizes`, and the largest weights."""
    parts = _table("", "largest weights", text=(1,))
    for name, size in list(plan.weights_by_part.items())[:PARTS]:
        parts.add_row(text_of(size), name)
    return Group(memory_summary(plan, room, sizes), "", _pools(plan, sizes), "", parts, "")


def memory_summary(plan: MemoryPlan, room: Room, sizes: PoolSizes) -> Table:
    """One compact table: what pools of these `sizes` and all the rest take, and what is available."""
    table = _table("memory", "", "", text=(0, 2))
    for item in plan.fixed:
        if item.size_bytes:
            dtypes = _listed(plan.weights_by_dtype) if item.name == "weights" else ""
            table.add_row(item.name, text_of(item.size_bytes), ": ".join(filter(None, (item.why, dtypes))))
    pools = plan.pools(sizes)
    table.add_row("pools", text_of(sum(pools.values())), _listed(pools))
    table.add_row("all", text_of(plan.fixed_bytes + sum(pools.values())), _holds(plan, sizes), style="bold")
    table.add_row("available", text_of(room.limit_bytes), _available(room))
    return table


def _holds(plan: MemoryPlan, sizes: PoolSizes) -> str:
    count, _ = requests_fit(plan.groups, sizes, sizes.max_context, plan.bounds.tokens)
    running = f"{_count(sizes.max_requests, 'request')} at once"
    if count == sizes.max_requests:
        return f"{running}, each of {sizes.max_context:,} tokens"
    return f"{running}, {count:,} of them of {sizes.max_context:,} tokens"


def _available(room: Room) -> str:
    if room.share == 1.0:
        return f"at most {room.pool_share:.0%} of it for pools" if room.pool_share < 1 else ""
    others = f", less {text_of(room.others_bytes)} that others hold" if room.others_bytes else ""
    return f"{room.share:g} of {text_of(room.total_bytes)}{others}"


def _pools(plan: MemoryPlan, sizes: PoolSizes) -> Table:
    """By pool: what a page, a token and a request of the whole context cost. A window's cost ends at its horizon."""
    pools, tokens = plan.pools(sizes), plan.token_bytes()
    table = _table(
        "pool", "tokens a page", "bytes a page", "bytes a token", "bytes a request", "rows", "all", text=(0,)
    )
    for group in plan.groups:
        token = f"{tokens[group.name]:,.1f}" if group.horizon is None else f"none after {group.horizon}"
        request = peak_pages(group, sizes.max_context) * page_bytes(group)
        table.add_row(
            group.name, f"{group.page_tokens:,}", f"{page_bytes(group):,}", token, f"{request:,}",
            f"{sizes.pages[group.name]:,} pages", text_of(pools[group.name]),
        )  # fmt: skip
    for state in plan.states:
        size = slot_bytes([state])
        rows = pools[state.name] // size if size else sizes.slots
        table.add_row(state.name, "", "", "none", f"{size:,}", f"{rows:,} slots", text_of(pools[state.name]))
    if sizes.snapshots:
        size, count = plan.snapshot_bytes(), sizes.snapshots
        table.add_row("snapshots, of these", "", "", "none", f"{size:,} each", f"{count:,}", text_of(count * size))
    return table


def answer_of(plan: MemoryPlan, room: Room, fit: Fit, asked: int | None = None, longest: Fit | None = None) -> str:
    """One sentence or two: how many requests fit and what binds; for `asked` requests, whether they do."""
    what = f"of {fit.context:,} tokens"
    if fit.available_bytes <= 0:
        return (
            f"Nothing fits: before any request it needs {text_of(plan.fixed_bytes)}, "
            f"{text_of(room.limit_bytes)} are available."
        )
    left = fit.available_bytes - fit.pool_bytes
    if asked is not None and longest is not None and asked <= fit.requests:
        return f"{_count(asked, 'request')} {what} fit; so many fit up to {longest.context:,} tokens each."
    if asked is not None and longest is not None:
        needed = sum(plan.pools(plan.sizes(asked, fit.context)).values())
        shorter = (
            f"{asked:,} fit up to {longest.context:,} tokens" if longest.context else f"{asked:,} of no length fit"
        )
        return (
            f"{_count(asked, 'request')} {what} do not fit: they need {text_of(needed)} of pools, "
            f"{text_of(fit.available_bytes)} are available. {fit.requests:,} of this length fit; {shorter}."
        )
    if fit.requests == 0:
        return (
            f"Not one request {what} fits: it needs {text_of(fit.next_bytes)} of pools, most for {fit.pool}; "
            f"{text_of(fit.available_bytes)} are available."
        )
    if fit.binds == "requests":
        return (
            f"{_count(fit.requests, 'request')} {what} fit: as many as the artifact serves; {text_of(left)} stay free."
        )
    return (
        f"{_count(fit.requests, 'request')} {what} fit. Memory binds: one more needs "
        f"{text_of(fit.next_bytes - fit.pool_bytes)}, most for {fit.pool}; {text_of(left)} are left."
    )


def memory_json(plan: MemoryPlan, room: Room, sizes: PoolSizes, fit: Fit, longest: Fit) -> dict[str, Any]:
    """Everything the tables say, in bytes and tokens."""
    return {
        "target": plan.target,
        "memory": {**dataclasses.asdict(room), "limit_bytes": room.limit_bytes},
        "fixed": {item.name: item.size_bytes for item in plan.fixed},
        "fixed_bytes": plan.fixed_bytes,
        "weights": {"by_dtype": dict(plan.weights_by_dtype), "by_part": dict(plan.weights_by_part)},
        "groups": {
            g.name: {
                "page_tokens": g.page_tokens, "page_bytes": page_bytes(g), "token_bytes": plan.token_bytes()[g.name],
                "horizon": g.horizon,
            }
            for g in plan.groups
        },
        "states": {s.name: {"request_bytes": slot_bytes([s])} for s in plan.states},
        "snapshot_bytes": plan.snapshot_bytes(),
        "limits": {"requests": plan.bounds.requests, "context": plan.max_context, "step_tokens": plan.bounds.tokens},
        "fit": dataclasses.asdict(fit),
        "longest": dataclasses.asdict(longest),
        "pools": {
            "requests": sizes.max_requests, "context": sizes.max_context, "snapshots": sizes.snapshots,
            "pages": dict(sizes.pages), "bytes": plan.pools(sizes),
        },
    }  # fmt: skip


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {text_of(size)}" for name, size in sizes.items())


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _table(*columns: str, text: tuple[int, ...]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        last = i == len(columns) - 1
        table.add_column(column, justify="left" if i in text else "right", overflow="fold", no_wrap=not last)
    return table
