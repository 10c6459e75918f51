"""A DeviceRunner samples as the host does: the same tokens, log-probabilities and ends, whatever is asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.errors import RequestError
from dsv4c.reference import References
from dsv4c.runtime.contracts import ContractExecutor
from dsv4c.runtime.device import DeviceRunner
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.graphs import GraphExecutor
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.loader import device_rows
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.pools import allocate
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Request
from dsv4c.runtime.runner import HostRunner
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.seats import MAX_ASKED
from tests.runtime import toy
from tests.runtime.devices import CPU, PatientRunner, drain, gathered, tokens_of

EOS = 5
REQUESTS, TOKENS, CONTEXT = 8, 32, 128
MANIFEST = toy.manifest(REQUESTS, TOKENS)
LIMITS = Limits(max_requests=REQUESTS, max_step_tokens=TOKENS, max_logit_rows=TOKENS)


def sizes_of(pages: int | None = None) -> PoolSizes:
    full = PoolSizes.for_requests(toy.groups(), REQUESTS, CONTEXT, TOKENS)
    return full if pages is None else PoolSizes(dict.fromkeys(full.pages, pages), full.slots, CONTEXT)


def device(
    seed: int = 0,
    runner: type[DeviceRunner] = DeviceRunner,
    sizes: PoolSizes | None = None,
    bank: torch.Tensor | None = None,
    *,
    checked: bool = False,
) -> Engine:
    sizes = sizes or sizes_of()
    weights = {"bank": toy.bank(seed) if bank is None else bank}
    given: Any = (MANIFEST.programs, References(MANIFEST.kernels, {}), weights, allocate(MANIFEST, sizes, CPU), CPU)
    rows = device_rows(MANIFEST, sizes)
    make = ContractExecutor(*given, rows=rows, manifest=MANIFEST) if checked else GraphExecutor(*given, rows=rows)
    pool = KVPool(MANIFEST.kv_groups, sizes, track=True)
    made = runner(make, pool, vocab_size=toy.VOCAB)
    limits = dataclasses.replace(LIMITS, late_masks=True)
    return Engine(made, pool=pool, vocab_size=toy.VOCAB, limits=limits, eos_token_ids=(EOS,))


def host(seed: int = 0, sizes: PoolSizes | None = None) -> Engine:
    sizes = sizes or sizes_of()
    pool = KVPool(MANIFEST.kv_groups, sizes)
    runner = HostRunner(toy.HostBank(toy.bank(seed)), toy.STEP_INPUTS, pool, vocab_size=toy.VOCAB)
    return Engine(runner, pool=pool, vocab_size=toy.VOCAB, limits=LIMITS, eos_token_ids=(EOS,))


token = st.integers(0, toy.VOCAB - 1)
PARAMS = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.1]),
        "top_k": st.sampled_from([0, -1, 1, 3, 20, 1000]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5]),
        "seed": st.integers(-(2**63), 2**64 - 1),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.7, -1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.6]),
        "logit_bias": st.dictionaries(token, st.sampled_from([-100.0, -3.0, 0.5, 6.0]), max_size=4),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(token, max_size=6).map(tuple),
        "logprobs": st.sampled_from([None, None, 0, 1, 5, 20]),
        "prompt_logprobs": st.sampled_from([None, None, 0, 3]),
    }
).map(lambda p: p | {"min_tokens": min(p["min_tokens"], p["max_tokens"])})
ASKED = st.lists(st.tuples(st.lists(token, min_size=1, max_size=60), PARAMS), min_size=1, max_size=12)


def requests(asked: list[tuple[list[int], dict[str, Any]]]) -> list[Request]:
    return [Request(str(i), prompt, SamplingParams(**params)) for i, (prompt, params) in enumerate(asked)]


# a draw may fall within 1e-7 of the border of two tokens, where float32 and float64 differ: examples stay the same
@settings(max_examples=80, deadline=None, derandomize=True)
@given(asked=ASKED, seed=st.integers(0, 100), pages=st.sampled_from([None, 40]))
def test_the_device_gives_what_the_host_gives(
    asked: list[tuple[list[int], dict[str, Any]]], seed: int, pages: int | None
) -> None:
    """With steps of mixed prompts and single tokens, more requests than seats, and pages that run out."""
    sizes = sizes_of(pages)
    wanted = gathered(drain(host(seed, sizes), requests(asked)))
    engine = device(seed, sizes=sizes)
    assert gathered(drain(engine, requests(asked))) == wanted
    # seats, tables and counts of earlier requests must not matter
    assert gathered(drain(engine, requests(asked))) == wanted


@settings(max_examples=15, deadline=None, derandomize=True)
@given(asked=ASKED)
def test_contracts_hold_and_change_nothing(asked: list[tuple[list[int], dict[str, Any]]]) -> None:
    assert gathered(drain(device(checked=True), requests(asked))) == gathered(drain(device(), requests(asked)))


def test_a_token_in_flight_is_fed_on_the_device() -> None:
    """The same tokens as where the host knows each before the next step; the ids given are then never -1."""
    params = {"max_tokens": 9, "temperature": 1.0, "ignore_eos": True}
    asked = [([i, 2 * i, 7], {**params, "seed": i}) for i in range(6)]
    fed: list[int] = []

    class Watched(DeviceRunner):
        def launch(self, spans: Any, /) -> Any:
            fed.extend(span.request.token(span.start) for span in spans if span.length == 1)
            return super().launch(spans)

    late = tokens_of(drain(device(runner=Watched), requests(asked)))
    assert fed.count(-1) == len(fed) == 6 * 8  # every decode step but none of prefill
    assert late == tokens_of(drain(device(runner=PatientRunner), requests(asked)))


def test_penalties_survive_preemption_and_a_change_of_seat() -> None:
    params = {"max_tokens": 40, "temperature": 0.0, "frequency_penalty": 0.8, "repetition_penalty": 1.2}
    asked = [([i + 1, i + 2], {**params, "logprobs": 2}) for i in range(5)]
    tight = sizes_of(9)
    engine = device(sizes=tight)
    found = gathered(drain(engine, requests(asked)))
    assert engine.scheduler.num_preemptions > 0
    assert found == gathered(drain(host(), requests(asked)))


def test_logits_that_are_no_numbers_fail_their_request_alone() -> None:
    bank = toy.bank()
    bank[3] = torch.nan
    engine = device(bank=bank)
    bad = Request("bad", [3], SamplingParams(max_tokens=4, temperature=0.0, logprobs=1))
    good = Request("good", [4], SamplingParams(max_tokens=4, temperature=0.0, logit_bias={3: -100.0}))
    for request in (bad, good):
        engine.submit(request)
    events = [event for _ in range(20) for event in engine.step()]
    ends = {event.request_id: event.end for event in events if event.end}
    assert ends["bad"].error is not None and "NaN" in ends["bad"].error.message
    assert ends["good"].reason == "length"
    engine.audit()


def test_more_edits_than_a_row_has_room_for_are_refused() -> None:
    runner = device().runner
    assert isinstance(runner, DeviceRunner)
    many = Request("a", [1], SamplingParams(logit_bias=dict.fromkeys(range(MAX_ASKED + 1), 1.0)))
    with pytest.raises(RequestError, match=f"at most {MAX_ASKED}"):
        runner.check(many)
    full = dict.fromkeys(range(MAX_ASKED), 1.0)
    with pytest.raises(RequestError):
        runner.check(Request("b", [1], SamplingParams(min_tokens=1, logit_bias=full, stop_token_ids=(1,))))
    runner.check(Request("c", [1], SamplingParams(logit_bias=full, stop_token_ids=(1,))))


def test_states_are_copied_between_slots_as_they_were() -> None:
    runner = device().runner
    assert isinstance(runner, DeviceRunner)
    runner._states = ("sampling.counts",)
    counts = runner.executor.states["sampling.counts"]
    counts.copy_(torch.arange(counts.shape[0]).unsqueeze(1).expand_as(counts))
    runner.copy_states([(1, 2), (2, 3), (4, 1)])  # all are read before any is written
    assert counts[:, 0].tolist() == [0, 4, 1, 2, 4, 5, 6, 7, 8]
    runner.copy_states([])
    assert np.array_equal(counts[:, 0], [0, 4, 1, 2, 4, 5, 6, 7, 8])
