"""Ends below 0 complete no entry; the others are those of the model."""

from __future__ import annotations

import torch

from dsv4c.model import paging, rope
from dsv4c.ops import OPS


def test_ends_below_0_are_none() -> None:
    pages, owners = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 0, 1, 1])
    positions, ends = torch.tensor([3, 4, 10, 11]), torch.tensor([-1, 0, -1, 3])
    attrs = {"ratio": 4, "entries_per_page": 2}
    slots = OPS["entry_slots"](pages, owners, positions, ends, **attrs)
    assert slots.tolist() == [0, paging.entry_slots(pages, owners, positions, ends[1:2], **attrs).item(), 0, 8]
    frequency = torch.tensor([1.0, 0.1])
    table = OPS["entry_rope_table"](positions, ends, frequency, ratio=4)
    assert torch.equal(table[[1, 3]], rope.entry_rope_table(positions, ends[[1, 3]], frequency, ratio=4))
    assert table[0].tolist() == table[2].tolist() == [1.0, 1.0, 0.0, 0.0]
    none = ends[:0]
    assert OPS["entry_slots"](pages, owners, positions, none, **attrs).shape == (0,)
