"""Measured rows: which schedule and config was fastest for an op at a size, on which card, when.

One JSON object a line in schedules/tuned/<arch>.jsonl, written by `dsv4c tune`, read by selection. A row fits a node
of the same op, attributes and static sizes. Of the rows at several sizes the nearest counts: by |log2| of the tokens,
then of the context (columns of page tables). Rows at more than twice or less than half the tokens never count: there
the cost model decides. How large pools are, and how many requests or entries a step has, does not matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsv4c.errors import ScheduleError
from dsv4c.schedules._schedule import Config, OpNode

FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Row:
    """One measurement. Rates count the workload's least bytes and flops; `limit` is the share of the roofline."""

    op: str
    key: str
    """Static identity of the node: attributes, dtypes and sizes, symbols by name."""
    symbols: Mapping[str, int]
    label: str
    schedule: str
    config: Config
    microseconds: float
    gb_per_s: float
    tflops: float
    limit: float
    """Time of the roofline at the copy bandwidth and matrix rate measured in the same run, over the time measured."""
    error: float
    """Against the reference, as the workload measures it."""
    hardware: str
    date: str
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Microseconds of other implementations in the same run."""

    def reason(self) -> str:
        return f"tuned {self.microseconds:.1f} us at `{self.label}`"


def symbol_names(node: OpNode) -> dict[str, str]:
    """The node's symbols -> names by kind: `T` stays, `P_c4` (columns of a page table) becomes `P0`, and so on."""
    out: dict[str, str] = {}
    for value in (*node.inputs, *node.outputs):
        for size in value.shape if value is not None else ():
            if isinstance(size, str) and size not in out:
                kind = size.partition("_")[0]
                out[size] = size if size == "T" else f"{kind}{sum(n.startswith(kind) for n in out.values())}"
    return out


def node_key(node: OpNode) -> str:
    """Text that is equal for nodes which one tuned row can serve."""
    names = symbol_names(node)
    values = [
        None if v is None else [[names[s] if isinstance(s, str) else s for s in v.shape], v.dtype]
        for v in (*node.inputs, *node.outputs)
    ]
    return json.dumps([dict(sorted(node.attrs.items())), values], separators=(",", ":"))


def node_symbols(node: OpNode, symbols: Mapping[str, int]) -> dict[str, int]:
    """The values of a node's symbols by their names in `node_key`."""
    return {new: symbols[old] for old, new in symbol_names(node).items() if old in symbols}


class Tuned:
    """The rows of one architecture."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self._rows.setdefault((row.op, row.key), []).append(row)

    @classmethod
    def of(cls, arch: str) -> Tuned:
        """The rows kept in the repository for this architecture; none if it was never tuned."""
        path = FOLDER / f"{arch}.jsonl"
        return cls(read_rows(path) if path.exists() else ())

    def best(self, node: OpNode, target: str, symbols: Mapping[str, int]) -> Row | None:
        """The fastest row at the nearest measured sizes, or None."""
        rows = self._rows.get((node.op, node_key(node)), [])
        wanted = node_symbols(node, symbols)
        near = [(self._distance(row.symbols, wanted), row.microseconds, i) for i, row in enumerate(rows)]
        near = [entry for entry in near if entry[0] < math.inf]
        return rows[min(near)[2]] if near else None

    @staticmethod
    def _distance(measured: Mapping[str, int], wanted: Mapping[str, int]) -> float:
        def apart(name: str) -> float:
            return abs(math.log2(max(measured[name], 1)) - math.log2(max(wanted.get(name, measured[name]), 1)))

        if "T" in measured and apart("T") > 1:
            return math.inf
        return round(sum((1.0 if name == "T" else 0.01) * apart(name) for name in measured if name[0] in "TP"), 6)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file; ScheduleError naming the line that is no row."""
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            out.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ScheduleError(f"`{path.name}` line {number} is no tuned row: {error}", hint="tune again") from error
    return out


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows, sorted, one object a line."""
    lines = sorted(json.dumps(_plain(asdict(row)), sort_keys=True) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
