"""TileLang kernels, ahead of time: a `TileLaunch` becomes a cubin and the record that launches it.

    factory(**constants) -> prim_func -> tilelang.lower -> CUDA source -> our own nvcc -> cubin
                                      `-> host program -> tensor maps, parameters, grid, threads, shared memory

TileLang's own runtime is not used. Its lowered host program calls the kernel once, and that call is read off here:
which tensor maps it makes, in which order the kernel takes its parameters, and how it is launched. What the record
cannot say, and what would silently be slow or wrong, is refused with the reason.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv4c.artifact import Launch, LaunchArg, TensorMap
from dsv4c.errors import ScheduleError
from dsv4c.ops import DTYPE_BYTES
from dsv4c.schedules._gpu import SHARED_LIMIT, Compiled
from dsv4c.schedules._launch import Expr, TileLaunch
from dsv4c.schedules._schedule import Value
from dsv4c.schedules._tiletraps import traps
from dsv4c.strictjson import decode

# A GEMM lowered to these runs at a quarter of wgmma's rate or less, and TileLang chooses them without a word.
_LEGACY_MMA = ("mma_sync", "ptx_mma", "gemm_ss<", "gemm_rs<")

# ftz: exp2f becomes one instruction; float32 denormals mean nothing at our tolerances. Neither line information nor
# names of temporary files: the same source gives the same bytes. C++20: TileLang's headers ask for it.
_FLAGS = ("-std=c++20", "-O3", "-w", "-ftz=true", "-cubin", "-Xptxas=-v")

# Kernels that trade registers between warpgroups sit at their limits: some spill a word at one level and not at the
# other. 5 is what ptxas does unasked.
_REGISTER_LEVELS = (5, 10)

_MAP_TYPES = {0: "uint8", 2: "int32", 3: "int32", 6: "float16", 7: "float32", 9: "bfloat16"}  # CUtensorMapDataType
_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle
_PROMOTIONS = {0: 0, 1: 64, 2: 128, 3: 256}  # CUtensorMapL2promotion


@dataclass(frozen=True)
class Lowered:
    """What TileLang made of a prim_func: CUDA source, and the launch without its code."""

    source: str
    symbol: str
    args: tuple[LaunchArg, ...]
    grid: tuple[Expr, ...]
    threads: int
    shared: int
    cluster: tuple[int, ...]
    waits: bool
    """The kernel waits for the kernel before it (programmatic dependent launch)."""


def compile_tile(launch: TileLaunch, values: Sequence[Value | None], arch: str, cache_dir: Path) -> Compiled:
    """Builds one TileLang kernel for `arch` on the call's arguments `values`; ScheduleError says what is wrong."""
    stem = stem_of(launch, values, arch, cache_dir)
    record, code = stem.with_suffix(".json"), stem.with_suffix(".cubin")
    if record.is_file() and code.is_file():
        return Compiled(code.read_bytes(), decode(Launch, json.loads(record.read_text(encoding="utf-8"))))
    lowered = lower(launch, values, arch)
    image, registers = _nvcc(launch, lowered, arch)
    done = Launch(
        file="", sha256=hashlib.sha256(image).hexdigest(), symbol=lowered.symbol, args=lowered.args, grid=lowered.grid,
        threads=lowered.threads, shared=lowered.shared, registers=registers, cluster=lowered.cluster, pdl=launch.pdl,
    )  # fmt: skip
    cache_dir.mkdir(parents=True, exist_ok=True)
    _write(code, image)
    _write(record, json.dumps(asdict(done)).encode())
    return Compiled(image, done)


def stem_of(launch: TileLaunch, values: Sequence[Value | None], arch: str, cache_dir: Path) -> Path:
    """Where its code and record lie in the cache, by all they depend on."""
    return cache_dir / _key(launch, values, arch)


def lower(launch: TileLaunch, values: Sequence[Value | None], arch: str) -> Lowered:
    """Traces and lowers the factory's prim_func and reads its launch off the host program."""
    import tilelang
    from tilelang import tvm

    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    try:
        # Tracing asks for the target as well as lowering does.
        with target:
            function = _factory(launch)(**launch.constants)
            if not arch.startswith("sm_9") and (wrong := next(traps(function), None)):
                raise _refusal(launch, wrong)
            made = tilelang.lower(function, target=target)
    except ScheduleError:
        raise
    except Exception as error:
        raise _refusal(launch, f"TileLang cannot lower it: {_first_line(error)}") from error
    lowered = _read(launch, values, function, made)
    legacy = [name for name in _LEGACY_MMA if name in lowered.source]
    if legacy:
        raise _refusal(
            launch, f"a GEMM fell back to `{legacy[0]}`", hint="wgmma needs 64 rows of A, and whole warpgroups"
        )
    return lowered


