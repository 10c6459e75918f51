"""Linear workloads: every weight of flash, pro and nano at decode and prefill batches.

Weights that read the same activation are one weight, as the fused program stacks them. Random data: E4M3 blocks that
use the format's whole range, a power-of-two scale for each; rows of very different size.

Legend: T tokens, N output channels, K input channels, G groups, S = K / 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4c.config import preset
from dsv4c.ops.formats import quantise_rows
from dsv4c.ops.linears import linear_mixed
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload

GROUP = 128  # channels that share a scale, of activations and (squared) of weights
_REFERENCE_BYTES = 1 << 30  # float32 weight rows widened at once by a reference


@dataclass(frozen=True)
class Shape:
    """One weight: `groups` > 1 is grouped_linear_fp8 with N rows a group, `mixed` is linear_mixed."""

    model: str
    name: str
    n: int
    k: int
    groups: int = 1
    mixed: bool = False

    @property
    def op(self) -> str:
        if self.mixed:
            return "linear_mixed"
        return "linear_fp8" if self.groups == 1 else "grouped_linear_fp8"

    def node(self) -> OpNode:
        n, k, groups = self.n, self.k, self.groups
        if self.mixed:
            x, weight = Value(("T", k), "bfloat16"), Value((n, k), "bfloat16", "weight")
            return OpNode(self.op, {}, (x, weight), (Value(("T", n), "float32"),))
        lead: tuple[int | str, ...] = ("T",) if groups == 1 else ("T", groups)
        weight = Value((groups * n, k), "float8_e4m3fn", "weight")
        scale = Value((_blocks(groups * n), _blocks(k)), "float32", "weight")
        inputs = (Value((*lead, k), "float8_e4m3fn"), Value((*lead, _blocks(k)), "float32"), weight, scale)
        attrs = {} if groups == 1 else {"groups": groups}
        return OpNode(self.op, attrs, inputs, (Value(("T", groups * n), "bfloat16"),))

    def make(self, tokens: int, generator: torch.Generator) -> Args:
        """Fresh inputs on the generator's device."""
        device, rows = generator.device, self.groups * self.n
        lead = (tokens,) if self.groups == 1 else (tokens, self.groups)
        x = torch.randn(*lead, self.k, generator=generator, device=device)
        x = x * torch.exp2(4 * torch.rand(*lead, 1, generator=generator, device=device) - 2)
        if self.mixed:
            weight = torch.empty(rows, self.k, dtype=torch.bfloat16, device=device)
            return [x.to(torch.bfloat16), weight.normal_(0, self.k**-0.5, generator=generator)]
        data, scale = quantise_rows(x.to(torch.bfloat16), group=GROUP)
        weight = torch.empty(rows, self.k, dtype=torch.bfloat16, device=device).normal_(0, 100, generator=generator)
        exponent = torch.randint(-14, -10, (_blocks(rows), _blocks(self.k)), generator=generator, device=device)
        return [data, scale, weight.clamp_(-448, 448).to(torch.float8_e4m3fn), torch.exp2(exponent.float())]

    def bytes_moved(self, tokens: int) -> float:
        """Least bytes of one call."""
        rows, k = self.groups * self.n, self.groups * self.k
        if self.mixed:
            return 2.0 * (tokens * k + rows * k) + 4.0 * tokens * rows
        scales = 4.0 * (tokens * k / GROUP + _blocks(rows) * _blocks(self.k))
        return tokens * k + rows * self.k + scales + 2.0 * tokens * rows


