"""Marks every weight with the format in which the checkpoint stores it; the artifact keeps it so.

    %weight.layers.2.attn.wq_b.weight : f32[512, 128]  ->  ... stored fp8
    %weight.layers.2.ffn.experts.w1 : f32[16, 128, 256]  ->  ... stored fp4

A schedule then says where a weight is widened: in the kernel, or when it is loaded. Widening is exact (values times
powers of two); activations are not quantised here, so no bit of any result changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsv4c.errors import PassError
from dsv4c.pipeline import Pass
from dsv4c.program import Program
from dsv4c.weights import stored_formats


@dataclass(frozen=True)
class Quantise(Pass):
    name: ClassVar[str] = "quantise"
    needs: ClassVar[frozenset[str]] = frozenset({"stitched"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantised"})

    formats: Mapping[str, str] | None = None
    """Weight of the plain model -> `fp8` (128 x 128 blocks), `fp4` (groups of 32), `bf16`, `f32` or `i64`.
    None: as checkpoints of the program's model usually store them."""

    def apply(self, program: Program) -> int:
        stored = stored_formats(program.config) if self.formats is None else self.formats
        count = 0
        for node in program.nodes():
            if node.op != "placeholder" or node.meta["value"].kind != "weight":
                continue
            name = node.meta["value"].name
            formats = []
            for source in program.weight_sources.get(name, (name,)):
                if source not in stored:
                    raise PassError(f"weight `{source}` has no stored format", hint="is it in the checkpoint's names?")
                formats.append(stored[source])
            node.meta["stored"] = "+".join(dict.fromkeys(formats))
            count += 1
        return count
