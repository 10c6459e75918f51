"""Seconds of a call by roofline: the slower of moving its bytes and doing its arithmetic, plus its launch.

The machine is one core of a current x86 server (measured on an EPYC with AVX-512): the numbers rank schedules, they
do not predict. A launch counts what Python and the kernel's own entry cost at batch 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.schedules._schedule import Work


@dataclass(frozen=True)
class Machine:
    """Peak rates of a target, and seconds to launch one call of each kind."""

    bytes_per_s: float
    flops_per_s: float
    launch_s: dict[str, float]


MACHINES = {
    "cpu": Machine(
        bytes_per_s=40e9,  # streaming bf16 weights from L3: 50-60 GB/s alone, less beside another core
        flops_per_s=220e9,  # packed float32 GEMM reaches 190 GFLOPS a core
        launch_s={"cpp": 0.1e-6, "aten": 3e-6},
    )
}


def seconds(work: Work, target: str) -> float:
    """Roofline time of one call on `target`."""
    machine = MACHINES[target]
    busy = max(work.bytes_moved / machine.bytes_per_s, work.flops / (machine.flops_per_s * work.efficiency))
    return busy + machine.launch_s[work.launch]
