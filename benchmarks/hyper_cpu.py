"""Our C++ kernel of hc_post + hc_pre + norm beside torch.compile of the same composition, interleaved, on this CPU.

usage: python benchmarks/hyper_cpu.py [--hidden 4096] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.ops import OPS
from dsv4c.runtime.kernels import Kernels
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules.emit import emit
from dsv4c.schedules.select import select

N = 4  # streams
ATTRS = {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20, "out_eps": 1e-6}


def inputs(tokens: int, hidden: int) -> list[Tensor]:
    """Random values of the op's parameters, in order."""
    comb = torch.rand(tokens, N, N)
    return [
        torch.randn(tokens, hidden), torch.randn(tokens, N, hidden), torch.rand(tokens, N), comb / comb.sum(-1, True),
        torch.randn(N * (N + 2), N * hidden) / (N * hidden) ** 0.5, torch.randn(N * (N + 2)), torch.rand(3),
        torch.rand(hidden),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    d, op = args.hidden, OPS["hc_post_pre_norm"]
    given = [Value(tuple("T" if s == 7 else s for s in t.shape), "float32") for t in inputs(7, d)]
    results = (Value(("T", N, d), "float32"), Value(("T", d), "float32"), Value(("T", N), "float32"),
               Value(("T", N, N), "float32"))  # fmt: skip
    choice = select(OpNode(op.name, ATTRS, tuple(given), results), "cpu", symbols={"T": 4096})
    compiled = torch.compile(lambda *a: op(*a, **ATTRS), dynamic=True)
    print(f"hidden {d}, {torch.get_num_threads()} threads, schedule {choice.schedule}")
    print(f"{'tokens':>7}{'ours ms':>10}{'torch.compile ms':>18}{'ratio':>8}{'max error':>12}")
    with tempfile.TemporaryDirectory() as folder:
        kernels = Kernels(emit({choice.kernel: choice}, Path(folder), Path(folder) / "cache", None), Path(folder))
        for tokens in (1, 4, 16, 64, 256, 1024):
            values = inputs(tokens, d)
            sizes = {"T": tokens}
            out = [torch.empty(v.sizes(sizes)) for v in (*choice.workspace, *results)]
            (run,) = kernels.bind([(choice.kernel, [*values, *out])])
            rounds = []
            with torch.no_grad():
                expected = compiled(*values)
                run()
                for _ in range(args.rounds):
                    t0 = time.perf_counter()
                    run()
                    t1 = time.perf_counter()
                    compiled(*values)
                    rounds.append((t1 - t0, time.perf_counter() - t1))
            ours, theirs = (statistics.median(r[i] for r in rounds) * 1e3 for i in (0, 1))
            error = max((a - b).abs().max().item() for a, b in zip(out[len(choice.workspace) :], expected, strict=True))
            ratio = statistics.median(b / a for a, b in rounds)
            print(f"{tokens:>7}{ours:>10.3f}{theirs:>18.3f}{ratio:>7.1f}x{error:>12.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
