"""Copies on the host: what ranges say and nothing else, however they are made; and never outside of a pool."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.errors import HandleError, LeaseLost
from dsv4c.runtime.transfer.hostcopy import SMALL, HostCopy
from dsv4c.runtime.transfer.layout import Ranges

UNITS = np.array([8, 7, SMALL, SMALL + 8], np.int64)
PAGES = 30


def pools(seed: int, spare: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, (PAGES + spare) * unit, dtype=np.uint8) for unit in UNITS.tolist()]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_copies_what_is_said(data: st.DataObject) -> None:
    source, target = pools(1), pools(2, spare=5)
    wanted = [p.copy() for p in target]
    rows = []
    for number, unit in enumerate(UNITS.tolist()):
        pages = data.draw(st.permutations(range(PAGES)))[: data.draw(st.integers(0, PAGES))]
        odd = data.draw(st.booleans())
        for at, page in enumerate(pages):
            nbytes = unit - 1 if odd and at % 3 == 0 else unit
            shift = odd and at % 5 == 0 and nbytes < unit
            rows.append((number, page * unit + shift, at * unit, nbytes))
            wanted[number][at * unit : at * unit + nbytes] = source[number][page * unit + shift :][:nbytes]
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    HostCopy("p", source, target, UNITS).copy(Ranges(*columns))
    assert all(np.array_equal(a, b) for a, b in zip(target, wanted, strict=True))


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ((0, -8, 0, 8), LeaseLost), ((0, PAGES * 8, 0, 8), LeaseLost), ((2, 0, PAGES * SMALL, 1), HandleError),
        ((3, 0, -1, 1), HandleError), ((1, PAGES * 7 - 1, 0, 2), LeaseLost),
    ],
)  # fmt: skip
def test_outside_of_a_pool(row: tuple[int, ...], error: type[Exception]) -> None:
    target = pools(2)
    before = [p.copy() for p in target]
    ranges = Ranges(*np.array([(0, 0, 0, 8), row], np.int64).T)
    with pytest.raises(error):
        HostCopy("p", pools(1), target, UNITS).copy(ranges)
    assert all(np.array_equal(a, b) for a, b in zip(target, before, strict=True))
