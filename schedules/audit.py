"""Whether the machine code of an artifact's GPU kernels is what their schedules promise, read from the cubins alone.

    read(image)          what a kernel's code holds: matrix instructions by name, copies, registers, parameters
    faults(kernel, ...)  what of it breaks a promise, in words; nothing for a sound kernel

Of matrix instructions a kernel must hold the ones its schedule was written for and no other, as many as whole steps of
its tiles take: on Blackwell a tile that is too small compiles to the old `mma.sync` (HMMA), block-scaled operands may
be widened to bfloat16 (UTCHMMA), and FP4 in the wrong layout is multiplied as if it were 8 bits wide (UTCQMMA where
UTCOMMA is due, or UTCQMMA on packed values). All of these compile without a word. Every tensor map must be read by the
copy engine. No kernel may keep registers in local memory, or take more shared or tensor memory than there is;
parameters must lie where the launcher puts them, each of its kind, and a block must have the threads that the code
was made for.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsv4c.artifact import Kernel, Launch, LaunchArg, Manifest
from dsv4c.errors import ArtifactError
from dsv4c.schedules import _cubin
from dsv4c.schedules._cubin import Cubin
from dsv4c.schedules._gpu import SHARED_LIMIT
from dsv4c.schedules._packing import mismatches

LEGACY = frozenset({"HMMA", "IMMA", "QMMA", "OMMA", "DMMA", "BMMA"})
"""Matrix instructions of single warps: what Hopper and Blackwell keep from older cards, at a fraction of the rate."""
_MATRIX = re.compile(r"\b((?:UTC[HQOI]MMA(?:\.BLOCK16)?)|(?:[HIQODB]G?MMA))\b")

_SCALED = {"bf16": "UTCHMMA", "mxfp8": "UTCQMMA", "mxfp4": "UTCOMMA", "nvfp4": "UTCOMMA.BLOCK16"}
_BLACKWELL = {
    "scaled": "UTCQMMA", "mixed": "UTCHMMA", "attend": "UTCHMMA", "score_tiles": "UTCQMMA", "score_runs": "UTCQMMA",
    "scaled_pairs_kernel": "UTCQMMA", "index_query": "UTCHMMA", "project": "UTCHMMA",
}  # fmt: skip
"""Kernel function -> its matrix instruction: operands of 16, 8 or 4 bits (H, Q, O), sums in tensor memory."""
_FP4 = {
    "experts_fp4": frozenset({3, 5, 7}), "experts_mx": frozenset({3, 5, 7}), "experts_nvfp4": frozenset({3, 6, 9}),
}  # fmt: skip
"""Op -> its inputs that hold two FP4 values a byte."""
_WEIGHTS: Mapping[str, Callable[[Kernel], frozenset[int]]] = {
    "grouped_up": lambda kernel: _fp4(kernel), "grouped_down": lambda kernel: _fp4(kernel),
    "scaled": lambda kernel: frozenset({2}), "scaled_pairs_kernel": lambda kernel: frozenset({2}),
    "mixed": lambda kernel: frozenset({1}),
}  # fmt: skip
"""Kernel function -> the arguments whose tiles are its products' left operands."""


_RESERVED = 1024  # bytes of shared memory that the system keeps of every block; cubins count them as static
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory
_REGISTERS = 65536  # of a multiprocessor
_CHANNELS = {"UTCOMMA.BLOCK16": 64, "UTCOMMA": 64, "UTCQMMA": 32, "UTCHMMA": 16}  # of one instruction: 32 bytes


@dataclass(frozen=True)
class Code:
    """What a cubin says of its one kernel. Sizes in bytes."""

    cubin: Cubin
    target: str
    """Architecture, such as `sm_103a`."""
    matrix: Mapping[str, int]
    """Matrix instruction (`UTCOMMA.BLOCK16`, `HGMMA`) -> how often it is in the code."""
    copies: int
    """Loads and stores through tensor maps."""
    local: int
    """Of a thread: stack and spilled registers."""
    columns: int | None
    """Of tensor memory; None if the code asks for a number that is not in it."""

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self.cubin.registers


