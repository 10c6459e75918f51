"""Whether the values that a launch record gives are the parameters that the machine code takes.

As many, in the same order: each as large, an address where the code expects one, and the layout that follows from them
the code's own, byte for byte. The launcher hands the driver a pointer to each value; the driver copies as many bytes
as the code says.
"""

from __future__ import annotations

from dsv4c.artifact import LaunchArg
from dsv4c.schedules._cubin import Cubin

BYTES = {"ptr": 8, "null": 8, "map": 128, "i32": 4, "f32": 4, "i64": 8}
"""Of a value by its kind, as the launcher packs it."""


def mismatches(args: tuple[LaunchArg, ...], cubin: Cubin) -> list[str]:
    """What does not fit; an empty list if the launcher's values fill the parameters."""
    sizes = [BYTES[arg.kind] for arg in args]
    if len(sizes) != len(cubin.parameters):
        return [f"takes {len(cubin.parameters)} parameters, its record gives {len(sizes)}"]
    out = []
    knows = any(parameter.address for parameter in cubin.parameters)  # a compiler need not say which are addresses
    for i, (arg, parameter) in enumerate(zip(args, cubin.parameters, strict=True)):
        if parameter.size != BYTES[arg.kind]:
            out.append(f"parameter {i} has {parameter.size} bytes, its record gives {BYTES[arg.kind]}")
        elif knows and parameter.address != (arg.kind in ("ptr", "null")):
            out.append(f"parameter {i} is {'an address' if parameter.address else 'a number'}, its record: {arg.kind}")
    out += _layout(args, cubin)
    return out


def _layout(args: tuple[LaunchArg, ...], cubin: Cubin) -> list[str]:
    """Whether the parameters lie one behind the other, each at a multiple of what it needs: maps 64 (Triton) or 128
    (CUDA 13's own type), others their size.
    """
    tried = [_laid_out(args, cubin, multiple) for multiple in (64, 128)]
    return [] if [] in tried else tried[0]


def _laid_out(args: tuple[LaunchArg, ...], cubin: Cubin, multiple: int) -> list[str]:
    """The layout with maps at multiples of `multiple` bytes. Constant memory begins at a place of the card's own, so
    the first offset says what multiples count from.
    """
    if not args:
        return []
    alignment = [multiple if arg.kind == "map" else BYTES[arg.kind] for arg in args]
    maps = (p for p, a in zip(cubin.parameters, alignment, strict=True) if a == multiple)
    base = next((-p.offset % multiple for p in maps), 0)
    at = 0
    for i, (arg, parameter) in enumerate(zip(args, cubin.parameters, strict=True)):
        at = -(-(at + base) // alignment[i]) * alignment[i] - base
        if parameter.offset != at:
            return [f"parameter {i} lies at byte {parameter.offset}, its record puts it at {at}"]
        at += BYTES[arg.kind]
    if at != cubin.parameter_bytes:
        return [f"takes {cubin.parameter_bytes} bytes of parameters, its record gives {at}"]
    return []
