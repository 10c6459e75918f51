"""Block-scaled formats beside their definitions: scales, rounding, saturation, both ends of scales, what is no number.

OCP Microscaling Formats 1.0: MXFP8 (E4M3) and MXFP4 (E2M1), 32 values a scale, E8M0 with 255 for NaN. NVFP4: E2M1, 16
values a scale in E4M3, a float32 factor for the tensor. Values are compared with fractions, rounded here.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.ops.formats import dequantise_fp4, from_e8m0, pack_e2m1, to_e8m0, unpack_e2m1
from dsv4c.ops.mx import LARGEST, MxFormat, dequantise_mx, mx_group, quantise_mx, rounded_mx

FORMATS: tuple[MxFormat, ...] = ("mxfp8", "mxfp4", "nvfp4")
E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
E4M3 = [Fraction(2) ** -6 * Fraction(m, 8) for m in range(8)] + [
    Fraction(2) ** (e - 7) * (1 + Fraction(m, 8)) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
]


def nearest(x: Fraction, grid: list[Fraction]) -> Fraction:
    """To nearest, ties to an even code, saturating; the grid's places are its codes."""
    size = min(abs(x), grid[-1])
    best = min(range(len(grid)), key=lambda code: (abs(grid[code] - size), code % 2))
    return grid[best] if x >= 0 else -grid[best]


def halfway(grid: list[Fraction]) -> list[float]:
    """Every value of a grid, every tie between two, and the float32 on either side of each tie."""
    ties = [float((a + b) / 2) for a, b in itertools.pairwise(grid)]
    beside = [float(torch.nextafter(torch.tensor(t), torch.tensor(side))) for t in ties for side in (0.0, 1e9)]
    return [*map(float, grid), *ties, *beside]


def test_e2m1_rounds_to_nearest_even_everywhere() -> None:
    x = torch.tensor(halfway(E2M1) + [-v for v in halfway(E2M1)])
    x = torch.cat((x, x[: len(x) % 2]))
    found = unpack_e2m1(pack_e2m1(x))
    assert found.tolist() == [float(nearest(Fraction(v), E2M1)) for v in x.tolist()]
    assert torch.equal(found.signbit(), x.signbit())  # -0 stays -0


def test_e4m3_rounds_to_nearest_even_everywhere() -> None:
    """As elements of MXFP8 whose scale is 1: the group's largest is 448."""
    values = [v for v in halfway(E4M3) if v <= 448]
    for first in range(0, len(values), 31):
        x = torch.zeros(1, 32)
        x[0, 0] = 448
        part = torch.tensor(values[first : first + 31])
        x[0, 1 : 1 + len(part)] = part
        data, scale = quantise_mx(x, "mxfp8")
        assert int(scale) == 127
        assert data[0].float().tolist() == [float(nearest(Fraction(v), E4M3)) for v in x[0].tolist()]


def test_e8m0_is_a_power_of_two_from_end_to_end() -> None:
    byte = torch.arange(256).to(torch.uint8)
    power = from_e8m0(byte)
    assert power[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]  # 0 is 2^-127, a subnormal; 254 is 2^127
    assert power[255].isnan()
    assert torch.equal(to_e8m0(power[:255]), byte[:255])
    data = pack_e2m1(torch.tensor([[6.0, -0.5] * 16]))
    assert dequantise_fp4(data, byte[:1].view(1, 1))[0, :2].tolist() == [6 * 2.0**-127, -(2.0**-128)]
    assert dequantise_fp4(data, byte[254:255].view(1, 1))[0, :2].tolist() == [math.inf, -(2.0**126)]
    assert dequantise_fp4(data, byte[255:].view(1, 1)).isnan().all()


@given(st.integers(-125, 126), st.floats(1, 2, exclude_max=True, width=32), st.sampled_from(("mxfp8", "mxfp4")))
@settings(max_examples=200, deadline=None)
def test_mx_scales_are_ocps_or_one_more_so_that_nothing_saturates(power: int, mantissa: float, fmt: MxFormat) -> None:
    """OCP's conversion takes amax's power of two over the largest element's, 2^8 or 2^2."""
    most = math.ldexp(mantissa, power)
    x = torch.zeros(1, 32)
    x[0, 5] = -most
    byte = int(quantise_mx(x, fmt)[1])
    ocp = power - (8 if fmt == "mxfp8" else 2)
    saturates = mantissa > LARGEST[fmt] / 2 ** (8 if fmt == "mxfp8" else 2)
    assert byte - 127 == max(-126, ocp + saturates)
    assert most <= LARGEST[fmt] * 2.0 ** (byte - 127)


