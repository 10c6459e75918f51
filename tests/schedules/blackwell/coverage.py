"""Which check covers which of Blackwell's schedules: in the interpreter, and on an H200. Tests hold it to the registry.

`interpreter`: a script of this folder and its part, run as `python -m tests.schedules.blackwell.<script> 200 [part]`.
`card`: a part of `on_hopper`, or why an H200 cannot run the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv4c.schedules import blackwell

from . import on_hopper
from .shared_cases import shared


@dataclass(frozen=True)
class Covered:
    """The checks of one schedule."""

    script: str
    parts: tuple[str, ...]
    card: str

    @property
    def on_card(self) -> bool:
        return self.card in ("experts", *on_hopper.FAMILIES)


def _family(op: str) -> str:
    """The part of `on_hopper` that runs an op."""
    return next(family for family in on_hopper.FAMILIES for one in on_hopper.workloads_of(family) if one.op == op)


_SCHEDULES = blackwell.schedules("sm_103a")
_EXPERTS = {"experts_fp4": ("bf16",), "experts_mx": ("mxfp8", "mxfp4"), "experts_nvfp4": ("nvfp4",)}
_LINEAR = {
    "linear_fp8.triton_scaled": "linear", "grouped_linear_fp8.triton_scaled": "linear",
    "linear_mixed.triton_tiles": "linear", "gate_linear_bias.triton_tiles": "gate",
    "gate_linear_hash.triton_tiles": "gate",
}  # fmt: skip
COVERAGE: Mapping[str, Covered] = {
    **{f"{op}.triton_scaled": Covered("interpret_experts", parts, "experts") for op, parts in _EXPERTS.items()},
    **{name: Covered("interpret_linear", (name.partition(".")[0],), family) for name, family in _LINEAR.items()},
    "linear_fp8.tilelang_pairs": Covered("emulate_pairs", (), on_hopper.NOT_HERE["linear_fp8.tilelang_pairs"]),
    **{
        f"attend_{kind}_packed.triton_wide": Covered("interpret_attention", ("widen", "attention"), "attention")
        for kind in ("window", "csa", "hca")
    },
    **{f"index_scores.triton_{way}": Covered("interpret_index", ("fp8", "fp4"), "index") for way in ("tiles", "runs")},
    **{s.name: Covered("interpret_hyper", (s.op,), "hyper") for s in _SCHEDULES if s.name.endswith(".triton_cluster")},
    **{s.name: Covered("interpret_shared", (s.name,), _family(s.op)) for s in shared(_SCHEDULES)},
}
