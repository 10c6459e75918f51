"""Schedules for Hopper (`sm_90a`), by family of ops. Nothing here imports a kernel language."""

from __future__ import annotations

from dsv4c.schedules._schedule import Schedule
from dsv4c.schedules.hopper import (
    attention,
    compress,
    experts,
    gate,
    hyper,
    hyper_few,
    index,
    linear,
    rows,
    sampling,
    speculation,
    tile,
)

SCHEDULES: tuple[Schedule, ...] = (
    *hyper.SCHEDULES,
    *hyper_few.SCHEDULES,
    *rows.SCHEDULES,
    *compress.SCHEDULES,
    *index.SCHEDULES,
    *attention.SCHEDULES,
    *experts.SCHEDULES,
    *linear.SCHEDULES,
    *gate.SCHEDULES,
    *sampling.SCHEDULES,
    *speculation.SCHEDULES,
    *tile.SCHEDULES,
)
