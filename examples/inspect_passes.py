"""Runs every pass on the nano model and prints what each one did; no weights, no kernels.

usage: python examples/inspect_passes.py [PASS]     with a pass name: also the diff it made
"""

from __future__ import annotations

import sys

from dsv4c.capturing import capture
from dsv4c.config import NANO
from dsv4c.passes import default_pipeline
from dsv4c.weights import stored_formats


def main(argv: list[str]) -> int:
    program = capture(NANO)
    for step in default_pipeline(stored_formats(NANO)).steps(program):
        record = step.record
        print(
            f"{step.name:<22} {record.rewrites:>5} rewrites {record.nodes_before:>6} -> {record.nodes_after:>5} nodes"
        )
        if step.name in argv:
            print(step.diff())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