def _factory(launch: TileLaunch) -> Callable[..., Any]:
    module, _, name = launch.kernel.partition(":")
    factory: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    if factory is None:
        raise _refusal(launch, "there is no such factory")
    return factory


def _refusal(launch: TileLaunch, reason: str, hint: str = "") -> ScheduleError:
    shown = ", ".join(f"{name}={value}" for name, value in launch.constants.items())
    return ScheduleError(f"kernel `{launch.kernel}` ({shown}): {reason}", hint=hint)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# Reading the host program -----------------------------------------------------------------------------------------


def _read(launch: TileLaunch, values: Sequence[Value | None], function: Any, made: Any) -> Lowered:
    kernels = list(made.device_mod.functions.items())
    if len(kernels) != 1:
        raise _refusal(launch, f"it lowers to {len(kernels)} kernels, expected 1")
    kernel = kernels[0][1]
    calls = _packed_calls(made.host_mod)
    symbol = str(kernel.attrs["global_symbol"])
    passed = calls[symbol][0]
    launched = dict(zip(map(str, kernel.attrs["tirx.kernel_launch_params"]), passed[len(kernel.params) :], strict=True))
    tensors = _tensors(launch, values, function)
    maps = {_name(call[0]): call[1:] for call in calls.get("__tvm_tensormap_create_tiled", ())}
    odd = [name for name in calls if name.startswith("__tvm_tensormap") and not name.endswith("create_tiled")]
    if odd:
        raise _refusal(launch, f"the launcher cannot make the tensor maps of `{odd[0]}`")
    args = tuple(_arg(launch, parameter, maps, tensors) for parameter in kernel.params)
    grid = tuple(_expr(launch, launched.get(f"blockIdx.{axis}", 1)) for axis in "xyz")
    threads = [int(launched.get(f"threadIdx.{axis}", 1)) for axis in "xyz"]
    if threads[1:] != [1, 1]:
        raise _refusal(launch, f"its threads have the shape {threads}, expected one dimension")
    shared = int(launched.get("tirx.use_dyn_shared_memory", 0))
    cluster = tuple(int(launched.get(f"tir.cluster_dim_{axis}", 1)) for axis in "xyz")
    waits = "has_cuda_pdl_sync" in kernel.attrs
    if launch.pdl and not waits:
        raise _refusal(
            launch, "it does not wait for the kernel before it", hint="call `T.pdl_sync()` before the first load"
        )
    _check_grid(launch, values, grid)
    return Lowered(made.kernel_source, symbol, args, grid, threads[0], shared, cluster, waits)


def _packed_calls(module: Any) -> dict[str, list[list[Any]]]:
    """Name -> arguments of every packed call of the host program."""
    from tvm import tirx
    from tvm.tirx.stmt_functor import post_order_visit

    calls: dict[str, list[list[Any]]] = {}

    def visit(node: Any) -> None:
        if isinstance(node, tirx.Call) and str(node.op.name) == "tirx.tvm_call_packed":
            calls.setdefault(str(node.args[0].value), []).append(list(node.args[1:]))

    for _, function in module.functions.items():
        post_order_visit(function.body, visit)
    return calls


def _tensors(launch: TileLaunch, values: Sequence[Value | None], function: Any) -> dict[str, int]:
    """Tensor parameter of the prim_func -> argument of the call, after a check of their sizes."""
    buffers = [function.buffer_map[handle] for handle in function.params]
    if len(buffers) != len(launch.tensors):
        raise _refusal(launch, f"it takes {len(buffers)} tensors, the launch names {len(launch.tensors)}")
    sizes = _trial_sizes(values, 2)
    symbols = {name: evaluate(value, sizes) for name, value in launch.symbols.items()}
    for buffer, arg in zip(buffers, launch.tensors):
        value = values[arg]
        if value is None:
            raise _refusal(launch, f"its tensor `{buffer.name}` is argument {arg}, which is absent")
        given = DTYPE_BYTES[value.dtype]
        for axis in range(len(value.shape)):
            given *= sizes[f"a{arg}_{axis}"]
        taken = _bytes_of(str(buffer.dtype))
        for size in buffer.shape:
            taken *= evaluate(_expr(launch, size, substitute=False), symbols)
        if value.strides is None and given != taken:
            raise _refusal(
                launch, f"its tensor `{buffer.name}` has {taken} bytes where argument {arg} has {given} "
                f"({value.dtype}{list(value.shape)} at {symbols})"
            )  # fmt: skip
    return {str(buffer.name): arg for buffer, arg in zip(buffers, launch.tensors)}


