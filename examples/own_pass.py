"""A pass of one's own, in one file outside the package: what would KV entries in FP8 cost a model that runs in float32?

usage: python examples/own_pass.py

It rounds every KV entry to FP8 and back before it is written. It joins the default pipeline directly behind `stitch`,
which holds it to its contract like any other pass: the rewrites that it reports, its fact, its tolerance, the types
that it leaves. Every call that it adds or changes knows so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

import dsv4c
from dsv4c.facts import Checker
from dsv4c.ops import OPS
from dsv4c.program import is_op


def writes(graph: fx.Graph) -> list[fx.Node]:
    """The calls that write KV entries; index keys have a format of their own."""
    found = (n for n in graph.nodes if is_op(n, "page_write"))
    return [n for n in found if not n.args[0].meta["value"].name.endswith(".index")]


def not_rounded(program: dsv4c.Program) -> list[fx.Node]:
    """Where the fact `kv-rounded` does not hold."""
    found = (node for graph in program.graphs.values() for node in writes(graph))
    return [node for node in found if not is_op(node.args[2], "quantise_kv")]


@dataclass(frozen=True)
class RoundKv(dsv4c.Pass):
    """%2 = dsv4.page_write(%p, %slots, %1)  ->  %2 = dsv4.quantise_kv(%1); %3 = dsv4.page_write(%p, %slots, %2)"""

    name: ClassVar[str] = "round-kv"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched"})
    gives: ClassVar[frozenset[str]] = frozenset({"kv-rounded"})
    checkers: ClassVar[Mapping[str, Checker]] = {"kv-rounded": not_rounded}
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 2**-4
    why: ClassVar[str] = "KV entries are rounded to FP8: 3 bits of mantissa, half an ulp is 1/16 of a value"

    rope_dim: int = 64
    """Rotated channels, behind the others, that stay as they are."""
    group: int = 64
    """Channels that share a scale."""

    def run(self, graph: fx.Graph) -> int:
        found, attrs = writes(graph), {"rope_dim": self.rope_dim, "group": self.group}
        for write in found:
            entry = write.args[2]
            assert isinstance(entry, fx.Node)
            with graph.inserting_before(write):
                rounded = graph.call_function(OPS["quantise_kv"], (entry,), attrs)
            rounded.meta = {"type": entry.meta["type"], "scope": write.meta["scope"]}
            write.replace_input_with(entry, rounded)
        return len(found)


def main() -> int:
    config = dsv4c.preset("nano")
    one = RoundKv(rope_dim=config.qk_rope_head_dim, group=32)
    pipeline = dsv4c.Pipeline.default("cpu").with_(one, after="stitch")
    program = dsv4c.capture(config)
    for step in pipeline.steps(program):
        program = step.after
        if step.name == RoundKv.name:
            print(
                f"{step.name}: {step.record.rewrites} rewrites; {', '.join(step.facts - step.before.facts)} holds now"
            )
            print(f"on seeded inputs: {step.check()}")
            print(f"kernels: {step.work.before.kernels} -> {step.work.after.kernels}\n{step.diff()}")
    rounded = program.find("dsv4.quantise_kv")[0]
    print(f"{rounded} comes from {', '.join(rounded.meta['origin'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
