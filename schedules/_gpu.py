"""Launches -> machine code and launch records, without a GPU: Triton and Gluon here, TileLang in `_tilelang.py`.

Everything is keyed by content: the kernel's text with all it calls, its types and constants, the tools. The same
sources give the same bytes (no paths, no line numbers in the code). Nothing here touches a driver.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4c import artifact
from dsv4c.errors import ScheduleError
from dsv4c.schedules._cubin import read
from dsv4c.schedules._launch import Desc, LaunchArg, Ptr, Scalar, TileLaunch, TritonLaunch
from dsv4c.schedules._packing import mismatches
from dsv4c.schedules._schedule import Progress, Value

ARCHS: Mapping[str, int] = {"sm_90a": 90, "sm_100a": 100, "sm_103a": 103}
SHARED_LIMIT = 227 * 1024  # of one block, on Hopper and Blackwell
CUDA_RELEASE = "13.0"  # what a driver of the 580 series runs; ptxas of that release is used where it is installed

_TRITON_TYPES = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8e4nv", "float8_e8m0fnu": "u8",
    "int64": "i64", "int32": "i32", "int16": "i16", "uint8": "u8", "int8": "i8", "bool": "i1",
}  # fmt: skip
_SWIZZLE_BYTES = (0, 32, 64, 128)  # by the driver's code


@dataclass(frozen=True)
class Compiled:
    """Machine code, and how to launch it; `file` and `sha256` of the record are those of the image."""

    image: bytes
    record: artifact.Launch
    spills: int = 0
    """Bytes a thread keeps in local memory."""


@dataclass(frozen=True)
class Request:
    """One launch to compile. `what` names the op and its shapes, for messages."""

    what: str
    launch: TritonLaunch | TileLaunch
    values: tuple[Value | None, ...]
    arch: str


def compile_all(
    requests: Sequence[Request], cache_dir: Path, progress: Progress | None = None, workers: int = 1
) -> list[Compiled]:
    """Every launch compiled, in order. Equal code is built once, by `workers`; what the cache has needs none of them.

    Raises ScheduleError naming the op whose kernel does not compile.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    missing: dict[Path, Request] = {}  # place in the cache -> the first launch of this code
    for request in requests:
        stem = _stem(request, cache_dir)
        if not _is_cached(stem):
            missing.setdefault(stem, request)
    if workers > 1 and len(missing) > 1:
        context = multiprocessing.get_context("forkserver")  # its children leave without tearing the compilers down
        with ProcessPoolExecutor(max_workers=min(workers, len(missing)), mp_context=context) as pool:
            waiting = {pool.submit(compile_launch, one, cache_dir): one for one in missing.values()}
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()
                if progress:
                    progress(done, len(missing), waiting[future].what)
    out = []
    for done, request in enumerate(requests, 1):
        out.append(compile_launch(request, cache_dir))
        if progress:
            progress(done, len(requests), request.what)
    return out


def _stem(request: Request, cache_dir: Path) -> Path:
    """Where the code of a launch lies in the cache, by all it depends on."""
    if isinstance(request.launch, TileLaunch):
        from dsv4c.schedules._tilelang import stem_of  # only where TileLang's compiler is

        return stem_of(request.launch, request.values, request.arch, cache_dir)
    return _Triton.of(request, request.launch).stem(cache_dir)


def compile_launch(request: Request, cache_dir: Path) -> Compiled:
    """One launch, from the cache if its content is known."""
    if isinstance(request.launch, TileLaunch):
        from dsv4c.schedules._tilelang import compile_tile  # tilelang is imported only where it is used

        compiled: Compiled = compile_tile(request.launch, request.values, request.arch, cache_dir)
    else:
        compiled = _compile_triton(_Triton.of(request, request.launch), cache_dir)
    if compiled.record.shared > SHARED_LIMIT:
        raise ScheduleError(
            f"the kernel of `{request.what}` needs {compiled.record.shared} bytes of shared memory, "
            f"`{request.arch}` has {SHARED_LIMIT} a block",
            hint=f"{request.launch.kernel} with {dict(request.launch.constants)}",
        )
    return compiled


@dataclass(frozen=True)
class _Triton:
    """A Triton or Gluon launch as its compiler takes it."""

    request: Request
    launch: TritonLaunch
    function: Any
    gluon: bool
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, request: Request, launch: TritonLaunch) -> _Triton:
        from triton.experimental.gluon._runtime import GluonJITFunction

        module, _, name = launch.kernel.partition(":")
        function = getattr(importlib.import_module(module), name)
        gluon = isinstance(function, GluonJITFunction)
        signature, constants, attrs = _signature(request, launch, list(function.arg_names), gluon)
        options = {
            "num_warps": launch.num_warps, "num_stages": launch.num_stages, "num_ctas": launch.num_ctas,
            "maxnreg": launch.maxnreg, "launch_pdl": launch.pdl, "enable_fp_fusion": True,
        }  # fmt: skip
        return cls(request, launch, function, gluon, signature, constants, attrs, options)

    def stem(self, cache_dir: Path) -> Path:
        """Where its code and record lie, by all they depend on."""
        import triton

        key = json.dumps(
            [self.function.cache_key, self.launch.kernel, self.signature, repr(sorted(self.constants.items())),
             repr(self.attrs), self.options, self.request.arch, triton.__version__, _ptxas()[1], _record_version()],
            sort_keys=True, default=str,
        )  # fmt: skip
        return cache_dir / hashlib.sha256(key.encode()).hexdigest()[:32]


