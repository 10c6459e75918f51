"""Every schedule that accepts a case gives its reference's result, for any number of rows, alone or in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4c.ops import OPS, VIEWS, attention, compress, experts, hyper, index, linears, mx, rows, sampling, speculation
from dsv4c.schedules.select import SCHEDULES

from .cases import CASES, Case, make_case
from .conftest import PAIRS, Built

TOKENS = (0, 1, 2, 17, 63, 64, 65, 130)
ORDER_FREE = {"index_topk"}  # the order of the picks is free
# an angle is the float32 product of position and frequency; a quantised value flips where its scale is a bit off
DEFINED_IN_FLOAT32 = {"rope_table", "entry_rope_table", "quantise_kv", "quantise_index"}


def reference(case: Case, dtype: torch.dtype) -> list[Any]:
    """The plain function in this dtype throughout: `.float()` inside it widens no further than `dtype`."""
    inputs = [t.clone().to(dtype) if t.is_floating_point() else t.clone() for t in case.inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(dtype))
        results = OPS[case.node.op].reference(*inputs, **case.node.attrs)
    return list(results) if isinstance(results, tuple) else [results]


def copies(case: Case) -> list[Tensor]:
    """The inputs, with pools of their own; strides stay."""
    return [t.clone() if i in case.node.mutates else t for i, t in enumerate(case.inputs)]


def results_of(case: Case, built: Built, schedule: str) -> list[Tensor]:
    """What the kernel wrote, in the order of the op's results."""
    op, inputs = OPS[case.node.op], copies(case)
    written = iter(built.run(case, schedule, inputs))
    at = {i: op.parameters.index(p) for i, p in op.in_place.items()}
    return [inputs[at[i]] if i in at else next(written) for i in range(op.outputs)]


def check(got: Tensor, expected: Tensor, tolerance: float, case: Case) -> None:
    if case.node.op == "compress" and got.dim() == 3:
        got, expected = got[1:], expected[1:]  # slot 0 is nobody's: tokens that a ring cannot keep may go there
    assert got.shape == expected.shape
    if not got.is_floating_point():
        if case.node.op in ORDER_FREE:
            got, expected = got.sort(-1).values, expected.sort(-1).values
        assert torch.equal(got, expected)
        return
    if got.numel():
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
        assert error <= max(tolerance, 1e-30), f"error {error:.1e}"


# ops on stored formats, which only GPUs have schedules for
STORED = {
    op.name
    for family in (attention, compress, experts, hyper, index, linears, mx, rows, sampling, speculation)
    for op in family.OPS
}


def test_every_op_has_a_case_and_a_schedule() -> None:
    on_cpu = [s for s in SCHEDULES if "cpu" in s.targets]
    assert {op for op, _ in CASES.values()} == set(OPS) - VIEWS - STORED
    assert {name for name, _ in PAIRS} == set(CASES)
    names = [(s.name, target) for s in SCHEDULES for target in s.targets]
    assert len(set(names)) == len(names)
    assert {s.op for s in SCHEDULES} <= {*OPS, "*"}
    assert {name for _, name in PAIRS} == {s.name for s in on_cpu}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_schedule_gives_the_reference(name: str, schedule: str, tokens: int, built: Built) -> None:
    case = make_case(name, tokens)
    tolerance = next(s for s in SCHEDULES if s.name == schedule).tolerance
    dtype = torch.float32 if case.node.op in DEFINED_IN_FLOAT32 else torch.float64
    for got, expected in zip(results_of(case, built, schedule), reference(case, dtype), strict=True):
        check(got, expected, tolerance, case)


CHOSEN = [p for p in PAIRS if ".cpp_" in p[1] or p[0] in ("swiglu", "swiglu_pair", "add_embedding")]


@pytest.mark.parametrize(("name", "schedule"), CHOSEN)
def test_a_row_does_not_depend_on_its_batch(name: str, schedule: str, built: Built) -> None:
    """Bit for bit, so that a request alone and in a batch gives the same tokens."""
    case = make_case(name, 65)
    if case.node.mutates or "block" in case.node.attrs or any(v.shape[0] != "T" for v in case.node.outputs):
        pytest.skip("not a map over the tokens")
    whole = built.run(case, schedule, case.inputs)
    for row in (0, 1, 6, 36, 64):
        alone = [
            t[row : row + 1] if v is not None and v.shape[0] == "T" else t
            for t, v in zip(case.inputs, case.node.inputs, strict=True)
        ]
        for got, expected in zip(built.run(case, schedule, alone), whole, strict=True):
            assert torch.equal(got[0], expected[row])


BLOCKS = [p for p in PAIRS if "block" in make_case(p[0], 9).node.attrs]


@pytest.mark.parametrize(("name", "schedule"), BLOCKS)
def test_a_block_does_not_depend_on_its_batch(name: str, schedule: str, built: Built) -> None:
    """Bit for bit, so that a request alone and in a batch gives the same drafts."""
    case = make_case(name, 17)
    whole, parameters = built.run(case, schedule, case.inputs), OPS[case.node.op].parameters
    at = {name: i for i, name in enumerate(parameters)}
    block, first = int(str(case.node.attrs["block"])), case.inputs[at["block_rows"]]
    for r in (0, 5, 16):
        rows = {"T": slice(int(first[r]), int(first[r]) + block), "R": slice(r, r + 1)}
        alone = [
            t[rows[str(v.shape[0])]] if v is not None and v.shape[0] in rows else t
            for t, v in zip(case.inputs, case.node.inputs, strict=True)
        ]
        alone[at["block_rows"]] = torch.zeros(1, dtype=torch.int64)
        if "request_rows" in at:
            alone[at["request_rows"]] = torch.zeros(block, dtype=torch.int64)
        for got, expected, out in zip(built.run(case, schedule, alone), whole, case.node.outputs, strict=True):
            assert torch.equal(got, expected[rows[str(out.shape[0])]])


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_threads_change_nothing(name: str, schedule: str, built: Built) -> None:
    case = make_case(name, 130, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results_of(case, built, schedule)
        torch.set_num_threads(2)
        shared = results_of(case, built, schedule)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
