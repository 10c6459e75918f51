"""Runs every pass on the nano model and prints what each one did; no weights, no kernels.

usage: python examples/inspect_passes.py [PASS]     with a pass name: also the diff it made
"""

from __future__ import annotations

import sys

import dsv4c


def main(argv: list[str]) -> int:
    program = dsv4c.capture(dsv4c.preset("nano"))
    for step in dsv4c.Pipeline.default("cpu").steps(program):
        record, work = step.record, step.work.after
        nodes = f"{record.nodes_before:>6} -> {record.nodes_after:>5} nodes"
        print(f"{step.name:<22} {record.rewrites:>5} rewrites {nodes} {work.kernels:>6} kernels")
        if step.name in argv:
            print(step.diff())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