@given(
    st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=32, max_size=32), st.sampled_from(("mxfp8", "mxfp4"))
)
@settings(max_examples=100, deadline=None)
def test_mx_values_are_the_nearest_of_their_group(values: list[float], fmt: MxFormat) -> None:
    data, scale = quantise_mx(torch.tensor([values]), fmt)
    power = Fraction(2) ** (int(scale) - 127)
    grid = E4M3 if fmt == "mxfp8" else E2M1
    found = dequantise_mx(data, torch.full_like(scale, 127), fmt)[0].tolist()
    for value, got in zip(values, found, strict=True):
        exact = Fraction(value) / power
        if exact.denominator < 2**60:  # else the quotient is a subnormal float32, far below half a step
            assert got == float(nearest(exact, grid))
        else:
            assert got == 0


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=16, max_size=16), st.sampled_from((1.0, 2.0**-5, 0.013, 3.1e-6))
)
@settings(max_examples=200, deadline=None)
def test_nvfp4_is_two_roundings_to_nearest_even(values: list[float], factor: float) -> None:
    """The scale is E4M3 of amax / 6 / factor; the values E2M1 of x / (scale factor), both saturating."""
    factor = float(torch.tensor(factor))  # a float32
    data, scale = quantise_mx(torch.tensor([values]), "nvfp4", factor)
    most = max(abs(v) for v in values)
    assert _near(float(scale.float()), Fraction(most) / 6 / Fraction(factor), E4M3)
    step = Fraction(float(scale.float())) * Fraction(factor)
    for value, got in zip(values, unpack_e2m1(data)[0].tolist(), strict=True):
        assert _near(got, Fraction(value) / step if step else Fraction(0), E2M1)


def _near(got: float, exact: Fraction, grid: list[Fraction]) -> bool:
    """Rounded as `nearest` does; within float32's error of a tie to either side."""
    return any(got == float(nearest(exact * (1 + Fraction(off, 2**22)), grid)) for off in (-1, 0, 1))


def test_nvfp4_saturates_and_vanishes_at_the_ends_of_its_scales() -> None:
    factor = 2.0**-10
    top = 448 * 6 * factor
    x = torch.zeros(1, 16)
    for most, kept in (
        (top, top),
        (8 * top, top),
        (6 * 2.0**-9 * factor, 6 * 2.0**-9 * factor),
        (2.0**-9 * factor, 0.0),
    ):
        x[0, 3] = most
        assert float(rounded_mx(x, "nvfp4", factor)[0, 3]) == kept
    x[0, 3] = 6 * 2.0**-10 * factor  # half of the least scale: a tie, to the even 0
    assert int(quantise_mx(x, "nvfp4", factor)[1].view(torch.uint8)) == 0


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_group_of_zeros_is_zero_and_its_scale_a_number(fmt: MxFormat) -> None:
    x = torch.zeros(2, 64)
    x[1] = -0.0
    data, scale = quantise_mx(x, fmt)
    assert (scale.float() == (0 if fmt == "nvfp4" else 1)).all()  # E8M0 has no 0: 2^-126
    assert (dequantise_mx(data, scale, fmt) == 0).all()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_makes_its_group_nan_and_no_other(fmt: MxFormat, what: float) -> None:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    clean = rounded_mx(x, fmt)
    x[1, 37] = what
    data, scale = quantise_mx(x, fmt)
    group = mx_group(fmt)
    bad = torch.zeros(3, 96 // group, dtype=torch.bool)
    bad[1, 37 // group] = True
    assert torch.equal(scale.view(torch.uint8) == (127 if fmt == "nvfp4" else 255), bad)
    found, wide = dequantise_mx(data, scale, fmt), bad.repeat_interleave(group, -1)
    assert found[wide].isnan().all() and torch.equal(found[~wide], clean[~wide])


def test_a_fp4_weight_in_groups_of_32_is_an_nvfp4_weight_without_a_rounding() -> None:
    """As long as a tensor's exponents lie within E4M3's powers of two, 2^-9 to 2^8."""
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (24, 64), generator=draw).to(torch.uint8)
    byte = torch.randint(110, 128, (24, 4), generator=draw).to(torch.uint8)
    factor = 2.0 ** (int(byte.max()) - 127 - 8)
    scale = (from_e8m0(byte) / factor).to(torch.float8_e4m3fn).repeat_interleave(2, -1)
    assert torch.equal(dequantise_mx(codes, scale, "nvfp4", factor), dequantise_fp4(codes, byte))