def _arg(launch: TileLaunch, parameter: Any, maps: Mapping[str, list[Any]], tensors: Mapping[str, int]) -> LaunchArg:
    name = _name(parameter)
    if name in maps:
        return _tensor_map(launch, maps[name], tensors)
    if name in tensors:
        return LaunchArg("ptr", arg=tensors[name])
    if name in launch.symbols and str(parameter.dtype) in ("int32", "int64"):
        return LaunchArg("i32" if str(parameter.dtype) == "int32" else "i64", value=launch.symbols[name])
    raise _refusal(launch, f"the launch does not say what its parameter `{name}` is")


def _tensor_map(launch: TileLaunch, call: Sequence[Any], tensors: Mapping[str, int]) -> LaunchArg:
    """Type, rank, tensor, then `rank` each of sizes, byte strides, box, element strides; then four modes."""
    code, rank, tensor = int(call[0]), int(call[1]), _name(call[2])
    if code not in _MAP_TYPES or tensor not in tensors:
        raise _refusal(launch, f"the launcher cannot make a tensor map of type {code} over `{tensor}`")
    dtype = _MAP_TYPES[code]
    groups = [list(call[3 + i * rank : 3 + (i + 1) * rank])[::-1] for i in range(4)]
    interleave, swizzle, promotion, fill = (int(mode) for mode in call[3 + 4 * rank :])
    steps = [int(step) for step in groups[3]]
    if interleave or any(step != 1 for step in steps):
        raise _refusal(launch, f"the tensor map over `{tensor}` is interleaved or skips elements")
    sizes = tuple(_expr(launch, size) for size in groups[0])
    strides = tuple(_elements(_expr(launch, stride), DTYPE_BYTES[dtype]) for stride in groups[1])
    return LaunchArg(
        "map", arg=tensors[tensor],
        map=TensorMap(
            dtype, sizes, strides, tuple(int(size) for size in groups[2]), swizzle=_SWIZZLES[swizzle],
            fill="nan" if fill else "zero", promotion=_PROMOTIONS[promotion],
        ),
    )  # fmt: skip


def _elements(stride: Expr, width: int) -> Expr:
    """A stride in bytes as one in elements."""
    return stride // width if isinstance(stride, int) else f"({stride}) // {width}"


def _name(node: Any) -> str:
    return str(getattr(node, "name", node))


def _bytes_of(dtype: str) -> int:
    if dtype.startswith("float8"):
        return 1
    return DTYPE_BYTES[dtype]


# Expressions ------------------------------------------------------------------------------------------------------


def _expr(launch: TileLaunch, node: Any, substitute: bool = True) -> Expr:
    """TIR arithmetic as an expression over the call's arguments (or, not substituted, over the kernel's symbols)."""
    text = _text(launch, node, substitute)
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _text(launch: TileLaunch, node: Any, substitute: bool) -> str:
    if isinstance(node, int):
        return str(node)
    kind = type(node).__name__
    if kind == "IntImm":
        return str(int(node))
    if kind == "Cast":
        return _text(launch, node.value, substitute)
    if kind == "Var":
        name = _name(node)
        if name not in launch.symbols:
            raise _refusal(launch, f"the launch does not say what its size `{name}` is")
        value = launch.symbols[name] if substitute else name
        return str(value) if re.fullmatch(r"\w+", str(value)) else f"({value})"
    signs = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "Div": "//", "FloorMod": "%", "Mod": "%"}
    if kind in signs:
        return f"({_text(launch, node.a, substitute)} {signs[kind]} {_text(launch, node.b, substitute)})"
    if kind in ("Min", "Max"):
        return f"{kind.lower()}({_text(launch, node.a, substitute)}, {_text(launch, node.b, substitute)})"
    raise _refusal(launch, f"a size is computed by `{kind}`, which an expression cannot say")


def evaluate(expr: Expr, names: Mapping[str, int]) -> int:
    """The value of an expression; KeyError names a size that is not there."""
    if isinstance(expr, int):
        return expr
    return _evaluate(ast.parse(expr, mode="eval").body, names)


