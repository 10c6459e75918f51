"""What the inputs of a padded step must be, checked value by value: the runtime's side of a program's contract.

Tokens of a request in a row, at the positions that its sequence says; pages behind everything they read and write, and
nobody else's pages behind what they write; ends, rows of logits, seats and edits that belong to live tokens; padding
that is the null slot's. Where a step verifies drafts, what the host could not know is looked up as the device will.
For debugging: the values are read back to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.artifact import Input, KVGroup, Program
from dsv4c.errors import ContractError

Arrays = Mapping[str, npt.NDArray[Any]]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepBounds:
    """What the engine that gives the steps was made for. `pages`: of each KV group, the null page included."""

    groups: Sequence[KVGroup]
    pages: Mapping[str, int]
    slots: int
    max_context: int
    vocab_size: int


def check_step(program: Program, inputs: Arrays, bounds: StepBounds, lengths: Int64Array | None = None) -> None:
    """Raises ContractError that names the first input at fault, its row and its value.

    `lengths`: of each slot the tokens computed, as the device knows them, for programs that keep them there.
    """
    _Check(program, inputs, bounds, lengths).run()


class _Check:
    def __init__(self, program: Program, inputs: Arrays, bounds: StepBounds, lengths: Int64Array | None) -> None:
        self.program, self.bounds, self.lengths = program, bounds, lengths
        kinds = {item.kind: item for item in program.inputs}
        self.drafts = 0
        """Most drafts of a request that the program verifies."""
        if "draft_seats" in kinds and program.phase == "decode":
            self.drafts = program.symbols["S"] // program.symbols["D"] - 1
        self.by_kind: dict[str, list[tuple[Input, npt.NDArray[Any]]]] = {}
        for item in program.inputs:
            self.by_kind.setdefault(item.kind, []).append((item, inputs[item.name]))

    def one(self, kind: str) -> npt.NDArray[Any]:
        return self.by_kind[kind][0][1]

    def run(self) -> None:
        rows = self.one("request_rows")
        self.inside("request_rows", rows, 0, self.bounds.slots)
        self.live = int((rows != 0).sum())
        self.all("request_rows", rows, (rows != 0) == (np.arange(rows.size) < self.live), "padding comes last")
        self.rows, given = rows[: self.live], self.one("positions")[: self.live]
        self.floating = given < 0
        self.positions = given
        if self.lengths is not None:
            self.inside("positions", -given[self.floating], 1, 2 + self.drafts)
            self.positions = np.where(self.floating, self.lengths[self.rows] - 1 - given, given)
        self.tokens()
        self.sequences()
        for item, ends in self.by_kind.get("window_ends", []):
            wanted = np.flatnonzero(~self.floating & ((self.positions + 1) % int(item.ratio or 1) == 0))
            # of a span whose place is not known: its first row, as it may complete a window
            may = np.flatnonzero(self.floating & (given == -1))
            expected = np.concatenate([wanted, -2 - may])
            padded = np.concatenate([expected, np.full(max(0, ends.size - expected.size), -1)])
            self.all(item.name, ends, ends == padded[: ends.size], "rows that complete a window, ascending, then -1")
        self.inside("logit_rows", self.one("logit_rows"), 0, max(1, self.live))
        for item, table in self.by_kind.get("page_table", []):
            self.pages(item, table)
        if "penalty_seats" in self.by_kind:
            self.seats()
            self.sampling("")
        if "draft_seats" in self.by_kind:
            self.requests()
            self.sampling("draft_")

    def tokens(self) -> None:
        ids, positions = self.one("token_ids"), self.one("positions")
        self.inside("token_ids", ids[: self.live], -1 - self.drafts, self.bounds.vocab_size)
        self.inside("token_ids", ids[self.live :], 0, self.bounds.vocab_size, self.live)
        self.inside("positions", self.positions, 0, self.bounds.max_context)
        padding = positions[self.live :]
        self.all("positions", padding, padding == 0, "padding is at position 0", self.live)

    def sequences(self) -> None:
        if not self.live:
            return
        begins = np.flatnonzero(np.diff(self.rows, prepend=0) != 0)
        slots = self.rows[begins]
        lengths = np.diff(begins, append=self.live)
        once = np.array([np.count_nonzero(slots == slot) == 1 for slot in slots])
        self.all("request_rows", slots, once, "the tokens of a request are in a row", begins)
        expected = np.arange(self.live) - np.repeat(begins, lengths) + np.repeat(self.positions[begins], lengths)
        self.all("positions", self.positions, self.positions == expected, "one behind the other")
        if self.program.phase == "decode":
            wanted = "one token a request" + (f", and {self.drafts} drafts at most" if self.drafts else "")
            self.all("request_rows", slots, lengths <= 1 + self.drafts, wanted, begins)
        if "seq_starts" in self.by_kind:
            starts, ends = self.one("seq_starts"), self.one("seq_ends")
            firsts, loose = self.positions[begins], self.floating[begins]
            begin, end = np.where(loose, -1, firsts), np.where(loose, -lengths, firsts + lengths)
            self.all("seq_starts", starts[slots], starts[slots] == begin, "the position of its first token", slots)
            self.all("seq_ends", ends[slots], ends[slots] == end, "behind its last token", slots)
            self.all("seq_ends", ends[:1], ends[:1] > self.bounds.max_context, "far away for the null slot")

    def pages(self, item: Input, table: Int64Array) -> None:
        group = next(g for g in self.bounds.groups if g.name == item.group)
        self.all(item.name, table[0], table[0] == 0, "the null slot has no pages")
        first = self.positions if group.horizon is None else np.maximum(0, self.positions + 1 - group.horizon)
        low = np.zeros_like(first) if group.horizon is None else first // group.page_tokens
        last = self.positions // group.page_tokens
        writers: dict[int, int] = {}
        for slot in np.unique(self.rows).tolist():
            own = self.rows == slot
            columns = np.arange(low[own].min(), last[own].max() + 1)
            pages = table[slot, columns] if columns[-1] < table.shape[1] else np.zeros(1, np.int64)
            self.all(
                f"{item.name}[{slot}]", pages, (pages > 0) & (pages < self.bounds.pages[group.name]),
                f"pages of `{group.name}` that a live token reads, 1 to {self.bounds.pages[group.name] - 1}", columns,
            )  # fmt: skip
            for page in np.unique(table[slot, last[own]]).tolist():
                if writers.setdefault(page, slot) != slot:
                    raise ContractError(
                        f"input `{item.name}`: slots {writers[page]} and {slot} write the same page {page} of "
                        f"`{group.name}`"
                    )

    def seats(self) -> None:
        owners = self.one("request_rows")[self.one("logit_rows")]
        rows = "one row" + (f", and {self.drafts} for drafts at most" if self.drafts else "")
        for kind in {"token_seats", "penalty_seats"} & self.by_kind.keys():
            seats = self.one(kind)
            used = seats[seats != 0]
            few = np.array([np.count_nonzero(used == seat) <= 1 + self.drafts for seat in used], dtype=bool)
            self.all(kind, used, few, f"a seat has {rows}", np.flatnonzero(seats != 0))
            self.all(kind, seats, (seats == 0) | (seats == owners), "the slot of the row's token")

    def requests(self) -> None:
        """What accepting and drafting ask: a row of each request that samples, and its drafts behind it."""
        seats, starts, limits = (self.one(f"draft_{name}") for name in ("seats", "starts", "limits"))
        live = int((seats != 0).sum())
        self.all("draft_seats", seats, (seats != 0) == (np.arange(seats.size) < live), "padding comes last")
        self.inside("draft_starts", starts, 0, self.one("logit_rows").size)
        self.inside("draft_limits", limits, 0, 1 + self.drafts)
        owners = self.one("request_rows")[self.one("logit_rows")]
        self.all("draft_seats", seats[:live], seats[:live] == owners[starts[:live]], "the seat of its first row")
        chains = np.zeros(owners.size, np.int64)
        for first, limit, seat in zip(starts[:live], limits[:live], seats[:live], strict=True):
            rows = owners[first : first + limit + 1]
            self.all("logit_rows", rows, rows == seat, "a row of the request", int(first))
            chains[first : first + limit + 1] = np.arange(limit + 1)
        self.all("chain", self.one("chain"), self.one("chain") == chains, "drafts before the row")

    def sampling(self, prefix: str) -> None:
        for name, low, high in (
            ("temperature", 0.0, np.inf), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0), ("top_k", 0, np.inf),
        ):  # fmt: skip
            if prefix + name in self.by_kind:  # a step that makes no draft asks nothing
                self.numbers(prefix + name, low, high)
        if prefix:
            return
        for name, low, high in (("repetition", 0.0, np.inf), ("frequency", -2.0, 2.0), ("presence", -2.0, 2.0)):
            self.numbers(name, low, high)
        if "masks" in self.by_kind:
            self.inside("mask_rows", self.one("mask_rows"), 0, len(self.one("masks")))
        starts, stops, tokens = self.one("edit_starts"), self.one("edit_stops"), self.one("edit_tokens")
        self.all("edit_starts", starts, (starts >= 0) & (starts <= stops), "at most its stop")
        self.inside("edit_stops", stops, 0, tokens.size + 1)
        for row in np.flatnonzero(stops > starts).tolist():
            live = tokens[starts[row] : stops[row]]
            self.inside("edit_tokens", live, 0, self.bounds.vocab_size, int(starts[row]))
            if np.unique(live).size != live.size:
                raise ContractError(f"input `edit_tokens`: row {row} of logits edits a token twice")
            values = self.one("edit_values")[starts[row] : stops[row]]
            self.all("edit_values", values, ~np.isnan(values), "numbers", int(starts[row]))

    def numbers(self, kind: str, low: float, high: float) -> None:
        values = self.one(kind)
        fits = (values >= low) & (values <= high) & np.isfinite(values)
        self.all(kind, values, fits, f"from {low} to {high}")

    def inside(self, name: str, values: npt.NDArray[Any], low: int, below: int, first: int = 0) -> None:
        self.all(name, values, (values >= low) & (values < below), f"at least {low} and below {below}", first)

    def all(
        self, name: str, values: npt.NDArray[Any], right: npt.NDArray[np.bool_], wanted: str,
        rows: int | Int64Array = 0,
    ) -> None:  # fmt: skip
        """Raises if not all are right. `rows`: where the values stand, or where the first does."""
        if not right.all():
            at = int(np.flatnonzero(~right)[0])
            row = rows + at if isinstance(rows, int) else int(rows[at])
            raise ContractError(f"input `{name}` row {row} is {values[at]}; wanted: {wanted}")
