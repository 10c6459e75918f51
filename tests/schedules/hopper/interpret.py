"""Runs candidates in Triton's interpreter, on a CPU, beside the references: `interpret.py FAMILY [LABEL ...]`.

`FAMILY` is one of Hopper's, or `blackwell.` and one of Blackwell's.

In a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated. One line a candidate, `ok` or `FAIL`.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv4c.ops import OPS
from dsv4c.runtime import layouts
from dsv4c.runtime.gpu import CallSizes
from dsv4c.schedules._launch import Desc, Ptr, Scalar, TritonLaunch
from dsv4c.schedules._schedule import Build, Schedule, Transforms, Value
from dsv4c.schedules._workload import Args, Workload
from dsv4c.schedules.triton import compress, compress_online, index, rows
from dsv4c.trial import largest_error

_convert = interpreter._convert_float
_FENCE = 1 << 16  # bytes


def _nearest(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
    """Narrowing as the card does it, to nearest even; the interpreter's own cuts bits off."""
    if source == tl.float32 and target in (tl.bfloat16, tl.float8e4nv):
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).copy())
        if target == tl.bfloat16:
            return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if source == tl.float8e4nv and target in (tl.float16, tl.float32):  # the interpreter's own takes NaN for 480
        byte = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).copy())
        wide = byte.view(torch.float8_e4m3fn).to(torch.float16 if target == tl.float16 else torch.float32)
        return wide.numpy().view(np.uint16 if target == tl.float16 else np.uint32)
    if source == tl.bfloat16 and target == tl.float32:  # the interpreter's own gets subnormal numbers wrong
        return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
    return _convert(values, source, target, mode)


def _masked(name: str) -> None:
    """A mask made of a row and a scalar is an int64 to the interpreter."""
    plain = getattr(interpreter.InterpreterBuilder, name)
    position = 2 if name == "create_masked_load" else 3

    def masked(*args: Any, **named: Any) -> Any:
        mask = args[position] if len(args) > position else named["mask"]
        mask.data = mask.data.astype(bool)
        return plain(*args, **named)

    setattr(interpreter.InterpreterBuilder, name, masked)


