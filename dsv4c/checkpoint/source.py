"""What every source of weights offers (a checkpoint on disk, dummy weights), and the model's state made from one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dsv4c.checkpoint.names import TensorSpec, inventory, parameter_sources
from dsv4c.config import ModelConfig


class Stored(NamedTuple):
    """A stored tensor. One of its rows belongs to `covers` rows of the logical tensor that it is a part of."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    covers: int = 1


class WeightSource(Protocol):
    """Tensors by checkpoint name: whole (`raw`, `dequantised`), or some rows at a time, on any device."""

    @property
    def config(self) -> ModelConfig:
        """The model these weights are for."""
        ...

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP blocks' tensors are there."""
        ...

    def names(self) -> Iterable[str]:
        """Names of all stored tensors, scales included, sorted."""
        ...

    def raw(self, name: str) -> Tensor:
        """A stored tensor as it is stored; read-only by contract."""
        ...

    def release(self) -> None:
        """Gives back memory that reading raw tensors took; tensors handed out stay valid."""
        ...

    def dequantised(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A logical tensor as a new `dtype` tensor, its scale applied; tables of ids stay int64."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a logical tensor."""
        ...

    def stored(self, name: str) -> Stored:
        """What is stored under this name. Raises CheckpointError if nothing is."""
        ...

    def parts(self, name: str) -> tuple[Stored, ...]:
        """The stored tensors that make a logical one: itself, then its scale.

        Raises CheckpointError if one is missing, misshapen or of a wrong type.
        """
        ...

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fills `into` (uint8 [n], on the host) with a stored tensor's bytes from `start` on; from any thread."""
        ...

    def widen(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """The same rows of a logical tensor's parts -> these rows as `dtype`, where the parts are; ids stay int64."""
        ...

    def suspect(self, name: str, parts: Sequence[Tensor]) -> Tensor | None:
        """How much in these rows cannot be right, a count where the parts are; None if there is nothing to look at."""
        ...

    def check(self, name: str) -> None:
        """Raises CheckpointError that says what `suspect` found in a logical tensor."""
        ...


def load_model_state(source: WeightSource, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The plain model's state dict, by parameter name, in model order (`parameter_sources`).

    Every float tensor has `dtype`; `tid2eid` tables stay int64. MTP parameters are there if the source has them.
    Streams tensor by tensor: beside the result, only one tensor of the checkpoint is in memory.
    Raises CheckpointError for a tensor that is missing, misshapen, of a wrong type or with a scale that is not finite.
    """
    specs = inventory(source.config, mtp=source.has_mtp)
    state = {}
    for parameter, names in parameter_sources(source.config, mtp=source.has_mtp).items():
        if specs[names[0]].role == "expert":
            state[parameter] = _stack(source, [specs[name] for name in names], dtype)
        else:
            state[parameter] = source.dequantised(names[0], dtype)
    return state


def _stack(source: WeightSource, specs: list[TensorSpec], dtype: torch.dtype) -> Tensor:
    out = torch.empty((len(specs), *specs[0].shape), dtype=dtype)
    for row, spec in zip(out, specs, strict=True):
        row.copy_(source.dequantised(spec.name, dtype))
    return out
