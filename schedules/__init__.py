"""Schedules: ways to run one logical op on a target. What a schedule of one's own is made of."""

from __future__ import annotations

from dsv4c.schedules._schedule import Build, Config, OpNode, Schedule, Value, Work

__all__ = ["Build", "Config", "OpNode", "Schedule", "Value", "Work"]
