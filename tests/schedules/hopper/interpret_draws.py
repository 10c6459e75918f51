"""Draws of small and odd vocabularies in Triton's interpreter, on a CPU, beside the reference: `interpret_draws`.

One line a batch, `ok` or `FAIL`; exits with 1 if any failed.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import interpret, interpret_sampling  # replaces what is the card's own

# isort: on
import sys
import warnings

import torch

from dsv4c.schedules.hopper.sampling import SCHEDULES
from dsv4c.schedules.workloads.sampling import DRAWS, Kind, workload

assert interpret_sampling
BATCHES = (
    (1, 2, Kind("one token", (1.0, 0.0), (0, 1), (1.0, 0.5))),
    (7, 6, Kind("mixed", (0.0, 0.3, 1.0), (0, 0, 2, 10), (1.0, 1.0, 0.9), (0.0, 0.0, 0.05), hard=True, ruled=0.7)),
    # three chunks, the last one short, an odd token
    (9001, 5, Kind("no filter", (0.0, 0.3, 1.0), hard=True, ruled=0.5)),
    (9001, 2, Kind("min_p", min_p=(0.02,), ruled=1.0)),
    (2049, 2, Kind("flat", top_k=(1500,), hard=True, ruled=0.5)),  # row 1 has equal logits, more than a chunk lists
)


def main() -> int:
    failed = 0
    for vocab, rows, kind in BATCHES:
        for op in DRAWS:
            batch = workload("nano", kind, rows, op, vocab=vocab)
            (schedule,) = (s for s in SCHEDULES if s.op == batch.op)
            config = schedule.space(batch.node, batch.symbols)[0]
            build, workspace = schedule.build(batch.node, config), schedule.workspace(batch.node, config)
            results, expected = interpret.outputs_of(batch, build, {}, seed=vocab, workspace=workspace)
            assert batch.error is not None
            error = batch.error(results, expected)
            good = error <= schedule.tolerance
            failed += not good
            print(f"{'ok  ' if good else 'FAIL'} {batch.op} {kind.name} {vocab} {error:.2e}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(main())
