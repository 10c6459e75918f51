"""The pools and states of an artifact as tensors: by value name, zeroed, of their own or in memory that is given."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv4c.artifact import Manifest, Pool
from dsv4c.errors import ConfigError
from dsv4c.runtime.poolsizes import DTYPE_BYTES, ceil_div, snapshot_states

ALIGNMENT = 4096
"""Bytes: pools in given memory begin with a page of it."""

Buffer = bytearray | memoryview | mmap.mmap


class PoolRows(Protocol):
    """How many pages of each KV group and how many request slots to allocate, null page and slot included."""

    @property
    def pages(self) -> Mapping[str, int]: ...

    @property
    def slots(self) -> int: ...

    @property
    def snapshots(self) -> int:
        """Rows more of the state groups that snapshots copy."""


@dataclass(frozen=True)
class PoolLayout:
    """Where the pools lie in one piece of memory: first byte by value name, and its size."""

    offsets: Mapping[str, int]
    total_bytes: int


def pool_layout(manifest: Manifest, rows: PoolRows) -> PoolLayout:
    """The layout that `allocate` gives memory. Raises ConfigError as it does."""
    offsets, end = {}, 0
    for pool, count in _pools(manifest, rows):
        offsets[pool.name] = end
        size = count * math.prod(pool.entry_shape) * DTYPE_BYTES[pool.dtype]
        end += ceil_div(size, ALIGNMENT) * ALIGNMENT
    return PoolLayout(offsets, end)


def allocate(
    manifest: Manifest, rows: PoolRows, device: torch.device | None = None, memory: Buffer | None = None
) -> dict[str, Tensor]:
    """Zeroed pools and states by value name, on `device`, or as views of writable `memory` of `pool_layout`'s size.

    Raises ConfigError for too few rows, for memory that is read-only or of another size, or given for a device.
    """
    if memory is None:
        return {
            pool.name: torch.zeros((count, *pool.entry_shape), dtype=getattr(torch, pool.dtype), device=device)
            for pool, count in _pools(manifest, rows)
        }
    layout, view = pool_layout(manifest, rows), memoryview(memory).cast("B")
    if view.readonly or view.nbytes != layout.total_bytes or (device is not None and device.type != "cpu"):
        kind = "read-only" if view.readonly else "writable"
        raise ConfigError(
            f"pools of {layout.total_bytes} bytes cannot lie in {view.nbytes} bytes of {kind} memory"
            + ("" if device is None else f" on `{device}`")
        )
    whole, out = torch.frombuffer(view, dtype=torch.uint8), {}
    whole.zero_()
    for pool, count in _pools(manifest, rows):
        size = count * math.prod(pool.entry_shape) * DTYPE_BYTES[pool.dtype]
        part = whole[layout.offsets[pool.name] :][:size]
        out[pool.name] = part.view(getattr(torch, pool.dtype)).view(count, *pool.entry_shape)
    return out


def _pools(manifest: Manifest, rows: PoolRows) -> Iterator[tuple[Pool, int]]:
    """Every pool with its rows, in the order of the manifest."""
    for group in manifest.kv_groups:
        pages = rows.pages.get(group.name, 0)
        if pages < 2:
            raise ConfigError(f"KV group `{group.name}` has {pages} pages, it needs the null page and one more")
        yield from ((pool, pages * group.entries_per_page) for pool in group.pools)
    if manifest.state_groups and rows.slots < 2:
        raise ConfigError(f"there are {rows.slots} state slots, it takes the null slot and one more")
    copied = snapshot_states(manifest.state_groups, manifest.kv_groups)
    for states in manifest.state_groups:
        count = rows.slots + (rows.snapshots if states in copied else 0)
        yield from ((pool, count) for pool in states.pools)
