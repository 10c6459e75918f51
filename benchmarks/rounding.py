"""Programs whose experts round their activations in ways that no pass offers, and weights rounded behind a rotation.

%1 = dsv4.experts(%x, ...)   ->   %1 = dsv4.experts_rounded(%x, ...) {x=.., hidden=..}

A rotation is a Hadamard transform of blocks of 16, 32 or 128 channels. Activations are rotated, rounded and rotated
back, and so are weights along their input channels: the products are those of both rotated, and all else stays as it
is. float32 rotates to 1e-7, which counts as nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from dsv4c.model.quant import hadamard, round_e2m1
from dsv4c.numerics import Runs
from dsv4c.ops import OPS, TensorType
from dsv4c.ops._op import Op
from dsv4c.ops.formats import dequantise_fp4
from dsv4c.ops.mx import LARGEST, experts_of, rounded_mx
from dsv4c.passes._storing import stored_pair
from dsv4c.program import Program, is_op, types_of

E4M3, E2M1 = LARGEST["mxfp8"], LARGEST["nvfp4"]
WHICH = ("w1", "w3", "w2")


def rotated(x: Tensor, size: int) -> Tensor:
    """float32 x, every block of `size` channels transformed; 0: as it is. Its own inverse."""
    return hadamard(x.float().unflatten(-1, (-1, size))).flatten(-2) if size else x.float()


def floored(x: Tensor) -> Tensor:
    """MXFP4 as OCP's specification converts: the scale is amax's power of two over 4, and what is above 6 saturates."""
    wide = x.float().unflatten(-1, (-1, 32))
    most = wide.abs().amax(-1, keepdim=True).clamp(min=2.0**-124)
    scale = torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent - 3)
    return (round_e2m1((wide / scale).clamp(-6, 6)) * scale).flatten(-2)


@dataclass(frozen=True)
class Rounding:
    """float32 rows as a format holds them behind a rotation; `factor` is NVFP4's for the tensor."""

    fmt: str
    hadamard: int = 0
    factor: float = 1.0

    def __call__(self, x: Tensor, expert: int = 0) -> Tensor:
        if self.fmt == "float32":
            return x
        if self.fmt == "bf16":
            return x.bfloat16().float()
        wide = rotated(x, self.hadamard)
        found = floored(wide) if self.fmt == "mxfp4-floor" else rounded_mx(wide, self.fmt, self.factor)  # type: ignore[arg-type]
        return rotated(found, self.hadamard)


@dataclass
class Largest:
    """Rounds nothing and remembers the largest magnitude behind a rotation."""

    hadamard: int
    value: float = 0.0

    def __call__(self, x: Tensor, expert: int = 0) -> Tensor:
        if x.numel():
            self.value = max(self.value, float(rotated(x, self.hadamard).abs().max()))
        return x


@dataclass(frozen=True)
class Experts:
    """Formats of the two products' activations, the blocks of their rotation, and which scopes (`only`: all)."""

    x: str
    hidden: str
    hadamard: int = 0
    only: tuple[str, ...] = ("*",)

    def said(self) -> dict[str, Any]:
        """For a row."""
        out: dict[str, Any] = {"activations": self.x if self.x == self.hidden else f"{self.x}, {self.hidden}"}
        if self.hadamard:
            out["hadamard"] = self.hadamard
        return {**out, **({} if self.only == ("*",) else {"only": list(self.only)})}


def _rounded(
    x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, shared_TD: Tensor, *,
    limit: float, x: Any, hidden: Any,
) -> Tensor:  # fmt: skip
    pairs = (w1, w3, w2)
    return experts_of(x_TD, chosen_TK, weight_TK, lambda i, e: pairs[i][e], shared_TD, limit, x, hidden)


