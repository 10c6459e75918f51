"""Two texts side by side: numbers are followed, what differs is marked, what is alike in many layers is folded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4c.report.irlines import lines_of, tokens
from dsv4c.report.sides import Gap, Row, align, difference, marked


def text(*lines: str, name: str = "step") -> str:
    return "\n".join([f"graph {name} {{", *(f"  {line}" for line in lines), "}"])


def kinds(before: str, after: str) -> list[str]:
    return [row.kind for row in align(lines_of(before)["step"], lines_of(after)["step"])]


BEFORE = text(
    "%input.x : f32[T, 4]",
    "%0 = dsv4.a(%input.x) : f32[T, 4]  # L00.attn",
    "%1 = dsv4.b(%0) : f32[T, 4]  # L00.attn",
    "%2 = dsv4.c(%1, %0) : f32[T, 4]  # L00.ffn",
    "return y=%2",
)


def test_the_same_text_has_no_difference() -> None:
    found = difference(BEFORE, BEFORE)
    assert found.folds == () and (found.removed, found.added, found.changed) == (0, 0, 0)


def test_a_new_number_is_no_change() -> None:
    after = text(
        "%input.x : f32[T, 4]",
        "%0 = dsv4.new(%input.x) : f32[T, 4]  # embed",
        "%1 = dsv4.a(%input.x) : f32[T, 4]  # L00.attn",
        "%2 = dsv4.b(%1) : f32[T, 4]  # L00.attn",
        "%3 = dsv4.c(%2, %1) : f32[T, 4]  # L00.ffn",
        "return y=%3",
    )
    assert kinds(BEFORE, after) == ["same", "added", "same", "same", "same", "same"]


def test_the_same_words_that_read_another_value_are_a_change_of_that_reference_alone() -> None:
    after = BEFORE.replace("dsv4.c(%1, %0)", "dsv4.c(%1, %1)")
    found = difference(BEFORE, after)
    (row,) = [r for fold in found.folds for r in fold.hunk.rows if isinstance(r, Row) and r.kind != "same"]
    assert row.section == "L00.ffn" and row.stale
    old, new = marked(row)
    assert [part for part, mark in old if mark] == ["%0"] and [part for part, mark in new if mark] == ["%1"]


def test_an_output_by_index_is_followed_too() -> None:
    before = text("%0 = dsv4.p() : f32[1], f32[2]  # a", "%1 = dsv4.q(%0.1) : f32[2]  # a", "return y=%1")
    assert "changed" not in kinds(before, before)
    assert kinds(before, before.replace("%0.1", "%0.0")) == ["same", "changed", "same"]


def test_a_new_type_marks_the_type() -> None:
    after = BEFORE.replace("%1 = dsv4.b(%0) : f32[T, 4]", "%1 = dsv4.b(%0) : bf16[T, 4]")
    (row,) = [
        r for fold in difference(BEFORE, after).folds for r in fold.hunk.rows if getattr(r, "kind", "") == "changed"
    ]
    assert [[part for part, mark in side if mark] for side in marked(row)] == [["f32"], ["bf16"]]
    assert ["".join(part for part, _ in side) for side in marked(row)] == [row.before.text, row.after.text]


def layers(op: str, count: int) -> str:
    lines = []
    for layer in range(count):
        lines += [
            f"%{2 * layer} = dsv4.x(%weight.layers.{layer}.w) : f32[T, 4]  # L{layer:02d}.attn",
            f"%{2 * layer + 1} = dsv4.{op}(%{2 * layer}) : f32[T, 4]  # L{layer:02d}.attn",
        ]
    return text(*lines, f"return y=%{2 * count - 1}")


def test_the_same_change_in_many_layers_is_shown_once() -> None:
    found = difference(layers("norm", 12), layers("norm_fused", 12))
    fold, results = found.folds
    assert (
        results.hunk.section == "step results"
        and fold.hunk.section == "L00.attn"
        and fold.alike == tuple(f"L{n:02d}.attn" for n in range(1, 12))
    )
    assert (found.removed, found.added, found.changed) == (12, 12, 1)


def test_a_layer_that_differs_has_its_own_hunk() -> None:
    after = layers("norm_fused", 12).replace("%9 = dsv4.norm_fused(%8)", "%9 = dsv4.other(%8)")
    folds = difference(layers("norm", 12), after).folds
    assert [(f.hunk.section, len(f.alike)) for f in folds][:2] == [("L00.attn", 10), ("L04.attn", 0)]


def test_unchanged_stretches_are_gaps_that_say_how_long_they_are() -> None:
    many = [f"%{n} = dsv4.op{n}() : f32[1]  # a" for n in range(40)]
    after = [line.replace("op20()", "new()") for line in many]
    (fold,) = difference(text(*many), text(*after)).folds
    gaps = [row.lines for row in fold.hunk.rows if isinstance(row, Gap)]
    assert gaps == [17, 16] and sum(isinstance(row, Row) for row in fold.hunk.rows) == 8


def test_what_is_too_long_is_left_out_and_counted() -> None:
    before = text(*(f"%{n} = dsv4.op{n}() : f32[1]  # s{n}" for n in range(50)))
    after = text(*(f"%{n} = dsv4.new{n}() : f32[1]  # s{n}" for n in range(50)))
    found = difference(before, after, most_rows=20)
    shown = sum(row.kind != "same" for fold in found.folds for row in fold.hunk.rows if isinstance(row, Row))
    assert 0 < shown <= 20 and shown + found.left_out == found.removed + found.added == 100


def test_joined_graphs_are_set_beside_the_piece_they_are_instances_of() -> None:
    piece = text(
        "%streams.streams : f32[T]", "%0 = dsv4.a(%weight.w) : f32[T]  # attn", "return streams=%0", name="attn"
    )
    joined = text(
        "%0 = dsv4.a(%weight.layers.0.w) : f32[T]  # L00.attn", "%1 = dsv4.a(%weight.layers.1.w) : f32[T]  # L01.attn",
        "return streams=%1",
    )  # fmt: skip
    found = difference(piece, joined, {"L00.attn": "attn", "L01.attn": "attn"})
    first = next(fold for fold in found.folds if fold.hunk.section == "L00.attn")
    assert first.alike == ("L01.attn",)
    assert [(row.kind, row.before.text[:10], row.after.text[:10]) for row in first.hunk.rows] == [
        ("changed", "%0 = dsv4.", "%0 = dsv4.")
    ]


@pytest.mark.parametrize("line", ["%12.1 = a(%x.y-z, [1, 2]) {eps=1e-06} : f32[T, E_4*2]", "", "  "])
def test_tokens_give_the_line_back(line: str) -> None:
    assert "".join(tokens(line)) == line


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_rows_hold_every_line_of_both_sides_in_order(old: list[str], new: list[str]) -> None:
    def program(ops: list[str]) -> str:
        return text(*(f"%{i} = dsv4.{op}({f'%{i - 1}' if i else ''}) : f32[1]  # s" for i, op in enumerate(ops)))

    before, after = lines_of(program(old))["step"], lines_of(program(new))["step"]
    rows = align(before, after)
    assert [row.before for row in rows if row.before] == before and [row.after for row in rows if row.after] == after
    assert (old == new) == all(row.kind == "same" for row in rows)
