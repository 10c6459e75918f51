"""A pass of one's own, in one file outside the package: the indexer picks fewer compressed entries for every query.

usage: python examples/own_pass.py [COUNT]

It joins the default pipeline directly behind `stitch`. The pipeline holds it to its contract like any other pass: the
number of rewrites, its fact, the types it leaves; and every later call knows that `fewer-picks` changed it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

import dsv4c
from dsv4c.facts import Checker
from dsv4c.ops import TensorType
from dsv4c.program import is_op, types_of


def too_many(program: dsv4c.Program) -> list[fx.Node]:
    """The nodes where the fact `few-picks` does not hold: none, if every indexer picks alike."""
    counts = {node.kwargs["topk"] for node in program.find("dsv4.index_topk")}
    return program.find("dsv4.index_topk") if len(counts) > 1 else []


@dataclass(frozen=True)
class FewerPicks(dsv4c.Pass):
    """%1 = dsv4.index_topk(...) {topk=64} : i64[T, 64]  ->  the same with topk=32 : i64[T, 32]"""

    name: ClassVar[str] = "fewer-picks"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched"})
    gives: ClassVar[frozenset[str]] = frozenset({"few-picks"})
    checkers: ClassVar[Mapping[str, Checker]] = {"few-picks": too_many}
    exact: ClassVar[bool] = False
    why: ClassVar[str] = "queries no longer see the entries that they picked last"

    count: int = 32
    """Entries a query picks, at most."""

    def run(self, graph: fx.Graph) -> int:
        found = [n for n in graph.nodes if is_op(n, "index_topk") and n.kwargs["topk"] > self.count]
        for node in found:
            (kind,) = types_of(node)
            node.kwargs = {**node.kwargs, "topk": self.count}
            node.meta["type"] = TensorType((kind.shape[0], self.count), kind.dtype)
        return len(found)


def main(argv: list[str]) -> int:
    count = int(argv[0]) if argv else 32
    program = dsv4c.capture(dsv4c.preset("nano"))
    pipeline = dsv4c.Pipeline.default("sm_90a").with_(FewerPicks(count), after="stitch")
    for step in pipeline.steps(program):
        program = step.after
        if step.name == FewerPicks.name:
            before, after = step.work.before, step.work.after
            print(
                f"{step.name}: {step.record.rewrites} rewrites; holds now: {', '.join(step.facts - step.before.facts)}"
            )
            print(f"predicted for 64 decoding requests: {before.microseconds:,.1f} us -> {after.microseconds:,.1f} us")
            print(step.diff())
    (attend, *_) = program.find("dsv4.index_topk_packed")
    print(f"{attend} went through {', '.join(attend.meta['passes'])}")
    print("it comes from", *attend.meta["origin"], sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
