"""A layered drawing of a small acyclic graph: arrows point down, few cross, and little moves from step to step.

Layers are longest paths; long arrows pass through bends, one a layer; sweeps order each layer by the places of its
neighbours; then every node moves towards them as far as its own neighbours' widths allow. The first order is that of
the program, and no choice is random: two steps of the pipeline that differ little look alike, for which the layout
libraries that we found have no option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

SWEEPS = 12
MOVES = 16
GAP = 18.0  # between two boxes of a layer
BEND_GAP = 10.0


@dataclass(frozen=True)
class Placed:
    """Centre of a node by layer, and the bends of every arrow, from source to target. Units of `widths`."""

    x: Mapping[str, float]
    layer: Mapping[str, int]
    bends: Mapping[tuple[str, str], tuple[float, ...]]
    width: float
    layers: int


def layered(widths: Mapping[str, float], arrows: Sequence[tuple[str, str]]) -> Placed:
    """Places the nodes `widths`, in their order; an arrow against that order is drawn but not obeyed."""
    rank = {key: i for i, key in enumerate(widths)}
    down = [(a, b) for a, b in arrows if rank[a] < rank[b]]
    layer = _layers(list(widths), down)
    rows: list[list[str]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    sizes = dict(widths)
    above: dict[str, list[str]] = {key: [] for key in widths}
    below: dict[str, list[str]] = {key: [] for key in widths}
    chains: dict[tuple[str, str], list[str]] = {}
    for key in widths:
        rows[layer[key]].append(key)
    for a, b in down:
        chain = [a, *(f"{a}>{b}>{level}" for level in range(layer[a] + 1, layer[b])), b]
        chains[a, b] = chain[1:-1]
        for level, bend in zip(range(layer[a] + 1, layer[b]), chain[1:-1], strict=True):
            rows[level].append(bend)
            sizes[bend] = 0.0
        for upper, lower in pairwise(chain):
            below.setdefault(upper, []).append(lower)
            above.setdefault(lower, []).append(upper)
    order = _ordered(rows, above, below)
    x = _places(order, sizes, above, below)
    low = min((x[k] - sizes[k] / 2 for k in x), default=0.0)
    x = {key: value - low for key, value in x.items()}
    bends = {arrow: tuple(x[bend] for bend in chain) for arrow, chain in chains.items()}
    width = max((x[k] + sizes[k] / 2 for k in x), default=0.0)
    return Placed({k: x[k] for k in widths}, layer, bends, width, len(rows))


def _layers(nodes: Sequence[str], arrows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Longest path from the top; what nothing leads to is as low as its users allow."""
    above: dict[str, list[str]] = {key: [] for key in nodes}
    below: dict[str, list[str]] = {key: [] for key in nodes}
    for a, b in arrows:
        above[b].append(a)
        below[a].append(b)
    layer: dict[str, int] = {}
    for key in nodes:
        layer[key] = max((layer[a] + 1 for a in above[key]), default=0)
    for key in reversed(nodes):
        if below[key] and not above[key]:
            layer[key] = min(layer[b] for b in below[key]) - 1
    return layer


def _ordered(rows: list[list[str]], above: Mapping[str, list[str]], below: Mapping[str, list[str]]) -> list[list[str]]:
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(SWEEPS):
        near = above if sweep % 2 == 0 else below
        places = {key: i for row in rows for i, key in enumerate(row)}
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {key: _mean([places[n] for n in near[key]], places[key]) for key in row}
            row.sort(key=lambda key: wanted[key])
            places.update({key: i for i, key in enumerate(row)})
        found = _crossings(rows, below)
        if found < fewest:
            best, fewest = [list(row) for row in rows], found
    return best


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _crossings(rows: Sequence[Sequence[str]], below: Mapping[str, list[str]]) -> int:
    count = 0
    for upper, lower in pairwise(rows):
        places = {key: i for i, key in enumerate(lower)}
        ends = [sorted(places[n] for n in below[key]) for key in upper]
        for i, first in enumerate(ends):
            for second in ends[i + 1 :]:
                count += sum(a > b for a in first for b in second)
    return count


def _places(
    rows: Sequence[Sequence[str]],
    sizes: Mapping[str, float],
    above: Mapping[str, list[str]],
    below: Mapping[str, list[str]],
) -> dict[str, float]:
    x: dict[str, float] = {}
    for row in rows:
        x.update(_apart(row, [0.0] * len(row), sizes))
    for move in range(MOVES):
        near = above if move % 2 == 0 else below
        last = move >= MOVES - 2
        for row in rows if move % 2 == 0 else reversed(rows):
            wanted = []
            for key in row:
                neighbours = [*above[key], *below[key]] if last else near[key]
                wanted.append(_mean([x[n] for n in neighbours], x[key]))
            x.update(_apart(row, wanted, sizes))
    return x


def _apart(row: Sequence[str], wanted: Sequence[float], sizes: Mapping[str, float]) -> dict[str, float]:
    """The places nearest to what is wanted, in order and without overlap: least squares, by pooling neighbours."""
    offsets = [0.0]
    for a, b in pairwise(row):
        gap = GAP if sizes[a] and sizes[b] else BEND_GAP
        offsets.append(offsets[-1] + (sizes[a] + sizes[b]) / 2 + gap)
    pools: list[tuple[float, int]] = []
    for value, offset in zip(wanted, offsets, strict=False):
        pools.append((value - offset, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (low, n), (high, m) = pools[-2:]
            pools[-2:] = [((low * n + high * m) / (n + m), n + m)]
    free = [value for value, count in pools for _ in range(count)]
    return {key: value + offset for key, value, offset in zip(row, free, offsets, strict=False)}
