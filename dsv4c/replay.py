"""Every launch of an artifact made on a driver that only writes it down, and compared with the machine code.

The runtime binds the calls of every program to tensors of their planned sizes, the artifact's own launcher packs the
parameters, and a recording driver (schedules/cpp/recorder.cc) copies them as a card's would: as many bytes of each, to
such a place, as the cubin says. What then lies in the parameters must be the tensors' addresses, the sizes and the
tensor maps of the launch record, byte for byte; the maps must be such that a driver makes them.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.artifact import Call, KVGroup, Launch, LaunchArg, Manifest, Program, StateGroup
from dsv4c.errors import ArtifactError
from dsv4c.runtime.gpu import CallSizes, GpuKernels
from dsv4c.runtime.lanes import Part
from dsv4c.schedules._cubin import Cubin, read
from dsv4c.schedules._packing import BYTES
from dsv4c.schedules.emit import build_recorder

_FP4 = 14  # 16U4_ALIGN16B: sixteen values of four bits land in sixteen bytes
_ELEMENT_BITS = {0: 8, 1: 16, 2: 32, 3: 32, 4: 32, 5: 64, 6: 16, 7: 32, 8: 64, 9: 16, 13: 4, 14: 4}
_SWIZZLE_BYTES = (0, 32, 64, 128)


class _Launched(ctypes.Structure):
    """As in recorder.cc."""

    _fields_ = (
        ("symbol", ctypes.c_char * 128), ("grid", ctypes.c_int32 * 3), ("block", ctypes.c_int32 * 3),
        ("cluster", ctypes.c_int32 * 3), ("shared", ctypes.c_int32), ("allowed", ctypes.c_int32),
        ("pdl", ctypes.c_int32), ("parameters", ctypes.c_int32), ("bank", ctypes.c_ubyte * 4096),
    )  # fmt: skip


@dataclass(frozen=True)
class Map:
    """A tensor map as the driver was asked for it, innermost first; strides in bytes."""

    address: int
    dtype: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @classmethod
    def of(cls, data: bytes) -> Map:
        """Read from what the recording driver makes of it. Raises ArtifactError if it was made by none."""
        address, dtype, rank = struct.unpack_from("<Qii", data)
        if not 1 <= rank <= 5:
            raise ArtifactError("a parameter that is to be a tensor map is none")
        sizes, strides = struct.unpack_from("<5Q", data, 16)[:rank], struct.unpack_from("<4Q", data, 56)[: rank - 1]
        return cls(address, dtype, sizes, strides, struct.unpack_from("<5I", data, 88)[:rank], data[108])

    def faults(self) -> list[str]:
        """Why a driver would not make it, by the rules of `cuTensorMapEncodeTiled`."""
        bits, wide = _ELEMENT_BITS[self.dtype], self.dtype == _FP4
        row = self.box[0] * (8 if wide else bits) // 8
        rules = (
            (self.address % (32 if wide else 16), "its tensor is not aligned"),
            (any(not 1 <= size <= 1 << 32 for size in self.sizes), "a size is not within 1 and 2^32"),
            (any(step % (32 if wide else 16) for step in self.strides), f"a stride of {self.strides} is not aligned"),
            (any(step >= 1 << 40 for step in self.strides), "a stride is 2^40 bytes or more"),
            (any(not 1 <= size <= 256 for size in self.box), f"its box {self.box} is not within 1 and 256"),
            (row % 16, f"a row of its box has {row} bytes, no multiple of 16"),
            (self.swizzle and row > _SWIZZLE_BYTES[self.swizzle], f"a row of {row} bytes is wider than its swizzle"),
            (wide and self.box[0] != 128, f"a row of its box has {self.box[0]} values of four bits, not 128"),
            (wide and self.sizes[0] % 128, f"its rows have {self.sizes[0]} values of four bits, no multiple of 128"),
            (wide and self.swizzle not in (0, 3), "padded values of four bits cannot be swizzled so"),
        )
        return [f"a tensor map cannot be made: {text}" for broken, text in rules if broken]


@dataclass(frozen=True)
class Replayed:
    """One launch as it would reach a card, and what is wrong with it."""

    program: str
    kernel: str
    launch: Launch
    grid: tuple[int, ...]
    faults: tuple[str, ...]


def replay(folder: Path, manifest: Manifest, cache: Path) -> Iterator[Replayed]:
    """Every launch of every program, once for each kernel and sizes that it is called with. Needs a C++ compiler.

    Raises ArtifactError in a process that has a CUDA driver loaded: the recording one would not be asked.
    """
    recorder = _Recorder(build_recorder(cache))
    kernels = GpuKernels(manifest.kernels, folder, manifest.target, check=False)
    cubins: dict[str, Cubin] = {}
    seen: set[object] = set()
    for name, program in manifest.programs.items():
        values = _Values(manifest, program)
        for call in (call for segment in program.segments for call in segment.calls):
            kernel = manifest.kernels[call.kernel]
            args = [values[arg] if isinstance(arg, str) else None for arg in call.args]
            key = (call.kernel, tuple(arg if arg is None else (arg.shape, arg.stride(), arg.dtype) for arg in args))
            if key in seen or not kernel.launches:
                continue
            seen.add(key)
            for i, launch in enumerate(kernel.launches):
                if launch.sha256 not in cubins:
                    cubins[launch.sha256] = read((folder / launch.file).read_bytes())
                made = recorder.launch(kernels, call, i, args, cubins[launch.sha256], len(launch.args))
                if made is not None:
                    grid = tuple(made.grid)
                    wrong = tuple(_compare(launch, call.kernel, args, made, cubins[launch.sha256]))
                    yield Replayed(name, call.kernel, launch, grid, wrong)


class _Recorder:
    """The recording driver, loaded into this process before any other."""

    def __init__(self, file: Path) -> None:
        """`file`: the library. A launcher asks the first one of its name that a process has."""
        try:
            self._library = ctypes.CDLL(file.name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:  # none is loaded yet
            self._library = ctypes.CDLL(str(file))
        if not hasattr(self._library, "recorder_take"):
            raise ArtifactError(
                "a CUDA driver is loaded, and launchers would ask it in place of the recording one",
                hint="replay in a process without one, such as on a machine without a GPU",
            )

    def launch(
        self, kernels: GpuKernels, call: Call, index: int, args: list[Tensor | None], cubin: Cubin, given: int
    ) -> _Launched | None:
        """One launch of a call; None if its grid is empty."""
        if len(cubin.parameters) != given:
            raise ArtifactError(f"a launch of `{call.kernel}` gives {given} parameters, its code takes {cubin}")
        count = len(cubin.parameters)
        array = ctypes.c_int64 * count
        offsets, sizes = (array(*(getattr(p, name) for p in cubin.parameters)) for name in ("offset", "size"))
        self._library.recorder_layout(count, offsets, sizes, ctypes.c_int64(cubin.parameter_bytes))
        run = kernels.bind_parts([(Part(call, index, index + 1), args)])
        if run is None:
            return None
        run(0)
        out = _Launched()
        if not self._library.recorder_take(ctypes.byref(out)):
            raise ArtifactError(f"a launch of `{call.kernel}` did not reach the recording driver")
        return out


@dataclass
class _Values:
    """Tensors of the planned sizes by the names of a program's values; they share a few bytes, but not an address."""

    manifest: Manifest
    program: Program
    made: dict[str, Tensor] = field(default_factory=dict)
    types: dict[str, tuple[tuple[int | str, ...], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in self.program.inputs:
            self.types[item.name] = (item.shape, item.dtype)
        for buffer in self.program.buffers:
            self.types[buffer.name] = (buffer.shape, buffer.dtype)
        for weight in self.manifest.weights:
            self.types[weight.name] = (weight.shape, weight.dtype)
        groups: tuple[tuple[KVGroup | StateGroup, str], ...] = (
            *((group, f"N_{group.name}") for group in self.manifest.kv_groups),
            *((group, "Z") for group in self.manifest.state_groups),
        )
        for group, rows in groups:
            for pool in group.pools:
                self.types[pool.name] = ((rows, *pool.entry_shape), pool.dtype)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.made:
            shape, dtype = self.types[name]
            sizes = [self.program.symbols[size] if isinstance(size, str) else size for size in shape]
            element: torch.dtype = getattr(torch, dtype)
            base = torch.empty(64, dtype=torch.uint8)  # of its own: addresses differ
            whole = base[-base.data_ptr() % 32 :][:32].view(element)
            self.made[name] = whole.as_strided(sizes, [0] * len(sizes))
        return self.made[name]


def _compare(launch: Launch, kernel: str, args: list[Tensor | None], made: _Launched, cubin: Cubin) -> Iterator[str]:
    """What differs between a recorded launch and what its record and its code say."""
    bank = bytes(made.bank)
    if tuple(made.block) != (launch.threads, 1, 1) or cubin.threads not in (0, launch.threads):
        yield f"has blocks of {tuple(made.block)} threads, its code is made for {cubin.threads}"
    if tuple(made.cluster) != (*launch.cluster, 1, 1, 1)[:3]:
        yield f"has clusters of {tuple(made.cluster)}, its record says {launch.cluster}"
    if any(size % step for size, step in zip(made.grid, made.cluster, strict=True)):
        yield f"has a grid of {tuple(made.grid)} for clusters of {tuple(made.cluster)}"
    if not 0 < made.grid[0] < 1 << 31 or any(not 0 < size < 1 << 16 for size in made.grid[1:]):
        yield f"has a grid of {tuple(made.grid)}, more than a card takes"
    if made.shared != launch.shared or made.shared > made.allowed:
        yield f"asks for {made.shared} bytes of shared memory, {made.allowed} are allowed"
    if bool(made.pdl) != launch.pdl:
        yield "is programmatic, or not, against its record"
    sizes = CallSizes(kernel, args)
    for i, (arg, parameter) in enumerate(zip(launch.args, cubin.parameters, strict=True)):
        data = bank[parameter.offset : parameter.offset + parameter.size]
        yield from (f"parameter {i} ({arg.kind}) {fault}" for fault in _wrong(arg, data, args, sizes))


def _wrong(arg: LaunchArg, data: bytes, args: list[Tensor | None], sizes: CallSizes) -> list[str]:
    tensor = None if arg.arg is None else args[arg.arg]
    if len(data) != BYTES[arg.kind]:
        return [f"has {len(data)} bytes, its record gives {BYTES[arg.kind]}"]
    if arg.map is not None:
        assert tensor is not None
        found = Map.of(data)
        shape = tuple(max(1, sizes.value(size)) for size in reversed(arg.map.sizes))
        same = found.address == tensor.data_ptr() and found.sizes == shape and found.box == arg.map.box[::-1]
        return found.faults() if same else ["is a tensor map over something else"]
    if arg.kind in ("ptr", "null"):
        address = 0 if tensor is None else tensor.data_ptr()
        return [] if data == struct.pack("<Q", address) else ["is not its tensor's address"]
    if arg.kind == "f32":
        return [] if data == struct.pack("<f", arg.value) else [f"is not {arg.value}"]
    assert isinstance(arg.value, int | str)
    value = sizes.value(arg.value)
    try:
        packed = struct.pack("<i" if arg.kind == "i32" else "<q", value)
    except struct.error:
        return [f"is {value}, more than {arg.kind} holds"]
    return [] if data == packed else [f"is not {value}"]
