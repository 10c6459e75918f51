"""Runs the token sort in Triton's interpreter, on a CPU: `interpret_sort.py`, one line a case, `ok` or `FAIL`.

In a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from dsv4c.schedules.triton import moe_sort

for name in ("gdc_wait", "gdc_launch_dependents"):  # the order of launches is the card's
    setattr(moe_sort, name, lambda: None)

DIM, TILE = 256, 16


def panels(x: Tensor, chosen: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    """The rows as schedules/triton/experts.py says they are stored, value by value."""
    out = torch.empty(DIM // 64, len(order), 64, dtype=x.dtype)
    position = torch.arange(DIM)
    q, j, h, t, c = ((position // s) % n for s, n in ((32, 4), (16, 2), (8, 2), (2, 4), (1, 2)))
    channel = position // 128 * 128 + 32 * t + 8 * q + 4 * c + 2 * j + h
    rows = x[order // chosen.shape[1]][:, channel]
    for p in range(DIM):
        chunk = (p % 64 // 8) ^ (rank % 8)
        out[p // 64, torch.arange(len(order)), chunk * 8 + p % 8] = rows[:, p]
    return out


def check(chosen: Tensor, experts: int) -> bool:
    tokens, topk = chosen.shape
    pairs = tokens * topk
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(tokens, topk, generator=generator)
    x = torch.randn(tokens, DIM, generator=generator).to(torch.bfloat16)
    flat = chosen.flatten().long()
    order = torch.sort(flat, stable=True).indices
    rank = torch.arange(pairs) - torch.searchsorted(flat[order], flat[order])
    place = torch.empty(pairs, dtype=torch.long)
    place[order] = 8 * torch.arange(pairs) + rank % 8
    right = True
    for fused in (False, True):
        ints = [torch.full((size,), -1, dtype=torch.int32) for size in (pairs, pairs, 4 * pairs, 4)]
        row_weight, out = torch.full((pairs,), torch.nan), torch.full((DIM // 64, pairs, 64), torch.nan).to(x.dtype)
        to = (ints[0], ints[1], row_weight, ints[2], ints[3])
        sizes = {"EP": 1 << (experts - 1).bit_length(), "TILE": TILE, "BLOCK": 32, "MOST_TILES": 4}
        moves = {"K": topk, "D": DIM, "ROWS": 4, "BLOCKS": 1}
        if fused:
            moe_sort.sort_gather[(min(experts, pairs), 2)](x, chosen, weight, *to, out, pairs, **sizes, **moves)
        else:
            moe_sort.sort_pairs[(experts,)](chosen, weight, *to, pairs, **sizes)
            moe_sort.gather_rows[(-(-pairs // 4), 2)](x, ints[1], ints[0], out, pairs, **moves)
        right &= torch.equal(ints[0].long(), place) and torch.equal(ints[1].long(), order)
        right &= torch.equal(row_weight, weight.flatten()[order])
        right &= torch.equal(out, panels(x, chosen, order, rank))
        right &= covers(ints[2].view(-1, 4)[: int(ints[3][0])], flat[order])
    return right


def covers(tiles: Tensor, expert: Tensor) -> bool:
    """Tiles in order hold every row once, each of one expert, at most TILE rows, from a multiple of 8 of its ranks."""
    row = 0
    for e, first, rows, _ in tiles.tolist():
        start = int(torch.searchsorted(expert, torch.tensor(e)))
        if first != row or not 0 < rows <= TILE or (first - start) % 8 or (expert[first : first + rows] != e).any():
            return False
        row += rows
    return row == len(expert)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = {
        "one token": torch.tensor([[5, 0, 39]]),
        "even": torch.rand(13, 40, generator=generator).topk(6).indices,
        "one expert for all": torch.tensor([[7, 2]]).expand(50, 2),
        "last experts": torch.tensor([[38, 39]]).expand(9, 2),
    }
    for name, chosen in cases.items():
        print("ok" if check(chosen.to(torch.int32).contiguous(), 40) else "FAIL", name)


main()
