"""Hyper-connection workloads: flash, pro and nano, from one token to 16 K.

Streams and results of sublayers have rows of very different size; coefficients are what the model can produce (post in
(0, 2), comb doubly stochastic). `extreme` has logits in the hundreds, where Sinkhorn starts from a 0/1 matrix.

Legend: T tokens, N streams, D hidden_size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4c.config import ModelConfig
from dsv4c.ops.formats import quantise_rows
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._workload import Args, Workload, config_of

GROUP = 128  # channels that share a scale of a quantised activation
BFLOAT16_ULPS = 32  # two units of bfloat16, 2**-6 of a value at most, are 32 times the 5e-4 asked of coefficients
EXTREME_SCALE = 200.0  # of comb's logits; it multiplies rounding errors too

_POST = frozenset({"hc_post", "hc_post_pre_norm", "hc_post_pre_norm_quantise"})
_HEAD = frozenset({"hc_head", "hc_head_norm"})


def _quantises(op: str) -> bool:
    return op.endswith("_quantise")


def node(op: str, model: str | ModelConfig) -> OpNode:
    """The op as the fused GPU program of a preset has it."""
    config = config_of(model)
    n, d = config.hc_mult, config.hidden_size
    streams, row = Value(("T", n, d), "bfloat16"), Value(("T", d), "bfloat16")
    post, comb = Value(("T", n), "float32"), Value(("T", n, n), "float32")
    inputs: tuple[Value, ...] = (row, streams, post, comb) if op in _POST else (streams,)
    if op == "hc_post":
        return OpNode(op, {}, inputs, (streams,))
    rows, scales = (n, 1) if op in _HEAD else ((2 + n) * n, 3)
    inputs += tuple(Value(shape, "float32", "weight") for shape in ((rows, n * d), (rows,), (scales,)))
    attrs: dict[str, Any] = {"norm_eps": config.rms_norm_eps, "eps": config.hc_eps}
    outputs: tuple[Value, ...] = (streams, row) if op in _POST else (row,)
    if op not in _HEAD:
        outputs += (post, comb)
        attrs["iters"] = config.hc_sinkhorn_iters
    if "norm" in op:
        inputs += (Value((d,), "float32", "weight", exact="bfloat16"),)
        attrs["out_eps"] = config.rms_norm_eps
    if _quantises(op):
        outputs += (Value(("T", d), "float8_e4m3fn"), Value(("T", d // GROUP), "float32"))
        attrs["group"] = GROUP
    return OpNode(op, attrs, inputs, outputs)


def make(what: OpNode, tokens: int, extreme: bool, generator: torch.Generator) -> Args:
    """Fresh inputs on the generator's device."""
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    first = what.inputs[1] if what.op in _POST else what.inputs[0]
    assert first is not None
    n, d = int(first.shape[1]), int(first.shape[2])
    size = torch.exp2(4 * torch.rand(tokens, n, 1, generator=generator, device=device) - 2)
    streams = (normal(tokens, n, d) * size).to(torch.bfloat16)
    args: Args = [streams]
    if what.op in _POST:
        post = 2 * torch.rand(tokens, n, generator=generator, device=device)
        comb = torch.softmax(3 * normal(tokens, n, n), -1)
        for _ in range(10):
            comb = comb / comb.sum(-2, keepdim=True)
            comb = comb / comb.sum(-1, keepdim=True)
        args = [normal(tokens, d).to(torch.bfloat16), streams, post, comb]
    if what.op == "hc_post":
        return args
    rows, scales = (n, 1) if what.op in _HEAD else ((2 + n) * n, 3)
    scale = torch.ones(scales, device=device)
    scale[-1] = EXTREME_SCALE if extreme else 2.0
    args += [normal(rows, n * d) * (n * d) ** -0.5, normal(rows), scale]
    if "norm" in what.op:
        args.append((1 + 0.2 * normal(d)).to(torch.bfloat16).float())
    return args


