"""One safetensors file, memory-mapped: its header checked against its size, its tensors as views of the mapping.

A file is: 8 bytes of little-endian header length, the header (JSON: name -> dtype, shape, data_offsets), the data.
Its pages can be given back after a tensor was copied elsewhere, so that reading a file never keeps it all resident.
Loading reads bytes into buffers of its own instead: a file that was cut since gives an error there, not a fault.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
import weakref
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
_TRUNCATED = "the file is truncated or corrupted; download or write it again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file: bytes [start, end) of the file. `dtype` is safetensors' name of the type."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Shard:
    """A mapped safetensors file. `entries` by tensor name; views are read-only by contract.

    Raises CheckpointError if the file is absent, cut short, too long, or its header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = path.stat().st_size
            self._file = path.open("rb")
            weakref.finalize(self, self._file.close)
            self.entries = _read_header(path, self._file.read(8), self._file.read, self._size)
            # A private mapping that nobody writes to: torch wants writable memory.
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"cannot read `{path}`: {error.strerror}", hint=_TRUNCATED) from error

    def view(self, name: str) -> Tensor:
        """The tensor as a view of the mapping (a copy if the file does not align it); do not write to it."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
        if entry.start % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(entry.shape)

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fills `into` (uint8 [n], on the host) with the tensor's bytes from `start` on, from any thread.

        Raises CheckpointError if the file cannot be read or ends before them.
        """
        at, rest = self.entries[name].start + start, memoryview(into.numpy().data)
        while rest:
            try:
                count = os.preadv(self._file.fileno(), [rest], at)
            except OSError as error:
                raise CheckpointError(f"cannot read `{name}` in `{self.path}`: {error.strerror}") from error
            if count == 0:
                size = os.fstat(self._file.fileno()).st_size
                raise CheckpointError(
                    f"`{name}` in `{self.path}`: data ends at byte {self.entries[name].end}, but the file has {size} "
                    "bytes by now",
                    hint=_TRUNCATED,
                )
            at, rest = at + count, rest[count:]

    def release(self) -> None:
        """Gives all resident pages of the file back; views stay valid and are read again when touched.

        All of them: reading a tensor also maps its neighbours' pages, which would pile up one by one.
        """
        if sys.platform == "linux":
            self._map.madvise(mmap.MADV_DONTNEED)


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError for one that says a key twice, of which a reader would take either."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"`{next(name for name in names if names.count(name) > 1)}` is there twice")
    return out


def _read_header(path: Path, prefix: bytes, read: Any, size: int) -> dict[str, Entry]:
    """The entries of a file whose first 8 bytes are `prefix` and whose next ones `read` returns."""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length + 8 > size:
        raise CheckpointError(
            f"`{path}` has {size} bytes, expected at least {length + 8} for its header", hint=_TRUNCATED
        )
    try:
        header = json.loads(read(length), object_pairs_hook=no_repeats)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"`{path}` has no safetensors header: {error}", hint=_TRUNCATED) from error
    for name, entry in entries.items():
        if entry.end > size:
            raise CheckpointError(
                f"`{name}` in `{path}`: data ends at byte {entry.end}, but the file has {size} bytes", hint=_TRUNCATED
            )
    placed = sorted((entry.start, entry.end, name) for name, entry in entries.items())
    for (_, end, name), (start, _, other) in pairwise(placed):
        if start < end:
            raise CheckpointError(f"`{name}` and `{other}` in `{path}` share bytes from {start} on", hint=_TRUNCATED)
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if end != size:
        raise CheckpointError(f"`{path}` has {size} bytes, expected {end} from its header", hint=_TRUNCATED)
    return entries


def _entry(path: Path, name: str, value: dict[str, Any], base: int) -> Entry:
    dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(
            f"`{name}` in `{path}`: unknown dtype `{dtype}`, expected one of {', '.join(DTYPES)}",
            hint="the file was written for another format",
        )
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if start < 0 or end - start != expected:
        raise CheckpointError(
            f"`{name}` in `{path}`: header gives it {end - start} bytes, expected {expected} for {dtype} {list(shape)}",
            hint=_TRUNCATED,
        )
    return Entry(dtype, shape, base + start, base + end)
