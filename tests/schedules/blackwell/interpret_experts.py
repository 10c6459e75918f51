"""Blackwell's expert kernels in Triton's interpreter beside exact models: `interpret_experts.py [CASES] [PART]`.

In a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated. Every stage is judged alone, from
what the stage before it wrote, so that a value which falls to its neighbour in one stage is no error of the next.
One line a check, `ok` or `FAIL`; the first are canaries, which fail when the interpreter's patches no longer matter
or no longer hold.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import interpret  # first: sets TRITON_INTERPRET and repairs the interpreter

# isort: on
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from dsv4c.ops.formats import from_e8m0
from dsv4c.ops.mx import MxFormat, dequantise_mx, mx_group, quantise_mx
from dsv4c.schedules._launch import TritonLaunch
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules.blackwell.experts import schedules

FORMATS: tuple[MxFormat, ...] = ("mxfp8", "mxfp4", "nvfp4")
SCHEDULES = {schedule.op: schedule for schedule in schedules("sm_103a")}
_plain_scale = interpreter._dot_scaled_scale_to_f32


def _scale(handle: interpreter.TensorHandle, compute: tl.dtype) -> np.ndarray:
    """E4M3 scales as numbers; the interpreter's own takes their bits for an exponent."""
    if handle.dtype.scalar != tl.float8e4nv:
        return _plain_scale(handle, compute)
    bits = np.ascontiguousarray(handle.data).view(np.uint8)
    return torch.from_numpy(bits.copy()).view(torch.float8_e4m3fn).float().numpy()


