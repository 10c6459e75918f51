"""What commands print with: a console for tables on stdout, bars of progress on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def console() -> Console:
    """stdout; as wide as the tables need where it is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=180)


def progress_bars(amount: str | None = None) -> Progress:
    """Bars on a terminal; `amount` says how much of each is done (default: how many of how many)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    done = MofNCompleteColumn() if amount is None else TextColumn(amount)
    return Progress(
        TextColumn("{task.description:<8}"), BarColumn(), done, TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"), console=Console(stderr=True),
        disable=not sys.stderr.isatty(), transient=True,
    )  # fmt: skip