_BINARY: dict[type, Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_CALLS: dict[str, Callable[..., int]] = {"cdiv": lambda a, b: -(-a // b), "min": min, "max": max}


def _evaluate(node: ast.expr, names: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_evaluate(left, names), _evaluate(right, names))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _CALLS[name](*(_evaluate(arg, names) for arg in args))
    raise ValueError(f"not an expression of sizes: {ast.unparse(node)}")


def _trial_sizes(values: Sequence[Value | None], trial: int) -> dict[str, int]:
    """`aI_D` of every argument with each symbol at some value of its own."""
    out: dict[str, int] = {}
    symbols: dict[str, int] = {}
    for arg, value in enumerate(values):
        for axis, size in enumerate(value.shape if value else ()):
            if isinstance(size, str):
                size = symbols.setdefault(size, (0, 1, 7, 129, 1000)[trial] + 3 * len(symbols) + (trial > 0))
            out[f"a{arg}_{axis}"] = size
    return out


def _check_grid(launch: TileLaunch, values: Sequence[Value | None], grid: tuple[Expr, ...]) -> None:
    for trial in range(5):
        sizes = _trial_sizes(values, trial)
        said, lowered = ([evaluate(axis, sizes) for axis in axes] for axes in (launch.grid, grid))
        if said != lowered:
            raise _refusal(launch, f"its grid is {lowered} where the launch says {said}")


# Compiling --------------------------------------------------------------------------------------------------------


def _nvcc(launch: TileLaunch, lowered: Lowered, arch: str) -> tuple[bytes, int]:
    """The cubin and the registers of a thread; refuses what would be slow, hang or not load."""
    image, report, reason = b"", "", ""
    for level in _REGISTER_LEVELS:
        image, report = _run_nvcc(launch, lowered.source, arch, level)
        reason = _slow(report)
        if not reason:
            break
    if reason:
        raise _refusal(launch, reason, hint="use smaller tiles, or fewer registers in `T.set_max_nreg`")
    static = sum(int(n) for n in re.findall(r"(\d+) bytes smem", report))
    if lowered.shared + static > SHARED_LIMIT:
        raise _refusal(
            launch, f"it needs {lowered.shared + static} bytes of shared memory, a block has {SHARED_LIMIT}",
            hint="use fewer stages or smaller tiles",
        )  # fmt: skip
    found = re.search(r"Used (\d+) registers", report)
    registers = int(found.group(1)) if found else 0
    _check_trade(launch, lowered, registers)
    return image, registers


def _run_nvcc(launch: TileLaunch, source: str, arch: str, level: int) -> tuple[bytes, str]:
    """The cubin, and what ptxas reports of it."""
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cu").write_text(source, encoding="utf-8")
        command = [
            _nvcc_path(), *_FLAGS, f"-Xptxas=--register-usage-level={level}",
            f"-gencode=arch=compute_{number},code=sm_{number}", *(f"-I{include}" for include in _includes()),
            "kernel.cu", "-o", "kernel.cubin",
        ]  # fmt: skip
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if ran.returncode:
            lines = [line for line in (ran.stdout + ran.stderr).splitlines() if "error" in line or "fatal" in line]
            raise _refusal(launch, f"nvcc: {lines[0] if lines else ran.stderr.strip()[:500]}")
        return (Path(folder) / "kernel.cubin").read_bytes(), ran.stdout + ran.stderr


def _slow(report: str) -> str:
    """Why ptxas made a slow kernel, if it did."""
    if "wgmma.mma_async instructions are serialized" in report:
        return "its wgmma instructions are serialised"
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    stack = sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", report))
    return f"it spills {spilled} bytes and has a stack of {stack}" if spilled or stack else ""


def _check_trade(launch: TileLaunch, lowered: Lowered, registers: int) -> None:
    """Warpgroups may trade only the registers the block was launched with; one that asks for more waits for ever."""
    given = [int(n) for n in re.findall(r"warpgroup_reg_dealloc<(\d+)>", lowered.source)]
    taken = [int(n) for n in re.findall(r"warpgroup_reg_alloc<(\d+)>", lowered.source)]
    groups = lowered.threads // 128
    if not taken:
        return
    # a branch that serves several warpgroups says it once: count the others at the least anyone wants
    wanted = sum(given) + sum(taken) + min(given + taken) * max(0, groups - len(given) - len(taken))
    if wanted > registers * groups:
        raise _refusal(
            launch, f"its warpgroups want {wanted} registers a lane together, {groups} x {registers} are there",
            hint="the kernel would hang: lower `T.set_max_nreg`",
        )  # fmt: skip


@functools.cache
def _nvcc_path() -> str:
    path = shutil.which("nvcc")
    if path is None:
        raise ScheduleError("`nvcc` is not on the path", hint="TileLang kernels need the CUDA 13 compiler")
    return path


@functools.cache
def _includes() -> tuple[str, ...]:
    import tilelang

    root = Path(tilelang.__file__).parent
    return (str(root / "src"), str(root / "3rdparty" / "cutlass" / "include"))


def _key(launch: TileLaunch, values: Sequence[Value | None], arch: str) -> str:
    """Everything the cubin depends on."""
    from importlib.metadata import version

    texts = sorted((Path(__file__).parent / "tilelang").glob("*.py"))
    digest = hashlib.sha256()
    for part in (
        json.dumps(
            [asdict(launch), [value and asdict(value) for value in values], arch, _FLAGS, _REGISTER_LEVELS],
            sort_keys=True,
        ).encode(),
        version("tilelang").encode(),
        _nvcc_version(),
        Path(__file__).read_bytes(),
        *(text.read_bytes() for text in texts),
    ):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


@functools.cache
def _nvcc_version() -> bytes:
    return subprocess.run([_nvcc_path(), "--version"], capture_output=True, check=True).stdout


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: another process may write or read the same file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