@triton.jit
def _canary(a, sa, b, sb, out, FORMAT: tl.constexpr):
    G: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    i, k, s = tl.arange(0, 16), tl.arange(0, 32), tl.arange(0, 64 // G)
    x = tl.load(a + i[:, None] * 32 + k[None, :])
    y = tl.load(b + i[None, :] * 32 + k[:, None])
    xs = tl.load(sa + i[:, None] * (64 // G) + s[None, :])
    ys = tl.load(sb + i[:, None] * (64 // G) + s[None, :])
    z = tl.dot_scaled(x, xs, "e2m1", y, ys, "e2m1", tl.zeros([16, 16], tl.float32))
    tl.store(out + i[:, None] * 16 + i[None, :], z)


def _canary_error(fmt: MxFormat) -> float:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 16, 64, generator=generator)
    (a, sa), (b, sb) = quantise_mx(x, fmt), quantise_mx(y, fmt)
    out = torch.empty(16, 16)
    _canary[(1,)](a, sa, b, sb, out, FORMAT=fmt)
    exact = dequantise_mx(a, sa, fmt).double() @ dequantise_mx(b, sb, fmt).double().T
    return float((out - exact).abs().max() / exact.abs().max())


def canaries() -> None:
    """The interpreter is wrong without the patch, and right with it."""
    interpreter._dot_scaled_scale_to_f32 = _plain_scale
    wrong = _canary_error("nvfp4")
    assert not wrong < 0.1, f"the interpreter reads E4M3 scales by itself now ({wrong:.1e}): take the patch out"
    interpreter._dot_scaled_scale_to_f32 = _scale
    for fmt in ("mxfp4", "nvfp4"):
        error = _canary_error(fmt)  # type: ignore[arg-type]
        assert error < 1e-6, f"{fmt}: {error:.1e}"


@dataclass(frozen=True)
class Case:
    """Sizes and kinds of values of one call."""

    tokens: int
    experts: int
    topk: int
    dim: int
    inner: int
    columns: int
    routing: str
    """`random`, `one` (all tokens choose the same experts), `last` (the first experts stay empty)."""
    scale: str
    """`usual`, `extreme` (every byte from 0 to 254, or every E4M3), `tiny` (subnormal scales)."""
    rows: str
    """`usual`, `zeros` (groups of nothing but 0), `large` (the format's largest, and far more)."""
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 5))
    return Case(
        draw(st.integers(1, 9)), experts, draw(st.integers(1, min(3, experts))), draw(st.sampled_from((128, 256))),
        draw(st.sampled_from((128, 256))), draw(st.sampled_from((16, 32))),
        draw(st.sampled_from(("random", "one", "last"))), draw(st.sampled_from(("usual", "extreme", "tiny"))),
        draw(st.sampled_from(("usual", "zeros", "large"))), draw(st.integers(0, 2**31)),
    )  # fmt: skip


def _rows(case: Case, generator: torch.Generator) -> Tensor:
    x = torch.randn(case.tokens, case.dim, generator=generator)
    if case.rows == "zeros":
        x.unflatten(-1, (-1, 16))[:, ::3] = 0
    if case.rows == "large":
        x.unflatten(-1, (-1, 16))[:, ::2] *= 2.0**30
        x[:, 0] = 448.0
    return x.to(torch.bfloat16)


def _weight_scales(case: Case, fmt: MxFormat, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # the largest products must stay finite: an extreme expert's scales are all of one kind
    low, high = {"usual": (118, 124), "extreme": (0, 255), "tiny": (0, 4)}[case.scale]
    if fmt == "nvfp4":
        if case.scale == "usual":
            return (torch.rand(shape, generator=generator) * 2 + 0.1).to(torch.float8_e4m3fn)
        high = 127 if case.scale == "extreme" else 8  # E4M3 subnormals are 1 to 7
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    byte = torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)
    if case.scale == "extreme":
        # 2^127 times 2^127 is no float32: only rows, never both operands, are that large
        byte = torch.where(torch.rand(shape, generator=generator) < 0.9, torch.randint_like(byte, 110, 130), byte // 2)
    return byte


def _node(case: Case, fmt: MxFormat) -> OpNode:
    nv, row = fmt == "nvfp4", Value(("T", case.dim), "bfloat16")
    inputs = [row, Value(("T", case.topk), "int32"), Value(("T", case.topk), "float32")]
    for lines, channels in ((case.inner, case.dim), (case.inner, case.dim), (case.dim, case.inner)):
        inputs += [Value((case.experts, lines, channels // 2), "uint8", "weight")]
        kind = "float8_e4m3fn" if nv else "uint8"
        inputs += [Value((case.experts, lines, channels // mx_group(fmt)), kind, "weight")]
        inputs += [Value((case.experts,), "float32", "weight")] if nv else []
    inputs += [Value((1,), "float32", "weight"), Value((case.experts,), "float32", "weight")] if nv else []
    attrs = {"limit": 10.0, "activations": fmt}
    return OpNode("experts_nvfp4" if nv else "experts_mx", attrs, (*inputs, row), (row,))


def _inputs(case: Case, fmt: MxFormat, node: OpNode) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    if case.routing == "one":
        scores = scores[:1].expand_as(scores)
    if case.routing == "last":
        scores = scores + torch.arange(case.experts)
    weight = torch.rand(case.tokens, case.topk, generator=generator) + 0.1
    args = [_rows(case, generator), scores.topk(case.topk, -1).indices.to(torch.int32), weight]
    for value in node.inputs[3:-1]:
        assert value is not None
        shape = tuple(int(size) for size in value.shape)
        if value.dtype == "float32":
            args.append(torch.rand(shape, generator=generator) + 0.01)
        elif value.dtype == "uint8" and shape[-1] in (case.dim // 2, case.inner // 2):
            args.append(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
        else:
            args.append(_weight_scales(case, fmt, shape, generator))
    return [*args, torch.randn(case.tokens, case.dim, generator=generator).to(torch.bfloat16)]


def _wide(args: Sequence[Tensor], fmt: MxFormat) -> list[Tensor]:
    """w1, w3, w2 in float64."""
    if fmt == "nvfp4":
        return [
            dequantise_mx(args[i], args[i + 1], fmt).double() * args[i + 2].double()[:, None, None] for i in (3, 6, 9)
        ]
    return [dequantise_mx(args[i], args[i + 1], "mxfp4").double() for i in (3, 5, 7)]


def check(fmt: MxFormat, case: Case) -> None:
    """Every stage against its model."""
    node = _node(case, fmt)
    schedule, config = SCHEDULES[node.op], {"columns": case.columns, "warps": 4, "stages": 3, "share": 1}
    assert schedule.accepts(node) is None
    args = _inputs(case, fmt, node)
    buffers = []
    for value in (*schedule.workspace(node, config), *node.outputs):
        tensor = torch.empty(value.sizes({"T": case.tokens}), dtype=getattr(torch, value.dtype))
        tensor.view(torch.uint8).fill_(0xFF)
        buffers.append(tensor)
    build: Any = schedule.build
    for launch in build.func(node, config, sms=3).launches:  # so few that programs go round
        assert isinstance(launch, TritonLaunch)
        interpret.run(launch, [*args, *buffers])
    _place, pair, row_weight, tiles, meta, data, scale, hidden, hidden_scale, rows, out = buffers
    x_global, hidden_factor = (args[12], args[13]) if fmt == "nvfp4" else (torch.ones(1), torch.ones(case.experts))

    # the tokens: bit for bit
    expected = quantise_mx(args[0], fmt, x_global)
    assert torch.equal(data.view(torch.uint8), expected[0].view(torch.uint8)), "tokens' data"
    assert torch.equal(scale.view(torch.uint8), expected[1].view(torch.uint8)), "tokens' scales"

    w1, w3, w2 = _wide(args, fmt)
    x = dequantise_mx(data, scale, fmt, x_global).double()
    pair, row_weight = pair.flatten().long(), row_weight.flatten()
    expert = args[1].flatten().long()[pair]
    assert torch.equal(pair.sort().values, torch.arange(len(pair))) and (expert.diff() >= 0).all(), "the sort"
    token = pair // case.topk
    hidden_global = hidden_factor[expert].unsqueeze(1)  # of each row
    gate = torch.einsum("rd,rid->ri", x[token], w1[expert])
    up = torch.einsum("rd,rid->ri", x[token], w3[expert])
    # sums are float32: an error of a few ulps of the largest term
    reach = torch.einsum("rd,rid->ri", x[token].abs(), w1[expert].abs())
    reach_up = torch.einsum("rd,rid->ri", x[token].abs(), w3[expert].abs())
    model = F.silu(gate.clamp(max=10.0)) * up.clamp(-10, 10) * row_weight.double()[:, None]
    slack = 1e-5 * (reach.clamp(max=1e6) + reach_up.clamp(max=1e6)) * row_weight.double()[:, None] * 12
    group = mx_group(fmt)
    found = dequantise_mx(hidden.flatten(0, 1), hidden_scale.flatten(0, 1), fmt, hidden_global).double()
    step = hidden_scale.flatten(0, 1).float() * hidden_global if fmt == "nvfp4" else None
    if step is None:
        step = from_e8m0(hidden_scale.flatten(0, 1))
    step = step.double().repeat_interleave(group, 1)
    # half a step where it is coarsest, and what saturates: a sixteenth of 6 in NVFP4, and what its scale cuts off
    rounding = step * (16.0 if fmt == "mxfp8" else 1.0) + (step * 0.376 if fmt == "nvfp4" else 0)
    if fmt == "nvfp4":
        most = model.abs().unflatten(1, (-1, group)).amax(-1).repeat_interleave(group, 1)
        rounding = torch.where(most > 6 * 448 * hidden_global, most, rounding)
        # a subnormal scale is off by half of 2^-9
        rounding = torch.where(most < 6 * hidden_global * 2.0**-6, rounding + 6 * hidden_global * 2.0**-10, rounding)
        rounding = torch.where(most < 6 * hidden_global * 2.0**-9, most, rounding)
    assert ((found - model).abs() <= rounding + slack + 1e-30).all(), "hidden"
    if fmt != "nvfp4":  # the scale is the smallest that fits
        largest = 448.0 if fmt == "mxfp8" else 6.0
        assert (found.abs() <= largest * step).all()

    result = torch.einsum("ri,rdi->rd", found, w2[expert])
    reach = torch.einsum("ri,rdi->rd", found.abs(), w2[expert].abs())
    got = rows.flatten(0, 1).double()
    error = (got - result).abs()
    assert (error <= 2.0**-8 * result.abs() + 1e-5 * reach + 1e-37).all(), "rows of pairs"

    total = args[-1].double()
    total = total.index_add(0, token, got)
    near = (out.double() - total).abs() <= 2.0**-8 * total.abs() + 1e-6 * got.abs().max() + 1e-30
    assert near.all(), "the sum"
    assert int(meta[0]) >= 1 and int(tiles.flatten()[2]) >= 1


def _checked(fmt: MxFormat) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        check(fmt, case)

    return run


def main(count: int, part: str) -> int:
    checks: dict[str, Callable[[], None]] = {"canaries": canaries}
    interpreter._dot_scaled_scale_to_f32 = _scale
    for fmt in FORMATS:
        quiet = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        checks[fmt] = quiet(given(cases())(_checked(fmt)))
    failed = 0
    for name, run in checks.items():
        if part and part != name:
            continue
        try:
            run()
        except Exception:  # noqa: BLE001 - one failed check must not hide the others
            failed += 1
            print(f"FAIL {name}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"ok   {name}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(main(int((sys.argv[1:] or ["20"])[0]), (sys.argv[2:] or [""])[0]))
