"""Seconds of a call by roofline: the slower of moving its bytes and doing its arithmetic, plus its launches.

`cpu` is one core of a current x86 server (measured on an EPYC with AVX-512), `sm_90a` one H200: the numbers rank
schedules, they do not predict. A launch counts what Python and the kernel's own entry cost at batch 1, or, on a GPU,
the gap between two kernels of one CUDA graph.

`sm_100a` (B200) and `sm_103a` (GB300) are not measured here: their rates are what NVIDIA states, times the share that
an H200 reaches of what NVIDIA states for it. Sources, by figure:

    bytes      B200 7.67 TB/s: 7,680 bits at 3,996 MHz, read from a card (pytorch/ao#4002; the data sheet says 8);
               GB300 8 TB/s (NVIDIA, "Inside NVIDIA Blackwell Ultra"). H200: 4.8 TB/s stated, 4.3 measured, 0.9 of it
    bf16, fp8  B200 2.25 and 4.5 PFLOPS dense, GB300 2.5 and 5 (NVIDIA's data sheets). H200: 0.99 and 1.98 stated,
               0.78 and 1.4 measured, 0.79 and 0.71 of them
    fp4        B200 9 PFLOPS dense, GB300 15, 1.5 times 10 (the same); no measured card has FP4: 0.71 as for FP8
    memory     B200 192 GB, GB300 288 GB of HBM3e (the same); usable: 180 and 278 GB
    fp32       148 multiprocessors x 128 lanes x 2 x 1.85 GHz, 75 to 80 TFLOPS stated
    blocks     a B200 and a B300 have 148 multiprocessors (pytorch/ao#4002), GB200 and GB300 up to 152 of 160: grids
               are made for 148, which all of them have
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
    multiprocessors: int = 1
    """Of a GPU: what grids and tiles are made for."""
    memory_bytes: int = 0
    """Of a GPU; 0: the machine says."""
    measured: bool = True
    """Whether the rates were measured on the card, or derived from what its maker states."""


_BLACKWELL_LAUNCH = {"gpu": 1.5e-6, "aten": 2e-6}  # as measured on an H200

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
        multiprocessors=132,  # of an H100 or H200 SXM
        memory_bytes=141 * 10**9,
    ),
    "sm_100a": Machine(
        bytes_per_s=0.9 * 7.67e12,
        flops_per_s={"fp32": 70e12, "bf16": 0.79 * 2.25e15, "fp8": 0.71 * 4.5e15, "fp4": 0.71 * 9e15},
        launch_s=_BLACKWELL_LAUNCH,
        multiprocessors=148,
        memory_bytes=180 * 10**9,
        measured=False,
    ),
    "sm_103a": Machine(
        bytes_per_s=0.9 * 8e12,
        flops_per_s={"fp32": 70e12, "bf16": 0.79 * 2.5e15, "fp8": 0.71 * 5e15, "fp4": 0.71 * 15e15},
        launch_s=_BLACKWELL_LAUNCH,
        multiprocessors=148,
        memory_bytes=278 * 10**9,
        measured=False,
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
