"""A diff of programs shows what changed, not what was renumbered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsv4c.irdiff import changed, diff_lines, unified

BEFORE = """graph step {
  %0 = dsv4.embed(%input.ids) : f32[T, 8]
  %1 = dsv4.hc_pre(%0) : f32[T, 8]
  %2 = dsv4.rms_norm(%1, %weight.n) : f32[T, 8]
  %3 = dsv4.linear(%2, %weight.a) : f32[T, 8]
  %4 = dsv4.linear(%3, %weight.b) : f32[T, 8]
  %5 = dsv4.add(%3, %4) : f32[T, 8]
  return logits=%5
}"""


def test_a_fused_pair_is_all_that_changes() -> None:
    after = """graph step {
  %0 = dsv4.embed(%input.ids) : f32[T, 8]
  %1 = dsv4.hc_pre_norm(%0, %weight.n) : f32[T, 8]
  %2 = dsv4.linear(%1, %weight.a) : f32[T, 8]
  %3 = dsv4.linear(%2, %weight.b) : f32[T, 8]
  %4 = dsv4.add(%2, %3) : f32[T, 8]
  return logits=%4
}"""
    assert unified(BEFORE, after, context=1) == (
        "@@ -2,4 +2,3 @@\n"
        "   %0 = dsv4.embed(%input.ids) : f32[T, 8]\n"
        "-  %1 = dsv4.hc_pre(%0) : f32[T, 8]\n"
        "-  %2 = dsv4.rms_norm(%1, %weight.n) : f32[T, 8]\n"
        "+  %1 = dsv4.hc_pre_norm(%0, %weight.n) : f32[T, 8]\n"
        "   %2 = dsv4.linear(%1, %weight.a) : f32[T, 8]\n"
    )
    assert changed(BEFORE, after) == 3


def test_reading_another_value_is_a_change() -> None:
    after = BEFORE.replace("dsv4.add(%3, %4)", "dsv4.add(%4, %3)")
    assert [line.text for line in diff_lines(BEFORE, after) if line.mark == "+"] == [
        "  %5 = dsv4.add(%4, %3) : f32[T, 8]"
    ]
    after = BEFORE.replace("dsv4.linear(%3, %weight.b)", "dsv4.linear(%2, %weight.b)")
    assert changed(BEFORE, after) == 2


def test_nothing_changed_is_an_empty_diff() -> None:
    assert unified(BEFORE, BEFORE) == "" and changed(BEFORE, BEFORE) == 0


def test_graphs_are_numbered_apart() -> None:
    other = BEFORE.replace("step", "mtp")
    after = BEFORE.replace("  %0 = dsv4.embed(%input.ids) : f32[T, 8]\n", "")
    assert changed(f"{BEFORE}\n{other}", f"{after}\n{other}") == 1


@given(st.lists(st.sampled_from(BEFORE.splitlines())), st.lists(st.sampled_from(BEFORE.splitlines())))
def test_both_texts_can_be_read_from_the_lines(old: list[str], new: list[str]) -> None:
    lines = diff_lines("\n".join(old), "\n".join(new))
    assert [line.after for line in lines if line.mark != "-"] == [i + 1 for i in range(len(new))]
    assert [line.before for line in lines if line.mark != "+"] == [i + 1 for i in range(len(old))]
    assert [line.text for line in lines if line.mark != "-"] == new
    assert [line.text for line in lines if line.mark == "-"] == [old[line.before - 1] for line in lines
                                                                 if line.mark == "-" and line.before]  # fmt: skip
