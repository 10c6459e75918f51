"""A schedule of one's own, in one file outside the package: SwiGLU in C++, for CPUs, in place of Inductor's.

usage: python examples/own_schedule.py ["PROMPT"]

Selection takes it where its cost is the lowest of those that accept a node, and the artifact says so. The answer is
then computed with every kernel's reference beside it: a result further off than the tolerance is reported.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import dsv4c
from dsv4c.launch import LaunchOptions, answer, launch
from dsv4c.schedules import Build, Config, OpNode, Schedule, Work

NANO = Path(__file__).resolve().parent / "nano"

# Arguments are the op's inputs, then its outputs; LIMIT comes from `defines`. Bound by memory: one pass over each row.
SOURCE = """
#include "dsv4c.h"
DSV4C_KERNEL {
  Tensor gate_up = a[0], out = a[1];
  a.expect(2);
  const int64_t T = out.size(0), C = out.size(1);
#pragma omp parallel for if (T * C > (1 << 15)) schedule(static)
  for (int64_t t = 0; t < T; ++t)
    for (int64_t c = 0; c < C; c += VL)
      store(out.row(t) + c, swiglu(load(gate_up.row(t) + c), load(gate_up.row(t) + C + c), LIMIT));
}
DSV4C_END
"""


def accepts(node: OpNode) -> str | None:
    """None, or the reason for refusing: whole vectors of float32."""
    (out,) = node.outputs
    return None if out.dtype == "float32" and int(out.shape[-1]) % 16 == 0 else "rows of no whole float32 vectors"


def cost(node: OpNode, symbols: Mapping[str, int], config: Config) -> Work:
    """Each value once."""
    return Work(sum(value.bytes(symbols) for value in (*node.inputs, *node.outputs) if value is not None))


def build(node: OpNode, config: Config) -> Build:
    return Build("cpp", defines={"LIMIT": node.attrs["limit"]}, text=SOURCE)


OWN = Schedule("swiglu_pair.cpp_own", "swiglu_pair", frozenset({"cpu"}), build, cost, accepts, tolerance=5e-6)


def main(argv: list[str]) -> int:
    prompt = argv[0] if argv else "The package provides"
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "nano-cpu"
        config, target = dsv4c.preset("nano"), dsv4c.Target("cpu")
        dsv4c.compile_artifact(config, target, directory, dsv4c.Options(), checkpoint=NANO, schedules=[OWN])
        calls = [call for call in dsv4c.load(directory).program("decode").calls if call.op == "swiglu_pair"]
        first = calls[0]
        print(f"{len(calls)} calls, such as that of {first.scope}: {first.kernel.schedule}, {first.kernel.reason}")
        launched = launch(directory, LaunchOptions(executor="shadow"))
        print(prompt, *answer(launched, prompt, max_tokens=16, temperature=0.0, seed=0), sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
