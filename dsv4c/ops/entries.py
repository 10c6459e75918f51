"""Where compressed entries go and how they are turned, for window ends of which some complete nothing.

A step on a GPU has room for more ends than windows that it completes, and one that verifies drafts learns on the device
which do: an end below 0 is none. Its entry lies in null row 0, unturned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.model import paging, rope


def entry_slots(
    pages_RP: Tensor, request_rows: Tensor, positions: Tensor, ends: Tensor, *, ratio: int, entries_per_page: int
) -> Tensor:
    """[E] pool row for every compressed entry that the rows `ends` complete; 0 for an end below 0."""
    at = ends.clamp(min=0)
    rows = paging.entry_slots(
        pages_RP, request_rows, positions, at, ratio=ratio, entries_per_page=entries_per_page
    )  # fmt: skip
    return torch.where(ends >= 0, rows, 0)


def entry_rope_table(positions: Tensor, ends: Tensor, frequency: Tensor, *, ratio: int) -> Tensor:
    """float32 [E, R]: cosines, then sines, at the first token of each window; of position 0 for an end below 0."""
    first_E = torch.where(ends >= 0, positions[ends.clamp(min=0)] - (ratio - 1), 0)
    return rope.rope_table(first_E, frequency)
