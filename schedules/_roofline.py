"""Seconds of a call by roofline: the slower of moving its bytes and doing its arithmetic, plus its launches.

`cpu` is one core of a current x86 server (measured on an EPYC with AVX-512), `sm_90a` one H200: the numbers rank
schedules, they do not predict. A launch counts what Python and the kernel's own entry cost at batch 1, or, on a GPU,
the gap between two kernels of one CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.schedules._schedule import Work


@dataclass(frozen=True)
class Machine:
    """Peak rates of a target, and seconds to launch one call of each kind."""

    bytes_per_s: float
    flops_per_s: dict[str, float]
    launch_s: dict[str, float]


MACHINES = {
    "cpu": Machine(
        bytes_per_s=40e9,  # streaming bf16 weights from L3: 50-60 GB/s alone, less beside another core
        flops_per_s={"fp32": 220e9},  # packed float32 GEMM reaches 190 GFLOPS a core
        launch_s={"cpp": 0.1e-6, "aten": 3e-6},
    ),
    "sm_90a": Machine(
        bytes_per_s=4.3e12,  # device-to-device copy, bytes read plus bytes written
        # vector units: 132 SMs x 128 lanes x 2 x 1.75 GHz; matrix units: 8192^3 products on random data
        flops_per_s={"fp32": 59e12, "bf16": 780e12, "fp8": 1400e12},
        launch_s={"gpu": 1.5e-6, "aten": 2e-6},
    ),
}


def seconds(work: Work, target: str) -> float:
    """Roofline time of one call on `target`."""
    return busy_seconds(work, target) + work.launches * MACHINES[target].launch_s[work.launch]


def busy_seconds(work: Work, target: str) -> float:
    """The part of it during which the call keeps the whole machine busy."""
    machine = MACHINES[target]
    rate = machine.flops_per_s[work.unit] * work.efficiency
    return max(work.bytes_moved / machine.bytes_per_s, work.flops / rate)
