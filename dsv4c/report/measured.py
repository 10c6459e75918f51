"""What `dsv4c verify` measured, as the texts of the report's tables of numerics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4c.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from dsv4c.verifying import Verification


@dataclass(frozen=True)
class Measured:
    """Figures measured of stages, in words: `what` was run, and for each stage a text under every column.

    `schedules`: (op, schedule) -> the largest error of its calls. `broken`: stage, or schedule, -> how its claim is.
    """

    what: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    schedules: Mapping[tuple[str, str], str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    verdict: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: Verification) -> Measured:
        """The table that `dsv4c verify` prints."""
        from dsv4c.describe_numerics import COLUMNS, cells, number, verdict
        from dsv4c.verifying import Row

        text = any(row.bits_per_byte is not None for row in found.rows)
        columns = (*COLUMNS[2:], *(("bits a byte",) if text else ()))
        return cls(
            what=f"{found.model} for {found.target}; {'; '.join(found.inputs)}",
            columns=columns,
            rows={row.name: cells(row)[2 : 2 + len(columns)] for row in found.rows},
            schedules={(row.op, row.schedule): number(row.error) for row in found.schedules},
            broken={r.name if isinstance(r, Row) else r.schedule: str(r.broken) for r in found.broken},
            verdict=verdict(found),
            notes=found.notes,
        )

    def row(self, name: str) -> tuple[str, ...]:
        """The figures of this stage; empty texts where nothing was measured."""
        return self.rows.get(name, ("",) * len(self.columns))

    def around(self, passes: Iterable[str]) -> tuple[list[str], list[str]]:
        """Stages that are no passes: those before the passes, and those after."""
        known, names = set(passes), list(self.rows)
        first = next((i for i, name in enumerate(names) if name in known), len(names))
        return names[:first], [name for name in names[first:] if name not in known]


def read_measured(path: Path, target: str) -> Measured:
    """Of the file that `dsv4c verify --json` wrote for this target. Raises ConfigError for any other."""
    from dsv4c.verifying import Verification

    try:
        found = Verification.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read `{path}`: {error.strerror}", hint="`dsv4c verify --json FILE` writes it"
        ) from error
    except (ValueError, ArtifactError) as error:
        raise ConfigError(
            f"`{path}` is not what `dsv4c verify --json` writes: {error}", hint="verify again with this dsv4c"
        ) from error
    if found.target != target:
        raise ConfigError(
            f"`{path}` is of passes for {found.target}, the report is of {target}", hint="verify the same target"
        )
    return Measured.of(found)