def _blocks(size: int) -> int:
    return -(-size // GROUP)


def shapes(model: str) -> tuple[Shape, ...]:
    """Every linear map of a preset, stacked as the fused program does."""
    c = preset(model)
    d, heads, rank = c.hidden_size, c.num_attention_heads * c.head_dim, c.q_lora_rank
    index, inner = c.index_n_heads * c.index_head_dim, c.moe_intermediate_size
    # k and gate of two streams, main and index compressor, and the indexer's weights
    csa = 4 * c.head_dim + 4 * c.index_head_dim + c.index_n_heads
    return (
        Shape(model, "wq_a+wkv", rank + c.head_dim, d),
        Shape(model, "wq_b", heads, rank),
        Shape(model, "wq_b+index", heads + index, rank),
        Shape(model, "wo_a", c.o_lora_rank, heads // c.o_groups, groups=c.o_groups),
        Shape(model, "wo_b", d, c.o_groups * c.o_lora_rank),
        Shape(model, "w1+w3", 2 * inner, d),
        Shape(model, "w2", d, inner),
        Shape(model, "csa_compress", csa, d, mixed=True),
        Shape(model, "hca_compress", 2 * c.head_dim, d, mixed=True),
        Shape(model, "gate", c.n_routed_experts, d, mixed=True),
        Shape(model, "lm_head", c.vocab_size, d, mixed=True),
    )


def _reference_fp8(data: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, **attrs: Any) -> Tensor:
    """The op's reference, some output channels at a time."""
    groups = int(attrs.get("groups", 1))
    rows = weight.shape[0] // groups
    step = max(GROUP, _REFERENCE_BYTES // (4 * weight.shape[1]) // GROUP * GROUP)
    out = torch.empty(data.shape[0], weight.shape[0], dtype=torch.bfloat16, device=data.device)
    wide = data.float().unflatten(-1, (scale.shape[-1], GROUP)) * scale.unsqueeze(-1)
    x = wide.reshape(data.shape[0], groups, weight.shape[1])
    for group in range(groups):
        for first in range(group * rows, (group + 1) * rows, step):
            last = min(first + step, (group + 1) * rows)
            part = weight_scale[first // GROUP : _blocks(last)].repeat_interleave(GROUP, 0)
            part = part.repeat_interleave(GROUP, 1)[: last - first, : weight.shape[1]]
            out[:, first:last] = (x[:, group] @ (weight[first:last].float() * part).T).to(torch.bfloat16)
    return out


def _baselines(shape: Shape) -> dict[str, Callable[[Args], Callable[[], object]]]:
    def bf16(args: Args) -> Callable[[], object]:
        """The same product with everything in bfloat16 (half the speed limit, no scales)."""
        x, weight = args[0], args[-1 if shape.mixed else 2]
        assert x is not None and weight is not None
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        if shape.groups == 1:
            return lambda: torch.mm(x, weight.t())
        x_GTK, weight_GKN = x.transpose(0, 1), weight.unflatten(0, (shape.groups, -1)).transpose(1, 2)
        return lambda: torch.bmm(x_GTK, weight_GKN)

    def fp8(args: Args) -> Callable[[], object]:
        """cuBLASLt with the same block scales, given whole fours of rows and their scales in the order it wants."""
        data, scale, weight, weight_scale = args
        assert data is not None and scale is not None and weight is not None and weight_scale is not None
        padding = -data.shape[0] % 4
        data = torch.cat((data, data[:1].expand(padding, -1)))
        by_column = torch.cat((scale, scale[:1].expand(padding, -1))).t().contiguous().t()
        return lambda: torch._scaled_mm(data, weight.t(), by_column, weight_scale.t(), out_dtype=torch.bfloat16)

    # cuBLASLt wants rows of weight scales at multiples of 16 bytes
    if shape.mixed or shape.groups > 1 or shape.k % (4 * GROUP):
        return {"torch bf16": bf16}
    return {"torch bf16": bf16, "cuBLASLt fp8": fp8}


def workload(shape: Shape, tokens: int, *, bench: bool = True) -> Workload:
    """The workload of one weight at a number of tokens."""
    phase = "decode" if tokens <= 512 else "prefill"  # the largest decode bucket
    return Workload(
        label=f"{shape.model} {shape.name} {phase} {tokens}",
        node=shape.node(),
        symbols={"T": tokens},
        make=lambda generator: shape.make(tokens, generator),
        bytes_moved=shape.bytes_moved(tokens),
        flops=2.0 * tokens * shape.groups * shape.n * shape.k,
        unit="bf16" if shape.mixed else "fp8",
        reference=linear_mixed if shape.mixed else _reference_fp8,
        baselines=_baselines(shape),
        purpose=frozenset({"check", "bench"}) if bench else frozenset({"check"}),
    )


_TOKENS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
_HEAD_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512)  # only sampled rows reach lm_head


def _all(model: str, tokens: Sequence[int]) -> list[Workload]:
    out = []
    for shape in shapes(model):
        head = shape.name == "lm_head"
        sizes = [t for t in tokens if not head or t in _HEAD_TOKENS]
        out += [workload(shape, t, bench=model != "nano") for t in sizes]
    return out


def workloads() -> tuple[Workload, ...]:
    edges = [workload(shape, t, bench=False) for shape in shapes("flash") for t in (0, 3, 65, 129)]
    long = [workload(shape, 16384) for shape in shapes("flash") if shape.name in ("wq_b", "wo_b", "w1+w3")]
    return (
        *_all("nano", (0, 1, 3, 64, 65, 300)),
        *_all("flash", _TOKENS),
        *_all("pro", (1, 64, 256, 8192)),
        *edges,
        *long,
    )
