"""The commands of `dsv4c`, one file each: `add(commands)` adds a parser, `run(args)` runs it. Heavy imports wait."""

from __future__ import annotations

from dsv4c.commands import (
    audit,
    bench,
    bisect,
    chat,
    compile,
    dynamo,
    explain,
    inspect,
    plan,
    predict,
    run,
    tune,
    verify,
)

COMMANDS = (compile, run, dynamo, chat, bench, plan, predict, tune, inspect, explain, verify, bisect, audit)
"""In the order of `dsv4c --help`."""

__all__ = ["COMMANDS"]
