"""Page tables on the device: a mirror of the KV pool's, brought up to date by what changed since the last step.

A row for every slot and one tensor for every group, so that a step names its requests by slot and no table is built
or sent for it. An entry that a request gave back keeps its old page: readers are bounded by positions. Slot 0 is all
zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class PageTables:
    """`columns`: group -> width of its table. `tensors[group]` is int64 [slots, columns]."""

    def __init__(self, slots: int, columns: Mapping[str, int], device: torch.device) -> None:
        self._starts, total = {}, 0
        for group, width in columns.items():
            self._starts[group] = total
            total += -(-slots * width // 32) * 32  # every table starts at a multiple of 256 bytes
        self._columns = dict(columns)
        self._flat = torch.zeros(total, dtype=torch.int64, device=device)
        self._pinned = device.type == "cuda"
        self.tensors: dict[str, Tensor] = {
            group: self._flat[start : start + slots * columns[group]].view(slots, columns[group])
            for group, start in self._starts.items()
        }

    @property
    def nbytes(self) -> int:
        return self._flat.nbytes

    def update(self, changes: Mapping[str, Sequence[tuple[int, int, int]]]) -> None:
        """Writes (slot, column, page) entries by group, on the current stream; the last of equal places counts."""
        places: dict[int, int] = {}
        for group, entries in changes.items():
            start, width = self._starts[group], self._columns[group]
            places.update((start + slot * width + column, page) for slot, column, page in entries)
        if not places:
            return
        both = torch.empty(2, len(places), dtype=torch.int64, pin_memory=self._pinned)
        both.numpy()[0] = np.fromiter(places.keys(), np.int64, len(places))
        both.numpy()[1] = np.fromiter(places.values(), np.int64, len(places))
        at, pages = both.to(self._flat.device, non_blocking=True)
        self._flat.index_copy_(0, at, pages)
