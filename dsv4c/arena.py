"""Where buffers lie in the arena: largest first, each at the lowest place that is free while it is in use.

Two buffers may share memory only if every use of one comes before every use of the other, in the order that lanes and
waits promise. In one lane that is: if their lives, from the first to the last call, do not overlap.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Need:
    """`size` bytes for one buffer, and the calls that use it (by number; the end of the program counts as one more)."""

    name: str
    size: int
    uses: frozenset[int]

    @cached_property
    def first(self) -> int:
        return min(self.uses)

    @cached_property
    def last(self) -> int:
        return max(self.uses)


def place(needs: Sequence[Need], before: Sequence[int]) -> tuple[Mapping[str, int], int]:
    """Offsets by name, and the bytes of the arena. `before[i]`: bit j says that call j is over when call i begins."""
    order = _Order(before)
    alive: dict[int, list[Need]] = defaultdict(list)  # placed buffers by the calls during which they live
    offsets: dict[str, int] = {}
    top = 0
    for need in sorted(needs, key=lambda n: (-n.size, n.first, n.name)):
        near = {o.name: o for at in order.around(need) for o in alive[at]}
        others = [o for o in near.values() if not order.apart(need, o)]
        start = 0
        for other in sorted(others, key=lambda o: offsets[o.name]):
            low = offsets[other.name]
            if start < low + other.size and low < start + need.size:
                start = low + other.size
        offsets[need.name] = start
        for at in range(need.first, need.last + 1):
            alive[at].append(need)
        top = max(top, start + need.size)
    return offsets, top


class _Order:
    """What comes before what, of calls and of buffers. The end of the program comes after every call."""

    def __init__(self, before: Sequence[int]) -> None:
        end = len(before)
        self._before = (*before, (1 << end) - 1)
        self._masks: dict[str, tuple[int, int]] = {}  # buffer -> its uses, and what is over before any of them
        self._beside: list[tuple[int, int]] = []  # the first and last call that may run at the same time
        for i, over in enumerate(self._before):
            free = ((1 << i) - 1) & ~over
            low = (free & -free).bit_length() - 1 if free else i
            self._beside.append((low, i))
        for i, over in enumerate(self._before):  # the same seen from the earlier one
            free = ((1 << i) - 1) & ~over
            while free:
                j = (free & -free).bit_length() - 1
                self._beside[j] = (self._beside[j][0], max(self._beside[j][1], i))
                free &= free - 1

    def around(self, need: Need) -> range:
        """The calls during which a buffer lives that may not share memory with this one."""
        spans = [self._beside[use] for use in need.uses]
        return range(min(need.first, *(low for low, _ in spans)), max(need.last, *(high for _, high in spans)) + 1)

    def apart(self, one: Need, two: Need) -> bool:
        """Whether every use of one comes before every use of the other."""
        (uses, over), (other_uses, other_over) = self._mask(one), self._mask(two)
        return not uses & ~other_over or not other_uses & ~over

    def _mask(self, need: Need) -> tuple[int, int]:
        found = self._masks.get(need.name)
        if found is None:
            over = functools.reduce(operator.and_, (self._before[use] for use in need.uses))
            found = self._masks[need.name] = (sum(1 << use for use in need.uses), over)
        return found
