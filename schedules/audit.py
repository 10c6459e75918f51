"""Whether the machine code of an artifact's GPU kernels is what their schedules promise, read from the cubins alone.

    read(image)          what a kernel's code holds: matrix instructions by name, copies, registers, parameters
    faults(kernel, ...)  what of it breaks a promise, in words; nothing for a sound kernel

Of matrix instructions a kernel must hold the ones its schedule was written for and no other: on Blackwell a tile that
is too small compiles to the old `mma.sync` (HMMA), block-scaled operands may be widened to bfloat16 (UTCHMMA), and FP4
in the wrong layout is multiplied as if it were 8 bits wide (UTCQMMA where UTCOMMA is due). All of these compile without
a word. No kernel may spill registers, or take more shared memory than a block has; parameters must lie where the
launcher puts them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4c.artifact import Kernel, Launch, LaunchArg, Manifest
from dsv4c.errors import ArtifactError
from dsv4c.schedules._gpu import SHARED_LIMIT

LEGACY = frozenset({"HMMA", "IMMA", "QMMA", "OMMA", "DMMA", "BMMA"})
"""Matrix instructions of single warps: what Hopper and Blackwell keep from older cards, at a fraction of the rate."""
_MATRIX = re.compile(r"\b((?:UTC[HQOI]MMA(?:\.BLOCK16)?)|(?:[HIQODB]G?MMA))\b")
_BYTES = {"ptr": 8, "null": 8, "map": 128, "i32": 4, "f32": 4, "i64": 8}

_SCALED = {"bf16": "UTCHMMA", "mxfp8": "UTCQMMA", "mxfp4": "UTCOMMA", "nvfp4": "UTCOMMA.BLOCK16"}
_BLACKWELL = {
    "scaled": "UTCQMMA", "mixed": "UTCHMMA", "attend": "UTCHMMA", "score_tokens": "UTCQMMA", "index_query": "UTCHMMA",
    "project": "UTCHMMA",
}  # fmt: skip
"""Kernel function -> its matrix instruction: operands of 16, 8 or 4 bits (H, Q, O), sums in tensor memory."""


@dataclass(frozen=True)
class Code:
    """What a cubin says of its one kernel. Sizes in bytes."""

    target: str
    """Architecture, such as `sm_103a`."""
    matrix: Mapping[str, int]
    """Matrix instruction (`UTCOMMA.BLOCK16`, `HGMMA`) -> how often it is in the code."""
    copies: int
    """Loads through tensor maps."""
    registers: int
    local: int
    """Of a thread: stack and spilled registers."""
    parameters: tuple[tuple[int, int], ...]
    """Offset and size of each parameter."""


def read(image: bytes) -> Code:
    """The code of a cubin with one kernel. Raises ArtifactError if NVIDIA's tools cannot read it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(image)
        text = _tool("nvdisasm", "-c", file)
        usage = _tool("cuobjdump", "--dump-resource-usage", file)
        elf = _tool("cuobjdump", "-elf", file)
    target = re.search(r"\.target\s+(\w+)", text)
    sizes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    slots = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)", elf)
    return Code(
        target=target.group(1) if target else "",
        matrix=dict(Counter(_MATRIX.findall(text))),
        copies=len(re.findall(r"\bUTMALDG\b", text)),
        registers=sizes.get("REG", 0),
        local=sizes.get("STACK", 0) + sizes.get("LOCAL", 0),
        parameters=tuple((int(at, 16), int(size, 16)) for _, at, size in sorted(slots, key=lambda s: int(s[0], 16))),
    )


def _tool(name: str, flag: str, file: Path) -> str:
    import triton  # its package carries NVIDIA's tools

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(tool), flag, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ArtifactError(f"`{name}` cannot read a kernel's machine code: {line}")
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


def faults(kernel: Kernel, launch: Launch, code: Code, target: str) -> list[str]:
    """What is wrong with one launch of a kernel; an empty list if nothing is."""
    out = []
    if code.target != target:
        out.append(f"is made for {code.target or 'no known card'}, not for {target}")
    due = promised(kernel, launch, target)
    if due is not None:
        found = frozenset(code.matrix)
        out += [f"has {code.matrix[name]} {_named(name)}" for name in sorted(found - due)]
        out += [f"has no {name}, which it is written for" for name in sorted(due - found)]
    if code.local:
        out.append(f"keeps {code.local} bytes a thread in local memory")
    if launch.shared > SHARED_LIMIT:
        out.append(f"takes {launch.shared} bytes of shared memory, a block has {SHARED_LIMIT}")
    if code.registers * launch.threads > 65536:
        out.append(f"takes {code.registers} registers for {launch.threads} threads, a multiprocessor has 65536")
    return out + _packing(launch.args, code.parameters)


def _named(instruction: str) -> str:
    return f"legacy {instruction}" if instruction in LEGACY else f"unexpected {instruction}"


def _packing(args: tuple[LaunchArg, ...], parameters: tuple[tuple[int, int], ...]) -> list[str]:
    """Whether the launcher's values fill the parameters: as many, each as large."""
    sizes = [_BYTES[arg.kind] for arg in args]
    if len(sizes) != len(parameters):
        return [f"takes {len(parameters)} parameters, its record gives {len(sizes)}"]
    return [
        f"parameter {i} has {size} bytes, its record gives {given}"
        for i, (given, (_, size)) in enumerate(zip(sizes, parameters, strict=True))
        if given != size
    ]


@dataclass(frozen=True)
class Audited:
    """One launch of an artifact: its kernel, its code, and what is wrong with it."""

    kernel: Kernel
    launch: Launch
    code: Code
    faults: tuple[str, ...]


def audit(folder: Path, manifest: Manifest) -> Iterator[Audited]:
    """Every launch of every GPU kernel of the artifact in `folder`; a cubin that several share is read once."""
    codes: dict[str, Code] = {}
    for kernel in manifest.kernels.values():
        for launch in kernel.launches:
            if launch.sha256 not in codes:
                codes[launch.sha256] = read((folder / launch.file).read_bytes())
            code = codes[launch.sha256]
            yield Audited(kernel, launch, code, tuple(faults(kernel, launch, code, manifest.target)))