def read(image: bytes) -> Code:
    """The code of a cubin with one kernel. Raises ArtifactError if it is none, or NVIDIA's tools cannot read it."""
    cubin = _cubin.read(image)
    text = _disassembled(image)
    target = re.search(r"\.target\s+(\w+)", text)
    touched = len(re.findall(r"\b(?:LDL|STL)\b", text))
    return Code(
        cubin=cubin,
        target=target.group(1) if target else "",
        matrix=dict(Counter(_MATRIX.findall(text))),
        copies=len(re.findall(r"\bUTMA(?:LDG|STG|REDG)\b", text)),
        local=cubin.stack or 4 * touched,
        columns=_columns(text),
    )


def _columns(text: str) -> int | None:
    """Columns of tensor memory: what is asked for comes in units of 32, in a register set just before."""
    values: dict[str, int] = {}
    most = 0
    for line in text.splitlines():
        if found := re.search(r"\bUMOV (UR\d+), (0x[0-9a-f]+) ;", line):
            values[found.group(1)] = int(found.group(2), 16)
        elif found := re.search(r"\bUTCATOMSWS\S*\.FIND_AND_SET\S* UP\d+, UR\d+, (UR\d+)", line):
            if found.group(1) not in values:
                return None
            most = max(most, 32 * values.pop(found.group(1)))
    return most


def _disassembled(image: bytes) -> str:
    import triton  # its package carries NVIDIA's tools

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        done = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ArtifactError(f"`nvdisasm` cannot read a kernel's machine code: {line}")
    return done.stdout


def promised(kernel: Kernel, launch: Launch, target: str) -> frozenset[str] | None:
    """The matrix instructions that a launch is to have; empty for none, None where nothing is promised."""
    if not target.startswith("sm_10"):
        return None  # Hopper's kernels are measured on the card
    if launch.symbol in ("grouped_up", "grouped_down"):
        wide = {"experts_fp4": "bf16", "experts_nvfp4": "nvfp4"}.get(kernel.op)
        return frozenset({_SCALED[wide or str(kernel.op_attrs["activations"])]})
    one = _BLACKWELL.get(launch.symbol)
    return frozenset({one} if one else ())


