"""Marks of a program: places between its calls behind which some pools are no longer touched.

The calls of one scope of the model (a layer's attention, say) make one mark, behind the last of them that reads or
writes any pool. It follows from the manifest alone, so both ends of a transfer know the same marks. Pools that no call
names have none: they are somebody else's to write, a drafter's, behind the program.
"""

from __future__ import annotations

from collections.abc import Collection

from dsv4c.artifact import Program


def marks_of(program: Program, pools: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """For each mark in order, the pools that are final behind it and were not behind the one before."""
    return tuple(names for _, names in _marks(program, pools))


def calls_to_marks(program: Program, pools: Collection[str]) -> tuple[int, ...]:
    """For each mark in order, how many of the program's calls are in front of it."""
    return tuple(count for count, _ in _marks(program, pools))


def _marks(program: Program, pools: Collection[str]) -> list[tuple[int, tuple[str, ...]]]:
    last: dict[str, tuple[int, str]] = {}
    calls = [call for segment in program.segments for call in segment.calls]
    for number, call in enumerate(calls):
        last.update((arg, (number, call.scope)) for arg in call.args if isinstance(arg, str) and arg in pools)
    scopes: dict[str, int] = {}
    for number, scope in last.values():
        scopes[scope] = max(number, scopes.get(scope, -1))
    ends = {number: scope for scope, number in scopes.items()}
    return [
        (number + 1, tuple(sorted(name for name, (_, of) in last.items() if of == scope)))
        for number, scope in sorted(ends.items())
    ]
