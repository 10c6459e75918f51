"""A source of weights in memory: tensors by name, as stored and as meant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4c.checkpoint.source import Stored
from dsv4c.errors import CheckpointError


class MemorySource:
    """Remembers the order in which tensors were read; `broken` names one whose reading fails."""

    def __init__(self, broken: str | None = None, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.asked: list[str] = []
        self.broken = broken

    def raw(self, name: str) -> Tensor:
        return self.tensors[name]

    def dequantised(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.widen([self.tensors[name]], dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise CheckpointError(f"`{name}` is missing")
        return Stored(name, self.tensors[name].dtype, self.shape(name))

    def parts(self, name: str) -> tuple[Stored, ...]:
        return (self.stored(name),)

    def read(self, name: str, start: int, into: Tensor) -> None:
        if name == self.broken:
            raise CheckpointError(f"`{name}` cannot be read")
        self.asked.append(name)
        into.copy_(self.tensors[name].flatten().view(torch.uint8)[start : start + into.numel()])

    def widen(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return parts[0] if parts[0].dtype == torch.int64 else parts[0].to(dtype)

    def suspect(self, name: str, parts: Sequence[Tensor]) -> Tensor | None:
        return None

    def check(self, name: str) -> None:
        """Nothing is wrong with any tensor."""

    def release(self) -> None:
        """Nothing to give back."""
