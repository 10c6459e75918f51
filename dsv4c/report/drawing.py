"""A sublayer as a drawing: where its boxes are and how its arrows run, in CSS pixels. The template makes it SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4c.report.layered import Placed, layered
from dsv4c.report.sublayers import Box, Sublayer

LABEL_CHAR = 7.3  # of 12 px monospace
NOTE_CHAR = 6.1  # of 10 px monospace
BOX_HEIGHT = 34
PITCH = 56  # from layer to layer
MARGIN = 8


@dataclass(frozen=True)
class DrawnBox:
    """A box and its place: the left upper corner and its width."""

    box: Box
    changed: bool
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Drawing:
    """Boxes in the order of the program, and arrows as SVG paths between places of that order."""

    width: int
    height: int
    boxes: tuple[DrawnBox, ...]
    arrows: tuple[tuple[int, int, str], ...]


def draw(sublayer: Sublayer, changed: frozenset[str]) -> Drawing:
    """The drawing of a sublayer, with `changed` boxes marked."""
    widths = {box.key: _width(box) for box in sublayer.boxes}
    placed = layered(widths, sublayer.arrows)
    boxes = tuple(
        DrawnBox(
            box, box.key in changed, round(placed.x[box.key] - widths[box.key] / 2 + MARGIN, 1),
            placed.layer[box.key] * PITCH + MARGIN, widths[box.key],
        )
        for box in sublayer.boxes
    )  # fmt: skip
    number = {box.key: i for i, box in enumerate(sublayer.boxes)}
    arrows = tuple((number[a], number[b], _path(placed, a, b)) for a, b in sublayer.arrows)
    height = (placed.layers - 1) * PITCH + BOX_HEIGHT + 2 * MARGIN
    return Drawing(round(placed.width + 2 * MARGIN), max(height, BOX_HEIGHT), boxes, arrows)


def _width(box: Box) -> float:
    return round(max(len(box.label) * LABEL_CHAR, len(box.note) * NOTE_CHAR) + 18, 1)


def _path(placed: Placed, source: str, target: str) -> str:
    """Down from the source, through its bends, into the target."""
    top = placed.layer[source] * PITCH + BOX_HEIGHT + MARGIN
    x = placed.x[source] + MARGIN
    out = [f"M{x:.0f} {top}"]
    for level, bend in enumerate(placed.bends.get((source, target), ()), placed.layer[source] + 1):
        upper, lower = level * PITCH + MARGIN, level * PITCH + BOX_HEIGHT + MARGIN
        out += [_curve(x, top, bend + MARGIN, upper), f"V{lower}"]
        x, top = bend + MARGIN, lower
    out.append(_curve(x, top, placed.x[target] + MARGIN, placed.layer[target] * PITCH + MARGIN))
    return "".join(out)


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    if round(x) == round(to_x):
        return f"V{to_y}"
    middle = (y + to_y) / 2
    return f"C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y}"


def size_of(drawings: Sequence[Drawing]) -> tuple[int, int]:
    """Width and height that hold any of them."""
    return max((d.width for d in drawings), default=0), max((d.height for d in drawings), default=0)
