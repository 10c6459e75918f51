"""Schedules for Blackwell (`sm_100a`: B200, GB200; `sm_103a`: B300, GB300). Nothing here imports a kernel language.

What is plain Triton is shared with Hopper, with configs for this card's multiprocessors; most of what multiplies has
kernels of its own. An op without an entry here has no native schedule yet, and compiling it is refused by name. No
kernel was run on such a card: docs/blackwell.md.
"""

from __future__ import annotations

from dsv4c.schedules._schedule import Schedule
from dsv4c.schedules.blackwell import attention, experts, index, linear, tile
from dsv4c.schedules.hopper import compress, gate, hyper, hyper_few, rows, sampling, speculation

TARGETS = ("sm_100a", "sm_103a")


def schedules(arch: str) -> tuple[Schedule, ...]:
    """Everything for one of `TARGETS`."""
    return (
        *hyper.schedules(arch),
        *hyper_few.schedules(arch),
        *rows.schedules(arch),
        *compress.schedules(arch),
        *index.schedules(arch),
        *gate.schedules(arch),
        *experts.schedules(arch),
        *linear.schedules(arch),
        *tile.schedules(arch),
        *attention.schedules(arch),
        *sampling.schedules(arch),
        *speculation.schedules(arch),
    )


SCHEDULES: tuple[Schedule, ...] = tuple(schedule for arch in TARGETS for schedule in schedules(arch))
