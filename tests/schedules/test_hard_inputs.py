"""Inputs that random cases do not reach: ties, NaN, indices out of range, long contexts, evicted pages."""

from __future__ import annotations

import pytest
import torch

from .cases import ENTRIES, PAGE, RATIO, TOPK, WINDOW, make_case
from .conftest import Built
from .test_schedules import check, reference, results_of


def test_ties_take_the_earlier_entry(built: Built) -> None:
    case = make_case("index_topk", 65)
    case.inputs[0].zero_()  # every score is 0
    (picks,) = built.run(case, "index_topk.cpp_tiles", case.inputs)
    seen = (case.inputs[5] + 1) // RATIO
    expected = torch.arange(TOPK).expand(65, -1)
    assert torch.equal(picks, expected.masked_fill(expected >= seen.unsqueeze(1), -1))


def test_nan_scores_are_never_picked(built: Built) -> None:
    case = make_case("index_topk", 65)
    pages, requests, positions = case.inputs[3:]
    row = int((positions + 1).argmax())
    table = pages[requests[row]]
    case.inputs[2][table[0] * ENTRIES + 1] = float("nan")
    (picks,) = built.run(case, "index_topk.cpp_tiles", case.inputs)
    assert (positions[row] + 1) // RATIO > TOPK and 1 not in picks[row]
    (expected,) = reference(case, torch.float64)
    assert torch.equal(picks[row].sort().values, expected[row].sort().values)
    case.inputs[2].fill_(float("nan"))
    (picks,) = built.run(case, "index_topk.cpp_tiles", case.inputs)
    assert bool((picks[row] == -1).all())


@pytest.mark.parametrize(
    ("name", "schedule", "index", "value", "message"),
    [
        ("page_write", "page_write.cpp_rows", 1, 10**6, "a slot lies outside its pool"),
        ("norm_rope_write", "norm_rope_write.cpp_rows", 1, -1, "a slot lies outside its pool"),
        ("take_rows", "take_rows.cpp_rows", 1, 10**6, "a row lies outside its tensor"),
        ("embed_streams", "embed_streams.cpp_rows", 0, -5, "a row lies outside its tensor"),
        ("token_slots", "token_slots.cpp_rows", 2, 10**6, "a position lies outside its page table"),
        ("attend_window", "attend_window.cpp_tiles", 4, 10**6, "a position lies outside its page table"),
        ("index_topk", "index_topk.cpp_tiles", 5, 10**6, "a position lies outside its page table"),
        ("gate_hash", "gate_hash.cpp_scan", 1, 10**6, "a token id lies outside"),
        ("experts-float32", "experts.cpp_sorted", 1, 99, "a chosen expert does not exist"),
        ("compress-csa", "compress.cpp_channels", 9, 10**6, "a state slot lies outside its pool"),
    ],
)
def test_an_index_out_of_range_is_an_error(
    name: str, schedule: str, index: int, value: int, message: str, built: Built
) -> None:
    case = make_case(name, 17)
    case.inputs[index].view(-1)[0] = value
    with pytest.raises(RuntimeError, match=message):
        built.run(case, schedule, case.inputs)


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_unwritten_and_evicted_keys_are_never_read(kind: str, built: Built) -> None:
    """Pools hold NaN wherever no token of the batch has a visible key; evicted window pages are the null page."""
    case = make_case(f"attend_{kind}", 65)
    expected = reference(case, torch.float64)
    pool, pages = case.inputs[1], case.inputs[2]
    requests, positions = case.inputs[-3], case.inputs[-2]
    live = torch.zeros(len(pool), dtype=torch.bool)
    for request, position in zip(requests.tolist(), positions.tolist(), strict=True):
        for at in range(max(0, position - WINDOW + 1), position + 1):
            live[pages[request, at // PAGE] * PAGE + at % PAGE] = True
    pool[~live] = float("nan")
    for request in range(len(pages)):
        first = int(positions[requests == request].min()) - WINDOW + 1
        pages[request, : max(0, first) // PAGE] = 0
    if kind != "window":
        entry_pool, entry_pages = case.inputs[3], case.inputs[4]
        live = torch.zeros(len(entry_pool), dtype=torch.bool)
        for request in range(len(pages)):
            for entry in range((int(positions[requests == request].max()) + 1) // RATIO):
                live[entry_pages[request, entry // ENTRIES] * ENTRIES + entry % ENTRIES] = True
        entry_pool[~live] = float("nan")
    for got, wanted in zip(results_of(case, built, f"attend_{kind}.cpp_tiles"), expected, strict=True):
        check(got, wanted, 5e-6, case)


def test_a_large_sink_takes_all_the_weight(built: Built) -> None:
    case = make_case("attend_hca", 17)
    case.inputs[-1].fill_(1e4)
    (got,) = built.run(case, "attend_hca.cpp_tiles", case.inputs)
    assert bool((got == 0).all())
    case.inputs[-1].fill_(-1e4)
    check(*built.run(case, "attend_hca.cpp_tiles", case.inputs), *reference(case, torch.float64), 5e-6, case)  # type: ignore[misc]


def test_extreme_activations_stay_finite(built: Built) -> None:
    for scale in (1e-30, 1e4):
        case = make_case("swiglu_pair", 17)
        case.inputs[0].mul_(scale)
        (got,) = built.run(case, "any.inductor", case.inputs)
        check(got, reference(case, torch.float64)[0], 5e-6, case)
    case = make_case("hc_pre_norm", 17)
    case.inputs[2].mul_(200)  # coefficients of about +-200: Sinkhorn of nearly permutation matrices
    for got, wanted in zip(
        built.run(case, "hc_pre_norm.cpp_lanes", case.inputs), reference(case, torch.float64), strict=True
    ):
        check(got, wanted, 1e-4, case)
