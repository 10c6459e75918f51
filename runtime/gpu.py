"""Launches the GPU kernels of an artifact: cubins, bound to tensors, through the artifact's own small launcher.

    kernels = GpuKernels(manifest.kernels, directory, device=0)
    run = kernels.bind([("hc_pre_1f2e", [x, fn, ..., out])])     # tensors are held, not copied
    run(torch.cuda.current_stream().cuda_stream)                 # may be captured into a CUDA graph

Sizes in a launch record are expressions over the sizes of the call's arguments: `a2_0` is size 0 of argument 2, with
ints, `+ - * // %`, `cdiv(x, y)`, `min` and `max`. A launch whose grid is empty is left out. Nothing is compiled here.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import tvm_ffi
from torch import Tensor

from dsv4c.artifact import Expr, Kernel, Launch, LaunchArg, TensorMap
from dsv4c.errors import ArtifactError, EngineError
from dsv4c.runtime.lanes import Part

Args = Sequence[Tensor | None]
Run = Callable[[int], None]
"""Makes the bound calls on the stream with this handle."""

_MAP_TYPES = {  # the driver's codes of tensor map elements
    "uint8": 0, "float8_e4m3fn": 0, "float8_e8m0fnu": 0, "int8": 0, "uint16": 1, "int32": 3, "int64": 5,
    "float16": 6, "float32": 7, "bfloat16": 9, "float4_e2m1fn_x2": 14,
}  # fmt: skip
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}
_LETTERS = {"ptr": "p", "map": "m", "i32": "i", "i64": "l", "f32": "f", "null": "p"}


class GpuKernels:
    """The `gpu` kernels of one artifact, loaded on one device."""

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        directory: Path,
        arch: str,
        device: int = 0,
        *,
        check: bool = True,
    ) -> None:
        """`check`: refuse a card that the kernels are not made for; not where nothing will run."""
        self._kernels = {name: kernel for name, kernel in kernels.items() if kernel.kind == "gpu"}
        self._device = device
        if check:
            check_card(arch, device)
        self._launcher = _open(self._kernels, directory)
        self._loaded: dict[tuple[str, str, int], Any] = {}
        for name, kernel in self._kernels.items():
            for launch in kernel.launches:
                self._load(name, launch, directory)

    def _load(self, name: str, launch: Launch, directory: Path) -> None:
        key = (launch.sha256, launch.symbol, launch.shared)
        if key in self._loaded:
            return
        image = (directory / launch.file).read_bytes()
        try:
            self._loaded[key] = self._launcher.get_function("load")(
                image, launch.symbol, launch.shared, math.prod(launch.cluster), self._device
            )
        except RuntimeError as error:
            raise ArtifactError(
                f"kernel `{name}` cannot be loaded: {_last_line(error)}",
                hint="is the driver older than CUDA 13.0, or the artifact made for another card?",
            ) from error

    def bind(self, calls: Sequence[tuple[str, Args]]) -> Run:
        """A function that makes these calls in order. Raises EngineError for sizes that a kernel cannot serve."""
        return self._chain([launch for name, args in calls for launch in self._prepare(name, args)])

    def bind_parts(self, parts: Sequence[tuple[Part, Args]]) -> Run | None:
        """The same for parts of calls; None if no launch is left."""
        prepared: list[Any] = []
        alone = False  # the next launch is not programmatic
        for part, args in parts:
            alone = alone or part.alone
            made = self._prepare(part.call.kernel, args, part.first, part.stop, alone)
            alone = alone and not made
            prepared += made
        return self._chain(prepared) if prepared else None

    def _chain(self, prepared: list[Any]) -> Run:
        run: Run = self._launcher.get_function("chain")(prepared)
        return run

    def _prepare(
        self, name: str, args: Args, first: int = 0, stop: int | None = None, alone: bool = False
    ) -> list[Any]:
        """The launches [first, stop) of a call. `alone`: the first that is made is not programmatic."""
        out: list[Any] = []
        for launch in self._kernels[name].launches[first:stop]:
            sizes = CallSizes(name, args)
            grid = [sizes.value(size) for size in launch.grid]
            if 0 in grid:
                continue
            kinds = "".join(_LETTERS[arg.kind] for arg in launch.args)
            values = [self._value(arg, args, sizes) for arg in launch.args]
            loaded = self._loaded[(launch.sha256, launch.symbol, launch.shared)]
            pdl = launch.pdl and not (alone and not out)
            out.append(loaded(launch.threads, grid, list(launch.cluster), pdl, kinds, values))
        return out

    def _value(self, arg: LaunchArg, args: Args, sizes: CallSizes) -> Any:
        if arg.kind == "null":
            return 0
        if arg.kind == "f32":
            return float(arg.value)  # type: ignore[arg-type]
        if arg.kind in ("i32", "i64"):
            number = sizes.value(arg.value)  # type: ignore[arg-type]
            if number % arg.multiple:
                raise EngineError(
                    f"`{sizes.name}` needs `{arg.value}` to be a multiple of {arg.multiple}, not {number}"
                )
            return number
        assert arg.arg is not None
        tensor = args[arg.arg]
        if tensor is None:
            raise EngineError(f"`{sizes.name}` reads argument {arg.arg}, which is absent")
        address = tensor.data_ptr()
        if address % 16:
            raise EngineError(f"argument {arg.arg} of `{sizes.name}` is not aligned to 16 bytes")
        return address if arg.map is None else self._tensor_map(arg.map, address, sizes)

    def _tensor_map(self, tile: TensorMap, address: int, sizes: CallSizes) -> Any:
        dtype: torch.dtype = getattr(torch, tile.dtype)
        return self._launcher.get_function("tensor_map")(
            address, _MAP_TYPES[tile.dtype], dtype.itemsize,
            [max(1, sizes.value(s)) for s in tile.sizes], [sizes.value(s) for s in tile.strides], list(tile.box),
            _SWIZZLES[tile.swizzle], tile.fill == "nan", _PROMOTIONS[tile.promotion],
        )  # fmt: skip


def _open(kernels: Mapping[str, Kernel], directory: Path) -> Any:
    files = {kernel.file for kernel in kernels.values()}
    if len(files) != 1 or None in files:
        raise ArtifactError("the GPU kernels name no single launcher", hint="compile the artifact again")
    file = str(files.pop())
    try:
        return tvm_ffi.load_module(str(directory / file))
    except (RuntimeError, OSError) as error:
        raise ArtifactError(f"cannot load the launcher `{file}`: {_last_line(error)}") from error


def check_card(arch: str, device: int) -> None:
    """Refuses a machine without a card, and a card of another architecture than `arch` (`sm_90a`)."""
    if not torch.cuda.is_available():
        raise ArtifactError(
            f"the kernels are made for `{arch}`, this machine has no usable CUDA device",
            hint="serve it where the card is, or compile it with `--target cpu`",
        )
    count = torch.cuda.device_count()
    if not 0 <= device < count:
        raise ArtifactError(
            f"there is no card {device}: this machine has {count}", hint=f"`--device` is 0 to {count - 1}"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if arch.rstrip("abcf") != f"sm_{major}{minor}":
        raise ArtifactError(
            f"the kernels are made for `{arch}`, device {device} ({torch.cuda.get_device_name(device)}) is "
            f"sm_{major}{minor}",
            hint=f"compile it with `--target sm_{major}{minor}a`",
        )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


class CallSizes:
    """Evaluates the expressions of one call."""

    def __init__(self, name: str, args: Args) -> None:
        self.name = name
        self._args = args

    def value(self, expression: Expr) -> int:
        if isinstance(expression, int):
            return expression
        return self._eval(_parsed(expression), expression)

    def _eval(self, node: ast.expr, text: str) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return self._size(node.id, text)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](self._eval(node.left, text), self._eval(node.right, text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            return _FUNCTIONS[node.func.id](*(self._eval(arg, text) for arg in node.args))
        raise ArtifactError(f"`{text}` of kernel `{self.name}` is no size expression", hint="compile it again")

    def _size(self, name: str, text: str) -> int:
        arg, _, dim = name.removeprefix("a").partition("_")
        if not (name.startswith("a") and arg.isdigit() and dim.isdigit() and int(arg) < len(self._args)):
            raise ArtifactError(f"`{name}` in `{text}` of kernel `{self.name}` is no size", hint="compile it again")
        tensor = self._args[int(arg)]
        if tensor is None or int(dim) >= tensor.dim():
            raise ArtifactError(f"`{name}` in `{text}` of kernel `{self.name}` has no such tensor or dimension")
        return tensor.shape[int(dim)]


@functools.lru_cache(maxsize=4096)
def _parsed(expression: str) -> ast.expr:
    """An artifact has a few hundred expressions, each evaluated for every program."""
    return ast.parse(expression, mode="eval").body


_OPERATORS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b, ast.Mod: lambda a, b: a % b,
}  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[..., int]] = {"cdiv": lambda a, b: -(-a // b), "min": min, "max": max}
