"""Layered drawings of random acyclic graphs: arrows point down, boxes never overlap, nothing is left to chance."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dsv4c.report.charts import HEIGHT, WIDTH, chart
from dsv4c.report.layered import GAP, layered


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, float], list[tuple[str, str]]]:
    count = draw(st.integers(1, 14))
    names = [f"n{i}" for i in range(count)]
    widths = {name: draw(st.floats(20, 200)) for name in names}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    arrows = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=25)) if pairs else []
    return widths, arrows


@given(graphs())
def test_arrows_point_down_and_boxes_keep_apart(graph: tuple[dict[str, float], list[tuple[str, str]]]) -> None:
    widths, arrows = graph
    placed = layered(widths, arrows)
    assert all(placed.layer[a] < placed.layer[b] for a, b in arrows)
    assert all(len(placed.bends[a, b]) == placed.layer[b] - placed.layer[a] - 1 for a, b in arrows)
    for level in range(placed.layers):
        row = sorted((placed.x[name], widths[name]) for name in widths if placed.layer[name] == level)
        assert row, "no layer is empty"
        assert all(b - a >= (wa + wb) / 2 + GAP - 1e-6 for (a, wa), (b, wb) in pairwise(row))
    assert all(
        placed.x[n] - widths[n] / 2 >= -1e-6 and placed.x[n] + widths[n] / 2 <= placed.width + 1e-6 for n in widths
    )
    assert layered(widths, arrows) == placed


def test_an_arrow_against_the_order_is_not_obeyed() -> None:
    placed = layered({"a": 20, "b": 20}, [("b", "a")])
    assert placed.layer == {"a": 0, "b": 0}


def test_a_chain_is_straight() -> None:
    placed = layered({"a": 40, "b": 100, "c": 60}, [("a", "b"), ("b", "c"), ("a", "c")])
    assert placed.layer == {"a": 0, "b": 1, "c": 2} and placed.layers == 3


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=30))
def test_a_chart_stays_in_its_box(values: list[int]) -> None:
    made = chart("x", [f"p{i}" for i in range(len(values))], values, lambda v: f"{v:g}")
    assert all(0 <= y <= HEIGHT for y, _ in made.ticks) and made.ticks
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y, _, _ in made.marks)
    assert len(made.marks) == sum(a != b for a, b in pairwise(values))
