"""Constants of kernels, calibrated on an H200, and seconds of a stage on any machine.

`sm_90a.json` is written by `python benchmarks/predicted.py --calibrate` from half of the measured rows. For another
machine a kernel keeps its shares, its `fixed` and its `round`; the machine's rates are those of schedules/_roofline.py.
A kernel that reaches less than `_ISSUE` of the matrix units is held up by what its multiprocessors issue, and scales by
their number and clock. A kernel of tcgen05 that was never run takes the constants of its like on the H200.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv4c.errors import ScheduleError
from dsv4c.schedules._roofline import MACHINES
from dsv4c.schedules.predict._stage import Card, Stage

FILE = Path(__file__).parent / "sm_90a.json"
_POWER = 4.0  # of the norm that joins memory, cache and arithmetic: they overlap, but for the parts where both are busy
_CACHE = 11e12  # bytes/s of an H200's L2: its own FP8 products of 128 x 128 tiles read 10.2 TB/s from it
_CLOCK = {"sm_90a": 1.755, "sm_100a": 1.85, "sm_103a": 1.92}  # GHz; boost, as NVIDIA's tools report them
_CACHE_SIZE = {"sm_90a": 50e6, "sm_100a": 126e6, "sm_103a": 126e6}  # bytes, NVIDIA's tools and data sheets
_ISSUE = 0.3
_HALF = 0.5
_LAUNCH = 1e-6  # the least that one kernel after another takes within a graph (H200)

Bound = Literal["expected", "stated", "half"]
"""`expected`: H200's shares. `stated`: what the maker states, nothing exposed but launches. `half`: kernels that were
never measured reach half of their likes' shares."""

LIKES: Mapping[str, str] = {
    "linear.few_fp8.tcgen05": "linear.few_fp8",
    "linear.few_bf16.tcgen05": "linear.few_bf16",
    "linear.many_fp8.tcgen05": "linear.many_fp8.128x128",
    "linear.many_bf16.tcgen05": "linear.many_bf16.128x128",
    **{f"attend.wide.{where}": f"attend.groups.{where}" for where in ("decode", "window", "csa", "hca")},
    **{f"index.tiles_{form}": f"index.pages_{form}" for form in ("fp8", "fp4")},
    **{f"index.runs_{form}": f"index.keys_{form}" for form in ("fp8", "fp4")},
    "experts.few.tcgen05": "experts",
    "experts.many.tcgen05": "experts",
    "compress.window_1x8": "compress.window_decode",
    "compress.online_1x4": "compress.online_1x8",
    "compress.online_1x2": "compress.online_1x8",
    "topk.long64": "topk.long512",
    "sample_penalised.greedy": "sample.greedy",
    "sample_drafted.greedy": "sample.greedy",
}
"""Kernel that was never measured -> the measured one whose constants it takes."""

_STATED: Mapping[str, tuple[float, Mapping[str, float]]] = {
    "sm_90a": (4.8e12, {"fp32": 67e12, "bf16": 0.99e15, "fp8": 1.98e15}),
    "sm_100a": (8e12, {"fp32": 75e12, "bf16": 2.25e15, "fp8": 4.5e15, "fp4": 9e15}),
    "sm_103a": (8e12, {"fp32": 80e12, "bf16": 2.5e15, "fp8": 5e15, "fp4": 15e15}),
}
"""Bytes and operations a second of data sheets; sources in schedules/_roofline.py."""


@dataclass(frozen=True)
class Rates:
    """Of one kernel. Microseconds exposed once and in each round; shares of the copy bandwidth and of its unit."""

    fixed_us: float
    round_us: float
    memory: float
    matrix: float


def card_of(target: str) -> Card:
    """What stages need to know of a target."""
    return Card(MACHINES[target].multiprocessors, _CACHE_SIZE[target])


@functools.lru_cache(maxsize=1)
def known() -> Mapping[str, Rates]:
    """Every calibrated kernel."""
    return {name: Rates(**rates) for name, rates in json.loads(FILE.read_text(encoding="utf-8")).items()}


def measured(stage: Stage) -> bool:
    """Whether this kernel's own source was measured on an H200."""
    return stage.kernel not in LIKES


def rates_of(stage: Stage, rates: Mapping[str, Rates] | None = None) -> Rates:
    """The constants of a stage's kernel. Raises ScheduleError for one that was never calibrated."""
    table = known() if rates is None else rates
    name = LIKES.get(stage.kernel, stage.kernel)
    if name not in table:
        raise ScheduleError(
            f"kernel `{name}` has no calibrated rates", hint="`python benchmarks/predicted.py --calibrate` writes them"
        )
    return table[name]


def busy(stage: Stage, target: str, bound: Bound = "expected", rates: Mapping[str, Rates] | None = None) -> float:
    """Seconds that a stage keeps memory, cache or arithmetic busy."""
    if bound == "stated":
        bytes_per_s, peaks = _STATED[target]
        return max(stage.bytes / bytes_per_s, stage.flops / peaks[stage.unit])
    own, machine = rates_of(stage, rates), MACHINES[target]
    share = _HALF if bound == "half" and not measured(stage) else 1.0
    speed = machine.multiprocessors / MACHINES["sm_90a"].multiprocessors * _CLOCK[target] / _CLOCK["sm_90a"]
    peak = machine.flops_per_s[stage.unit]
    if own.matrix < _ISSUE and stage.unit in MACHINES["sm_90a"].flops_per_s:
        peak = MACHINES["sm_90a"].flops_per_s[stage.unit] * speed
    memory = stage.bytes / (machine.bytes_per_s * own.memory * stage.fill * share)
    cache = stage.cached / (_CACHE * speed)
    arithmetic = stage.issued / (peak * own.matrix * share)
    return float((memory**_POWER + cache**_POWER + arithmetic**_POWER) ** (1 / _POWER))


def seconds(stage: Stage, target: str, bound: Bound = "expected", rates: Mapping[str, Rates] | None = None) -> float:
    """How long a stage takes on `target`."""
    work = busy(stage, target, bound, rates)
    if bound == "stated":
        return work + _LAUNCH
    own = rates_of(stage, rates)
    return work + 1e-6 * (own.fixed_us + stage.rounds * own.round_us)