def _compile_triton(one: _Triton, cache_dir: Path) -> Compiled:
    request, launch, stem = one.request, one.launch, one.stem(cache_dir)
    image, metadata = _cached(stem) if _is_cached(stem) else _built(one, cache_dir, stem)
    if metadata["global_scratch_size"]:
        raise ScheduleError(
            f"the kernel of `{request.what}` wants {metadata['global_scratch_size']} bytes of scratch memory",
            hint="make tensor descriptors on the host: `Desc` arguments instead of `make_tensor_descriptor`",
        )
    cubin = read(image)
    args = _record_args(request, launch, list(one.function.arg_names), metadata["descriptors"])
    wrong = mismatches(args, cubin)
    if wrong:
        raise ScheduleError(
            f"the launch record of `{request.what}` is not what its code takes: {wrong[0]}",
            hint=f"{launch.kernel} with {dict(launch.constants)}",
        )
    record = artifact.Launch(
        file="",
        sha256=hashlib.sha256(image).hexdigest(),
        symbol=metadata["name"],
        args=args,
        grid=(_times(launch.grid[0], metadata["num_ctas"]), launch.grid[1], launch.grid[2]),
        threads=32 * metadata["num_warps"],
        shared=metadata["shared"],
        registers=cubin.registers,
        cluster=(max(metadata["num_ctas"], launch.cluster), 1, 1),
        pdl=launch.pdl,
    )
    return Compiled(image, record, cubin.stack)


def _built(one: _Triton, cache_dir: Path, stem: Path) -> tuple[bytes, dict[str, Any]]:
    """The machine code and what Triton says of it, now in the cache too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    request, launch, ptxas = one.request, one.launch, _ptxas()
    source = (GluonASTSource if one.gluon else ASTSource)(
        fn=one.function, signature=dict(one.signature), constexprs=dict(one.constants), attrs=dict(one.attrs)
    )
    with triton.knobs.cache.scope(), triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = str(cache_dir / "triton")
        triton.knobs.compilation.disable_line_info = True
        if ptxas[0]:
            triton.knobs.nvidia.ptxas = ptxas[0]
            triton.knobs.nvidia.ptxas_blackwell = ptxas[0]
        try:
            target = GPUTarget("cuda", ARCHS[request.arch], 32)
            kernel = triton.compile(
                source, target=target, options={k: v for k, v in one.options.items() if v is not None}
            )
        except Exception as error:  # the compiler raises kinds of its own, some of them bare
            text = " ".join(str(error).split()) or type(error).__name__
            raise ScheduleError(
                f"the kernel of `{request.what}` does not compile: {text[:300]}",
                hint=f"{launch.kernel} with {dict(launch.constants)}",
            ) from error
    if launch.pdl and "griddepcontrol.wait" not in kernel.asm["ptx"]:
        raise ScheduleError(
            f"the kernel of `{request.what}` may start early but never waits for the kernel before it",
            hint=f"`gdc_wait()` must come before the first load of {launch.kernel}, or give it no `pdl`",
        )
    found = kernel.metadata._asdict()
    metadata = {n: found[n] for n in ("name", "shared", "num_warps", "num_ctas", "global_scratch_size")}
    metadata["descriptors"] = [dict(d) for d in (found.get("tensordesc_meta") or ())]
    _store(stem, kernel.asm["cubin"], metadata)
    return kernel.asm["cubin"], metadata


def _record_version() -> int:
    """Raise it when what is stored beside an image changes."""
    return 1


def _times(size: artifact.Expr, factor: int) -> artifact.Expr:
    if factor == 1:
        return size
    return size * factor if isinstance(size, int) else f"({size}) * {factor}"


def _is_cached(stem: Path) -> bool:
    return stem.with_suffix(".json").exists() and stem.with_suffix(".cubin").exists()


def _cached(stem: Path) -> tuple[bytes, dict[str, Any]]:
    data = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    return stem.with_suffix(".cubin").read_bytes(), data["metadata"]


def _store(stem: Path, image: bytes, metadata: Mapping[str, Any]) -> None:
    """The record last, and each whole or not at all: another process may write or read the same."""
    for suffix, data in ((".cubin", image), (".json", json.dumps({"metadata": metadata}, default=_plain).encode())):
        part = stem.with_suffix(f"{suffix}.{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(stem.with_suffix(suffix))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else str(value)


@functools.cache
def _ptxas() -> tuple[str, str]:
    """(path or empty, version): the ptxas on PATH if it is of CUDA_RELEASE, else the one Triton carries."""
    found = shutil.which("ptxas")
    if found:
        text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+\.\d+)", text)
        if release and release.group(1) == CUDA_RELEASE:
            return found, release.group(1)
    return "", "triton"


def ptxas_version() -> str:
    """Of the assembler that makes cubins: a CUDA release, or `triton` for the one Triton carries."""
    return _ptxas()[1]


def ptxas_path(arch: str) -> Path:
    """The assembler for `arch`: the ptxas on PATH if it is of CUDA_RELEASE, else the one that Triton takes."""
    import triton

    name = "ptxas-blackwell" if ARCHS[arch] >= 100 else "ptxas"
    return Path(_ptxas()[0] or Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _signature(
    request: Request, launch: TritonLaunch, names: list[str], gluon: bool
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types of all parameters, values of the constant ones, and what may be assumed of the others."""
    unknown = sorted((set(launch.args) | set(launch.constants)) - set(names))
    missing = [n for n in names if n not in launch.args and n not in launch.constants]
    if unknown or missing:
        raise ScheduleError(
            f"the launch of `{launch.kernel}` for `{request.what}` "
            + (f"gives unknown parameters {unknown}" if unknown else f"lacks parameters {missing}"),
            hint=f"it takes {names}",
        )
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        arg = launch.args[name]
        signature[name] = _type(request, arg, launch.num_ctas if gluon else 0)
        if isinstance(arg, Ptr) or (isinstance(arg, Scalar) and arg.multiple % 16 == 0):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return signature, dict(launch.constants), attrs


