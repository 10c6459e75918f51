"""Hyper-connections of few tokens in Triton's interpreter beside float64: `interpret_hyper.py [CASES] [OP] [SEED]`.

In a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated. One line an op, `ok` or `FAIL`. Each
stage is compared on what the stage before it gave, so that roundings do not add up.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import interpret  # first: sets TRITON_INTERPRET and repairs the interpreter

# isort: on
import dataclasses
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4c.ops.formats import quantise_rows
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules.hopper.hyper import HEAD, POST
from dsv4c.schedules.hopper.hyper_few import schedules
from dsv4c.schedules.triton import hyper_few
from dsv4c.schedules.workloads.hyper import node
from tests.schedules.blackwell.checks import random_cases, run_checks


@triton.jit
def _reciprocal(x):
    return tl.full(x.shape, 1.0, tl.float32) / x


hyper_few.reciprocal = _reciprocal  # inline assembly is the card's
SCHEDULES = {schedule.op: schedule for schedule in schedules("sm_103a")}


@dataclass(frozen=True)
class Case:
    """Sizes and kinds of values of one call."""

    tokens: int
    dim: int
    streams: str
    """`usual`, `apart` (2^-20 to 2^20), `cancel` (stream 1 all but undoes stream 0), `zeros`, `nan` (one channel)."""
    spread: float
    """Of comb's logits."""
    reverse: bool
    """Programs in the opposite order."""
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        draw(st.integers(1, 5)), draw(st.sampled_from((128, 256, 384, 512, 896, 1024))),
        draw(st.sampled_from(("usual", "usual", "apart", "cancel", "zeros", "nan"))),
        draw(st.sampled_from((0.0, 2.0, 20.0, 200.0))), draw(st.booleans()), draw(st.integers(0, 2**31)),
    )  # fmt: skip