def _wide_dot() -> None:
    """Products of bfloat16 in float32; the interpreter's own multiplies their bits as integers."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = np.ascontiguousarray(handle.data.view(np.uint16)).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot


def _whole_maximum() -> None:
    """`largest` at once; the interpreter calls the combining function for every element."""
    plain = interpreter.ReduceOps.apply_impl

    def apply(self: Any, given: Any) -> Any:
        return self.min_max(given[0], val_reduce_op=np.max) if self.combine_fn is rows.larger else plain(self, given)

    interpreter.ReduceOps.apply_impl = apply


def _whole_numbers() -> None:
    """Integers as bfloat16; the interpreter's own takes their bits for it."""
    plain = interpreter.InterpreterBuilder.create_si_to_fp

    def convert(self: Any, source: interpreter.TensorHandle, target: Any) -> interpreter.TensorHandle:
        if target.scalar != tl.bfloat16:
            return plain(self, source, target)
        wide = torch.from_numpy(np.ascontiguousarray(source.data).astype(np.float32))
        return interpreter.TensorHandle(wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    interpreter.InterpreterBuilder.create_si_to_fp = convert


class _Order:
    """Which program runs at each step: the launch order, or its reverse."""

    reverse = False

    def __init__(self) -> None:
        builder, plain = interpreter.interpreter_builder, interpreter.interpreter_builder.set_grid_idx
        builder.set_grid_idx = lambda x, y, z: plain(builder.grid_dim[0] - 1 - x if self.reverse else x, y, z)


@triton.jit
def rounded(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def fast_exp(x):
    return tl.exp(x)


def counted(*bounds: Any) -> Iterator[Any]:
    """`range` of a kernel: its numbers are tensors, to the interpreter plain ints."""
    return (tl.full((), number, tl.int32) for number in range(*map(int, bounds)))


interpreter._convert_float = _nearest
vars(index)["range"] = counted
for texts in (rows, compress, compress_online):  # inline assembly is the card's
    texts.rounded, texts.fast_exp = rounded, fast_exp
_REPLACED = ("create_masked_load", "create_masked_store", "create_dot", "create_si_to_fp")
_plain = {name: getattr(interpreter.InterpreterBuilder, name) for name in _REPLACED}
_masked("create_masked_load")
_masked("create_masked_store")
_wide_dot()
_whole_maximum()
_whole_numbers()
_order = _Order()


@contextmanager
def unpatched() -> Iterator[None]:
    """The interpreter as it came, for canaries."""
    own = {name: getattr(interpreter.InterpreterBuilder, name) for name in _REPLACED}
    for name, function in _plain.items():
        setattr(interpreter.InterpreterBuilder, name, function)
    interpreter._convert_float = _convert
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(interpreter.InterpreterBuilder, name, function)
        interpreter._convert_float = _nearest


def outputs_of(
    workload: Workload,
    build: Build,
    by_index: Mapping[int, Transforms],
    seed: int,
    workspace: Sequence[Value] = (),
    launched: Callable[[TritonLaunch, Args], None] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(what the kernels give, what the reference gives), outputs updated in place included.

    Every dense tensor lies between bytes of 0xFF, which must stay so.
    """
    op = OPS[workload.op]
    generator = torch.Generator()
    generator.manual_seed(seed)
    fences: list[torch.Tensor] = []
    args = [a if a is None or not a.is_contiguous() else fenced(a, fences) for a in workload.make(generator)]
    expected = (workload.reference or op.reference)(
        *[a if a is None else a.clone() for a in args], **workload.node.attrs
    )
    buffers = []
    for value in (*workspace, *workload.node.outputs):
        tensor = torch.empty(value.sizes(workload.symbols), dtype=getattr(torch, value.dtype))
        tensor.view(torch.uint8).fill_(0xFF)
        buffers.append(fenced(tensor, fences))
    laid = [a if a is None or i not in by_index else layouts.apply(a, by_index[i]) for i, a in enumerate(args)]
    call: Args = [*laid, *buffers]
    for launch in build.launches:
        assert isinstance(launch, TritonLaunch)
        (launched or run)(launch, call)
    assert all((fence == 0xFF).all() for fence in fences), "written outside of a tensor"
    fresh = iter(buffers[len(workspace) :])
    results = [
        args[op.parameters.index(op.in_place[i])] if i in op.in_place else next(fresh) for i in range(op.outputs)
    ]
    return results, list(expected) if isinstance(expected, tuple) else [expected]  # type: ignore[return-value]


def fenced(tensor: torch.Tensor, fences: list[torch.Tensor]) -> torch.Tensor:
    """A copy between bytes of 0xFF, which are added to `fences`."""
    room = torch.full((tensor.nbytes + 2 * _FENCE,), 0xFF, dtype=torch.uint8)
    fences += [room[:_FENCE], room[_FENCE + tensor.nbytes :]]
    return room[_FENCE : _FENCE + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _reinterpreted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bytes as another type; what is left over of them is cut off."""
    flat = tensor.flatten().view(torch.uint8)
    return flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def run(launch: TritonLaunch, call: Args) -> None:
    """One launch on the call's arguments."""
    function, grid, values = bound(launch, call)
    if 0 not in grid:
        function[grid](**values)


def bound(launch: TritonLaunch, call: Args) -> tuple[Any, tuple[int, int, int], dict[str, Any]]:
    """The kernel of a launch, its grid and its arguments by name."""
    module, _, name = launch.kernel.partition(":")
    sizes = CallSizes(name, call)
    x, y, z = (sizes.value(size) for size in launch.grid)
    values = dict(launch.constants)
    for key, arg in launch.args.items():
        if isinstance(arg, Ptr):
            tensor = call[arg.arg]
            assert tensor is not None
            if tensor.dtype == torch.float8_e8m0fnu:
                tensor = tensor.view(torch.uint8)
            values[key] = tensor if arg.dtype is None else _reinterpreted(tensor, getattr(torch, arg.dtype))
        elif isinstance(arg, Desc):
            tensor = call[arg.arg]
            assert tensor is not None
            shape, strides = [sizes.value(s) for s in arg.sizes], [sizes.value(s) for s in arg.strides]
            values[key] = TensorDescriptor(tensor, shape, strides, list(arg.block))
        else:
            assert isinstance(arg, Scalar)
            values[key] = arg.value if arg.kind == "f32" else sizes.value(arg.value)  # type: ignore[arg-type]
    source: Any = importlib.import_module(module)
    source.gdc_wait = source.gdc_launch_dependents = lambda: None  # the order of launches is the card's
    return getattr(source, name), (x, y, z), values


def main(family: str, parts: Sequence[str]) -> int:
    cards, _, family = family.rpartition(".")
    module = importlib.import_module(f"dsv4c.schedules.{cards or 'hopper'}.{family}")
    schedules: tuple[Schedule, ...] = module.schedules("sm_103a") if cards == "blackwell" else module.SCHEDULES
    workloads = importlib.import_module(f"dsv4c.schedules.workloads.{family}").workloads()
    failed = 0
    for workload in workloads:
        if not any(part in f"{workload.op} {workload.label}" for part in parts):
            continue
        for schedule in schedules:
            if schedule.op != workload.op or schedule.accepts(workload.node) is not None:
                continue
            for config in schedule.space(workload.node, workload.symbols)[:1]:
                build, error = schedule.build(workload.node, config), 0.0
                if not all(isinstance(one, TritonLaunch) and one.cluster == 1 for one in build.launches):
                    continue  # TileLang, and PTX that blocks of a cluster talk in
                workspace = schedule.workspace(workload.node, config)
                for _order.reverse in (False, True):  # programs of a launch have no order
                    results, expected = outputs_of(
                        workload, build, schedule.layouts(workload.node), seed=17, workspace=workspace
                    )
                    found = (workload.error or largest_error)(results, expected)
                    error = math.inf if math.isnan(found) else max(error, found)
                good = error <= schedule.tolerance
                failed += not good
                print(
                    f"{'ok  ' if good else 'FAIL'} {workload.op} {workload.label} {dict(config)} {error:.2e}",
                    flush=True,
                )
    return int(failed > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1], sys.argv[2:] or [""]))
