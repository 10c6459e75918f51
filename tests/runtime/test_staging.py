"""Inputs on their way to the device, page tables that stay there, and what is kept by slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Request
from dsv4c.runtime.sampler import SamplerState
from dsv4c.runtime.scheduler import Span
from dsv4c.runtime.seats import Seats
from dsv4c.runtime.staging import FAR, Staging
from dsv4c.runtime.tables import PageTables
from tests.runtime import toy
from tests.runtime.devices import CPU

PROGRAMS = toy.manifest().programs
ROWS = {"R": 5, "Z": 5}


def staging() -> Staging:
    return Staging(PROGRAMS, CPU, ROWS)


def nobody(tensors: dict[str, torch.Tensor]) -> None:
    """What a step of nobody is."""
    for name, tensor in tensors.items():
        if name.startswith("ends_"):
            assert (tensor == -1).all()
        elif name in ("top_p", "repetition"):
            assert (tensor == 1).all()
        elif name == "seq_ends":
            assert tensor.tolist() == [FAR, 0, 0, 0, 0]
        elif not name.startswith("edit_") and name != "masks":
            assert not tensor.any(), name


def test_what_is_written_arrives_and_the_next_step_starts_from_nobody() -> None:
    made = staging()
    for turn in range(4):  # more than there are buffers
        for name, program in PROGRAMS.items():
            tensors, views = made.tensors(name), made.begin(name)
            assert (
                set(views)
                == set(tensors)
                == {i.name for i in program.inputs}
                - {"state_slots"}
                - {i.name for i in program.inputs if i.kind == "page_table"}
            )
            made.send(name)
            nobody(tensors)
            views = made.begin(name)
            for i, (key, view) in enumerate(views.items()):
                view.fill(turn + i)
                assert view.shape == tuple(tensors[key].shape) and tensors[key].data_ptr() % 64 == 0
            made.send(name, edits=3)
            made.send_masks(name, 1)
            for i, (key, view) in enumerate(views.items()):
                sent = 3 if key in ("edit_tokens", "edit_values") else view.shape[0]
                part = tensors[key][1:2] if key == "masks" else tensors[key][:sent]
                assert (part == turn + i).all(), key


def test_a_buffer_is_left_alone_while_two_more_are_built() -> None:
    made = staging()
    first = made.begin("decode.4")
    first["token_ids"].fill(7)
    for _ in range(2):
        made.begin("decode.4")["token_ids"].fill(9)
    assert (first["token_ids"] == 7).all()
    assert made.begin("decode.4")["token_ids"].base is not None and (first["token_ids"] == 0).all()


def test_only_the_edits_of_the_step_are_sent() -> None:
    made = staging()
    tensors, views = made.tensors("decode.2"), made.begin("decode.2")
    views["edit_tokens"][:5], views["edit_values"][:5] = 3, 0.5
    made.send("decode.2", edits=2)
    assert tensors["edit_tokens"][:5].tolist() == [3, 3, 0, 0, 0]
    assert tensors["edit_values"][:5].tolist() == [0.5, 0.5, 0, 0, 0]


def test_only_the_masks_of_the_step_are_sent_and_they_may_be_late() -> None:
    made = staging()
    tensors, views = made.tensors("decode.4"), made.begin("decode.4")
    views["mask_rows"][:3] = 1, 0, 2
    made.send("decode.4")
    views["masks"][:] = 7
    made.send_masks("decode.4", 2)
    assert tensors["mask_rows"].tolist() == [1, 0, 2, 0]
    assert tensors["masks"][:, 0].tolist() == [0, 7, 7, 0, 0]


COLUMNS = {"window": 5, "c4": 3, "index": 40}
CHANGES = st.dictionaries(
    st.sampled_from(sorted(COLUMNS)),
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2), st.integers(1, 99)), max_size=12),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(CHANGES, max_size=6))
def test_tables_hold_the_last_page_written_to_each_place(steps: list[dict[str, list[tuple[int, int, int]]]]) -> None:
    tables = PageTables(7, COLUMNS, CPU)
    expected = {group: np.zeros((7, width), np.int64) for group, width in COLUMNS.items()}
    for changes in steps:
        tables.update(changes)
        for group, entries in changes.items():
            for slot, column, page in entries:
                expected[group][slot, column] = page
    for group, table in expected.items():
        assert np.array_equal(tables.tensors[group].numpy(), table)
        assert tables.tensors[group].storage_offset() * 8 % 256 == 0


def test_tables_mirror_the_pools_entries_of_every_token_that_is_read() -> None:
    groups = toy.groups()
    pool = KVPool(groups, PoolSizes.for_requests(groups, 4, 64, 64), track=True)
    tables = PageTables(5, {g.name: pool.tables[g.name].shape[1] for g in groups}, CPU)
    slots = [pool.admit() for _ in range(3)]
    for tokens in (3, 9, 17, 40):
        for slot in slots:
            assert slot is not None and pool.grow(slot, tokens)
        tables.update(pool.drain_updates())
        for group in groups:
            table, mirror = pool.tables[group.name], tables.tensors[group.name].numpy()
            assert np.array_equal(mirror[table != 0], table[table != 0])
        for slot in slots:
            assert slot is not None
            pool.evict(slot, tokens)
    assert not any(pool.drain_updates().values())
    assert slots[0] is not None
    pool.release(slots[0])
    again = pool.admit()
    assert again == slots[0] and pool.grow(again, 8)
    tables.update(pool.drain_updates())
    row = pool.tables["window"][again]
    assert np.array_equal(tables.tensors["window"][again].numpy()[row != 0], row[row != 0])


def request_of(name: str, slot: int, prompt: list[int], stop: tuple[int, ...] = (), **params: Any) -> Request:
    request = Request(name, prompt, SamplingParams(**params))
    request.slot, request.stop_ids = slot, frozenset(stop)
    request.sampler = SamplerState(request.params, request.tokens(), sorted(stop))
    return request


def filled(seats: Seats, requests: list[Request]) -> tuple[dict[str, np.ndarray], int]:
    """The views that a step of these requests gives, each sampling; the row is its place."""
    program = PROGRAMS["decode.4"]
    views = {
        i.name: np.zeros(2048 if i.name.startswith("edit_t") or i.name.startswith("edit_v") else 4, i.dtype)
        for i in program.inputs
        if i.kind != "page_table"
    }
    spans = [Span(r, r.num_total - 1, r.num_total, True, range(0)) for r in requests]
    return views, seats.fill(views, spans, np.arange(len(requests)))


def test_a_seat_gives_what_its_request_asks() -> None:
    seats = Seats(5, toy.VOCAB)
    one = request_of("a", 2, [1, 2], temperature=0.7, top_k=-1, top_p=0.9, min_p=0.1, seed=-5, presence_penalty=1.0)
    two = request_of("b", 4, [3], temperature=0.0, top_k=2**40)
    views, edits = filled(seats, [one, two])
    assert edits == 0
    assert views["temperature"][:2].tolist() == [np.float32(0.7), 0.0]
    assert views["top_k"][:2].tolist() == [0, 2**31 - 1]
    assert views["top_p"][:2].tolist() == [np.float32(0.9), 1.0] and views["min_p"][0] == np.float32(0.1)
    assert one.sampler is not None and views["noise_keys"][0].astype(np.uint64) == np.uint64(one.sampler.key)
    assert views["penalty_seats"][:2].tolist() == [2, 0] and views["presence"][0] == 1.0
    assert views["noise_counters"][:2].tolist() == [0, 0]
    one.expect()
    assert filled(seats, [two, one])[0]["noise_counters"][:2].tolist() == [0, 1]


def test_a_seat_that_changes_hands_is_written_again() -> None:
    seats = Seats(5, toy.VOCAB)
    filled(seats, [request_of("a", 1, [1], temperature=0.3)])
    after = request_of("a", 1, [1], temperature=0.4)  # the same name, another request
    assert filled(seats, [after])[0]["temperature"][0] == np.float32(0.4)


def test_counts_are_of_what_was_generated_and_prompted() -> None:
    seats = Seats(5, toy.VOCAB)
    one = request_of("a", 3, [7, 7, 8], repetition_penalty=1.2, frequency_penalty=0.5)
    two = request_of("b", 1, [7], frequency_penalty=0.5)
    for request in (one, two):
        for token in (9, 9, 7):
            request.append(token)
    filled(seats, [one, two, request_of("c", 2, [1])])
    counts = dict(seats.fresh_counts())
    assert set(counts) == {1, 3} and all(c.dtype == np.int16 and c.shape == (toy.VOCAB,) for c in counts.values())
    in_prompt = 1 << 14
    assert {i: int(n) for i, n in enumerate(counts[3]) if n} == {7: in_prompt + 1, 8: in_prompt, 9: 2}
    assert {i: int(n) for i, n in enumerate(counts[1]) if n} == {7: 1, 9: 2}
    filled(seats, [one, two])
    assert seats.fresh_counts() == []  # the device has counted since
    one.num_preemptions += 1
    filled(seats, [one, two])
    assert [slot for slot, _ in seats.fresh_counts()] == [3]


def test_edits_are_biases_and_stop_tokens_until_enough_are_generated() -> None:
    seats = Seats(5, toy.VOCAB)
    one = request_of("a", 1, [1], stop=(4, 6), min_tokens=1, logit_bias={2: 1.5, 6: -3.0})
    two = request_of("b", 2, [1], stop=(5,), min_tokens=2)
    none = request_of("c", 3, [1], stop=(5,))
    views, edits = filled(seats, [two, none, one])
    assert edits == 4
    assert views["edit_starts"][:3].tolist() == [0, 1, 1] and views["edit_stops"][:3].tolist() == [1, 1, 4]
    assert views["edit_tokens"][:4].tolist() == [5, 2, 4, 6]
    assert views["edit_values"][:4].tolist() == [-np.inf, 1.5, -np.inf, -np.inf]
    one.expect()
    views, edits = filled(seats, [one])
    assert edits == 2 and views["edit_tokens"][:2].tolist() == [2, 6] and views["edit_values"][:2].tolist() == [1.5, -3]
