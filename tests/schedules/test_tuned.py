"""Tuned rows: the nearest measurement counts, far ones do not, and a broken file names its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.errors import ScheduleError
from dsv4c.schedules._schedule import OpNode, Value
from dsv4c.schedules._tuned import Row, Tuned, node_key, read_rows, write_rows
from dsv4c.schedules.select import select

NODE = OpNode(
    "linear", {"float32": False}, (Value(("T", 64), "float32"), Value((96, 64), "float32", "weight")),
    (Value(("T", 96), "float32"),),
)  # fmt: skip


def row(tokens: int, schedule: str, us: float) -> Row:
    return Row(
        op="linear", key=node_key(NODE), symbols={"T": tokens}, label=f"T {tokens}", schedule=schedule, config={},
        microseconds=us, gb_per_s=1.0, tflops=1.0, limit=0.5, error=0.0, hardware="a card", date="2026-11-21",
    )  # fmt: skip


ROWS = [row(64, "linear.aten", 5.0), row(64, "linear.cpp_packed", 7.0), row(512, "linear.cpp_packed", 9.0)]


@pytest.mark.parametrize(
    ("tokens", "schedule"),
    [
        (64, "linear.aten"),
        (90, "linear.aten"),
        (128, "linear.aten"),
        (300, "linear.cpp_packed"),
        (31, None),
        (2000, None),
    ],
)
def test_the_fastest_row_at_the_nearest_size_counts(tokens: int, schedule: str | None) -> None:
    found = Tuned(ROWS).best(NODE, "cpu", {"T": tokens})
    assert (found.schedule if found else None) == schedule


def test_selection_follows_the_row_and_says_so() -> None:
    choice = select(NODE, "cpu", {"T": 64}, Tuned(ROWS))
    assert (choice.schedule, choice.reason) == ("linear.aten", "tuned 5.0 us at `T 64`")
    assert select(NODE, "cpu", {"T": 4096}, Tuned(ROWS)).reason.startswith("model ")


def test_a_row_of_another_shape_or_an_unknown_schedule_does_not_count() -> None:
    other = OpNode(NODE.op, NODE.attrs, (NODE.inputs[0], Value((97, 64), "float32", "weight")), NODE.outputs)
    assert Tuned(ROWS).best(other, "cpu", {"T": 64}) is None
    gone = [row(64, "linear.removed", 1.0)]
    assert select(NODE, "cpu", {"T": 64}, Tuned(gone)).reason.startswith("model ")


def test_rows_survive_the_file_and_their_order_is_fixed(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    write_rows(tmp_path / "b.jsonl", ROWS[::-1])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert sorted(read_rows(tmp_path / "a.jsonl"), key=repr) == sorted(ROWS, key=repr)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"op": "linear"}\n', encoding="utf-8")
    with pytest.raises(ScheduleError, match=r"`x\.jsonl` line 1 is no tuned row"):
        read_rows(tmp_path / "x.jsonl")
