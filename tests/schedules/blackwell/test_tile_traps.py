"""What TileLang compiles for Blackwell without a word, and wrongly, is refused before it is lowered."""

from __future__ import annotations

import pytest

from dsv4c.errors import ScheduleError
from dsv4c.schedules._launch import TileLaunch
from dsv4c.schedules._schedule import Value

pytest.importorskip("tilelang", reason="TileLang is not installed; see the extra `gpu`")

from tilelang import tvm

from dsv4c.schedules._tilelang import lower
from dsv4c.schedules._tiletraps import traps
from tests.schedules.blackwell import tile_factories

BYTES, OUT = Value((128, 128), "float8_e4m3fn"), Value((128, 128), "float32")


def product(dtype: str, group: int) -> TileLaunch:
    factory = f"{tile_factories.__name__}:scaled_product"
    return TileLaunch(factory, (0, 1, 2), {"dtype": dtype, "group": group}, (1, 1, 1), 128)


@pytest.mark.parametrize(
    ("dtype", "group", "reason"),
    [
        ("float4_e2m1fn", 32, "is given packed FP4 as A, its instructions take a byte for each value"),
        ("float8_e4m3fn", 16, "has a scale of A for 16 channels, mxf8f6f4 has one for 32"),
    ],
)
@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_products_that_would_be_wrong_are_refused(dtype: str, group: int, reason: str, arch: str) -> None:
    with pytest.raises(ScheduleError, match=rf"scaled_product.*`tl\.tileop\.tcgen05_gemm_blockscaled` {reason}"):
        lower(product(dtype, group), (BYTES, BYTES, OUT), arch)


def test_a_sound_product_is_not_refused() -> None:
    with tvm.target.Target({"kind": "cuda", "arch": "sm_103a"}):
        assert list(traps(tile_factories.scaled_product("float8_e4m3fn", 32))) == []
