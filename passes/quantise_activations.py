"""Routed experts round their activations to what the matrix units of Blackwell multiply with FP4 weights.

%1 = dsv4.experts_fp4(%x, ...)   ->   %1 = dsv4.experts_mx(%x, ...) {activations=mxfp8}
%1 = dsv4.experts_nvfp4(%x, ...) {activations=bf16}   ->   %1 = dsv4.experts_nvfp4(%x, ...) {activations=nvfp4}

`mxfp8` is W4A8, `mxfp4` W4A4. Calls whose scope matches a pattern of `keep` (`L00.*`) stay W4A16: their weights are
widened to BF16, at a quarter to an eighth of the rate. NVFP4 weights are multiplied with NVFP4 activations, by
the checkpoint's `input_scale`: there is no choice, and none can be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from torch import fx

from dsv4c.errors import PassError
from dsv4c.passes._rewriting import call_before, erase
from dsv4c.pipeline import Pass
from dsv4c.program import Program, is_op, types_of

TOLERANCE = {"mxfp8": 3 * 2.0**-4, "mxfp4": 2.0**-1, "nvfp4": 2.0**-1, "bf16": 0.0}
"""Of a row of the experts' result, both products' rounding together: a channel is off by 2^-4 of itself (mxfp8) or by
2^-2 (E2M1; by all of itself far below the largest of its group), and terms cancel. Measured: docs/blackwell.md."""


@dataclass(frozen=True)
class QuantiseActivations(Pass):
    name: ClassVar[str] = "quantise-activations"
    needs: ClassVar[frozenset[str]] = frozenset({"experts-stored"})
    gives: ClassVar[frozenset[str]] = frozenset({"expert-activations-chosen"})
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 2.0**-1
    why: ClassVar[str] = (
        "activations of routed experts are rounded to MXFP8 or MXFP4 in groups of 32 channels, or to NVFP4 in groups "
        "of 16, by the input_scale of NVFP4 experts"
    )

    experts: Literal["mxfp8", "mxfp4"] | None = None
    """Of MXFP4 experts; None: mxfp8. Asked for where all experts are NVFP4, it is an error."""
    keep: tuple[str, ...] = ()
    """Patterns of scopes whose experts take BF16 activations. One that matches nothing is an error."""

    def tolerance_in(self, program: Program) -> float:
        """See Pass. By the coarsest format of the experts' activations."""
        calls = [n for n in program.nodes() if is_op(n, "experts_mx") or is_op(n, "experts_nvfp4")]
        return max((TOLERANCE[str(n.kwargs["activations"])] for n in calls), default=self.tolerance)

    def apply(self, program: Program) -> int:
        calls = [n for n in program.nodes() if is_op(n, "experts_fp4") or _wide_nvfp4(n)]
        scopes = {node: str(node.meta.get("scope", "")) for node in calls}
        for pattern in self.keep:
            if not any(fnmatchcase(scope, pattern) for scope in scopes.values()):
                raise PassError(
                    f"`{pattern}` matches no routed experts",
                    hint=f"their scopes are {', '.join(sorted(set(scopes.values())))}",
                )
        nvfp4 = [node for node in calls if not is_op(node, "experts_fp4")]
        if self.experts and nvfp4 and len(nvfp4) == len(calls):
            raise PassError(
                f"`{self.experts}` activations fit no experts: those of `{scopes[nvfp4[0]]}` and all others are NVFP4",
                hint="leave out `--activations`: NVFP4 weights are multiplied with NVFP4 activations",
            )
        kept = {node for node in calls if any(fnmatchcase(scopes[node], pattern) for pattern in self.keep)}
        for node in nvfp4:
            if node in kept:
                raise PassError(
                    f"`{scopes[node]}` cannot be kept: its experts are NVFP4, multiplied with NVFP4 activations",
                    hint="keep layers of MXFP4 experts, or take the MXFP4 checkpoint",
                )
        for node in calls:
            if node not in kept:
                self._quantise(node)
        return len(calls) - len(kept)

    def _quantise(self, node: fx.Node) -> None:
        mx = is_op(node, "experts_fp4")
        attrs = {**node.kwargs, "activations": (self.experts or "mxfp8") if mx else "nvfp4"}
        name = "experts_mx" if mx else "experts_nvfp4"
        node.replace_all_uses_with(call_before(node, name, node.args, attrs, types_of(node)[0]))
        erase(node)


def _wide_nvfp4(node: fx.Node) -> bool:
    return is_op(node, "experts_nvfp4") and node.kwargs["activations"] == "bf16"
