"""Blackwell's linear maps and gates in Triton's interpreter beside float64: `interpret_linear.py [CASES] [OP] [SEED]`.

In a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated. One line an op, `ok` or `FAIL`.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import (
    interpret,
    interpret_sampling,
)  # first: sets TRITON_INTERPRET and repairs the interpreter

# isort: on
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4c.runtime import layouts
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import Config, OpNode, Value
from dsv4c.schedules.blackwell.linear import schedules
from dsv4c.schedules.workloads.gate import choice_error, scores_and_ranks
from tests.schedules.blackwell.checks import random_cases, run_checks

assert interpret_sampling  # replaces the card's library for gates
SCHEDULES = {schedule.op: schedule for schedule in schedules("sm_103a")}


@dataclass(frozen=True)
class Case:
    """Sizes and kinds of values of one call. `n`: output channels (experts, of a gate), `k`: input channels."""

    tokens: int
    n: int
    k: int
    groups: int
    columns: int
    parts: int
    scale: str
    """Of the weight: `usual`, `extreme` (2^-127 to 2^20), `one` (all equal)."""
    rows: str
    """`usual`, `zeros`, `subnormal` (E4M3 below 2^-6), `most` (+-448, and scales of 2^-127 to 2^100)."""
    seed: int


@st.composite
def cases(draw: st.DrawFn, op: str) -> Case:
    fp8, grouped, gate = op.endswith("fp8"), op.startswith("grouped"), op.startswith("gate")
    k = draw(st.sampled_from((128, 256, 384, 512, 1024) if fp8 else (64, 128, 256, 512)))
    n = draw(st.sampled_from((8, 64, 256) if gate else (128, 256) if grouped else (8, 100, 128, 200, 400)))
    return Case(
        draw(st.integers(1, 70)), n, k, draw(st.sampled_from((1, 2, 4))) if grouped else 1,
        draw(st.sampled_from((16, 32, 64, 128))), draw(st.sampled_from((1, 2, 4))),
        draw(st.sampled_from(("usual", "extreme", "one"))),
        draw(st.sampled_from(("usual", "zeros", "subnormal", "most"))), draw(st.integers(0, 2**31)),
    )  # fmt: skip


def _fp8_inputs(case: Case, generator: torch.Generator) -> list[Tensor]:
    width, lines = case.groups * case.k, case.groups * case.n
    x = torch.randn(case.tokens, width, generator=generator) * 100
    exponent = torch.randint(-8, 4, (case.tokens, width // 128), generator=generator)
    if case.rows == "zeros":
        x.unflatten(-1, (-1, 64))[:, ::2] = 0
    if case.rows == "subnormal":
        x *= 2.0**-16
    if case.rows == "most":
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, 448.0, -448.0)
        exponent = torch.randint(-126, 100, exponent.shape, generator=generator)
    weight = torch.randn(lines, case.k, generator=generator) * 60
    low, high = {"usual": (-14, -10), "extreme": (-127, 21), "one": (0, 1)}[case.scale]
    if case.rows == "most":
        high = min(high, 2)  # sums must stay float32
    blocks = -(-lines // 128), case.k // 128
    scale = torch.randint(low, high, blocks, generator=generator)
    lead = (case.tokens,) if case.groups == 1 else (case.tokens, case.groups)
    data = x.clamp(-448, 448).to(torch.float8_e4m3fn).reshape(*lead, case.k)
    scales = torch.exp2(exponent.float()).reshape(*lead, case.k // 128)
    return [data, scales, weight.clamp(-448, 448).to(torch.float8_e4m3fn), torch.exp2(scale.float())]


def node_and_inputs(op: str, case: Case) -> tuple[OpNode, list[Tensor]]:
    generator = torch.Generator().manual_seed(case.seed)
    if op.endswith("fp8"):
        args = _fp8_inputs(case, generator)
        lead: tuple[int | str, ...] = ("T",) if case.groups == 1 else ("T", case.groups)
        inputs = (
            Value((*lead, case.k), "float8_e4m3fn"), Value((*lead, case.k // 128), "float32"),
            Value(tuple(args[2].shape), "float8_e4m3fn", "weight"), Value(tuple(args[3].shape), "float32", "weight"),
        )  # fmt: skip
        attrs = {} if case.groups == 1 else {"groups": case.groups}
        return OpNode(op, attrs, inputs, (Value(("T", case.groups * case.n), "bfloat16"),)), args
    x = torch.randn(case.tokens, case.k, generator=generator)
    weight = torch.randn(case.n, case.k, generator=generator) * case.k**-0.5
    if case.rows == "zeros":
        x[:, ::2] = 0
    if case.rows == "most" and op == "linear_mixed":
        x[:, 0], weight[:, 0] = 2.0**120, 0.9375
    pair = [x.to(torch.bfloat16), weight.to(torch.bfloat16)]
    values = [Value(("T", case.k), "bfloat16"), Value((case.n, case.k), "bfloat16", "weight")]
    if op == "linear_mixed":
        return OpNode(op, {}, tuple(values), (Value(("T", case.n), "float32"),)), pair
    topk = 1 + case.seed % min(6, case.n)
    attrs: dict[str, object] = {"scaling": 1.5}
    outputs = (Value(("T", topk), "int32"), Value(("T", topk), "float32"))
    if op.endswith("bias"):
        bias = torch.randn(case.n, generator=generator) / 8
        return OpNode(op, {**attrs, "topk": topk}, (*values, Value((case.n,), "float32", "weight")), outputs), [
            *pair,
            bias,
        ]
    table = torch.rand(50, case.n, generator=generator).argsort(-1)[:, :topk].contiguous()
    ids = torch.randint(0, 50, (case.tokens,), generator=generator)
    more = (Value(("T",), "int64", "input"), Value((50, topk), "int64", "weight"))
    return OpNode(op, attrs, (*values, *more), outputs), [*pair, ids, table]


def _config(op: str, case: Case, what: OpNode) -> Config:
    """The schedule's first config with the case's columns, and its parts where the steps divide."""
    config = dict(SCHEDULES[op].space(what, {"T": case.columns})[0])
    steps = case.k // (128 * config["blocks"] if op.endswith("fp8") else 64)
    return {**config, "parts": case.parts if steps % case.parts == 0 else 1}


def _exact(op: str, case: Case, args: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Results in float64, and what sums may be off by: ulps of their magnitudes, and scales' product below 2^-127."""
    if not op.endswith("fp8"):
        x, weight = (arg.double() for arg in args[:2])
        return x @ weight.T, 1e-6 * (x.abs() @ weight.T.abs())
    data, scale, weight, blocks = args
    x = data.double() * scale.double().repeat_interleave(128, -1).reshape(data.shape)
    wide = blocks.double().repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1) * weight.double()

    def product(a: Tensor, b: Tensor) -> Tensor:
        pair = a.reshape(case.tokens, case.groups, case.k), b.reshape(case.groups, case.n, case.k)
        return torch.einsum("tgk,gnk->tgn", *pair).flatten(1)

    least = 2.0**-127 * product(data.double().abs(), weight.double().abs())
    return product(x, wide), 1e-6 * product(x.abs(), wide.abs()) + least