def _type(request: Request, arg: LaunchArg, cluster: int) -> str:
    """Triton's name for a parameter's type. `cluster`: blocks of a Gluon kernel's cluster, 0 if it is no Gluon."""
    if isinstance(arg, Scalar):
        return {"i32": "i32", "i64": "i64", "f32": "fp32"}[arg.kind]
    dtype = _TRITON_TYPES[_dtype(request, arg)]
    if isinstance(arg, Ptr):
        return f"*{dtype}"
    block = list(arg.block)
    if not cluster:
        return f"tensordesc<{dtype}{block}>"
    from triton.experimental.gluon import language as gl

    element = {"fp32": gl.float32, "bf16": gl.bfloat16, "u8": gl.uint8, "fp8e4nv": gl.float8e4nv}[dtype]
    whole = [[0] * len(block)] * (cluster.bit_length() - 1)  # each block of a cluster loads whole tiles for itself
    layout = gl.NVMMASharedLayout.get_default_for(block, element, cga_layout=whole or None)
    return f"tensordesc<{dtype}{block},{layout!r}>"


def _dtype(request: Request, arg: Ptr | Desc) -> str:
    value = request.values[arg.arg] if arg.arg < len(request.values) else None
    if value is None:
        raise ScheduleError(f"a launch of `{request.what}` refers to argument {arg.arg}, which is absent")
    return arg.dtype or value.dtype


def _record_args(
    request: Request, launch: TritonLaunch, names: list[str], descriptors: list[dict[str, Any]]
) -> tuple[artifact.LaunchArg, ...]:
    """Parameters as the machine code takes them; Triton appends two scratch pointers, here null."""
    out: list[artifact.LaunchArg] = []
    left = iter(descriptors)
    for name in names:
        if name in launch.constants:
            continue
        arg = launch.args[name]
        if isinstance(arg, Ptr):
            out.append(artifact.LaunchArg("ptr", arg.arg))
        elif isinstance(arg, Scalar):
            out.append(artifact.LaunchArg(arg.kind, None, arg.value, arg.multiple))  # type: ignore[arg-type]
        else:
            meta = next(left)
            swizzle, box = _SWIZZLE_BYTES[int(meta["swizzle"])], tuple(int(b) for b in meta["block_size"])
            fill: Any = arg.padding
            dtype, sizes = _dtype(request, arg), arg.sizes
            if meta.get("fp4_padded"):  # FP4 that lands with room for a byte each: the engine counts single values
                dtype, sizes = "float4_e2m1fn_x2", (*sizes[:-1], _times(sizes[-1], 2))
            tile = artifact.TensorMap(dtype, sizes, arg.strides, box, swizzle, fill)
            out.append(artifact.LaunchArg("map", arg.arg, map=tile))
            out += [artifact.LaunchArg("i32", None, size) for size in arg.sizes]
            out += [artifact.LaunchArg("i64", None, stride) for stride in arg.strides]
    return (*out, artifact.LaunchArg("null"), artifact.LaunchArg("null"))


def named(compiled: Compiled, file: str) -> artifact.Launch:
    """The record with the file its image was written to."""
    return dataclasses.replace(compiled.record, file=file)
