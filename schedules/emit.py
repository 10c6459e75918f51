"""Builds the kernels of a plan: C++ texts are compiled in parallel and linked into one library, whose file is shared;
GPU kernels become one cubin each, with the launcher beside them.

Everything is keyed by content: the text with its constants, the headers, the compiler and its flags. An object built
once is taken from the cache afterwards; the same plan gives the same bytes (no paths, no dates, no debug records).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tvm_ffi.libinfo

from dsv4c.artifact import Kernel, sha256_of
from dsv4c.errors import ScheduleError
from dsv4c.schedules import _gpu, inductor
from dsv4c.schedules._schedule import Choice, Progress

SOURCES = Path(__file__).parent / "cpp"
MARCH = {"avx512": "x86-64-v4", "avx2": "x86-64-v3"}  # torch's names; other machines get the compiler's default
_COMMON = ("-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_OWN = (*_COMMON, "-std=c++17", "-ffp-contract=fast", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused")
# Inductor's own flags: its kernels are checked against eager PyTorch with these
_INDUCTOR = (
    *_COMMON, "-std=c++20", "-ffp-contract=off", "-fexcess-precision=fast", "-fno-tree-loop-vectorize", "-w",
    "-DNDEBUG", "-DTORCH_INDUCTOR_CPP_WRAPPER", "-DSTANDALONE_TORCH_HEADER", "-DC10_USING_CUSTOM_GENERATED_MACROS",
)  # fmt: skip


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler and the instruction set to compile for (`avx512`, `avx2` or `default`)."""

    compiler: str
    version: str
    isa: str

    @classmethod
    def of_host(cls, isa: str | None = None) -> Toolchain:
        """g++ or clang++, for this machine's instruction set; ScheduleError if there is no compiler."""
        compiler = shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise ScheduleError("no C++ compiler found", hint="install g++ 11 or newer")
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        return cls(compiler, version.splitlines()[0], isa or torch.backends.cpu.get_cpu_capability().lower())

    @property
    def flags(self) -> tuple[str, ...]:
        wide = ("-mprefer-vector-width=512",) if self.isa == "avx512" else ()
        return (f"-march={MARCH[self.isa]}", "-mtune=generic", *wide) if self.isa in MARCH else ()


@dataclass(frozen=True)
class _Unit:
    """One C++ file to compile. `name` is for messages."""

    name: str
    text: str
    flags: tuple[str, ...]


def emit(
    choices: Mapping[str, Choice],
    out_dir: Path,
    cache_dir: Path,
    progress: Progress | None = None,
    *,
    arch: str = "cpu",
    toolchain: Toolchain | None = None,
) -> dict[str, Kernel]:
    """Builds every kernel of `choices` into `out_dir`/kernels. Raises ScheduleError naming the op that failed."""
    tools = toolchain or Toolchain.of_host()
    cache_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "kernels").mkdir(parents=True, exist_ok=True)
    compiled = {key: c for key, c in sorted(choices.items()) if c.build.kind in ("cpp", "inductor")}
    units = [_unit(key, choice, tools, cache_dir) for key, choice in compiled.items()]
    file = _build_library(units, tools, out_dir, cache_dir, progress) if units else None
    digest = sha256_of(out_dir / file) if file else None
    out = {
        key: _kernel(key, choice, file if key in compiled else None, digest if key in compiled else None)
        for key, choice in sorted(choices.items())
    }
    return {**out, **_emit_gpu(choices, out, arch, tools, out_dir, cache_dir, progress)}


def records(choices: Mapping[str, Choice]) -> dict[str, Kernel]:
    """What the manifest says of every kernel, with no code behind it."""
    return {key: _kernel(key, choice, None, None) for key, choice in sorted(choices.items())}


