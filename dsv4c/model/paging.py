"""Paged state: where an entry lives, and writing entries there.

A page table row lists a request's pages; entry e of a request lives in pool row
`pages[request, e // entries_per_page] * entries_per_page + e % entries_per_page`. Page 0 is nobody's.

Legend: T tokens, E entries completed in this step, R requests, P pages a request.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def entry_rows(pages_RP: Tensor, request: Tensor, entry: Tensor, entries_per_page: int) -> Tensor:
    """Pool rows of `entry` (of any shape) of `request` (broadcast against it)."""
    return pages_RP[request, entry // entries_per_page] * entries_per_page + entry % entries_per_page


def token_slots(pages_RP: Tensor, request_rows: Tensor, positions: Tensor, *, entries_per_page: int) -> Tensor:
    """[T] pool row for every token's own entry."""
    return entry_rows(pages_RP, request_rows, positions, entries_per_page)


def entry_slots(
    pages_RP: Tensor, request_rows: Tensor, positions: Tensor, ends: Tensor, *, ratio: int, entries_per_page: int
) -> Tensor:
    """[E] pool row for every compressed entry that the rows `ends` complete."""
    return entry_rows(pages_RP, request_rows[ends], positions[ends] // ratio, entries_per_page)


def page_write(pool: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """The pool with `values` in rows `slots`."""
    return pool.index_put((slots,), values)


class TokenSlots(nn.Module):
    def __init__(self, entries_per_page: int) -> None:
        super().__init__()
        self.entries_per_page = entries_per_page

    def forward(self, pages_RP: Tensor, request_rows: Tensor, positions: Tensor) -> Tensor:
        return token_slots(pages_RP, request_rows, positions, entries_per_page=self.entries_per_page)


class EntrySlots(nn.Module):
    def __init__(self, ratio: int, entries_per_page: int) -> None:
        super().__init__()
        self.ratio, self.entries_per_page = ratio, entries_per_page

    def forward(self, pages_RP: Tensor, request_rows: Tensor, positions: Tensor, ends: Tensor) -> Tensor:
        return entry_slots(
            pages_RP, request_rows, positions, ends, ratio=self.ratio, entries_per_page=self.entries_per_page
        )


class PageWrite(nn.Module):
    def forward(self, pool: Tensor, slots: Tensor, values: Tensor) -> Tensor:
        return page_write(pool, slots, values)


class TakeRows(nn.Module):
    """Rows of a tensor: the tokens whose logits are wanted."""

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return take_rows(x, rows)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows]"""
    return torch.index_select(x, 0, rows)
