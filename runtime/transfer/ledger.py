"""The table in which an engine says how far its exported requests are; peers read it, word by word, without asking.

A row is a lease: head words, then the page-table row of every KV group in manifest order. int64, in memory that peers
can reach. Only its owner's engine thread writes (`RELEASED` excepted), as a seqlock: `VERSION` is odd while a row is
being written. A reader copies head, pages and head again; equal even versions mean that what it has is one state.

    LEASE         number of the lease, unique in the life of the ledger
    EPOCH         unique in every life of a lease: where it changed, nothing read under the old one counts
    STATUS        free, computing, complete or failed
    SLOT, TARGET  row of the state pools; tokens of which the state is exported
    TOKENS        the state of the first so many tokens is final in every pool
    NEXT_TOKENS   the step that runs will make it so many,
    MARK          and has already in the pools of so many of the program's marks
    RELEASED      number of the last lease of this row that its reader has let go; written by readers that can

The order of plain stores and loads is what makes this sound: it is kept by x86, and by a transport that reads words in
order of their addresses or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from dsv4c.errors import EngineError
from dsv4c.runtime.transfer.layout import Int64Array

VERSION, LEASE, EPOCH, STATUS, SLOT, TARGET, TOKENS, NEXT_TOKENS, MARK, RELEASED = range(10)
HEAD_WORDS = 16  # two cache lines: readers of one row disturb no other
FREE, COMPUTING, COMPLETE, FAILED = range(4)


def row_words(columns: Sequence[int]) -> int:
    """Words of a row, a whole number of cache lines."""
    return -(-(HEAD_WORDS + sum(columns)) // 8) * 8


class Ledger:
    """The owner's side, over `words` [rows, row_words(columns)] int64. Not thread-safe."""

    def __init__(self, words: Int64Array, columns: Sequence[int]) -> None:
        if words.dtype != np.int64 or words.ndim != 2 or words.shape[1] != row_words(columns):
            raise EngineError(f"a ledger of {words.dtype} {words.shape}, expected int64 [rows, {row_words(columns)}]")
        self.words = words
        self.columns = tuple(columns)
        ends = np.cumsum([HEAD_WORDS, *columns]).tolist()
        self.spans = tuple(slice(a, b) for a, b in itertools.pairwise(ends))
        """Of each group: its words in a row."""

    @property
    def rows(self) -> int:
        return int(self.words.shape[0])

    @contextmanager
    def writing(self, row: int) -> Iterator[Int64Array]:
        """The words of a row, to be written; readers wait until it is left."""
        words = self.words[row]
        words[VERSION] += 1
        try:
            yield words
        finally:
            words[VERSION] += 1

    def write(self, row: int, head: Mapping[int, int], pages: Sequence[Int64Array] | None = None) -> None:
        """Writes these head words and, if given, the first columns of every page table."""
        with self.writing(row) as words:
            for word, value in head.items():
                words[word] = value
            for span, table in zip(self.spans, pages or (), strict=pages is not None):
                words[span.start : span.start + table.size] = table

    def mark(self, row: int, mark: int) -> None:
        """One word alone: whoever reads the old one knows less, not worse."""
        self.words[row, MARK] = mark

    def let_go(self) -> list[tuple[int, int]]:
        """Row and lease of all that their readers have let go of."""
        words = self.words
        rows = np.flatnonzero(
            (words[:, RELEASED] == words[:, LEASE]) & np.isin(words[:, STATUS], (COMPUTING, COMPLETE))
        )
        return [(row, int(words[row, LEASE])) for row in rows.tolist()]