def check(op: str, case: Case) -> None:
    what, args = node_and_inputs(op, case)
    schedule, config = SCHEDULES[op], _config(op, case, what)
    assert schedule.accepts(what) is None
    by_index = schedule.layouts(what)
    laid = [layouts.apply(arg, by_index[i]) if i in by_index else arg for i, arg in enumerate(args)]
    buffers = []
    for value in (*schedule.workspace(what, config), *what.outputs):
        tensor = torch.empty(value.sizes({"T": case.tokens}), dtype=getattr(torch, value.dtype))
        tensor.view(torch.uint8).fill_(0xFF)
        buffers.append(tensor)
    build = schedule.build
    assert isinstance(build, partial)
    for launch in build.func(what, config, sms=2, native=False).launches:  # so few that programs go round
        assert isinstance(launch, TritonLaunch)
        interpret.run(launch, [*laid, *buffers])
    if op.startswith("gate"):
        outputs, known = buffers[-2:], scores_and_ranks(op, args)
        error = choice_error(op, 1.5, outputs, known)
        assert error <= 1e-5, f"{error:.2e}"
        return
    result, slack = _exact(op, case, args)
    found = buffers[-1].double()
    rounding = 2.0**-8 * result.abs() if op.endswith("fp8") else 0.0
    bad = ~((found - result).abs() <= rounding + slack + 1e-37)
    assert not bad.any(), f"{int(bad.sum())} values, the worst off by {float((found - result).abs().max()):.2e}"


def _checked(op: str) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        check(op, case)

    return run


def main(count: int, part: str, number: int) -> int:
    checks = {op: random_cases(given(cases(op))(_checked(op)), count, number) for op in SCHEDULES}
    return run_checks(checks, part)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count, part, number = (*sys.argv[1:], *("20", "", "5")[len(sys.argv) - 1 :])
    sys.exit(main(int(count), part, int(number)))