def _emit_gpu(
    choices: Mapping[str, Choice],
    kernels: Mapping[str, Kernel],
    arch: str,
    tools: Toolchain,
    out_dir: Path,
    cache_dir: Path,
    progress: Progress | None,
) -> dict[str, Kernel]:
    """The records of the GPU kernels, their cubins and the launcher written."""
    on_gpu = {key: choice for key, choice in sorted(choices.items()) if choice.build.kind == "gpu"}
    if not on_gpu:
        return {}
    requests = [
        _gpu.Request(choice.node.describe(), launch, (*choice.inputs, *choice.workspace, *choice.node.outputs), arch)
        for choice in on_gpu.values()
        for launch in choice.build.launches
    ]
    workers = min(os.cpu_count() or 1, len(requests) // 4 + 1)  # a worker takes seconds to import the compilers
    compiled = iter(_gpu.compile_all(requests, cache_dir, progress, workers))
    launcher = _build_launcher(tools, out_dir, cache_dir)
    digest = sha256_of(out_dir / launcher)
    out = {}
    for key, choice in on_gpu.items():
        launches = []
        for _ in choice.build.launches:
            made = next(compiled)
            file = f"kernels/{made.record.sha256}.cubin"
            (out_dir / file).write_bytes(made.image)
            launches.append(_gpu.named(made, file))
        out[key] = replace(kernels[key], file=launcher, sha256=digest, launches=tuple(launches))
    return out


def _build_launcher(tools: Toolchain, out_dir: Path, cache_dir: Path) -> str:
    """The launcher's file. It needs CUDA's header, which Triton carries, and no CUDA library."""
    import triton

    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    flags = ("-O2", "-fPIC", "-fvisibility=hidden", "-std=c++17", "-Wall", f"-I{header}")
    unit = _compile(_Unit("launcher", '#include "launcher.cc"\n', flags), replace(tools, isa="default"), cache_dir)
    target = out_dir / "kernels" / "launcher.part"
    library = Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent
    command = [
        tools.compiler, "-shared", "-s", "-Wl,--build-id=none", "-o", str(target), str(unit), f"-L{library}",
        "-ltvm_ffi", "-ldl", "-Wl,--no-undefined",
    ]  # fmt: skip
    _run(command, "the launcher")
    name = f"kernels/{sha256_of(target)}.so"
    target.replace(out_dir / name)
    return name


def build_recorder(cache_dir: Path) -> Path:
    """A CUDA driver for dsv4c/replay.py: it launches nothing and writes down what it is asked to."""
    import triton

    tools = replace(Toolchain.of_host(), isa="default")
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    cache_dir.mkdir(parents=True, exist_ok=True)
    flags = ("-O1", "-fPIC", "-fvisibility=hidden", "-std=c++17", "-Wall", f"-I{header}")
    unit = _compile(_Unit("recorder", '#include "recorder.cc"\n', flags), tools, cache_dir)
    folder = cache_dir / f"recorder-{unit.stem}"
    folder.mkdir(exist_ok=True)
    target, part = folder / "libcuda.so.1", folder / f"{os.getpid()}.part"
    if not target.exists():
        command = [tools.compiler, "-shared", "-s", "-Wl,-soname,libcuda.so.1", "-o", str(part), str(unit)]
        _run(command, "the recording driver")
        part.replace(target)
    return target


def _kernel(key: str, choice: Choice, file: str | None, digest: str | None) -> Kernel:
    vendor = choice.build.kind == "aten"
    kinds: dict[str, Literal["cpp", "aten", "gpu"]] = {"aten": "aten", "gpu": "gpu"}
    return Kernel(
        name=key,
        kind=kinds.get(choice.build.kind, "cpp"),
        op=choice.node.op,
        schedule=choice.schedule,
        reason=choice.reason,
        tolerance=choice.tolerance,
        symbol={"aten": choice.build.source, "gpu": ""}.get(choice.build.kind, key),
        file=file,
        sha256=digest,
        attrs=dict(choice.build.defines) if vendor else {},
        op_attrs=dict(choice.node.attrs),
    )


def _unit(key: str, choice: Choice, tools: Toolchain, cache_dir: Path) -> _Unit:
    build = choice.build
    if build.kind == "inductor":
        text = f"#define SYMBOL {key}\n{inductor.generate(choice.node, cache_dir)}"
        include = Path(torch.__file__).parent / "include"
        capability = {"avx512": "AVX512", "avx2": "AVX2"}.get(tools.isa, "DEFAULT")
        flags = (*_INDUCTOR, f"-DCPU_CAPABILITY_{capability}", f"-I{include}", f"-I{include}/torch/csrc/api/include")
        return _Unit(choice.node.describe(), text, flags)
    defines = {"SYMBOL": key, **{name: _literal(value) for name, value in sorted(build.defines.items())}}
    constants = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    return _Unit(choice.node.describe(), constants + (build.text or f'#include "{build.source}"\n'), _OWN)


def _literal(value: float) -> str:
    return repr(value) if isinstance(value, int) else f"{float(value)!r}f"


def _ffi_includes() -> list[str]:
    paths = {tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()}
    return [f"-I{path}" for path in sorted(paths)]


def _no_paths(cache_dir: Path) -> list[str]:
    """Names of files in messages of the code do not depend on where the sources lie."""
    places = [SOURCES, cache_dir, *(Path(flag.removeprefix("-I")) for flag in _ffi_includes())]
    return [f"-ffile-prefix-map={place}=." for place in places]


def _included_sha(text: str) -> str:
    """Of our C++ that a text can include: every header, and the files it names."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        if file.suffix == ".h" or f'"{file.name}"' in text:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _build_library(
    units: list[_Unit], tools: Toolchain, out_dir: Path, cache_dir: Path, progress: Progress | None
) -> str:
    units = [_Unit("sequence", '#include "sequence.cc"\n', _OWN), *units]
    objects: dict[int, Path] = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        waiting = {pool.submit(_compile, unit, tools, cache_dir): i for i, unit in enumerate(units)}
        for done, future in enumerate(as_completed(waiting), 1):
            objects[waiting[future]] = future.result()
            if progress:
                progress(done, len(units), units[waiting[future]].name)
    target = out_dir / "kernels" / "library.part"
    library = tvm_ffi.libinfo.find_libtvm_ffi()
    command = [
        tools.compiler, "-shared", "-fopenmp", "-s", "-Wl,--build-id=none", "-o", str(target),
        *(str(objects[i]) for i in range(len(units))),
        f"-L{Path(library).parent}", "-ltvm_ffi", f"-L{Path(torch.__file__).parent / 'lib'}", "-Wl,--as-needed",
        "-ltorch_cpu",  # Inductor's sines and cosines are SLEEF's, which torch carries
        "-Wl,--no-undefined",
    ]  # fmt: skip
    _run(command, "the library of kernels")
    name = f"kernels/{sha256_of(target)}.so"
    target.replace(out_dir / name)
    return name


def _compile(unit: _Unit, tools: Toolchain, cache_dir: Path) -> Path:
    flags = [*unit.flags, *tools.flags]
    key = "\0".join([unit.text, _included_sha(unit.text), tools.version, *flags])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    target = cache_dir / f"{name}.o"
    if target.exists():
        return target
    source, part = cache_dir / f"{name}.cc", cache_dir / f"{name}.{os.getpid()}.part"
    part.write_text(unit.text, encoding="utf-8")
    part.replace(source)
    command = [
        tools.compiler, *flags, f"-frandom-seed={name}", f"-I{SOURCES}", *_ffi_includes(), *_no_paths(cache_dir), "-c",
        str(source), "-o", str(part),
    ]  # fmt: skip
    _run(command, f"`{unit.name}`")
    part.replace(target)
    return target


def _run(command: list[str], what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line or "undefined" in line]
        raise ScheduleError(
            f"{what} does not compile: {(lines or result.stderr.splitlines() or ['no message'])[0]}",
            hint=f"the command was: {' '.join(command)[:400]}",
        )
