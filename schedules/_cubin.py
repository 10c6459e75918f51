"""What a cubin says of its one kernel: parameters, registers, stack, threads, read from its ELF file.

NVIDIA documents no layout; these are the records that `cuobjdump -elf` names, by the same numbers (CUDA 12 and 13):

    .nv.info            of every function: registers (2f), frame (11), least stack (12)
    .nv.info.<kernel>   of the kernel: a parameter each (17), where they lie in constant memory (0a), their bytes in
                        all (19), threads of a block (10, 05), blocks of a cluster (3d), tcgen05 (51, 52)

A record is a byte for its format (1: nothing, 2: a byte, 3: two bytes, 4: as many as the next two bytes say), a byte
for its number, and the value, at multiples of four bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dsv4c.errors import ArtifactError

_REGISTERS, _FRAME, _STACK = 0x2F, 0x11, 0x12
_PARAMETER, _BANK, _BANK_SIZE, _THREADS, _CLUSTER = 0x17, 0x0A, 0x19, 0x10, 0x3D
_GLOBAL = 4  # the space of a parameter that is an address; 0 for a number or a structure


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel, in bytes from the first. `address`: the compiler knows that it is one."""

    offset: int
    size: int
    address: bool = False


@dataclass(frozen=True)
class Cubin:
    """One kernel. Sizes in bytes."""

    symbol: str
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    """Of all parameters, with what lies between them."""
    registers: int
    stack: int
    """Of a thread: its frame and what it calls, spilled registers among it."""
    threads: int
    """Of a block, as the code demands; 0 where it takes any number."""
    shared: int
    """Static, beside what a launch asks for."""


def read(image: bytes) -> Cubin:
    """The kernel of a cubin. Raises ArtifactError if it is no ELF file of one kernel."""
    try:
        return _read(image)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ArtifactError(f"a kernel's machine code is no cubin: {error}") from error


def _read(image: bytes) -> Cubin:
    if image[:5] != b"\x7fELF\x02":
        raise ArtifactError("a kernel's machine code is no cubin: it is no ELF file")
    sections = _sections(image)
    kernels = [name.removeprefix(".nv.info.") for name in sections if name.startswith(".nv.info.")]
    if len(kernels) != 1:
        raise ArtifactError(f"a cubin holds {len(kernels)} kernels, expected 1")
    (symbol,) = kernels
    number = _number(image, sections, symbol)
    found: dict[int, list[bytes]] = {}
    for code, value in _records(image, sections[f".nv.info.{symbol}"]):
        found.setdefault(code, []).append(value)
    functions = [(code, *struct.unpack("<II", value)) for code, value in _records(image, sections[".nv.info"])
                 if code in (_REGISTERS, _FRAME, _STACK)]  # fmt: skip
    threads = struct.unpack("<III", found[_THREADS][0]) if _THREADS in found else (0, 0, 0)
    bank = struct.unpack("<IHH", found[_BANK][0])[2] if _BANK in found else 0
    total = struct.unpack("<H", found[_BANK_SIZE][0])[0] if _BANK_SIZE in found else bank
    if total != bank:
        raise ArtifactError(f"a cubin says that its parameters take {bank} bytes, and {total}")
    static = sections.get(f".nv.shared.{symbol}")
    return Cubin(
        symbol=symbol,
        parameters=tuple(_parameters(found.get(_PARAMETER, []))),
        parameter_bytes=bank,
        registers=max((value for code, of, value in functions if code == _REGISTERS and of == number), default=0),
        stack=max((value for code, of, value in functions if code in (_FRAME, _STACK)), default=0),
        threads=threads[0] * max(1, threads[1]) * max(1, threads[2]),
        shared=static.size if static else 0,
    )


def _parameters(records: list[bytes]) -> Iterator[Parameter]:
    """In the order of their numbers: 16 bits of number, 16 of offset, 4 of space at bit 8, 14 of size at bit 18."""
    fields = sorted((struct.unpack("<IHHI", record)[1:] for record in records), key=lambda one: one[0])
    for _, offset, packed in fields:
        yield Parameter(offset, packed >> 18, packed >> 8 & 15 == _GLOBAL)


@dataclass(frozen=True)
class _Section:
    at: int
    size: int
    kind: int


def _sections(image: bytes) -> dict[str, _Section]:
    (at,) = struct.unpack_from("<Q", image, 40)
    step, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, at + i * step) for i in range(count)]
    text = headers[names][4]
    return {_text(image, text + header[0]): _Section(header[4], header[5], header[1]) for header in headers}


def _text(image: bytes, at: int) -> str:
    return image[at : image.index(b"\0", at)].decode()


def _number(image: bytes, sections: dict[str, _Section], symbol: str) -> int:
    """The place of a function in the table of symbols, by which records name it."""
    table, strings = sections[".symtab"], sections[".strtab"]
    for i in range(table.size // 24):
        name, kind = struct.unpack_from("<IB", image, table.at + 24 * i)
        if kind & 15 == 2 and _text(image, strings.at + name) == symbol:  # 2: a function
            return i
    raise ArtifactError(f"a cubin has no symbol `{symbol}`")


def _records(image: bytes, section: _Section) -> Iterator[tuple[int, bytes]]:
    at, end = section.at, section.at + section.size
    while at < end:
        shape, code, size = struct.unpack_from("<BBH", image, at)
        at += 4
        if shape == 4:
            yield code, image[at : at + size]
            at += -(-size // 4) * 4
        else:  # a byte or two bytes lie where the others say their size
            yield code, image[at - 2 : at]