def _rounded_fp4(
    x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor, w2: Tensor,
    s2: Tensor, shared_TD: Tensor, *, limit: float, x: Any, hidden: Any,
) -> Tensor:  # fmt: skip
    pairs = ((w1, s1), (w3, s3), (w2, s2))

    def weight(which: int, expert: int) -> Tensor:
        data, scale = pairs[which]
        return dequantise_fp4(data[expert], scale[expert])

    return experts_of(x_TD, chosen_TK, weight_TK, weight, shared_TD, limit, x, hidden)


_OPS = {"experts": Op("experts_rounded", _rounded), "experts_fp4": Op("experts_rounded_fp4", _rounded_fp4)}


def _calls(program: Program) -> list[tuple[fx.Graph, fx.Node]]:
    return [(g, n) for g in program.graphs.values() for n in g.nodes if is_op(n, "experts") or is_op(n, "experts_fp4")]


def _replace(program: Program, roundings: Mapping[str, tuple[Any, Any]]) -> Program:
    """A copy whose experts in these scopes round so, and in others not at all."""
    out, plain = program.clone(), Rounding("float32")
    for graph, node in _calls(out):
        x, hidden = roundings.get(node.meta["scope"], (plain, plain))
        with graph.inserting_before(node):
            new = graph.call_function(_OPS[node.target.name], node.args, {**node.kwargs, "x": x, "hidden": hidden})
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return out


def rounded_experts(program: Program, experts: Experts, factors: Mapping[tuple[str, str], float]) -> Program:
    """A copy of a lowered program that rounds so; `factors`: NVFP4's by scope and product (`x`, `hidden`)."""
    chosen = {}
    for _, node in _calls(program):
        scope = node.meta["scope"]
        if any(fnmatchcase(scope, pattern) for pattern in experts.only):
            chosen[scope] = tuple(
                Rounding(fmt, experts.hadamard, factors.get((scope, which), 1.0))
                for which, fmt in (("x", experts.x), ("hidden", experts.hidden))
            )
    return _replace(program, chosen)  # type: ignore[arg-type]


def activation_factors(program: Program, hadamard: int, runs: Runs) -> dict[tuple[str, str], float]:
    """By scope and product: the largest magnitude of a run over the largest that NVFP4 holds."""
    seen = {node.meta["scope"]: (Largest(hadamard), Largest(hadamard)) for _, node in _calls(program)}
    runs.results(_replace(program, seen))
    return {
        (scope, which): max(one.value, 2.0**-100) / (E2M1 * E4M3)
        for scope, pair in seen.items()
        for which, one in zip(("x", "hidden"), pair, strict=True)
    }


def stored_experts(program: Program) -> Program:
    """A copy of a float32 program whose experts read FP4 as stored; all else stays, and so does every value."""
    out = program.clone()
    for graph, node in _calls(out):
        x, chosen, weight, w1, w3, w2, shared = node.args
        pairs = [part for one in (w1, w3, w2) for part in stored_pair(out, graph, one, "fp4")]
        with graph.inserting_before(node):
            new = graph.call_function(OPS["experts_fp4"], (x, chosen, weight, *pairs, shared), dict(node.kwargs))
        new.meta = {**node.meta, "type": TensorType(types_of(node)[0].shape, "float32")}
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return out


def weights_of(weights: Mapping[str, Tensor], fmt: str, hadamard: int) -> dict[str, Tensor]:
    """The experts' float32 weights by name as `fmt` holds them behind a rotation, rotated back; `stored`: none.

    NVFP4's factor of every expert is its largest magnitude over the largest that the format holds.
    """
    names = [n for n, w in weights.items() if n.endswith(WHICH) and ".experts." in n and w.dtype == torch.float32]
    return {} if fmt == "stored" else {name: _weight(weights[name], fmt, hadamard) for name in names}


def _weight(w_ENK: Tensor, fmt: str, hadamard: int) -> Tensor:
    def one(w: Tensor) -> Tensor:
        factor = float(w.abs().max()) / (E2M1 * E4M3)
        return rounded_mx(w, fmt, factor if fmt == "nvfp4" else 1.0)  # type: ignore[arg-type]

    return rotated(torch.stack([one(w) for w in rotated(w_ENK, hadamard)]), hadamard)
