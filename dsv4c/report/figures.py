"""The work of a program on the two steps that the report speaks of, by the roofline of its target's machine."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from dsv4c.program import Program
from dsv4c.report.families import FAMILIES, family_of
from dsv4c.work import Sizes, Work, node_work, work_of

REQUESTS, CONTEXT, CHUNK = 64, 8192, 2048  # a busy decode step, and a chunk of one prompt


def steps_of(program: Program) -> dict[str, Sizes]:
    """What a step is called -> its sizes; within what the model allows."""
    most = program.config.max_position_embeddings
    context, chunk = min(CONTEXT, most), min(CHUNK, most)
    return {
        f"decode {REQUESTS} requests of {context:,} tokens": Sizes.decode(REQUESTS, context),
        f"prefill {chunk:,} tokens": Sizes.prefill(chunk),
    }


def figures_of(program: Program, machine: str) -> Mapping[str, Work]:
    """Step -> the work of the whole program."""
    return {name: work_of(program, sizes, machine) for name, sizes in steps_of(program).items()}


def figures_by_family(program: Program, machine: str) -> Mapping[str, Mapping[str, Work]]:
    """Step -> family of ops -> their work in a stitched program's `step`; families without work are left out."""
    out = {}
    for name, sizes in steps_of(program).items():
        symbols = sizes.symbols(program.config, program.layout)
        sums = dict.fromkeys(FAMILIES, Work())
        for node in program.graphs["step"].nodes:
            if node.op == "call_function":
                sums[family_of(node.target)] += node_work(node, symbols, machine)
        out[name] = {family: work for family, work in sums.items() if work.kernels}
    return out


class NodeWork:
    """The work of calls on the first of the steps, for the graph's boxes."""

    def __init__(self, program: Program, machine: str) -> None:
        self.step, sizes = next(iter(steps_of(program).items()))
        self._symbols, self._machine = sizes.symbols(program.config, program.layout), machine

    def of(self, nodes: list[fx.Node]) -> Work:
        """Of these calls together."""
        return sum((node_work(node, self._symbols, self._machine) for node in nodes), Work())
