"""Mixture of experts: square-root-softplus gate (by bias or by a token's hash), routed experts, a shared expert.

Source: model.md 2.12. The routing weight is applied before w2; the gate's input is clamped from above only.

Legend: T tokens, D hidden_size, E `n_routed_experts`, K `num_experts_per_tok`, I `moe_intermediate_size`, V vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4c.config import ModelConfig
from dsv4c.model.linear import Linear


def _normalised(scores_TE: Tensor, experts_TK: Tensor, scaling: float) -> Tensor:
    chosen = scores_TE.gather(1, experts_TK)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scaling


def gate_bias(logits_TE: Tensor, bias_E: Tensor, *, topk: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The K experts with the highest sqrt(softplus(logit)) + bias, and their normalised, scaled scores (float32).

    The bias selects only. The earlier expert wins a tie.
    """
    scores = F.softplus(logits_TE).sqrt()
    order = (scores + bias_E).sort(dim=-1, descending=True, stable=True).indices
    experts = order[:, :topk].contiguous()
    return experts, _normalised(scores, experts, scaling)


def gate_hash(logits_TE: Tensor, token_ids: Tensor, tid2eid_VK: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """The experts that a token's id names, and their normalised, scaled scores (float32)."""
    experts = tid2eid_VK[token_ids]
    return experts, _normalised(F.softplus(logits_TE).sqrt(), experts, scaling)


def swiglu(gate: Tensor, up: Tensor, *, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), float32 inside."""
    return (F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)).to(gate.dtype)


def experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    weight_TK: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    shared_TD: Tensor,
    *,
    limit: float,
) -> Tensor:
    """shared + sum over a token's experts of w2 (weight * swiglu(w1 x, w3 x)), summed in float32."""
    gate = torch.einsum("td,tkid->tki", x_TD, w1_EID[experts_TK])
    up = torch.einsum("td,tkid->tki", x_TD, w3_EID[experts_TK])
    hidden = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)
    hidden = (hidden * weight_TK.unsqueeze(-1)).to(x_TD.dtype)
    routed = torch.einsum("tki,tkdi->tkd", hidden, w2_EDI[experts_TK])
    return (shared_TD.float() + routed.float().sum(1)).to(x_TD.dtype)


class GateBias(nn.Module):
    def __init__(self, topk: int, scaling: float) -> None:
        super().__init__()
        self.topk, self.scaling = topk, scaling

    def forward(self, logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        return gate_bias(logits_TE, bias_E, topk=self.topk, scaling=self.scaling)


class GateHash(nn.Module):
    def __init__(self, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling

    def forward(self, logits_TE: Tensor, token_ids: Tensor, tid2eid_VK: Tensor) -> tuple[Tensor, Tensor]:
        return gate_hash(logits_TE, token_ids, tid2eid_VK, scaling=self.scaling)


class Swiglu(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up, limit=self.limit)


class Gate(Linear):
    """The router: a float32 linear map, and the table or bias that its kind of gate needs."""

    tid2eid: Tensor

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__(config.hidden_size, config.n_routed_experts, float32=True)
        if kind == "hash":
            table = torch.rand(config.vocab_size, config.n_routed_experts).argsort(-1)
            self.register_buffer("tid2eid", table[:, : config.num_experts_per_tok].contiguous())
        else:
            self.bias = nn.Parameter(torch.zeros(config.n_routed_experts))


class SharedExpert(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.moe_intermediate_size * config.n_shared_experts
        self.w1 = Linear(config.hidden_size, inner)
        self.w2 = Linear(inner, config.hidden_size)
        self.w3 = Linear(config.hidden_size, inner)
        self.act = Swiglu(config.swiglu_limit)

    def forward(self, x_TD: Tensor) -> Tensor:
        out: Tensor = self.w2(self.act(self.w1(x_TD), self.w3(x_TD)))
        return out


class Experts(nn.Module):
    """All routed experts, stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, inner, dim = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.w1 = nn.Parameter(torch.empty(count, inner, dim).normal_(0, dim**-0.5))
        self.w2 = nn.Parameter(torch.empty(count, dim, inner).normal_(0, inner**-0.5))
        self.w3 = nn.Parameter(torch.empty(count, inner, dim).normal_(0, dim**-0.5))
        self.limit = config.swiglu_limit

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weight_TK: Tensor, shared_TD: Tensor) -> Tensor:
        return experts(x_TD, experts_TK, weight_TK, self.w1, self.w3, self.w2, shared_TD, limit=self.limit)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate = Gate(config, kind)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)
        if kind == "hash":
            self.choose: nn.Module = GateHash(config.routed_scaling_factor)
        else:
            self.choose = GateBias(config.num_experts_per_tok, config.routed_scaling_factor)

    def forward(self, x_TD: Tensor, token_ids: Tensor) -> Tensor:
        logits = self.gate(x_TD)
        if self.kind == "hash":
            chosen, weight = self.choose(logits, token_ids, self.gate.tid2eid)
        else:
            chosen, weight = self.choose(logits, self.gate.bias)
        out: Tensor = self.experts(x_TD, chosen, weight, self.shared_experts(x_TD))
        return out
