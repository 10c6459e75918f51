"""Tables for people: what the passes did, and what an artifact holds. Returns rich renderables, prints nothing."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv4c.artifact import KVGroup, Manifest, StateGroup
from dsv4c.config import ModelConfig
from dsv4c.ops import DTYPE_BYTES
from dsv4c.pipeline import Step
from dsv4c.plan import Plan

if TYPE_CHECKING:
    from dsv4c.compare import Difference


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, MB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e6 if sys.platform == "darwin" else size / 1e3


class PassTable:
    """Collects a row a pass as the pipeline runs: `PassTable().watch` is given to the compiler."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._table = new_table(
            "pass", "rewrites", "nodes before", "nodes after", "exact", "seconds", "peak MB", text=(0,)
        )

    def watch(self, step: Step) -> None:
        now = time.perf_counter()
        r = step.record
        if not self._table.row_count:
            self._table.add_row("capture", "", "", f"{r.nodes_before:,}", "", "", "")
        self._table.add_row(
            r.name, f"{r.rewrites:,}", f"{r.nodes_before:,}", f"{r.nodes_after:,}", "yes" if r.exact else "no",
            f"{now - self._last:.2f}", f"{peak_memory_mb():,.0f}",
        )  # fmt: skip
        self._last = now

    @property
    def seconds(self) -> float:
        """Since the table was made."""
        return time.perf_counter() - self._start

    def table(self) -> RenderableType:
        return self._table


def plan_table(plan: Plan) -> RenderableType:
    """Kernels by op with the schedule chosen, their calls in all programs, and the sizes of what was planned."""
    programs = plan.programs.values()
    calls = Counter(call.kernel for p in programs for segment in p.segments for call in segment.calls)
    table = new_table("op", "schedule", "calls", "reason", text=(0, 1, 3))
    for name, choice in sorted(plan.choices.items(), key=lambda c: (c[1].node.op, c[0])):
        table.add_row(choice.node.op, choice.schedule, f"{calls[name]:,}", choice.reason)
    summary = new_table("planned", "", text=(0,))
    for label, value in (
        ("programs", f"{len(plan.programs)}"),
        ("calls a step", _span(sum(len(s.calls) for s in p.segments) for p in programs)),
        ("segments a step", _span(len(p.segments) for p in programs)),
        ("distinct kernels", f"{len(plan.choices)}"),
        ("weights", f"{len(plan.weights):,}"),
        ("arena, MB", f"{plan.arena_bytes / 1e6:,.1f}"),
    ):
        summary.add_row(label, value)
    return Group(table, summary)


def _span(counts: Iterable[int]) -> str:
    """`84`, or `84 to 90` where programs differ."""
    found = sorted(set(counts))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _layers(manifest: Manifest) -> str:
    """`43`, or `the first 4 of 43`."""
    count = manifest.model["num_hidden_layers"]
    return str(count) if manifest.truncated_from is None else f"the first {count} of {manifest.truncated_from}"


def manifest_tables(manifest: Manifest) -> RenderableType:
    """The manifest in words: what it is for, pipeline, kernels, memory plan, KV groups, numerics."""
    model = manifest.model
    head = new_table("artifact", "", text=(0, 1))
    for label, value in (
        ("model", f"{_layers(manifest)} layers, hidden size {model['hidden_size']}, "
                  f"{model['n_routed_experts']} experts, vocabulary {manifest.vocab_size:,}"),
        ("routed experts", ModelConfig.from_dict(model).expert_formats),
        ("model hash", manifest.model_sha256[:16]),
        ("target", f"{manifest.target} ({manifest.isa}), {manifest.compute_dtype}"),
        ("longest context", f"{manifest.max_context:,} tokens"),
        ("weights", f"{len(manifest.weights):,}, " + ("inside" if manifest.embedded_weights else "given when served")),
        ("made with", ", ".join(f"{k} {v}" for k, v in sorted(manifest.tools.items()))),
        ("format version", str(manifest.format_version)),
    ):  # fmt: skip
        head.add_row(label, value)
    passes = new_table("pass", "rewrites", "nodes before", "nodes after", "exact", text=(0,))
    for r in manifest.passes:
        row = (f"{r.rewrites:,}", f"{r.nodes_before:,}", f"{r.nodes_after:,}", "yes" if r.exact else "no")
        passes.add_row(r.name, *row)
    kernels = new_table("kernel", "op", "schedule", "calls", "tolerance", "reason", text=(0, 1, 2, 5))
    calls = Counter(c.kernel for p in manifest.programs.values() for s in p.segments for c in s.calls)
    for name, k in manifest.kernels.items():
        kernels.add_row(name, k.op, k.schedule, f"{calls[name]:,}", f"{k.tolerance:g}", k.reason)
    numerics = new_table("numerics", text=(0,))
    for sentence in manifest.numerics:
        numerics.add_row(sentence)
    return Group(head, passes, kernels, _memory(manifest), _state(manifest), numerics)


def _memory(manifest: Manifest) -> Table:
    table = new_table("program", "phase", "calls", "segments", "arena MB", "largest sizes", text=(0, 1, 5))
    for name, program in manifest.programs.items():
        calls = sum(len(s.calls) for s in program.segments)
        sizes = ", ".join(f"{k}={v}" for k, v in sorted(program.symbols.items()) if k in ("T", "R", "S"))
        arena = f"{program.arena_bytes / 1e6:,.1f}"
        table.add_row(name, program.phase, f"{calls:,}", str(len(program.segments)), arena, sizes)
    return table


def _state(manifest: Manifest) -> Table:
    table = new_table("state", "pools", "tokens an entry", "tokens a page", "kept", "bytes", text=(0, 4))
    for group in manifest.kv_groups:
        size = f"{entry_bytes(group) / group.tokens_per_entry:,.0f} a token"
        kept = "all" if group.horizon is None else f"last {group.horizon} tokens"
        table.add_row(
            group.name, str(len(group.pools)), str(group.tokens_per_entry), str(group.page_tokens), kept, size
        )
    for state in manifest.state_groups:
        table.add_row(state.name, str(len(state.pools)), "", "", "ring", f"{entry_bytes(state):,.0f} a request")
    return table


def entry_bytes(group: KVGroup | StateGroup) -> int:
    """Bytes of one entry (or one slot) in all pools of a group."""
    total = 0
    for pool in group.pools:
        size = DTYPE_BYTES[pool.dtype]
        for n in pool.entry_shape:
            size *= n
        total += size
    return total


def new_table(*columns: str, text: tuple[int, ...]) -> Table:
    """A table of these columns; those numbered in `text` are flush left, the last one folds."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(
            column, justify="left" if i in text else "right", overflow="fold", no_wrap=i < len(columns) - 1
        )
    return table


def differences_table(found: Sequence[Difference], a: str, b: str) -> RenderableType:
    """What differs between two artifacts, a row each, by kind; or that nothing does."""
    if not found:
        return Text(f"{a} and {b} are the same: model, passes, kernels, plan, state, weights and numerics")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "", a, b):
        table.add_column(column, overflow="fold")
    kind = ""
    for one in found:
        if kind and one.kind != kind:
            table.add_row()
        table.add_row(Text(one.kind if one.kind != kind else "", style="bold"), *map(Text, (one.what, one.a, one.b)))
        kind = one.kind
    return table
