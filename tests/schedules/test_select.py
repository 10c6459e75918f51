"""Selection takes the cheapest schedule that accepts, says why, and refuses with every reason."""

from __future__ import annotations

import pytest

from dsv4c.errors import ScheduleError
from dsv4c.schedules._roofline import MACHINES, seconds
from dsv4c.schedules._schedule import OpNode, Value, Work, apply_layout
from dsv4c.schedules.select import SCHEDULES, candidates, choose, select

from .cases import make_case

SYMBOLS = {"T": 512}


def linear(channels: int, exact: str | None = None) -> OpNode:
    x, weight = Value(("T", 64), "float32"), Value((channels, 64), "float32", "weight", None, exact)
    return OpNode("linear", {"float32": False}, (x, weight), (Value(("T", channels), "float32"),))


def test_the_cheapest_is_chosen_with_both_costs_as_the_reason() -> None:
    choice = select(linear(96), "cpu", SYMBOLS)
    assert choice.schedule == "linear.cpp_packed"
    assert choice.reason.startswith("model ") and "`linear.aten`" in choice.reason


def test_a_shape_that_panels_do_not_divide_goes_to_the_library() -> None:
    choice = select(linear(37), "cpu", SYMBOLS)
    assert (choice.schedule, choice.reason) == ("linear.aten", "only one accepts")


def test_no_schedule_names_op_shapes_and_every_refusal() -> None:
    case = make_case("attend_window", 9)
    q = Value(("T", 8, 20), "float32")
    node = OpNode("attend_window", case.node.attrs, (q, *case.node.inputs[1:]), (q,))
    with pytest.raises(ScheduleError) as error:
        select(node, "cpu", SYMBOLS)
    assert "attend_window(float32[T, 8, 20]" in error.value.message
    assert "20 channels are no multiple of 16" in error.value.hint
    assert "`any.inductor`: it would materialise" in error.value.hint


def test_an_unknown_target_has_no_schedule() -> None:
    with pytest.raises(ScheduleError, match="on `tpu`"):
        select(linear(96), "tpu", SYMBOLS)


def test_layouts_give_the_shape_and_dtype_the_kernel_takes() -> None:
    choice = select(linear(96, "bfloat16"), "cpu", SYMBOLS)
    laid = choice.inputs[1]
    assert laid is not None
    assert (laid.shape, laid.dtype) == ((3, 64, 32), "bfloat16")
    assert choice.layouts[1] == (("reshape", (3, 32, 64)), ("transpose",), ("narrow", "bfloat16"))
    wide = select(linear(96), "cpu", SYMBOLS).inputs[1]
    assert wide is not None and wide.dtype == "float32"
    with pytest.raises(ValueError, match="`stack`"):
        apply_layout(laid, (("stack",),))


def test_one_kernel_serves_equal_nodes_and_not_others() -> None:
    first, second = select(linear(96), "cpu", SYMBOLS), select(linear(192), "cpu", SYMBOLS)
    assert first.kernel == second.kernel  # sizes are read when called
    assert first.kernel != select(linear(96, "bfloat16"), "cpu", SYMBOLS).kernel
    assert first.kernel.startswith("linear_")


def test_every_cost_is_positive_and_grows_with_the_tokens() -> None:
    case = make_case("rms_norm", 9)
    for schedule, refusal in candidates(case.node, "cpu"):
        assert refusal is None
        few, many = (choose(schedule, case.node, "cpu", {"T": t}, "").seconds for t in (1, 1000))
        assert 0 < few < many


def test_roofline_takes_the_slower_side() -> None:
    machine = MACHINES["cpu"]
    launch = machine.launch_s["cpp"]
    assert seconds(Work(machine.bytes_per_s, 1.0), "cpu") == pytest.approx(1 + launch)
    assert seconds(Work(1.0, machine.flops_per_s["fp32"], "cpp", 0.5), "cpu") == pytest.approx(2 + launch)


def test_schedules_say_what_they_promise() -> None:
    for schedule in SCHEDULES:
        assert "." in schedule.name and 0 <= schedule.tolerance <= (1e-5 if "cpu" in schedule.targets else 0.1)
