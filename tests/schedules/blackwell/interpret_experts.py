"""Blackwell's expert kernels in Triton's interpreter beside exact models: `interpret_experts.py [CASES] [PART] [SEED]`.

In a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated. One line a check, `ok` or `FAIL`; the
first are canaries, which fail when the interpreter's patches no longer matter or no longer hold.
"""

from __future__ import annotations

# isort: off
from tests.schedules.hopper import interpret  # first: sets TRITON_INTERPRET and repairs the interpreter

# isort: on
import sys
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime import interpreter

from dsv4c.ops.mx import MxFormat, dequantise_mx, quantise_mx
from dsv4c.schedules._launch import TritonLaunch

from .checks import Check, random_cases, run_checks
from .expert_models import (
    FORMATS,
    SCHEDULES,
    Case,
    buffers_of,
    config_of,
    inputs_of,
    laid_out,
    node_of,
    stages,
)  # fmt: skip

_plain_scale, _plain_values = interpreter._dot_scaled_scale_to_f32, interpreter._mxfp_value_handle_to_float32


def _scale(handle: interpreter.TensorHandle, compute: tl.dtype) -> np.ndarray:
    """E4M3 scales as numbers; the interpreter's own takes their bits for an exponent."""
    if handle.dtype.scalar != tl.float8e4nv:
        return _plain_scale(handle, compute)
    bits = np.ascontiguousarray(handle.data).view(np.uint8)
    return torch.from_numpy(bits.copy()).view(torch.float8_e4m3fn).float().numpy()


def _values(handle: interpreter.TensorHandle) -> np.ndarray:
    """bfloat16 operands as they are; the interpreter's own passes them through float16."""
    if handle.dtype.scalar != tl.bfloat16:
        return _plain_values(handle)
    return (np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


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


@triton.jit
def _wide_canary(a, sa, b, out):
    i, k = tl.arange(0, 16), tl.arange(0, 32)
    x = tl.load(a + i[:, None] * 32 + k[None, :])
    y = tl.load(b + i[None, :] * 64 + tl.arange(0, 64)[:, None])
    z = tl.dot_scaled(x, tl.load(sa + i[:, None] * 2 + tl.arange(0, 2)[None, :]), "e2m1", y, None, "bf16")
    tl.store(out + i[:, None] * 16 + i[None, :], z)


def _wide_canary_error() -> float:
    generator = torch.Generator().manual_seed(2)
    (a, sa), y = quantise_mx(torch.randn(16, 64, generator=generator), "mxfp4"), torch.randn(16, 64) * 2.0**40
    out = torch.empty(16, 16)
    _wide_canary[(1,)](a, sa, y.to(torch.bfloat16), out)
    exact = dequantise_mx(a, sa, "mxfp4").double() @ y.to(torch.bfloat16).double().T
    return float((out - exact).abs().max() / exact.abs().max())


def canaries() -> None:
    """The interpreter is wrong without the patches, and right with them."""
    interpreter._dot_scaled_scale_to_f32 = _plain_scale
    wrong = _canary_error("nvfp4")
    assert not wrong < 0.1, f"the interpreter reads E4M3 scales by itself now ({wrong:.1e}): take the patch out"
    interpreter._dot_scaled_scale_to_f32 = _scale
    for fmt in ("mxfp4", "nvfp4"):
        error = _canary_error(fmt)  # type: ignore[arg-type]
        assert error < 1e-6, f"{fmt}: {error:.1e}"
    interpreter._mxfp_value_handle_to_float32 = _plain_values
    wrong = _wide_canary_error()
    assert not wrong < 0.1, f"the interpreter reads bfloat16 by itself now ({wrong:.1e}): take the patch out"
    interpreter._mxfp_value_handle_to_float32 = _values
    error = _wide_canary_error()
    assert error < 1e-6, f"bfloat16: {error:.1e}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 5))
    columns = draw(st.sampled_from((16, 16, 32, 64, 128)))
    tokens = draw(st.integers(1, 9) if columns < 128 else st.integers(1, 150))
    return Case(
        tokens, experts, draw(st.integers(1, min(3, experts))), draw(st.sampled_from((128, 256))),
        draw(st.sampled_from((128, 256))), columns,
        draw(st.sampled_from(("random", "one", "last"))),
        draw(st.sampled_from(("usual", "extreme", "tiny", "zero", "largest"))),
        draw(st.sampled_from(("usual", "zeros", "large", "max", "NaN", "infinity"))), draw(st.integers(0, 2**31)),
        draw(st.booleans()),
    )  # fmt: skip


def check(fmt: str, case: Case) -> None:
    """Every stage against its model."""
    what = node_of(case, fmt)
    schedule, config = SCHEDULES[what.op], config_of(case, what)
    assert schedule.accepts(what) is None
    args, buffers = inputs_of(case, fmt, what), buffers_of(case, what, config)
    call, build = [*laid_out(args, what), *buffers], schedule.build
    assert isinstance(build, partial)
    for launch in build.func(what, config, sms=3, native=False).launches:  # so few that programs go round
        assert isinstance(launch, TritonLaunch)
        interpret.run(launch, call)
    wrong = [stage for stage in stages(fmt, case, args, buffers) if not stage.good]
    assert not wrong, wrong


def _checked(fmt: str) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        check(fmt, case)

    return run


def main(count: int, part: str, number: int) -> int:
    checks: dict[str, Check] = {"canaries": canaries}
    interpreter._dot_scaled_scale_to_f32, interpreter._mxfp_value_handle_to_float32 = _scale, _values
    for fmt in FORMATS:
        checks[fmt] = random_cases(given(cases())(_checked(fmt)), count, number)
    return run_checks(checks, part)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count, part, number = (*sys.argv[1:], *("20", "", "5")[len(sys.argv) - 1 :])
    sys.exit(main(int(count), part, int(number)))
