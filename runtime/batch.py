"""Spans of requests -> the int64 tensors of one step, as the manifest's `Input`s ask for them.

The rows of the flat batch are the spans one after the other. A page table is a gather of the pool's own tables,
its width a power of two (at least `min_columns`) so that few shapes occur; inputs that name the same symbol get
the same width. No loop runs over tokens. Every tensor is fresh: a step in flight never sees the next one's inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from dsv4c.artifact import Input, Manifest, Size
from dsv4c.errors import ArtifactError, EngineError
from dsv4c.runtime.kvpool import Int64Array, KVPool
from dsv4c.runtime.poolsizes import ceil_div, power_of_two
from dsv4c.runtime.scheduler import Span


def step_inputs(manifest: Manifest) -> tuple[tuple[Input, ...], dict[str, int]]:
    """The inputs of all steps of an artifact by name, and the least of each symbol's largest values.

    Raises ArtifactError if two programs disagree about an input: the engine gives every step the same ones.
    """
    inputs: dict[str, Input] = {}
    symbols: dict[str, int] = {}
    for program in (p for p in manifest.programs.values() if p.phase != "draft"):
        for name, largest in program.symbols.items():
            symbols[name] = min(largest, symbols.get(name, largest))
        for item in program.inputs:
            if inputs.setdefault(item.name, item) != item:
                raise ArtifactError(f"programs disagree about input `{item.name}`", hint="compile the artifact again")
    return tuple(inputs.values()), symbols


def logit_positions(span: Span) -> list[int]:
    """Positions of the request whose logits the step returns for this span, ascending."""
    rows = list(span.prompt_rows)
    return [*rows, *range(span.end - 1 - span.drafts, span.end)] if span.samples else rows


def tokens_of(span: Span) -> Int64Array:
    """The tokens of a span: known ones and drafts."""
    known = span.request.tokens(span.start, span.end - span.drafts)
    return np.concatenate([known, span.request.drafts[: span.drafts]]) if span.drafts else known


class BatchBuilder:
    """Builds the inputs of a step. `symbols` are the largest values of the sizes; page tables never exceed them."""

    def __init__(self, inputs: Iterable[Input], pool: KVPool, symbols: Mapping[str, int] | None = None) -> None:
        self.inputs = tuple(inputs)
        self._pool = pool
        self._symbols = dict(symbols or {})
        self._page_tokens = {g.name: g.page_tokens for g in pool.groups}
        for item in self.inputs:
            if item.kind == "page_table" and item.group not in self._page_tokens:
                raise ArtifactError(f"input `{item.name}` names the unknown KV group `{item.group}`")
            if item.kind == "window_ends" and not item.ratio:
                raise ArtifactError(f"input `{item.name}` lacks its ratio")

    def build(self, spans: Sequence[Span]) -> dict[str, torch.Tensor]:
        """Input name -> int64 tensor, for at least one span.

        `window_ends` is empty where no window completes, `logit_rows` where no logits are wanted.
        """
        if not spans:
            raise EngineError("a step needs at least one span")
        starts_R, ends_R, slots_R = np.array([(s.start, s.end, s.request.slot) for s in spans], dtype=np.int64).T
        lengths_R = ends_R - starts_R
        firsts_R = np.cumsum(lengths_R) - lengths_R  # the batch row of each span's first token
        rows_T = np.repeat(np.arange(len(spans), dtype=np.int64), lengths_R)
        positions_T = np.arange(rows_T.size, dtype=np.int64) + (starts_R - firsts_R)[rows_T]
        if rows_T.size == len(spans):
            tokens_T = np.array([s.request.token(s.start) for s in spans], dtype=np.int64)
        else:
            tokens_T = np.concatenate([tokens_of(s) for s in spans])
        # drafts beyond those that the step verifies look at a few columns more
        widths = self._widths(int(ends_R.max()) + max(s.wanted for s in spans))
        plain: dict[str, Int64Array] = {
            "token_ids": tokens_T,
            "positions": positions_T,
            "request_rows": rows_T,
            "seq_starts": starts_R,
            "seq_ends": ends_R,
            "state_slots": slots_R,
        }
        out = {}
        for item in self.inputs:
            if item.kind == "page_table":
                array = self._table(item.group or "", slots_R, widths[item.name])
            elif item.kind == "window_ends":
                array = np.flatnonzero((positions_T + 1) % (item.ratio or 1) == 0)
            elif item.kind == "logit_rows":
                array = self._logit_rows(spans, firsts_R, starts_R, ends_R)
            else:
                array = plain[item.kind]
            out[item.name] = torch.from_numpy(np.ascontiguousarray(array))
        return out

    def _widths(self, tokens: int) -> dict[str, int]:
        """Page-table input -> columns for requests of up to `tokens` tokens."""
        widths: dict[Size, int] = {}
        tables = [i for i in self.inputs if i.kind == "page_table"]
        for item in tables:
            size = item.shape[1]
            width = power_of_two(max(ceil_div(tokens, self._page_tokens[item.group or ""]), item.min_columns))
            largest = size if isinstance(size, int) else self._symbols.get(size)
            widths[size] = max(widths.get(size, 1), width if largest is None else min(width, largest))
        return {item.name: widths[item.shape[1]] for item in tables}

    def _table(self, group: str, slots_R: Int64Array, width: int) -> Int64Array:
        table = self._pool.tables[group]
        if width <= table.shape[1]:
            return table[slots_R, :width]
        padded = np.zeros((slots_R.size, width), dtype=np.int64)
        padded[:, : table.shape[1]] = table[slots_R]
        return padded

    @staticmethod
    def _logit_rows(
        spans: Sequence[Span], firsts_R: Int64Array, starts_R: Int64Array, ends_R: Int64Array
    ) -> Int64Array:
        if any(s.prompt_rows or s.drafts for s in spans):
            rows = [np.array(logit_positions(s), dtype=np.int64) for s in spans]
            shifts_S = np.repeat(firsts_R - starts_R, [r.size for r in rows])
            rows_S: Int64Array = np.concatenate(rows) + shifts_S
            return rows_S
        samples_R = np.array([s.samples for s in spans], dtype=bool)
        last_S: Int64Array = (firsts_R + ends_R - starts_R - 1)[samples_R]
        return last_S
