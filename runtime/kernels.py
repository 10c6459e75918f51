"""Kernels of an artifact behind one callable: exported C++ functions, and a small fixed table of vendor calls.

A kernel takes `(*inputs, *workspace, *outputs)` and writes its outputs. C++ kernels come from the artifact's library
through tvm-ffi, whose own tensors cost 0.1 us a call where torch's cost 0.6; the library's `sequence` runs many calls
as one. GPU kernels go through the launcher (runtime/gpu.py). Vendor calls are ATen functions, named here and nowhere
else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import tvm_ffi
from torch import Tensor

from dsv4c.artifact import Call, Kernel, Program
from dsv4c.errors import ArtifactError
from dsv4c.runtime.gpu import GpuKernels
from dsv4c.runtime.lanes import Part

Arg = Tensor | int | float | bool | None
Run = Callable[[], object]
Vendor = Callable[..., None]


def _linear(x: Tensor, weight: Tensor, y: Tensor) -> None:
    torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=y.view(-1, weight.shape[0]))


def _grouped(groups: int) -> Vendor:
    def run(x: Tensor, weight: Tensor, y: Tensor) -> None:
        """One GEMM a group: [T, I] columns of x times [A, I] rows of the weight into columns of y."""
        rows = x.reshape(x.shape[0], groups, weight.shape[1])
        for group, part in enumerate(weight.unflatten(0, (groups, -1))):
            size = part.shape[0]
            y[:, group * size : (group + 1) * size] = rows[:, group] @ part.t()

    return run


def _linear_fp8(
    data: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor,
    padded: Tensor, padded_scale: Tensor, by_column: Tensor, padded_y: Tensor, y: Tensor,
) -> None:  # fmt: skip
    """cuBLASLt with a scale for each 1 x 128 of x, column-major, and for each 128 x 128 of the weight.

    It takes multiples of 4 rows: the last 4 are multiplied on their own, fewer than 4 through a padded copy.
    """
    count, groups = scale.shape

    def multiply(data: Tensor, columns: Tensor, y: Tensor) -> None:
        torch._scaled_mm(data, weight.t(), columns.t(), weight_scale.t(), out_dtype=y.dtype, out=y)

    def by_columns(scale: Tensor) -> Tensor:
        return by_column.view(-1)[: scale.numel()].view(groups, -1).copy_(scale.t())

    if 0 < count < 4:
        padded[:count].copy_(data)
        padded_scale[:, :count].copy_(scale.t())
        multiply(padded, padded_scale, padded_y)  # rows are independent: the padding may hold anything
        y.copy_(padded_y[:count])
    elif count:
        even = count // 4 * 4
        multiply(data[:even], by_columns(scale[:even]), y[:even])
        if even < count:
            multiply(data[-4:], by_columns(scale[-4:]), y[-4:])


def _linear_mixed(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """bfloat16 products, summed and kept in float32."""
    torch.ops.aten.mm.dtype_out(x, weight.t(), y.dtype, out=y)


VENDOR_CALLS: Mapping[str, Callable[[Mapping[str, Any]], Vendor]] = {
    "aten.linear": lambda attrs: _linear,
    "aten.grouped_linear": lambda attrs: _grouped(int(attrs["groups"])),
    "aten.linear_fp8": lambda attrs: _linear_fp8,
    "aten.linear_mixed": lambda attrs: _linear_mixed,
}


class Binder(Protocol):
    """Whatever makes the calls of a program."""

    def bind_calls(self, program: Program, calls: Sequence[Call], values: Mapping[str, Tensor]) -> list[Run]:
        """Functions that make these calls in order, on these tensors by name."""


class Kernels:
    """The loaded kernels of one artifact."""

    def __init__(
        self, kernels: Mapping[str, Kernel], directory: Path, target: str = "cpu", device: int = 0
    ) -> None:  # fmt: skip
        """`device`: the number of the card, for a GPU target."""
        self._gpu = GpuKernels(kernels, directory, target, device) if target != "cpu" else None
        self._modules: dict[str, Any] = {}
        self._native: dict[str, Any] = {}
        self._vendor: dict[str, Vendor] = {}
        for name, kernel in kernels.items():
            if kernel.kind == "cpp":
                self._native[name] = self._function(kernel, directory)
            elif kernel.kind == "aten" and kernel.symbol in VENDOR_CALLS:
                self._vendor[name] = VENDOR_CALLS[kernel.symbol](kernel.attrs)
            elif kernel.kind != "gpu" or self._gpu is None:
                raise ArtifactError(
                    f"kernel `{name}` needs the {kernel.kind} call `{kernel.symbol}`, which this runtime lacks",
                    hint="compile the artifact again with this version",
                )

    def _function(self, kernel: Kernel, directory: Path) -> Any:
        if kernel.file is None:
            raise ArtifactError(f"kernel `{kernel.name}` names no file", hint="compile the artifact again")
        if kernel.file not in self._modules:
            try:
                self._modules[kernel.file] = tvm_ffi.load_module(str(directory / kernel.file))
            except (RuntimeError, OSError) as error:
                raise ArtifactError(
                    f"cannot load `{kernel.file}`: {str(error).splitlines()[-1]}",
                    hint="compile the artifact again on this machine",
                ) from error
        module = self._modules[kernel.file]
        if not module.implements_function(kernel.symbol):
            raise ArtifactError(f"`{kernel.file}` has no function `{kernel.symbol}`", hint="compile the artifact again")
        return module.get_function(kernel.symbol)

    def bind_calls(self, program: Program, calls: Sequence[Call], values: Mapping[str, Tensor]) -> list[Run]:
        """See Binder, and `bind`."""
        return self.bind([(call.kernel, arguments(call, values)) for call in calls])

    def bind(self, calls: Sequence[tuple[str, Sequence[Arg]]]) -> list[Run]:
        """Functions that make these calls in order; neighbouring native calls become one.

        Tensors are held, not copied. Size and dtype of each must be what the kernel was compiled for.
        """
        if self._gpu is not None:
            return self._bind_gpu(calls, self._gpu)
        out: list[Run] = []
        native: list[list[Any]] = []
        for name, args in calls:
            if name in self._native:
                native.append([self._native[name], *(_ffi(a) for a in args)])
                continue
            if name not in self._vendor:
                raise ArtifactError(f"a call names the unknown kernel `{name}`", hint="compile the artifact again")
            if native:
                out.append(self._sequence(native))
                native = []
            out.append(_bound(self._vendor[name], args))
        if native:
            out.append(self._sequence(native))
        return out

    def bind_parts(self, parts: Sequence[tuple[Part, Sequence[Arg]]]) -> list[Run]:
        """The same for parts of the calls of one lane, on a GPU; nothing where all grids are empty."""
        assert self._gpu is not None
        out: list[Run] = []
        for vendor, run in itertools.groupby(parts, lambda one: one[0].call.kernel in self._vendor):
            if vendor:
                out += [_bound(self._vendor[part.call.kernel], args) for part, args in run]
                continue
            held = [(part, [a if isinstance(a, Tensor) else None for a in args]) for part, args in run]
            if (chain := self._gpu.bind_parts(held)) is not None:
                out.append(_launching(chain, held))
        return out

    def _bind_gpu(self, calls: Sequence[tuple[str, Sequence[Arg]]], gpu: GpuKernels) -> list[Run]:
        """One function for each run of launches between vendor calls, on the stream that is current when it runs."""
        out: list[Run] = []
        launches: list[tuple[str, list[Tensor | None]]] = []
        for name, args in calls:
            if name in self._vendor:
                if launches:
                    out.append(_launching(gpu.bind(launches), launches))
                    launches = []
                out.append(_bound(self._vendor[name], args))
            else:
                launches.append((name, [a if isinstance(a, Tensor) else None for a in args]))
        if launches:
            out.append(_launching(gpu.bind(launches), launches))
        return out

    def _sequence(self, calls: list[list[Any]]) -> Run:
        module = next(iter(self._modules.values()))
        run: Run = module.get_function("sequence")(calls)
        return run


def arguments(call: Call, values: Mapping[str, Tensor]) -> list[Arg]:
    """A call's arguments: tensors by name, and its scalars. Raises ArtifactError for a name without a value."""
    out: list[Arg] = []
    for arg in call.args:
        if not isinstance(arg, str):
            out.append(arg)
        elif arg in values:
            out.append(values[arg])
        else:
            raise ArtifactError(
                f"a call of `{call.kernel}` reads `{arg}`, which nothing provides",
                hint="the manifest is corrupted; compile the artifact again",
            )
    return out


def _bound(vendor: Vendor, args: Sequence[Arg]) -> Run:
    return lambda: vendor(*args)


def _launching(run: Callable[[int], None], kept: object) -> Run:
    """Makes bound launches on the current stream; `kept` are their tensors."""

    def launch() -> object:
        run(torch.cuda.current_stream().cuda_stream)
        return kept

    return launch


def _ffi(arg: Arg) -> Any:
    return tvm_ffi.from_dlpack(arg) if isinstance(arg, Tensor) else arg
