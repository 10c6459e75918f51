"""One workload on the card: inputs, reference, and the check and the timing of every candidate.

A candidate runs twice on poisoned outputs and workspace: its results must be within its tolerance of the reference,
wholly written, and the same both times. Times are medians of CUDA graph replays over rotated copies of the inputs,
together larger than the L2 cache.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4c import artifact
from dsv4c.agreement import largest_error
from dsv4c.errors import ScheduleError
from dsv4c.ops import OPS, Op
from dsv4c.runtime import layouts
from dsv4c.runtime.gpu import GpuKernels, Run
from dsv4c.runtime.kernels import VENDOR_CALLS
from dsv4c.schedules._schedule import Choice, Transforms
from dsv4c.schedules._tuned import Row, node_key, node_symbols
from dsv4c.schedules._workload import Args, Workload

Others = Mapping[str, Mapping[str, Callable[..., Callable[[], object]]]]
"""Op -> name -> (inputs, attrs) -> a callable without arguments: implementations that are none of ours."""

ROTATE_BYTES = 256 << 20  # of inputs between two uses of the same one: four times the L2 cache of an H200
MOST_SETS = 48
REPLAYS = 15
BOOST_HZ = 1.755e9  # of an H200 SXM; the vector units' rate is arithmetic, the matrix units' is measured


@dataclass(frozen=True)
class Ceilings:
    """What this card does now: bytes read plus written a second, and flops a second by unit."""

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def seconds(self, workload: Workload) -> float:
        rate = self.flops_per_s[workload.unit]
        return max(workload.bytes_moved / self.bytes_per_s, workload.flops / rate)


class Trial:
    """All candidates of one workload, on the same inputs and reference."""

    def __init__(self, workload: Workload, ceilings: Ceilings | None, seed: int | None = None) -> None:
        self.workload = workload
        self.ceilings = ceilings
        self.op = find_op(workload.op)
        generator = torch.Generator("cuda")
        generator.manual_seed(torch.seed() % 2**62 if seed is None else seed)
        self.args = workload.make(generator)
        self._expected: list[Tensor] | None = None
        self._sets: dict[str, list[Args]] = {}

    @property
    def expected(self) -> list[Tensor]:
        """What the reference gives, computed once: outputs in order, those updated in place included."""
        if self._expected is None:
            reference = self.workload.reference or self.op.reference
            given = reference(*[a if a is None else a.clone() for a in self.args], **self.workload.node.attrs)
            self._expected = list(given) if isinstance(given, tuple) else [given]
        return self._expected

    def run(self, choice: Choice, kernel: artifact.Kernel, native: GpuKernels | None, *, checking: bool) -> Row | None:
        """Checks and times one candidate; prints its line."""
        bind = self._binder(choice, kernel, native)
        laid = self._laid(self.args, choice.layouts)
        name = f"{self.workload.label} | {choice.schedule} {_short(choice.config)}"
        error = math.nan
        try:
            if checking:
                error = self._check(choice, bind, laid)
        except (WrongResult, RuntimeError) as wrong:  # a candidate that cannot run here makes no row either
            print(f"FAIL {name}: {str(wrong).splitlines()[0]}", flush=True)
            return None
        if self.ceilings is None:
            print(f"ok   {name}: error {error:.2e}", flush=True)
            return None
        us = self._time(choice, bind, laid)
        work, limit = self.workload, self.ceilings.seconds(self.workload)
        row = Row(
            op=work.op,
            key=node_key(work.node),
            symbols=node_symbols(work.node, work.symbols),
            label=work.label,
            schedule=choice.schedule,
            config=dict(choice.config),
            microseconds=round(us, 3),
            gb_per_s=round(work.bytes_moved / us / 1e3, 1),
            tflops=round(work.flops / us / 1e6, 2),
            limit=round(limit * 1e6 / us, 4),
            error=float(f"{error:.3g}"),
            hardware=torch.cuda.get_device_name(),
            date=datetime.date.today().isoformat(),
        )
        print(
            f"ok   {name}: {us:.1f} us, {row.gb_per_s:.0f} GB/s, {row.tflops:.0f} TFLOPS, {100 * row.limit:.0f} % of "
            f"limit, error {error:.1e}",
            flush=True,
        )
        return row

    def check(self, choice: Choice, kernel: artifact.Kernel, native: GpuKernels | None) -> float:
        """A candidate's error, of two runs that give the same. Raises WrongResult."""
        return self._check(choice, self._binder(choice, kernel, native), self._laid(self.args, choice.layouts))

    def _laid(self, args: Args, by_index: Mapping[int, Transforms]) -> Args:
        return [a if a is None or i not in by_index else layouts.apply(a, by_index[i]) for i, a in enumerate(args)]

    def _binder(
        self, choice: Choice, kernel: artifact.Kernel, native: GpuKernels | None
    ) -> Callable[[Sequence[Args]], Run]:
        """A function that binds calls on these argument lists to one run."""
        if kernel.kind == "gpu":
            assert native is not None
            return lambda calls: native.bind([(kernel.name, args) for args in calls])
        vendor = VENDOR_CALLS[kernel.symbol](kernel.attrs)

        def bind(calls: Sequence[Args]) -> Run:
            def run(stream: int) -> None:
                for args in calls:
                    vendor(*args)

            return run

        return bind

    def _buffers(self, choice: Choice) -> list[Tensor]:
        """Workspace and outputs, poisoned."""
        out = []
        for value in (*choice.workspace, *choice.node.outputs):
            sizes = value.sizes(self.workload.symbols)
            tensor = torch.empty(sizes, dtype=getattr(torch, value.dtype), device="cuda")
            if tensor.numel():
                tensor.view(torch.uint8).fill_(0xFF)  # NaN, or -1
            out.append(tensor)
        return out

    def _check(self, choice: Choice, bind: Callable[[Sequence[Args]], Run], laid: Args) -> float:
        first, second = (self._results(choice, bind, laid) for _ in range(2))
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            if not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
                raise WrongResult(f"output {i} differs from run to run")
        measured = (self.workload.error or largest_error)(first, self.expected)
        if not measured <= choice.tolerance:
            raise WrongResult(f"error {measured:.3e} is over the tolerance {choice.tolerance:.1e}")
        return measured

    def _results(self, choice: Choice, bind: Callable[[Sequence[Args]], Run], laid: Args) -> list[Tensor]:
        """The op's outputs, in order, of one run on copies of what it updates in place."""
        args = list(laid)
        for index in choice.node.mutates:
            tensor = args[index]
            assert tensor is not None
            args[index] = tensor.clone()
        buffers = self._buffers(choice)
        bind([[*args, *buffers]])(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        fresh = iter(buffers[len(choice.workspace) :])
        results: list[Tensor | None] = []
        for i in range(self.op.outputs):
            if i in self.op.in_place:
                results.append(args[self.op.parameters.index(self.op.in_place[i])])
            else:
                results.append(next(fresh))
        return [r for r in results if r is not None]

    def _time(self, choice: Choice, bind: Callable[[Sequence[Args]], Run], laid: Args) -> float:
        """Median microseconds of one call, over replays of a graph of calls on rotated copies."""
        size = sum(a.nbytes for a in laid if a is not None)
        count = min(MOST_SETS, max(2, math.ceil(ROTATE_BYTES / max(size, 1))))
        calls = [[*(a if a is None else _copied(a) for a in laid), *self._buffers(choice)] for _ in range(count)]
        run = bind(calls)
        return time_graph(lambda: run(torch.cuda.current_stream().cuda_stream)) / count

    def baselines(self, others: Others | None = None) -> dict[str, float]:
        """Microseconds of the reference as it is, compiled by torch, and of what the workload and `others` name.

        One that does not run here (memory, an op its compiler lacks, a missing package) is printed and left out.
        """
        reference, attrs = self.workload.reference or self.op.reference, self.workload.node.attrs
        known: dict[str, Callable[[Args], Callable[[], object]]] = {
            "eager": lambda args: lambda: reference(*args, **attrs),
            "compile": lambda args: _compiled(reference, attrs, args),
            **self.workload.baselines,
            **{name: partial(make, attrs=attrs) for name, make in (others or {}).get(self.workload.op, {}).items()},
        }
        out = {}
        for name, make in known.items():
            try:
                call = make(self.args)
                out[name] = round(min(time_calls(call), _graphed(call)), 2)
            except (RuntimeError, ImportError) as error:
                print(
                    f"     {self.workload.label} | {name} does not run: {str(error).splitlines()[0][:120]}", flush=True
                )
            torch.cuda.empty_cache()
        return out


def _compiled(reference: Callable[..., Any], attrs: Mapping[str, Any], args: Args) -> Callable[[], object]:
    torch.compiler.reset()
    function = torch.compile(lambda *tensors: reference(*tensors, **attrs), dynamic=False)
    return lambda: function(*args)


def _graphed(call: Callable[[], object]) -> float:
    """The time inside a CUDA graph; infinity for a call that cannot be captured."""
    try:
        return time_graph(call)
    except RuntimeError:
        torch.cuda.synchronize()
        return math.inf


def _copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides: `clone` makes a view of some columns dense."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class WrongResult(Exception):
    """A candidate's result is not what it must be."""


def time_graph(call: Callable[[], object]) -> float:
    """Median microseconds of one replay of the graph that `call` makes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs may still be on their way
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return time_calls(graph.replay)


def time_calls(call: Callable[[], object]) -> float:
    """Median microseconds of one call, by events around it."""
    times: list[float] = []
    for _ in range(REPLAYS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def _copy_rate() -> float:
    """Bytes read plus written a second by a device-to-device copy of 2 GiB."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_calls(lambda: target.copy_(source)) / 1e6)


def measure_ceilings() -> Ceilings:
    """The copy bandwidth and matrix rates of this card, on random data."""
    bytes_per_s = _copy_rate()
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    bf16 = 2 * n**3 / (time_graph(lambda: torch.mm(a, b, out=out)) / 1e6)
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device="cuda")
    fp8 = 2 * n**3 / (time_graph(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)) / 1e6)
    card = torch.cuda.get_device_properties()
    vector = card.multi_processor_count * 256 * BOOST_HZ  # 128 lanes, a multiply-add counts twice
    return Ceilings(bytes_per_s, {"bf16": bf16, "fp8": fp8, "fp32": vector})


def find_op(name: str) -> Op:
    """The logical op of this name."""
    if name not in OPS:
        raise ScheduleError(f"no logical op is named `{name}`")
    return OPS[name]


def _short(config: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())
