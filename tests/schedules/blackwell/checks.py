"""Checks that stand alone in a process of their own: each is run whatever became of the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping

from hypothesis import HealthCheck, seed, settings

Check = Callable[[], None]


def random_cases(check: Check, count: int, number: int | None = None) -> Check:
    """A hypothesis test with so many cases, with this seed if there is one, and no time limit."""
    quiet = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return quiet(check) if number is None else seed(number)(quiet(check))


def run_checks(checks: Mapping[str, Check], part: str = "") -> int:
    """Runs them, or the one called `part`: a line each. The process's status: 1 if one has failed."""
    if part and part not in checks:
        raise SystemExit(f"there is no check `{part}`, only {', '.join(checks)}")
    failed = 0
    for name, check in checks.items():
        if part and part != name:
            continue
        try:
            check()
        except Exception:  # noqa: BLE001 - one failed check must not hide the others
            failed += 1
            print(f"FAIL {name}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"ok   {name}", flush=True)
    return int(failed > 0)
