"""Small charts of one figure after every pass, as SVG paths. The scale is logarithmic: passes change by factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 260, 110
LEFT, RIGHT, TOP, BOTTOM = 42, 4, 8, 10
_NICE = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Chart:
    """`path` in a box of WIDTH by HEIGHT; ticks are (y, text), marks (x, y, pass, text) where the figure changed."""

    label: str
    path: str
    ticks: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, float, str, str], ...]
    first: str
    last: str


def chart(
    label: str, names: Sequence[str], values: Sequence[float], text: Callable[[float], str], unit: float = 1.0
) -> Chart:
    """The chart of a figure; `names` are the passes, the capture first. Values of zero or less lie at the bottom.

    Ticks are counted in `unit`s, a power of ten.
    """
    positive = [value for value in values if value > 0] or [1.0]
    low, high = _bounds(min(positive), max(positive))

    def x(place: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * place / max(1, len(values)), 1)

    def y(value: float) -> float:
        share = (math.log10(max(value, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    path = f"M{x(0)} {y(values[0])}H{x(1)}" + "".join(
        f"V{y(value)}H{x(place + 1)}" for place, value in enumerate(values[1:], 1)
    )
    marks = tuple(
        (x(place + 0.5), y(value), name, text(value))
        for place, (name, before, value) in enumerate(zip(names[1:], values, values[1:], strict=False), 1)
        if before != value
    )
    ticks = tuple((y(tick), f"{tick / unit:,.10g}") for tick in _ticks(low, high))
    return Chart(label, path, ticks, marks, text(values[0]), text(values[-1]))


def _bounds(low: float, high: float) -> tuple[float, float]:
    """Nice numbers around the values, at least a factor of two apart."""
    top = next(n for n in _nice_from(high) if n >= high)
    bottom = next(n for n in reversed(list(_nice_around(low))) if n <= low)
    return (bottom, top) if top > bottom else (bottom, 2 * bottom)


def _nice_from(value: float) -> list[float]:
    power = math.floor(math.log10(value))
    return [nice * 10.0 ** (power + more) for more in (0, 1) for nice in _NICE]


def _nice_around(value: float) -> list[float]:
    power = math.floor(math.log10(value))
    return [nice * 10.0 ** (power + less) for less in (-1, 0) for nice in _NICE]


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the bounds; with fewer than two of them, the bounds."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [10.0**n for n in range(first, last + 1)]
    return powers if len(powers) > 1 else sorted({low, *powers, high})
