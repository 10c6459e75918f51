"""Runs the kernels of drafts in Triton's interpreter, on a CPU: `interpret_speculation [LABEL ...]`.

As interpret.py; all but the widest streams, which differ from narrow ones in nothing but time.
"""

from __future__ import annotations

import sys
import warnings

import torch

from dsv4c.schedules.workloads.speculation import workloads
from tests.schedules.hopper import interpret

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    labels = [f"{work.op} {work.label}" for work in workloads() if work.label != "flash streams 64"]
    sys.exit(interpret.main("speculation", sys.argv[1:] or labels))
