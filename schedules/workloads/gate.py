"""Gate workloads: router logits of flash, pro and nano, and the router's product with its gate.

A few rows hold NaN, infinities and long runs of equal logits: their experts must still be distinct and valid, ties
must fall to the earlier expert. Other float32 sums may rank two almost equal experts differently, so results are
judged by the scores of the experts chosen, not by their ids.

Legend: T tokens, E experts, K chosen experts, D hidden_size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4c.config import ModelConfig
from dsv4c.ops.linears import linear_mixed
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload, config_of


@dataclass(frozen=True)
class Case:
    """One gate: by bias or by hash, on logits or with the router's product."""

    model: str | ModelConfig
    kind: str
    product: bool

    @property
    def op(self) -> str:
        return f"gate_{'linear_' if self.product else ''}{self.kind}"

    def node(self) -> OpNode:
        c = config_of(self.model)
        experts, topk = c.n_routed_experts, c.num_experts_per_tok
        attrs: dict[str, Any] = {"scaling": c.routed_scaling_factor}
        inputs = [Value(("T", experts), "float32")]
        if self.product:
            inputs = [
                Value(("T", c.hidden_size), "bfloat16"),
                Value((experts, c.hidden_size), "bfloat16", "weight"),
            ]
        if self.kind == "bias":
            attrs["topk"] = topk
            inputs.append(Value((experts,), "float32", "weight"))
        else:
            inputs += [Value(("T",), "int64", "input"), Value((c.vocab_size, topk), "int64", "weight")]
        return OpNode(self.op, attrs, tuple(inputs), (Value(("T", topk), "int32"), Value(("T", topk), "float32")))

    def make(self, tokens: int, generator: torch.Generator) -> Args:
        c, device = config_of(self.model), generator.device
        experts, topk, dim = c.n_routed_experts, c.num_experts_per_tok, c.hidden_size
        args: Args
        if self.product:
            x = torch.randn(tokens, dim, generator=generator, device=device).to(torch.bfloat16)
            weight = torch.randn(experts, dim, generator=generator, device=device) * 2 * dim**-0.5
            args = [x, weight.to(torch.bfloat16)]
        else:
            logits = torch.randn(tokens, experts, generator=generator, device=device) * 2
            _spoil(logits)
            args = [logits]
        if self.kind == "bias":
            # a step of 1/64 makes exact ties of equal logits and biases
            return [*args, (torch.randn(experts, generator=generator, device=device) * 8).round() / 64]
        table = torch.rand(c.vocab_size, experts, generator=generator, device=device).argsort(-1)[:, :topk]
        ids = torch.randint(0, c.vocab_size, (tokens,), generator=generator, device=device)
        return [*args, ids, table.contiguous()]


def _spoil(logits: Tensor) -> None:
    """Rows of the hard kinds, spread over the batch; the first row of a batch stays ordinary."""
    hard: Sequence[Callable[[Tensor], object]] = (
        lambda row: row.fill_(0.5),
        lambda row: row.fill_(math.nan),
        lambda row: row[::3].fill_(math.nan),
        lambda row: row[5:].fill_(-math.inf),
        lambda row: row.mul_(0).sub_(200),
        lambda row: row.round_(),
        lambda row: row.mul_(30),
    )
    for i, change in enumerate(hard):
        if i + 1 < logits.shape[0]:
            change(logits[(i + 1) * logits.shape[0] // (len(hard) + 1)])


def scores_and_ranks(op: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """float64: all experts' scores, and the ranks they are chosen by; for a hash gate, the ids that the table names."""
    logits, rest = tensors[0], tensors[1:]
    if "linear" in op:
        logits, rest = linear_mixed(tensors[0], tensors[1]), tensors[2:]
    scores = F.softplus(logits.double()).sqrt()
    if op.endswith("bias"):
        return scores, scores + rest[0].double()
    return scores, rest[1][rest[0]].double()


def choice_error(op: str, scaling: float, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of: what the chosen experts' ranks lose to the best ones', and the error of the weights.

    `expected` are scores and ranks.
    """
    ids, weight = outputs[0].long(), outputs[1].double()
    scores, by = expected
    if not ids.numel():
        return 0.0
    ordered = ids.sort(-1).values
    if ids.min() < 0 or ids.max() >= scores.shape[1] or bool((ordered.diff(dim=-1) == 0).any()):
        return math.inf
    if op.endswith("hash"):
        loss = 0.0 if torch.equal(ids, by.long()) else math.inf
    else:
        ranks = by.masked_fill(by.isnan(), math.inf)
        best, mine = ranks.topk(ids.shape[1]).values, ranks.gather(1, ids).sort(-1, descending=True).values
        apart = torch.where(best == mine, 0.0, best - mine)
        loss = apart.abs().max().item()
        tied = best[:, :1] == ranks.gather(1, ids)
        if bool((tied.all(-1) & (ids.diff(dim=-1) < 0).any(-1)).any()):
            return math.inf  # among equals the earlier comes first
    chosen = scores.gather(1, ids)
    right = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scaling
    if not torch.equal(right.isnan(), weight.isnan()):
        return math.inf
    return max(loss, ((right - weight).abs().nan_to_num().max() / scaling).item())


def workload(case: Case, tokens: int, *, bench: bool) -> Workload:
    """The workload of a gate at a number of tokens."""
    c = config_of(case.model)
    experts, topk, dim = c.n_routed_experts, c.num_experts_per_tok, c.hidden_size
    read = 2.0 * (tokens + experts) * dim if case.product else 4.0 * tokens * experts
    if not case.product and case.kind == "hash":
        read = 4.0 * tokens * topk
    extra = 8.0 * tokens * (1 + topk) if case.kind == "hash" else 4.0 * experts
    return Workload(
        label=f"{case.model} {case.kind} {'decode' if tokens <= 512 else 'prefill'} {tokens}",
        node=case.node(),
        symbols={"T": tokens},
        make=lambda generator: case.make(tokens, generator),
        bytes_moved=read + extra + 8.0 * tokens * topk,
        flops=2.0 * tokens * experts * dim if case.product else 0.0,
        reference=lambda *tensors, **attrs: scores_and_ranks(case.op, tensors),
        error=functools.partial(choice_error, case.op, config_of(case.model).routed_scaling_factor),
        purpose=frozenset({"check", "bench"}) if bench else frozenset({"check"}),
    )


def workloads() -> tuple[Workload, ...]:
    out = []
    for model in ("nano", "flash", "pro"):
        for kind in ("bias", "hash"):
            for product in (False, True):
                case = Case(model, kind, product)
                sizes = (1, 64, 256) if product else (1, 64, 256, 2048, 8192)
                out += [workload(case, t, bench=model != "nano") for t in sizes]
                out += [workload(case, t, bench=False) for t in (0, 3, 65)]
    return tuple(out)
