"""Gluon kernels without clusters, tensor maps or matrix units on a CPU: Triton's interpreter knows Triton alone.

The kernel's own functions run as Python with a `gl` of numpy arrays. Layouts mean nothing here. What is read or written
outside a tensor, and shared memory that is used on both sides of a missing `gl.barrier`, is an error. Shared memory
begins as random bits.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon._runtime import GluonJITFunction

Layout = Any


class Block(np.ndarray):
    """Values of a block of threads, or one value."""

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Block:
        return np.asarray(array).view(Block)

    def to(self, dtype: type, bitcast: bool = False) -> Block:
        return self.view(dtype) if bitcast else block(np.trunc(self) if self.dtype.kind == "f" else self, dtype)


def block(values: Any, dtype: Any = None) -> Block:
    return np.asarray(values, dtype=dtype).view(Block)


class Pointer:
    """Places in a tensor, in elements."""

    def __init__(self, data: np.ndarray, at: Any = 0) -> None:
        self.data, self.at = data, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """(places, which of them count), all that count inside of the tensor."""
        at, on = np.broadcast_arrays(np.asarray(self.at), np.asarray(True if mask is None else mask))
        if ((at[on] < 0) | (at[on] >= self.data.size)).any():
            raise IndexError("a place outside of its tensor")
        return at, on


class Shared:
    """A buffer of shared memory, or a part of one."""

    def __init__(self, data: np.ndarray, since: np.ndarray, torn: np.ndarray) -> None:
        self.data, self.since, self.torn = data, since, torn
        """`since`: what was done to an element since the last barrier, 0 nothing, 1 read, 2 written. `torn`: written by
        two between barriers, so that nobody knows by whom last."""

    def slice(self, start: int, size: int) -> Shared:
        part = slice(start, start + size)
        return Shared(self.data[part], self.since[part], self.torn[part])

    def _read(self, at: Any) -> Block:
        if (self.since[at] == 2).any() or self.torn[at].any():
            raise AssertionError("shared memory is read that was written since the last barrier, or by two at a time")
        self.since[at] = 1
        return block(self.data[at])

    def _write(self, at: Any) -> None:
        if (self.since[at] == 1).any():
            raise AssertionError("shared memory is written that was read since the last barrier")
        places, times = np.unique(np.arange(self.data.size)[at], return_counts=True)
        self.torn[places] = (times > 1) | (self.since[places] == 2)
        self.since[places] = 2

    def load(self, layout: Layout = None) -> Block:
        return self._read(slice(None)).copy()

    def store(self, values: Block) -> None:
        self._write(slice(None))
        self.data[:] = values

    def gather(self, at: Block, axis: int) -> Block:
        return self._read(np.asarray(at))

    def scatter(self, values: Block, at: Block, axis: int) -> None:
        places = np.broadcast_to(at, np.shape(values))
        self._write(places)
        self.data[places] = values

    def atomic_scatter_add(self, values: Block, at: Block, axis: int) -> None:
        inside = np.asarray(at) < self.data.size
        assert inside.all() and (self.since[at] == 0).all(), "counted in what was used since the last barrier"
        np.add.at(self.data, np.asarray(at), np.asarray(values))
        self.since[at] = 2


def _scan_adds(values: Block, axis: int, combine: Callable[..., Any]) -> Block:
    assert combine(3, 4) == 7, "only sums are known"
    return block(np.cumsum(values, axis=axis, dtype=values.dtype))


def _where(condition: Any, a: Any, b: Any) -> Block:
    dtype = next((v.dtype for v in (a, b) if isinstance(v, np.ndarray)), None)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        dtype = np.promote_types(a.dtype, b.dtype)
    return block(np.where(condition, block(a, dtype), block(b, dtype)))


class Gluon:
    """`gluon.language` for one program."""

    int32, int64, uint32, float32 = np.int32, np.int64, np.uint32, np.float32
    constexpr = staticmethod(lambda value: value)
    BlockedLayout = SliceLayout = SwizzledSharedLayout = staticmethod(lambda *args: None)
    where = staticmethod(_where)
    associative_scan = staticmethod(_scan_adds)
    cdiv = staticmethod(lambda a, b: (a + b - 1) // b)
    expand_dims = staticmethod(lambda x, axis: np.expand_dims(x, axis))
    reshape = staticmethod(lambda x, shape: np.reshape(x, shape))
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)
    full_like = staticmethod(lambda x, value: np.full_like(x, value))
    inline_asm = staticmethod(lambda *args: None)  # the order of launches

    def __init__(self, program: tuple[int, int, int]) -> None:
        self._program, self._shared = program, list[np.ndarray]()

    def program_id(self, axis: int) -> Block:
        return block(self._program[axis], np.int32)

    def arange(self, start: int, stop: int, layout: Layout = None) -> Block:
        return block(np.arange(start, stop), np.int32)

    def full(self, shape: Any, value: Any, dtype: type, layout: Layout = None) -> Block:
        return block(np.full(shape, value), dtype)

    def zeros(self, shape: Any, dtype: type, layout: Layout = None) -> Block:
        return self.full(shape, 0, dtype)

    def sum(self, x: Block, axis: int) -> Block:
        return block(np.sum(x, axis=axis, dtype=x.dtype))

    def min(self, x: Block, axis: int) -> Block:
        return block(np.min(x, axis=axis))

    def max(self, x: Block, axis: int) -> Block:
        return block(np.max(x, axis=axis))

    def minimum(self, a: Any, b: Any) -> Block:
        return block(np.fmin(a, b))  # of a NaN and a number the number, as on the card

    def maximum(self, a: Any, b: Any) -> Block:
        return block(np.fmax(a, b))

    def load(self, at: Pointer, mask: Any = None, other: Any = 0) -> Block:
        places, on = at.places(mask)
        found = at.data[np.where(on, places, 0)] if at.data.size else np.zeros(places.shape, at.data.dtype)
        return block(np.where(on, found, np.asarray(other, at.data.dtype)))

    def store(self, at: Pointer, values: Any, mask: Any = None) -> None:
        places, on = at.places(mask)
        wanted = np.broadcast_to(values, places.shape)
        if len(set(places[on].tolist())) != int(on.sum()):
            raise AssertionError("a place is written twice by one store")
        at.data[places[on]] = wanted[on]

    def allocate_shared_memory(self, dtype: type, shape: list[int], layout: Layout) -> Shared:
        (size,) = shape
        since, torn = np.zeros(size, np.int8), np.zeros(size, bool)
        self._shared.append(since)
        bits = np.random.default_rng(len(self._shared)).integers(0, 256, size * np.dtype(dtype).itemsize, np.uint8)
        return Shared(bits.view(dtype), since, torn)

    def barrier(self) -> None:
        for since in self._shared:
            since[:] = 0


def run(kernel: GluonJITFunction, grid: tuple[int, int, int], values: Mapping[str, Any]) -> None:
    """All programs of a launch, one after another; tensors are of the CPU."""
    data = {
        name: Pointer(value.flatten().numpy() if value.is_contiguous() else _dense(name)) if _is(value) else value
        for name, value in values.items()
    }
    for program in itertools.product(*map(range, grid)):
        gl, names = Gluon(program), dict[str, Any]()
        for name, value in kernel.fn.__globals__.items():
            if isinstance(value, GluonJITFunction):
                names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
            else:
                names[name] = getattr(value, "value", value) if type(value).__name__ == "constexpr" else value
        names["gl"] = gl
        numbers = {k: block(v, np.int32) if isinstance(v, int) and k.islower() else v for k, v in data.items()}
        with np.errstate(all="ignore"):  # integers wrap, as on the card
            names[kernel.fn.__name__](**numbers)


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _dense(name: str) -> np.ndarray:
    raise ValueError(f"argument `{name}` is strided")
