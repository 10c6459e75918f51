"""Logical ops of the compress family for targets that store 8 and 4 bits."""

from __future__ import annotations

from dsv4c.ops._op import Op

OPS: tuple[Op, ...] = ()
