"""Runs gate and sampling kernels in Triton's interpreter, on a CPU:
`interpret_sampling FAMILY [LABEL ...]`.

As interpret.py, with what these kernels use of the card alone replaced: the order of launches, and two functions. And a
third, which the interpreter is slow at.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import interpret  # first: sets TRITON_INTERPRET and repairs the interpreter

# isort: on
import sys
import types
import warnings

import torch
import triton
import triton.language as tl

from dsv4c.schedules.triton import gate, noise, sampling


@triton.jit
def log1p(x):
    """Logarithm of 1 + x, to a few ulps where x is small."""
    more = 1.0 + x
    return tl.where(more == 1.0, x, tl.log(more) * (x / tl.where(more == 1.0, 1.0, more - 1.0)))


@triton.jit
def fast_log2f(x):
    return tl.log2(x)


@triton.jit
def above(p, cut):
    """As sampling's own, in two sums: the interpreter walks a reduction by a function of one's own in Python."""
    over = p >= cut
    return tl.sum(over.to(tl.int32), 0), tl.sum(tl.where(over, p, 0.0), 0)


for texts in (gate, sampling):
    texts.gdc_wait = texts.gdc_launch_dependents = lambda: None
gate.libdevice = types.SimpleNamespace(log1p=log1p)
sampling._above = above
noise.libdevice = types.SimpleNamespace(fast_log2f=fast_log2f)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(interpret.main(sys.argv[1], sys.argv[2:]))
