"""How many cases the property tests of the parser run, and the fragments that they are made of."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

BLOCK_PARTS = (
    "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", "<｜DSML｜toolcalls>", '<｜DSML｜invoke name="f">',
    '<｜DSML｜invoke name="', 'f">', "</｜DSML｜invoke>", '<｜DSML｜parameter name="', 'k" string="true">',
    'k" string="false">', '<｜DSML｜parameter name="k" string="true">', '<｜DSML｜parameter name="k" string="false">',
    "</｜DSML｜parameter>", "</｜DSML｜param>", "<｜DSML｜", "</｜DSML｜", "｜DSML｜", "[1, 2]",
    '｜DSML｜invoke name="g">', '{"a": 1}', "\n\n<｜DSML｜tool_calls>\n", "Paris", "DSML｜", "｜DS",
)  # fmt: skip
"""Whole tags, broken ones, and what stands between them."""


def cases(count: int) -> Any:
    """Settings of a property test: `count` cases, or what the profile asks for if that is more."""
    most = max(count, settings().max_examples if settings().max_examples > 1000 else 0)
    checks = [HealthCheck.too_slow]
    return settings(deadline=None, max_examples=most, suppress_health_check=checks)