def node_of(op: str, dim: int) -> OpNode:
    """nano's op with so many channels."""
    what = node(op, "nano")
    old = 256

    def sized(value: Value) -> Value:
        shape = tuple(
            {old: dim, 4 * old: 4 * dim, old // 128: dim // 128}.get(s, s) if isinstance(s, int) and i else s
            for i, s in enumerate(value.shape)
        )
        return dataclasses.replace(value, shape=(dim,) if value.shape == (old,) else shape)

    inputs = tuple(v if v is None else sized(v) for v in what.inputs)
    return dataclasses.replace(what, inputs=inputs, outputs=tuple(sized(v) for v in what.outputs))


def inputs_of(op: str, case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    tokens, dim = case.tokens, case.dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(tokens, 4, dim)
    if case.streams == "apart":
        x *= torch.exp2(torch.randint(-20, 21, (tokens, 4, 1), generator=generator).float())
    if case.streams == "cancel":
        x[:, 1] = -x[:, 0] * 1.01
    if case.streams == "zeros":
        x[::2] = 0
    y = normal(tokens, dim) * (0.0 if case.streams == "zeros" else 1.0)
    if case.streams == "nan":
        x[case.seed % tokens, case.seed % 4, case.seed % dim] = torch.nan
    rows, scales = (4, 1) if op in HEAD else (24, 3)
    scale = torch.full((scales,), 1.5)
    scale[-1] = case.spread if rows == 24 else 1.5
    weights = [normal(rows, 4 * dim) * (4 * dim) ** -0.5, normal(rows), scale]
    if "norm" in op:
        weights.append((1 + 0.2 * normal(dim)).to(torch.bfloat16).float())
    if op not in POST:
        return [x.to(torch.bfloat16), *weights]
    comb = torch.softmax(3 * normal(tokens, 4, 4), -1)
    return [y.to(torch.bfloat16), x.to(torch.bfloat16), 2 * torch.rand(tokens, 4, generator=generator), comb, *weights]


def _near(what: str, found: Tensor, exact: Tensor, slack: Tensor | float) -> None:
    """Within `slack`, and NaN where the exact value is."""
    found = found.double()
    assert bool((found.isnan() == exact.isnan()).all()), f"{what}: NaN in other places"
    bad = (found - exact).abs() > slack
    assert not bad.any(), f"{what}: {int(bad.sum())} values, the worst off by {float((found - exact).abs().max()):.2e}"


def _ulps(x: Tensor, count: float) -> Tensor:
    return count * 2.0**-7 * x.abs() + 1e-37


def _doubly_stochastic(logits: Tensor, eps: float, iters: int) -> Tensor:
    m = torch.softmax(logits, -1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def check(op: str, case: Case) -> None:
    what, args = node_of(op, case.dim), inputs_of(op, case)
    schedule = SCHEDULES[op]
    assert schedule.accepts(what) is None
    (config,) = schedule.space(what, {"T": case.tokens})
    buffers = []
    for value in what.outputs:
        tensor = torch.empty(value.sizes({"T": case.tokens}), dtype=getattr(torch, value.dtype))
        tensor.view(torch.uint8).fill_(0xFF)
        buffers.append(tensor)
    (launch,) = schedule.build(what, config).launches
    assert isinstance(launch, TritonLaunch)
    interpret._order.reverse = case.reverse
    interpret.run(launch, [*args, *buffers])
    results = iter(buffers)
    attrs: dict[str, Any] = dict(what.attrs)
    if op in POST:
        y, x, post, comb = (arg.double() for arg in args[:4])
        terms = torch.cat([post[:, None, :, None] * y[:, None, None], comb[..., None] * x[:, :, None]], 1)
        streams = next(results)
        _near("streams", streams, terms.sum(1), _ulps(terms.sum(1), 0.5) + 1e-6 * terms.abs().sum(1))
        args = [streams, *args[4:]]
    _check_mixed(op, attrs, args, list(results))


def _check_mixed(op: str, attrs: dict[str, Any], args: list[Tensor], results: list[Tensor]) -> None:
    """What follows from the streams `args[0]`."""
    s, fn, base, scale = (arg.double() for arg in args[:4])
    flat = s.flatten(1)
    rho = (flat.square().mean(-1, keepdim=True) + attrs["norm_eps"]).rsqrt()
    products, sizes = flat @ fn.T, flat.abs() @ fn.abs().T
    pre = torch.sigmoid(products[:, :4] * rho * scale[0] + base[:4]) + attrs["eps"]
    off = 1e-6 * (sizes[:, :4] * rho * scale[0] + base[:4].abs() + 1)  # of the logits; a sigmoid's slope is below 1/4
    x, terms = results[0], pre[..., None] * s
    exact = terms.sum(1)
    slack = 1e-6 * terms.abs().sum(1) + (off[..., None] * s.abs()).sum(1)
    if "norm" in op:
        narrow = exact.to(torch.bfloat16).double()
        inverse = (narrow.square().mean(-1, keepdim=True) + attrs["out_eps"]).rsqrt()
        factor = inverse * args[4].double()
        # where rounding before the norm goes another way the norm may be another too
        moved = _ulps(exact, 1) + slack
        least = ((narrow.abs() - moved).clamp(min=0).square().mean(-1, keepdim=True) + attrs["out_eps"]).rsqrt()
        exact, slack = narrow * factor, moved * least * args[4].double().abs() + (least - inverse) * narrow.abs()
        slack = slack * 1.01
    _near("input", x, exact, slack + _ulps(exact, 0.51))
    if op in HEAD:
        return
    post = 2 * torch.sigmoid(products[:, 4:8] * rho * scale[1] + base[4:8])
    _near("post", results[1], post, 2e-6 * (sizes[:, 4:8] * rho * scale[1] + base[4:8].abs() + 1))
    logits = (products[:, 8:] * rho * scale[2] + base[8:]).unflatten(-1, (4, 4))
    comb = _doubly_stochastic(logits, attrs["eps"], attrs["iters"])
    # steps of Sinkhorn bring matrices no further apart, in the largest ratio of ratios of entries
    wrong = 4e-6 * (sizes[:, 8:] * rho * scale[2] + base[8:].abs() + 20).amax(-1)
    _near("comb", results[2], comb, 4 * wrong[:, None, None])
    if op.endswith("_quantise"):
        data, scales = quantise_rows(x, group=128)
        whole = ~x.isnan().any(-1)
        assert torch.equal(data.view(torch.uint8)[whole], results[3].view(torch.uint8)[whole]), "data"
        assert torch.equal(scales[whole], results[4][whole]), "scales"
        assert results[3].float()[~whole].isnan().all(), "data of rows that are NaN"
        assert results[4][~whole].isnan().all(), "scales of rows that are NaN"


def _checked(op: str) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        check(op, case)

    return run


def main(count: int, part: str, number: int) -> int:
    checks = {op: random_cases(given(cases())(_checked(op)), count, number) for op in SCHEDULES}
    return run_checks(checks, part)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count, part, number = (*sys.argv[1:], *("20", "", "5")[len(sys.argv) - 1 :])
    sys.exit(main(int(count), part, int(number)))
