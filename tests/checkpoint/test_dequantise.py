"""FP8 and FP4 against definitions spelled out element by element, and the promises of the quantisers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.checkpoint.dequantise import (
    E2M1_VALUES,
    bad_scales,
    dequantise_fp4,
    dequantise_fp8_block,
    e2m1_decode,
    e2m1_encode,
    quantise_fp4,
    quantise_fp8_block,
)

SHAPES = [(1, 1), (128, 128), (127, 129), (256, 64), (130, 300), (0, 128), (3, 0)]


def random_e8m0(shape: tuple[int, ...], seed: int, low: int = 0, high: int = 255) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e8m0fnu)


def random_e4m3(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    return codes.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_tiles(shape: tuple[int, int]) -> None:
    weight = random_e4m3(shape, 0)
    scale = random_e8m0((-(-shape[0] // 128), -(-shape[1] // 128)), 1, 100, 150)
    rows, columns = torch.arange(shape[0]) // 128, torch.arange(shape[1]) // 128
    factor = torch.pow(2.0, scale.view(torch.uint8).int() - 127)[rows][:, columns]
    expected = weight.float() * factor
    assert torch.equal(dequantise_fp8_block(weight, scale), expected)
    assert torch.equal(dequantise_fp8_block(weight, scale, torch.bfloat16).float(), expected)


def test_fp8_with_float32_scales_rounds_once() -> None:
    weight = random_e4m3((130, 200), 3)
    scale = torch.rand((2, 2), generator=torch.Generator().manual_seed(4))
    factor = scale[torch.arange(130) // 128][:, torch.arange(200) // 128]
    expected = weight.float() * factor
    assert torch.equal(dequantise_fp8_block(weight, scale), expected)
    assert torch.equal(dequantise_fp8_block(weight, scale, torch.bfloat16), expected.bfloat16())


def test_fp4_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale = random_e8m0((16, 1), 5, 100, 150)
    got = dequantise_fp4(packed, scale)
    for row in range(16):
        factor = 2.0 ** (int(scale.view(torch.uint8)[row, 0]) - 127)
        for column in range(32):
            code = int(packed[row, column // 2]) >> (4 * (column % 2)) & 15
            value = E2M1_VALUES[code & 7] * (-1 if code & 8 else 1)
            assert got[row, column].item() == value * factor
    assert torch.equal(dequantise_fp4(packed.view(torch.int8), scale), got)
    assert torch.equal(dequantise_fp4(packed, scale, torch.bfloat16).float(), got)


def test_fp4_scale_covers_32_channels_of_a_row() -> None:
    packed = torch.full((2, 32), 0x22, dtype=torch.uint8)  # all ones
    scale = torch.tensor([[127, 128], [129, 126]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got = dequantise_fp4(packed, scale)
    assert got.tolist() == [[1.0] * 32 + [2.0] * 32, [4.0] * 32 + [0.5] * 32]


def test_e2m1_rounds_ties_to_even() -> None:
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0, 5.1: 6.0, 6.0: 6.0, 9.0: 6.0}
    x = torch.tensor([*ties, *(-v for v in ties)])
    assert e2m1_decode(e2m1_encode(x)).tolist() == [*ties.values(), *(-v for v in ties.values())]


def test_e2m1_codes_round_trip() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(e2m1_encode(e2m1_decode(codes)), codes)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(-140, 120), st.integers(1, 200), st.integers(1, 5))
def test_fp8_quantiser(seed: int, exponent: int, rows: int, groups: int) -> None:
    columns = groups * 60
    w = torch.ldexp(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), torch.tensor(exponent))
    values, scale = quantise_fp8_block(w)
    check_scales_are_least(w, values, scale, 448.0, (128, 128))
    again = dequantise_fp8_block(values, scale)
    step = scale.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns] * 2**-9
    # Half a step of 3 mantissa bits, or half of the subnormal step.
    assert (again.double() - w.double()).abs().le(torch.maximum(w.double().abs() * 2**-4, step / 2)).all()
    assert torch.equal(dequantise_fp8_block(*quantise_fp8_block(again)), again)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(-140, 120), st.integers(1, 40), st.integers(1, 5))
def test_fp4_quantiser(seed: int, exponent: int, rows: int, groups: int) -> None:
    w = torch.ldexp(
        torch.randn(rows, groups * 32, generator=torch.Generator().manual_seed(seed)), torch.tensor(exponent)
    )
    packed, scale = quantise_fp4(w)
    check_scales_are_least(w, packed, scale, 6.0, (1, 32))
    again = dequantise_fp4(packed, scale)
    step = scale.float().repeat_interleave(32, 1)
    assert (again - w).abs().le(step).all()  # half of the widest gap of the grid, 4 to 6
    assert torch.equal(dequantise_fp4(*quantise_fp4(again)), again)


def check_scales_are_least(
    w: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, top: float, tile: tuple[int, int]
) -> None:
    """Every scale is the least power of two (from 2^-127 on) that keeps its tile within `top`."""
    assert not bad_scales(scale)
    if values.dtype == torch.float8_e4m3fn:
        assert torch.isfinite(values.float()).all()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = w[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]].double()
            amax, factor = part.abs().max().item(), scale[i, j].double().item()
            assert amax <= top * factor
            assert amax > top * factor / 2 or factor == 2.0**-127


def test_zeros_and_the_largest_floats_have_finite_scales() -> None:
    w = torch.zeros(128, 256)
    w[:, 128:] = torch.finfo(torch.float32).max
    for values, scale in (quantise_fp8_block(w), quantise_fp4(w)):
        assert not bad_scales(scale)
        dequantise = dequantise_fp8_block if values.dtype == torch.float8_e4m3fn else dequantise_fp4
        again = dequantise(values, scale)
        assert (again[:, :128] == 0).all()
        assert torch.isfinite(again[0, 0])
        assert int(scale.view(torch.uint8).max()) < 255


def test_bfloat16_is_exact_for_any_usual_scale() -> None:
    weight, packed = random_e4m3((128, 128), 6), torch.arange(256, dtype=torch.uint8).view(16, 16)
    for byte in range(30, 230, 10):
        scale = torch.tensor([[byte]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
        exact = dequantise_fp8_block(weight, scale)
        assert torch.equal(dequantise_fp8_block(weight, scale, torch.bfloat16).float(), exact)
        rows = scale.view(torch.uint8).expand(16, 1).contiguous().view(torch.float8_e8m0fnu)
        assert torch.equal(dequantise_fp4(packed, rows, torch.bfloat16).float(), dequantise_fp4(packed, rows))


def test_bad_scales_are_counted() -> None:
    assert bad_scales(torch.tensor([0, 255, 254, 255], dtype=torch.uint8).view(torch.float8_e8m0fnu)) == 2
    assert bad_scales(torch.tensor([1.0, float("nan"), float("inf"), -1.0])) == 2


def test_fp4_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 32 input channels, not 48"):
        quantise_fp4(torch.zeros(2, 48))
