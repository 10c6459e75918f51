"""Workloads of the routed experts: flash, pro and nano, from one token to 16 K, even and skewed routing.

Weights are random E2M1 with scales of 2**-9 .. 2**-4, as trained weights of these sizes have.

Legend: T tokens, D hidden_size, K experts a token, E experts, I `moe_intermediate_size`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

from dsv4c.config import preset
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload

Routing = Literal["even", "skewed", "one"]


def node(model: str) -> OpNode:
    """The op as the program of a preset has it."""
    config = preset(model)
    d, i, e, k = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok
    row = Value(("T", d), "bfloat16")
    inputs = [row, Value(("T", k), "int32"), Value(("T", k), "float32")]
    for rows, channels in ((i, d), (i, d), (d, i)):
        inputs += [Value((e, rows, channels // size), "uint8", "weight") for size in (2, 32)]
    return OpNode("experts_fp4", {"limit": config.swiglu_limit}, (*inputs, row), (row,))


def make(what: OpNode, tokens: int, routing: Routing, generator: torch.Generator) -> Args:
    """Fresh inputs on the generator's device. `skewed`: a quarter of the experts get most tokens; `one`: all tokens
    choose the same experts."""
    device = generator.device
    x, chosen = what.inputs[0], what.inputs[1]
    assert x is not None and chosen is not None and what.inputs[3] is not None
    d, k, e = int(x.shape[1]), int(chosen.shape[1]), int(what.inputs[3].shape[0])

    def rows() -> torch.Tensor:
        return torch.randn(tokens, d, generator=generator, device=device).to(torch.bfloat16)

    scores = torch.rand(tokens, e, generator=generator, device=device)
    if routing == "skewed":
        scores[:, ::4] += 0.7
    if routing == "one":
        scores = scores[:1].expand(tokens, e)
    weight = torch.rand(tokens, k, generator=generator, device=device) + 0.1
    weight = 1.5 * weight / weight.sum(-1, keepdim=True)
    args: Args = [rows(), scores.topk(k, -1).indices.to(torch.int32), weight]
    for value in what.inputs[3:9]:
        assert value is not None
        shape = [int(s) for s in value.shape]
        low, high = (0, 256) if len(args) % 2 else (118, 124)
        args.append(torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.uint8))
    return [*args, rows()]


def hits(what: OpNode, tokens: int, routing: Routing) -> float:
    """Experts that a batch hits, on average."""
    assert what.inputs[1] is not None and what.inputs[3] is not None
    e, k = int(what.inputs[3].shape[0]), int(what.inputs[1].shape[1])
    if routing == "one":
        return float(k if tokens else 0)
    return e * (1 - (1 - k / e) ** tokens)


def bytes_moved(what: OpNode, tokens: int, routing: Routing) -> float:
    """The hit experts' weights and scales once, tokens in, result out."""
    weights = sum(v.bytes({}) for v in what.inputs[3:9] if v is not None)
    others = sum(v.bytes({"T": tokens}) for v in (*what.inputs[:3], *what.inputs[9:], *what.outputs) if v is not None)
    experts = what.inputs[3]
    assert experts is not None
    return weights * hits(what, tokens, routing) / int(experts.shape[0]) + others


def flops(what: OpNode, tokens: int) -> float:
    """Three products a pair of token and expert."""
    x, chosen, w1 = what.inputs[0], what.inputs[1], what.inputs[3]
    assert x is not None and chosen is not None and w1 is not None
    return 6.0 * tokens * int(chosen.shape[1]) * int(x.shape[1]) * int(w1.shape[1])


def _workload(model: str, phase: str, tokens: int, routing: Routing, purpose: frozenset[Any]) -> Workload:
    what = node(model)
    name = f"{model} {phase} {tokens}" + ("" if routing == "even" else f" {routing}")
    return Workload(
        name, what, {"T": tokens}, functools.partial(make, what, tokens, routing),
        bytes_moved(what, tokens, routing), flops(what, tokens), purpose=purpose,
    )  # fmt: skip


def workloads() -> tuple[Workload, ...]:
    both, check = frozenset({"check", "bench"}), frozenset({"check"})
    out = [_workload("flash", "decode", t, "even", both) for t in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    out += [_workload("flash", "prefill", t, "even", both) for t in (512, 1024, 2048, 4096, 8192, 16384)]
    out += [_workload("pro", "decode", t, "even", both) for t in (1, 16, 64)]
    out += [_workload("pro", "prefill", t, "even", both) for t in (1024, 8192)]
    out += [_workload("nano", "decode", t, "even", check) for t in (0, 1, 3, 64)]
    out += [_workload("nano", "prefill", t, "even", check) for t in (65, 1000)]
    out += [_workload("nano", "prefill", 500, r, check) for r in ("skewed", "one")]
    out += [_workload("flash", "decode", t, "one", check) for t in (33, 64)]
    out += [_workload("flash", "prefill", t, "skewed", both) for t in (2048, 8192)]
    out += [_workload("flash", "prefill", 1025, "one", check)]
    return tuple(out)