def bytes_moved(what: OpNode, tokens: int) -> float:
    """Every input read once, every output written once."""
    values = [v for v in (*what.inputs, *what.outputs) if v is not None]
    return float(sum(v.bytes({"T": tokens}) for v in values))


def flops(what: OpNode, tokens: int) -> float:
    """The projection: fn over all channels of all streams."""
    if what.op == "hc_post":
        return 0.0
    fn = what.inputs[4 if what.op in _POST else 1]
    assert fn is not None
    return 2.0 * tokens * int(fn.shape[0]) * int(fn.shape[1])


def error(outputs: Sequence[Tensor], expected: Sequence[Tensor], *, extreme: bool = False) -> float:
    """The largest max|out - ref| / max|ref|; bfloat16 results may be BFLOAT16_ULPS times as far off as coefficients.

    Quantised rows must be, bit for bit, what quantising the bfloat16 rows beside them gives.
    """
    quantised = len(outputs) > 2 and outputs[-2].dtype == torch.float8_e4m3fn
    worst = 0.0
    for out, ref in zip(outputs[: -2 if quantised else None], expected, strict=False):
        if out.shape != ref.shape:
            return float("inf")
        if not out.numel():
            continue
        most = max(ref.float().abs().max().item(), 1e-30)  # a result of nothing but 0 is 0
        apart = (out.float() - ref.float()).abs().max().item() / most
        if not apart < float("inf"):  # NaN too
            return float("inf")
        allowed = BFLOAT16_ULPS if out.dtype == torch.bfloat16 else EXTREME_SCALE / 10 if extreme else 1
        worst = max(worst, apart / allowed)
    if quantised and outputs[-1].numel():
        rows = next(out for out in reversed(outputs) if out.dtype == torch.bfloat16)
        data, scale = quantise_rows(rows, group=GROUP)
        same = torch.equal(data.view(torch.uint8), outputs[-2].view(torch.uint8)) and torch.equal(scale, outputs[-1])
        return worst if same else float("inf")
    return worst


def workload(op: str, model: str | ModelConfig, tokens: int, *, bench: bool = True, extreme: bool = False) -> Workload:
    """One op of a preset at a number of tokens."""
    what = node(op, model)
    phase = "decode" if tokens <= 512 else "prefill"  # the largest decode bucket
    return Workload(
        label=f"{model} {phase} {tokens}" + (" extreme" if extreme else ""),
        node=what,
        symbols={"T": tokens},
        make=lambda generator: make(what, tokens, extreme, generator),
        bytes_moved=bytes_moved(what, tokens),
        flops=flops(what, tokens),
        unit="bf16",
        error=functools.partial(error, extreme=extreme),
        purpose=frozenset({"check", "bench"}) if bench else frozenset({"check"}),
    )


_FUSED = ("hc_post_pre_norm", "hc_post_pre_norm_quantise")
_REST = ("hc_pre", "hc_post", "hc_head", "hc_pre_norm", "hc_pre_norm_quantise", "hc_head_norm")
_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def workloads() -> tuple[Workload, ...]:
    out = [workload(op, "flash", t) for op in _FUSED for t in _TOKENS]
    out += [workload(op, "flash", t) for op in _REST for t in (1, 64, 512, 8192)]
    out += [workload(op, "pro", t) for op in _FUSED for t in (1, 64, 512, 2048, 8192)]
    out += [workload(op, "pro", t) for op in _REST for t in (64, 8192)]
    edges = (0, 2, 63, 65, 513)
    out += [workload(op, model, t, bench=False) for op in _FUSED for model in ("flash", "pro") for t in edges]
    out += [workload(op, "flash", 65, bench=False) for op in _REST]
    out += [workload(op, "nano", t, bench=False) for op in (*_FUSED, *_REST) for t in (0, 1, 65, 513)]
    for op in ("hc_pre", "hc_pre_norm", *_FUSED):
        out += [workload(op, model, 130, bench=False, extreme=True) for model in ("flash", "pro", "nano")]
    return tuple(out)
