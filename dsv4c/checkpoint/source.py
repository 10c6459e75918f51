"""What every source of weights offers (a checkpoint on disk, dummy weights), and the model's state made from one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from dsv4c.checkpoint.names import TensorSpec, inventory, parameter_sources
from dsv4c.config import ModelConfig


class WeightSource(Protocol):
    """Tensors by checkpoint name."""

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
