"""Step inputs against a token-by-token construction, and the shapes they take."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.artifact import Input
from dsv4c.errors import ArtifactError, EngineError
from dsv4c.runtime.batch import BatchBuilder, logit_positions
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Request
from dsv4c.runtime.scheduler import Span
from tests.runtime.standin import INPUTS, kv_groups


def make_pool(requests: int = 8) -> KVPool:
    groups = kv_groups()
    return KVPool(groups, PoolSizes.for_requests(groups, requests, 1024, 8192))


def span_of(pool: KVPool, start: int, end: int, known: int, prompt_rows: range = range(0)) -> Span:
    request = Request(f"r{start}/{end}", [i % 50 for i in range(known)])
    slot = pool.admit()
    assert slot is not None
    request.slot, request.num_computed = slot, start
    assert pool.grow(slot, end)
    pool.evict(slot, start)
    return Span(request, start, end, end == known, prompt_rows)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 600), st.integers(1, 200), st.booleans(), st.booleans()), min_size=1, max_size=8)
)
def test_equals_a_token_by_token_construction(cases: list[tuple[int, int, bool, bool]]) -> None:
    pool = make_pool()
    spans = [
        span_of(pool, s, s + n, s + n + (not last), range(s, s + n - 1) if rows else range(0))
        for s, n, last, rows in cases
    ]
    got = {k: v.tolist() for k, v in BatchBuilder(INPUTS, pool).build(spans).items()}
    want: dict[str, list[int]] = {
        k: [] for k in ("token_ids", "positions", "request_rows", "ends_4", "ends_128", "logit_rows")
    }
    for r, span in enumerate(spans):
        for position in range(span.start, span.end):
            row = len(want["positions"])
            want["token_ids"].append(span.request.token(position))
            want["positions"].append(position)
            want["request_rows"].append(r)
            for ratio in (4, 128):
                if (position + 1) % ratio == 0:
                    want[f"ends_{ratio}"].append(row)
            if position in logit_positions(span):
                want["logit_rows"].append(row)
    assert {k: got[k] for k in want} == want
    assert got["seq_starts"] == [s.start for s in spans] and got["seq_ends"] == [s.end for s in spans]
    assert got["state_slots"] == [s.request.slot for s in spans]
    for group, page in (("window", 64), ("c4", 256), ("c128", 256), ("index", 256)):
        table = np.array(got[f"pages_{group}"])
        columns = -(-max(s.end for s in spans) // page)
        assert table.shape[1] >= columns and table.shape[1].bit_count() == 1
        for r, span in enumerate(spans):
            full = pool.tables[group][span.request.slot]
            assert (table[r, :columns] == full[:columns]).all() and not table[r, columns:].any()


def test_shapes_dtypes_and_empty_ends() -> None:
    pool = make_pool()
    inputs = BatchBuilder(INPUTS, pool).build([span_of(pool, 0, 2, 9)])
    assert all(x.dtype == torch.int64 and x.is_contiguous() for x in inputs.values())
    assert inputs["ends_4"].shape == inputs["ends_128"].shape == inputs["logit_rows"].shape == (0,)
    assert inputs["pages_window"].shape == (1, 2)
    assert inputs["pages_c4"].shape == inputs["pages_index"].shape == (1, 2), "one symbol, one width"
    assert inputs["pages_c128"].shape == (1, 1)


def test_page_tables_stay_within_the_program() -> None:
    pool = make_pool()
    spans = [span_of(pool, 640, 641, 641)]
    assert BatchBuilder(INPUTS, pool).build(spans)["pages_window"].shape == (1, 16)
    assert BatchBuilder(INPUTS, pool, {"Pw": 11}).build(spans)["pages_window"].shape == (1, 11)
    wide = [dataclasses.replace(i, min_columns=64) if i.kind == "page_table" else i for i in INPUTS]
    table = BatchBuilder(wide, pool).build(spans)["pages_c4"]
    assert table.shape == (1, 64) and not table[:, 4:].any()


def test_a_step_in_flight_keeps_its_inputs() -> None:
    pool = make_pool()
    builder, span = BatchBuilder(INPUTS, pool), span_of(pool, 0, 300, 300)
    first = builder.build([span])
    before = {k: v.clone() for k, v in first.items()}
    pool.release(span.request.slot)
    builder.build([span_of(pool, 0, 300, 300)])
    assert all(torch.equal(before[k], first[k]) for k in before)


def test_bad_inputs_are_refused() -> None:
    pool = make_pool()
    with pytest.raises(ArtifactError, match="unknown KV group `c8`"):
        BatchBuilder([Input("pages_c8", "page_table", ("R", "P"), group="c8")], pool)
    with pytest.raises(ArtifactError, match="lacks its ratio"):
        BatchBuilder([Input("ends", "window_ends", ("E",))], pool)
    with pytest.raises(EngineError, match="at least one span"):
        BatchBuilder(INPUTS, pool).build([])
