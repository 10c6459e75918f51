"""Messages: they come out as they went in, and what is none of them is refused."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4c.errors import ConfigError, EngineError, LinkError, RequestError
from dsv4c.runtime.cluster import wire
from dsv4c.runtime.enginestats import EngineStats
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import End, Event
from dsv4c.runtime.sampler import TokenLogprob
from dsv4c.runtime.speculation import SpeculationStats


def test_every_field_of_the_parameters_travels() -> None:
    given_params = SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=2**64 - 1,
        presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.5, logit_bias={3: -1.5}, logprobs=4,
        prompt_logprobs=0, stop_token_ids=(5, 6), ignore_eos=True, n=1, priority=-3,
    )  # fmt: skip
    sent = wire.Prefill(wire.Job("a", wire.packed([1, 2]), wire.sampling_of(given_params)))
    found = wire.decode_for_worker(wire.encode(sent))
    assert isinstance(found, wire.Prefill)
    assert wire.params_of(found.job.sampling) == given_params
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    assert set(wire.Sampling.__struct_fields__) | {"grammar"} == names


def test_what_is_usual_takes_few_bytes() -> None:
    job = wire.Job("a", wire.packed(range(100)), wire.sampling_of(SamplingParams(max_tokens=9, temperature=0.5)))
    assert len(wire.encode(wire.Prefill(job))) < 500
    assert len(wire.encode(wire.Said([wire.Spoken("0123abcd-17-1", (77777,))]))) < 60


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_tokens_travel(tokens: list[int]) -> None:
    assert wire.tokens_of(wire.packed(tokens)).tolist() == tokens


@pytest.mark.parametrize(
    "event",
    [
        Event("a", (1, 2), (TokenLogprob(1, -0.5, ((1, -0.5), (7, -2.0))), TokenLogprob(2, -0.1))),
        Event("a", (3,), prompt_logprobs=(None, TokenLogprob(4, -1.0)), cached_tokens=5, queued_s=0.25),
        Event("a", (3,), end=End("stop", 4, 1, 3)),
        Event("a", end=End("length", 4, 9)),
    ],
)
def test_events_travel(event: Event) -> None:
    said = wire.decode_for_router(wire.encode(wire.Said([wire.spoken_of(event)])))
    assert isinstance(said, wire.Said)
    found = wire.event_of(said.events[0])
    assert found == event and found.queued_s == event.queued_s


@pytest.mark.parametrize(
    "error",
    [
        RequestError("no", status=400, param="prompt", code="invalid_value", hint="other"),
        EngineError("broken", hint="restart"),
        ConfigError("wrong"),
    ],
)
def test_errors_travel(error: RequestError | EngineError | ConfigError) -> None:
    event = Event("a", end=End("failed", 1, 0, error=error))
    end = wire.event_of(msgspec.msgpack.decode(msgspec.msgpack.encode(wire.spoken_of(event)), type=wire.Spoken)).end
    assert end is not None and type(end.error) is type(error)
    assert vars(end.error) == vars(error) and str(end.error) == str(error)


def test_numbers_of_an_engine_travel() -> None:
    stats = EngineStats(
        3, 4, pages_used={"c4": 7}, step_s=1.5, speculation=SpeculationStats((2, 1), (1, 0), 4), ended={"stop": 2}
    )
    found = wire.decode_for_router(wire.encode(wire.Beat(stats, 2, {"pulled": 3})))
    assert isinstance(found, wire.Beat) and found.stats == stats


def test_what_is_not_understood_is_refused() -> None:
    good = msgspec.msgpack.decode(wire.encode(wire.Cancel("a")))
    for wrong in (
        {**good, "more": 1}, {**good, "id": 5}, {**good, "type": "Other"}, {"type": "Cancel"}, [1, 2], None, "text",
    ):  # fmt: skip
        with pytest.raises(LinkError):
            wire.decode_for_worker(msgspec.msgpack.encode(wrong))
    with pytest.raises(LinkError):
        wire.decode_for_worker(b"\xff\x00")
    with pytest.raises(LinkError):  # of the other side
        wire.decode_for_router(wire.encode(wire.Cancel("a")))
    with pytest.raises(LinkError):
        wire.tokens_of(b"abc")


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_else(data: bytes) -> None:
    for decode in (wire.decode_for_router, wire.decode_for_worker):
        try:
            decode(data)
        except LinkError:
            continue
