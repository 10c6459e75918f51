"""The arena of a program: one allocation, and the views that its buffers are at given sizes.

Every buffer has a fixed offset, planned for the largest value of each symbol; a step of smaller sizes uses a prefix.
Views are made once for each combination of sizes and kept by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4c.artifact import Buffer, Program, Shape
from dsv4c.errors import ArtifactError

_ALIGNMENT = 64  # the planner's on a CPU: offsets are multiples, so the base must be
_DEVICE_ALIGNMENT = 256  # on a GPU, where allocations are aligned so anyway


def sizes_of(shape: Shape, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The shape in numbers."""
    return tuple(symbols[size] if isinstance(size, str) else size for size in shape)


class Arena:
    """`program.arena_bytes` bytes on `device`, aligned, zeroed so that nothing undefined is ever read."""

    def __init__(self, program: Program, device: torch.device | None = None, memory: Tensor | None = None) -> None:
        """`memory`: what `Arena.memory` gave for the largest of several programs that run in turn."""
        self._buffers = {buffer.name: buffer for buffer in program.buffers}
        self._bytes = self.memory(program.arena_bytes, device) if memory is None else memory
        self._flat: dict[torch.dtype, Tensor] = {}
        for buffer in program.buffers:
            self._check(buffer, program.arena_bytes)

    @staticmethod
    def memory(arena_bytes: int, device: torch.device | None = None) -> Tensor:
        """Aligned, zeroed bytes for an arena, and a little more: a view of size 0 may lie at its end."""
        align = _ALIGNMENT if device is None or device.type == "cpu" else _DEVICE_ALIGNMENT
        whole = torch.zeros(arena_bytes + 2 * align, dtype=torch.uint8, device=device)
        start = -whole.data_ptr() % align
        return whole[start : start + arena_bytes + align]

    def _check(self, buffer: Buffer, arena_bytes: int) -> None:
        dtype = getattr(torch, buffer.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ArtifactError(f"buffer `{buffer.name}` has the unknown dtype `{buffer.dtype}`")
        offset = self._root(buffer).offset
        if offset is None or offset % _ALIGNMENT or not 0 <= offset <= arena_bytes:
            raise ArtifactError(
                f"buffer `{buffer.name}` lies at {offset}, outside the arena of {arena_bytes} bytes",
                hint="the manifest is corrupted; compile the artifact again",
            )
        if dtype not in self._flat:
            whole = self._bytes.numel() // dtype.itemsize * dtype.itemsize
            self._flat[dtype] = self._bytes[:whole].view(dtype)

    def _root(self, buffer: Buffer) -> Buffer:
        if buffer.of is None:
            return buffer
        if buffer.of not in self._buffers or self._buffers[buffer.of].of is not None:
            raise ArtifactError(f"buffer `{buffer.name}` is a view of `{buffer.of}`, which is no owning buffer")
        return self._buffers[buffer.of]

    def views(self, symbols: Mapping[str, int]) -> dict[str, Tensor]:
        """Every buffer as a tensor at these sizes. Raises ArtifactError if one leaves the arena."""
        out = {}
        for name, buffer in self._buffers.items():
            root = self._root(buffer)
            dtype: torch.dtype = getattr(torch, buffer.dtype)
            assert root.offset is not None
            offset = root.offset // dtype.itemsize + buffer.element_offset
            sizes = sizes_of(buffer.shape, symbols)
            strides = buffer.strides or _dense(sizes)
            last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
            flat = self._flat[dtype]
            if 0 not in sizes and last >= flat.numel():
                raise ArtifactError(
                    f"buffer `{name}` {list(sizes)} leaves the arena", hint="compile for more tokens or requests"
                )
            out[name] = flat.as_strided(sizes, strides, offset)
        return out


def _dense(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
