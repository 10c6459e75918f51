"""Schedules for Hopper (`sm_90a`), by family of ops. Nothing here imports a kernel language."""

from __future__ import annotations

from dsv4c.schedules._schedule import Schedule
from dsv4c.schedules.hopper import attention, gate, hyper, linear, rows, sampling, tile

SCHEDULES: tuple[Schedule, ...] = (
    *hyper.SCHEDULES,
    *rows.SCHEDULES,
    *attention.SCHEDULES,
    *linear.SCHEDULES,
    *gate.SCHEDULES,
    *sampling.SCHEDULES,
    *tile.SCHEDULES,
)