def step(kernel: Kernel, launch: Launch, instruction: str) -> int:
    """How many of a matrix instruction one step of the launch's tiles takes, over all the weights that it reads."""
    inputs = _WEIGHTS.get(launch.symbol)
    if inputs is None:
        return 1
    maps = [arg for arg in launch.args if arg.map is not None and arg.arg in inputs(kernel)]
    fp4 = _fp4(kernel)
    channels = [(2 if arg.arg in fp4 and not _padded(arg) else 1) * _row(arg) for arg in maps]
    return sum(max(1, width // _CHANNELS[instruction]) for width in channels) or 1


def _row(arg: LaunchArg) -> int:
    assert arg.map is not None
    return arg.map.box[-1]


def _padded(arg: LaunchArg) -> bool:
    """Whether FP4 values land in shared memory with room for a byte each."""
    return arg.map is not None and arg.map.dtype == "float4_e2m1fn_x2"


def _fp4(kernel: Kernel) -> frozenset[int]:
    """Arguments that hold two FP4 values a byte."""
    return _FP4.get(kernel.op, frozenset())


def faults(kernel: Kernel, launch: Launch, code: Code, target: str) -> list[str]:
    """What is wrong with one launch of a kernel; an empty list if nothing is."""
    out = []
    if code.target != target:
        out.append(f"is made for {code.target or 'no known card'}, not for {target}")
    due = promised(kernel, launch, target)
    if due is not None:
        out += _products(kernel, launch, code, due)
    out += _copies(launch, code)
    out += _memory(launch, code)
    return out + _launching(launch, code.cubin) + mismatches(launch.args, code.cubin)


def _products(kernel: Kernel, launch: Launch, code: Code, due: frozenset[str]) -> list[str]:
    found = frozenset(code.matrix)
    out = [f"has {code.matrix[name]} {_named(name)}" for name in sorted(found - due)]
    out += [f"has no {name}, which it is written for" for name in sorted(due - found)]
    for name in sorted(due & found):
        whole = step(kernel, launch, name)
        if code.matrix[name] % whole:
            out.append(f"has {code.matrix[name]} {name}, a step of its tiles takes {whole}")
    for arg in launch.args:
        if arg.map is None or arg.arg not in _fp4(kernel):
            continue
        if "UTCQMMA" in found and not _padded(arg):  # TileLang's packed tiles compile so
            out.append(f"multiplies the packed FP4 of argument {arg.arg} as if it were 8 bits wide")
        if "UTCOMMA" in due and _padded(arg):
            out.append(f"reads the FP4 of argument {arg.arg} with a byte for each value, UTCOMMA takes two in a byte")
    return out


def _named(instruction: str) -> str:
    return f"legacy {instruction}" if instruction in LEGACY else f"unexpected {instruction}"


def _copies(launch: Launch, code: Code) -> list[str]:
    maps = sum(arg.kind == "map" for arg in launch.args)
    if code.copies < maps:
        return [f"takes {maps} tensor maps and copies through {code.copies or 'none'}"]
    return [f"copies through tensor maps that it does not take: {code.copies}"] if code.copies and not maps else []


def _memory(launch: Launch, code: Code) -> list[str]:
    out = []
    if code.local:
        out.append(f"keeps {code.local} bytes a thread in local memory")
    shared = launch.shared + max(0, code.cubin.shared - _RESERVED)
    if shared > SHARED_LIMIT:
        out.append(f"takes {shared} bytes of shared memory, a block has {SHARED_LIMIT}")
    if code.columns is None:
        out.append("takes tensor memory of a size that its code does not say")
    elif code.columns > TENSOR_COLUMNS:
        out.append(f"takes {code.columns} columns of tensor memory, there are {TENSOR_COLUMNS}")
    elif not code.columns and any(name.startswith("UTC") for name in code.matrix):
        out.append("sums into tensor memory that it never takes")
    if -(-code.registers // 8) * 8 * launch.threads > _REGISTERS:
        out.append(f"takes {code.registers} registers for {launch.threads} threads, a multiprocessor has {_REGISTERS}")
    return out


def _launching(launch: Launch, cubin: Cubin) -> list[str]:
    out = []
    if launch.symbol != cubin.symbol:
        out.append(f"is launched as `{launch.symbol}`, its code is `{cubin.symbol}`")
    if cubin.threads not in (0, launch.threads):
        out.append(f"is launched with {launch.threads} threads, its code is made for {cubin.threads}")
    if cubin.registers != launch.registers:
        out.append(f"is recorded with {launch.registers} registers, its code takes {cubin.registers}")
    return out


@dataclass(frozen=True)
class Audited:
    """One launch of an artifact: its kernel, its code, and what is wrong with it."""

    kernel: Kernel
    launch: Launch
    code: Code
    faults: tuple[str, ...]


def audit(folder: Path, manifest: Manifest) -> Iterator[Audited]:
    """Every launch of every GPU kernel of the artifact in `folder`; a cubin that several share is read once."""
    launches = [(kernel, launch) for kernel in manifest.kernels.values() for launch in kernel.launches]
    files = {launch.sha256: folder / launch.file for _, launch in launches}
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:  # the disassembler is a process of its own
        codes = dict(zip(files, pool.map(lambda file: read(file.read_bytes()), files.values()), strict=True))
    for kernel, launch in launches:
        code = codes[launch.sha256]
        yield Audited(kernel, launch, code, tuple(faults(kernel, launch, code, manifest.target)))
