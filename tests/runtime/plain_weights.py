"""A weight's transforms taken literally, a whole tensor at a time: what streaming must equal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4c.artifact import Weight
from dsv4c.errors import ArtifactError, CheckpointError
from dsv4c.runtime import layouts


class WeightSource(Protocol):
    """A checkpoint, or seeded random weights of the same names."""

    def raw(self, name: str) -> Tensor:
        """The tensor as stored."""

    def dequantised(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor of logical values in `dtype`; integer tables stay int64."""


def load_weight(weight: Weight, source: WeightSource) -> Tensor:
    """One weight, dense, of the shape and dtype that the manifest says."""
    transforms = [(str(t[0]), t[1:]) for t in weight.transforms]
    dtype = _dtype(weight)
    exact = any(name == "narrow" for name, _ in transforms)
    whole: Tensor | None = None
    stored = any(name == "stored" for name, _ in transforms)
    parts = _stored_parts(weight, source, dtype) if stored else _parts(weight, source, dtype, exact)
    for name, args in transforms:
        if name in ("dequantise", "stored", "cast", "narrow", "view"):
            continue  # done for each source
        if name == "values":
            whole = torch.tensor(args[0], dtype=dtype)
        elif name in ("stack", "concat"):
            whole = _join(weight, parts, dtype, int(args[0]) if args else 0, stack=name == "stack")
        else:
            whole = _lay_out(weight, _single(weight, parts) if whole is None else whole, name, args)
    out = (_single(weight, parts) if whole is None else whole).contiguous()
    if tuple(out.shape) != tuple(weight.shape) or out.dtype != dtype:
        raise CheckpointError(
            f"weight `{weight.name}` is {out.dtype} {list(out.shape)}, the artifact expects "
            f"{weight.dtype} {list(weight.shape)}",
            hint="serve the checkpoint that the artifact was compiled for",
        )
    return out


def _dtype(weight: Weight) -> torch.dtype:
    dtype = getattr(torch, weight.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"weight `{weight.name}` has the unknown dtype `{weight.dtype}`")
    return dtype


def _parts(weight: Weight, source: WeightSource, dtype: torch.dtype, exact: bool) -> Iterable[Tensor]:
    """The sources one by one, already in the final dtype."""
    for name in weight.sources:
        wide = source.dequantised(name, torch.float32)
        part = wide.to(dtype) if wide.is_floating_point() else wide
        if exact and part.dtype != wide.dtype and not torch.equal(part.to(wide.dtype), wide):
            raise CheckpointError(
                f"`{name}` holds values that {weight.dtype} cannot hold exactly",
                hint="its scales are no powers of two; this artifact was compiled for a checkpoint where they are",
            )
        yield part


def _stored_parts(weight: Weight, source: WeightSource, dtype: torch.dtype) -> Iterable[Tensor]:
    """The sources one by one as they are stored: their bytes seen as the final dtype, or scales widened to it."""
    view = any(transform[0] == "view" for transform in weight.transforms)
    for name in weight.sources:
        raw = source.raw(name)
        if view and raw.element_size() != dtype.itemsize:
            raise CheckpointError(
                f"`{name}` is stored as {raw.dtype}, the artifact reads it as {weight.dtype}",
                hint="this artifact was compiled for a checkpoint that stores it in as many bits",
            )
        yield raw.view(dtype) if view else raw.to(dtype)


def _join(weight: Weight, parts: Iterable[Tensor], dtype: torch.dtype, dim: int, *, stack: bool) -> Tensor:
    """All parts along a new dim 0, or along `dim`, with one allocation for the whole."""
    if not stack and dim:
        return torch.cat(list(parts), dim)
    whole = torch.empty(0, dtype=dtype)
    at = 0
    for part in parts:
        rows = part.unsqueeze(0) if stack else part
        if at == 0:
            total = len(weight.sources) if stack else math.prod(weight.shape) // max(1, math.prod(part.shape[1:]))
            whole = torch.empty(total, *rows.shape[1:], dtype=part.dtype)
        if rows.shape[1:] != whole.shape[1:] or at + rows.shape[0] > whole.shape[0]:
            raise CheckpointError(
                f"the tensors of weight `{weight.name}` do not fit together: {list(part.shape)} after "
                f"{list(whole.shape[1:])}",
                hint="serve the checkpoint that the artifact was compiled for",
            )
        whole[at : at + rows.shape[0]] = rows
        at += rows.shape[0]
    if at != whole.shape[0]:
        raise CheckpointError(f"weight `{weight.name}` has {at} rows, expected {whole.shape[0]}")
    return whole


def _lay_out(weight: Weight, tensor: Tensor, name: str, args: Sequence[Any]) -> Tensor:
    layout = layouts.LAYOUTS.get(name)
    if layout is None:
        raise ArtifactError(
            f"weight `{weight.name}` has the unknown transform `{name}`", hint="compile it again with this version"
        )
    try:
        return layout(tensor, *args)
    except ValueError as error:
        raise CheckpointError(
            f"weight `{weight.name}` does not fit its layout: {error}",
            hint="serve the checkpoint that the artifact was compiled for",
        ) from error


def _single(weight: Weight, parts: Iterable[Tensor]) -> Tensor:
    found = list(parts)
    if len(found) != 1:
        raise ArtifactError(f"weight `{weight.name}` joins {len(found)} sources without saying how")
    return found[0]
