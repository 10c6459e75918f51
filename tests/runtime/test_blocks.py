"""How many drafts of a block are worth verifying: as many as give most tokens a second, found by trying all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4c.artifact import Drafter
from dsv4c.errors import ArtifactError
from dsv4c.runtime.blocks import BlockDrafter, worth_verifying

LOGITS = st.lists(st.floats(-6, 6), min_size=5, max_size=5)


@given(st.lists(LOGITS, min_size=1, max_size=4), st.floats(0.001, 2))
def test_no_other_length_gives_more(confidences: list[list[float]], price: float) -> None:
    for row, count in zip(confidences, worth_verifying(torch.tensor(confidences), price), strict=True):
        reached = torch.sigmoid(torch.tensor(row).double()).cumprod(0).tolist()
        rates = [(1 + sum(reached[:k])) / (1 + k * price) for k in range(6)]
        assert rates[count] >= max(rates) - 1e-6


@pytest.mark.parametrize(
    ("confidences", "price", "count"),
    [
        ([9.0] * 5, 0.2, 5),  # sure of all
        ([-9.0] + [9.0] * 4, 0.2, 0),  # sure that the first is wrong: the others are never reached
        ([0.0] * 5, 0.3, 1),  # 0.5 > 0.3, but 0.25 is less than 0.3 * 1.5 / 1.3
        ([0.0] * 5, 0.01, 5),
        ([9.0] * 5, 1.5, 0),  # a draft that costs more than a step never pays
    ],
)
def test_lengths(confidences: list[float], price: float, count: int) -> None:
    assert worth_verifying(torch.tensor([confidences]), price) == [count]


def test_a_manifest_without_blocks_is_refused() -> None:
    with pytest.raises(ArtifactError, match="the manifest's drafter has no blocks"):
        BlockDrafter(None, dict, dict, (), Drafter("mtp", 2))  # type: ignore[arg-type]
