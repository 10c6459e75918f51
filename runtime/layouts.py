"""Layouts of weights: pure functions of one tensor, named in the manifest and applied when a weight is loaded.

A layout permutes or views stored values and never changes one. `LAYOUTS` maps a transform's name to its function;
`dsv4c.schedules` names them, the loader and the tuner apply them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def reshape(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """The same values, in order, as `sizes`."""
    if math.prod(sizes) != tensor.numel():
        raise ValueError(f"{list(tensor.shape)} cannot be laid out as {list(sizes)}")
    return tensor.reshape(list(sizes))


def transpose(tensor: Tensor) -> Tensor:
    """The last two dimensions exchanged."""
    return tensor.transpose(-1, -2)


def permute(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """The dimensions in this order."""
    return tensor.permute(*dims)


def narrow(tensor: Tensor, dtype: str) -> Tensor:
    """The same values in a narrower dtype that holds them."""
    small = tensor.to(getattr(torch, dtype))
    if not torch.equal(small.to(tensor.dtype), tensor):
        raise ValueError(f"values of {tensor.dtype} do not fit {dtype}")
    return small


def at_most(tensor: Tensor, limit: int) -> Tensor:
    """The same tensor, if no value is larger: what a kernel's arithmetic assumes of stored scales."""
    if tensor.numel() and int(tensor.max()) > limit:
        raise ValueError(f"a stored value is {int(tensor.max())}, the kernel takes {limit} at most")
    return tensor


def at_least(tensor: Tensor, limit: float) -> Tensor:
    """The same tensor, if no value is smaller, or NaN."""
    if not bool((tensor.float() >= limit).all()):
        raise ValueError(f"a stored value is not {limit:g} or more")
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """The largest value, as a tensor of one."""
    return tensor.amax().reshape(1)


LAYOUTS: Mapping[str, Callable[..., Tensor]] = {
    "reshape": reshape, "transpose": transpose, "permute": permute, "narrow": narrow, "at_most": at_most,
    "at_least": at_least, "largest": largest,
}  # fmt: skip


def apply(tensor: Tensor, transforms: Sequence[Sequence[Any]]) -> Tensor:
    """The tensor after these transforms, left to right, dense. Raises ValueError where one does not fit."""
    for name, *args in transforms:
        tensor = LAYOUTS[name](tensor, *args)
    return tensor.contiguous()


def undo(tensor: Tensor, transforms: Sequence[Sequence[Any]], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What became `tensor` by these transforms: of this shape and dtype, dense."""
    shapes = [torch.empty(tuple(shape), device="meta")]
    for name, *args in transforms:
        same = name in ("narrow", "at_most")
        shapes.append(shapes[-1] if same else LAYOUTS[name](shapes[-1], *args))
    for (name, *args), before in zip(reversed(transforms), reversed(shapes[:-1]), strict=True):
        if name == "reshape":
            tensor = tensor.reshape(before.shape)
        elif name == "transpose":
            tensor = tensor.transpose(-1, -2)
        elif name == "permute":
            tensor = tensor.permute(*(args[0].index(dim) for dim in range(before.dim())))
    return tensor.to(dtype).contiguous()
