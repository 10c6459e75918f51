"""The engine against direct computation: paging, batching, chunking and preemption never change a token."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dsv4c.artifact import KVGroup, Manifest, Program
from dsv4c.errors import ArtifactError, ConfigError, EngineError, RequestError
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request, expand
from dsv4c.runtime.sampler import SamplerState, sample
from dsv4c.runtime.scheduler import Limits
from tests.runtime import standin as standins
from tests.runtime.standin import INPUTS, VOCAB, StandIn, direct_greedy, direct_logits, kv_groups

Make = Callable[..., tuple[Engine, StandIn]]


@pytest.fixture(params=[0, 1], ids=["lag0", "lag1"])
def lag(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def make_engine(lag: int) -> Make:
    """Makes engines whose runner is `lag` steps behind."""
    return functools.partial(standins.make_engine, lag=lag)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length}/{seed}")
    return [rng.randrange(VOCAB) for _ in range(length)]


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)


def sampled(max_tokens: int, seed: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, temperature=0.8, top_p=0.95, **options)


def drain(engine: Engine, before_step: Callable[[], None] = lambda: None) -> dict[str, list[Event]]:
    """Steps to the end; events by request. Checks that each ends once, last, and gives everything back."""
    events: dict[str, list[Event]] = {}
    while engine.has_work:
        before_step()
        for event in engine.step():
            assert event.request_id not in events or events[event.request_id][-1].end is None
            events.setdefault(event.request_id, []).append(event)
        engine.audit()
    assert all(of[-1].end for of in events.values())
    assert not any(engine.pool.used_pages().values())
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [t for e in events for t in e.tokens]


def merged(events: list[Event]) -> tuple[list[int], list[Any], str]:
    """Tokens, log-probabilities rounded to what another chunking may move, and how it ended."""
    entries = [p for e in events for p in (*e.prompt_logprobs, *e.logprobs)]
    rounded = [p and (p.token_id, round(p.logprob, 4), [t for t, _ in p.top]) for p in entries]
    return tokens_of(events), rounded, reason_of(events)


def reason_of(events: list[Event]) -> str:
    end = events[-1].end
    assert end is not None
    return end.reason


def alone(prompt: list[int], params: SamplingParams) -> list[int]:
    """Tokens of the host's own runner, in roomy pools."""
    engine, _ = standins.make_engine()
    engine.submit(Request("a", prompt, params))
    return tokens_of(drain(engine)["a"])


@pytest.mark.parametrize("length", [1, 3, 4, 63, 64, 127, 128, 129, 255, 300, 700])
def test_greedy_equals_direct_computation(make_engine: Make, length: int) -> None:
    engine, _ = make_engine()
    prompt = prompt_of(length)
    engine.submit(Request("a", prompt, greedy(40)))
    events = drain(engine)["a"]
    assert tokens_of(events) == direct_greedy(prompt, 40)
    assert events[-1].end and events[-1].end.reason == "length"
    assert (events[-1].end.prompt_tokens, events[-1].end.generated_tokens) == (length, 40)


def test_sampling_equals_direct_computation() -> None:
    params = sampled(
        60, seed=9, presence_penalty=0.8, repetition_penalty=1.2, logit_bias={4: 1.5}, top_k=30, min_p=0.01
    )
    prompt = prompt_of(150)
    tokens, state = list(prompt), SamplerState(params, np.array(prompt))
    for _ in range(60):
        token = sample(torch.from_numpy(direct_logits(tokens))[None], [state])[0][0]
        assert token is not None
        tokens.append(token)
        state.accept(token)
    assert alone(prompt, params) == tokens[150:]


@pytest.mark.parametrize("step_tokens", [1, 3, 64, 100, 1000])
def test_chunks_of_any_size_give_the_same(make_engine: Make, step_tokens: int) -> None:
    engine, _ = make_engine(limits=Limits(max_requests=1, max_step_tokens=step_tokens))
    prompt = prompt_of(333)
    engine.submit(Request("a", prompt, greedy(20)))
    assert tokens_of(drain(engine)["a"]) == direct_greedy(prompt, 20)


def test_a_window_shorter_than_a_page_and_one_that_divides_nothing(make_engine: Make) -> None:
    for horizon, page in ((5, 16), (100, 48)):
        engine, _ = make_engine(groups=kv_groups(page, 256, horizon), horizon=horizon)
        prompt = prompt_of(200)
        engine.submit(Request("a", prompt, greedy(120)))
        assert tokens_of(drain(engine)["a"]) == direct_greedy(prompt, 120, horizon)


def test_a_request_gives_the_same_alone_and_in_a_batch_of_32(make_engine: Make) -> None:
    cases = [
        (
            f"r{i}",
            prompt_of(5 + 13 * i, i),
            greedy(24) if i % 2 else sampled(24, seed=i, presence_penalty=0.5 * (i % 3)),
        )
        for i in range(32)
    ]
    engine, standin = make_engine(limits=Limits(max_requests=32, max_step_tokens=300))
    for case in cases:
        engine.submit(Request(*case))
    events = drain(engine)
    assert max(shape["seq_starts"][0] for shape in standin.log) == 32
    for name, prompt, params in cases:
        assert tokens_of(events[name]) == alone(prompt, params), name


@pytest.mark.parametrize("seed", range(3))
def test_preemption_never_changes_the_output(make_engine: Make, seed: int) -> None:
    """Short pools and preemptions at random, in the middle of prompts and of decoding, against roomy pools."""
    rng = random.Random(seed)
    groups = kv_groups(window_page=16, block=128, horizon=64)
    limits = Limits(max_requests=6, max_step_tokens=96)
    short = PoolSizes({"window": 22, "c4": 6, "c128": 6, "index": 7}, 7, 512)
    engine, _ = make_engine(short, limits, groups, horizon=64)
    calm, _ = make_engine(PoolSizes.for_requests(groups, 6, 512, 96), limits, groups, horizon=64)
    for i in range(6):
        extra: dict[str, Any] = {"logprobs": 2, "prompt_logprobs": 1} if i % 3 == 0 else {"frequency_penalty": 0.4}
        params = sampled(80, seed=i, **extra) if i % 2 else greedy(80, **extra)
        for one in (engine, calm):
            one.submit(Request(f"r{i}", prompt_of(60 + 17 * i, i), params))

    def disturb() -> None:
        if engine.scheduler.running and rng.random() < 0.1:
            engine.scheduler.preempt_newest()

    events, calm_events = drain(engine, disturb), drain(calm)
    assert engine.stats().preemptions > 5 and calm.stats().preemptions == 0
    for name, expected in calm_events.items():
        assert merged(events[name]) == merged(expected), name


def test_seeds() -> None:
    prompt = prompt_of(30)
    assert alone(prompt, sampled(30, seed=5)) == alone(prompt, sampled(30, seed=5))
    assert alone(prompt, sampled(30, seed=5)) != alone(prompt, sampled(30, seed=6))
    free = SamplingParams(max_tokens=30)
    assert alone(prompt, free) != alone(prompt, free)


def test_n_choices_differ_and_are_reproducible(make_engine: Make) -> None:
    def run() -> list[list[int]]:
        engine, _ = make_engine()
        for request in expand("x", prompt_of(10), sampled(20, seed=3, n=3)):
            engine.submit(request)
        events = drain(engine)
        assert sorted(events) == ["x-0", "x-1", "x-2"]
        return [tokens_of(events[k]) for k in sorted(events)]

    first = run()
    assert first == run() and len({tuple(t) for t in first}) == 3
    assert first[0] == alone(prompt_of(10), sampled(20, seed=3))


def test_stop_tokens_end_of_text_and_min_tokens(make_engine: Make) -> None:
    prompt = prompt_of(50)
    plain = direct_greedy(prompt, 40)
    stop = plain[10]
    first = plain.index(stop)
    for eos, params in (((stop,), greedy(40)), ((), greedy(40, stop_token_ids=(stop,)))):
        engine, _ = make_engine(eos=eos)
        engine.submit(Request("a", prompt, params))
        events = drain(engine)["a"]
        assert tokens_of(events) == plain[: first + 1] and reason_of(events) == "stop"
        assert events[-1].end and events[-1].end.stop_token == stop
    engine, _ = make_engine(eos=(stop,))
    engine.submit(Request("ignored", prompt, greedy(40, ignore_eos=True)))
    engine.submit(Request("late", prompt, greedy(40, min_tokens=25)))
    events = drain(engine)
    assert tokens_of(events["ignored"]) == plain
    assert stop not in tokens_of(events["late"])[:25] and len(tokens_of(events["late"])) >= 25


class StopAfter:
    """Stops at the `count`th token; remembers what it saw."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen: list[int] = []

    def push(self, token_id: int) -> bool:
        self.seen.append(token_id)
        if self.count < 0 and len(self.seen) == -self.count:
            raise ValueError("bad bytes")
        return len(self.seen) == self.count


def test_no_token_after_a_text_stop_is_delivered_and_one_at_most_computed(make_engine: Make, lag: int) -> None:
    engine, standin = make_engine()
    hook = StopAfter(7)
    engine.submit(Request("a", prompt_of(20), greedy(40), text_stop=hook))
    events = drain(engine)["a"]
    assert tokens_of(events) == hook.seen == direct_greedy(prompt_of(20), 7)
    assert reason_of(events) == "stop" and standin.steps == 7 + lag


def test_a_text_stop_before_min_tokens_is_ignored_and_a_broken_one_fails_alone(make_engine: Make) -> None:
    engine, _ = make_engine()
    engine.submit(Request("early", prompt_of(20), greedy(12, min_tokens=9), text_stop=StopAfter(5)))
    engine.submit(Request("broken", prompt_of(20), greedy(12), text_stop=StopAfter(-3)))
    events = drain(engine)
    assert len(tokens_of(events["early"])) == 12 and reason_of(events["early"]) == "length"
    end = events["broken"][-1].end
    assert end and end.reason == "failed" and end.error and "bad bytes" in end.error.message


@pytest.mark.parametrize("step_tokens", [7, 64, 400])
def test_prompt_logprobs_chunk_by_chunk(make_engine: Make, step_tokens: int) -> None:
    engine, _ = make_engine(limits=Limits(max_requests=2, max_step_tokens=step_tokens, max_logit_rows=step_tokens))
    prompt = prompt_of(150)
    engine.submit(Request("a", prompt, greedy(3, prompt_logprobs=2, logprobs=1)))
    engine.submit(Request("one", prompt[:1], greedy(3, prompt_logprobs=0)))
    events = drain(engine)
    entries = events["a"][0].prompt_logprobs
    assert len(entries) == 150 and entries[0] is None and events["one"][0].prompt_logprobs == (None,)
    assert all(not e.prompt_logprobs for e in events["a"][1:])
    for at in (1, 2, 77, 149):
        entry = entries[at]
        want = torch.log_softmax(torch.from_numpy(direct_logits(prompt[:at])), -1)
        assert entry and entry.token_id == prompt[at]
        assert entry.logprob == pytest.approx(float(want[prompt[at]]), abs=1e-5)
        assert [v for _, v in entry.top] == pytest.approx(want.topk(2).values.tolist(), abs=1e-5)
    for event in events["a"]:
        assert event.logprobs[0].token_id == event.tokens[0] == event.logprobs[0].top[0][0]


@pytest.mark.parametrize("failure", [RuntimeError("kernel exploded"), EngineError("out of arena"), MemoryError()])
def test_a_failing_step_fails_its_requests_and_no_other(make_engine: Make, failure: Exception) -> None:
    engine, standin = make_engine(limits=Limits(max_requests=2, max_step_tokens=256))
    standin.fail_at, standin.fail_with = {3}, failure
    for i in range(4):
        engine.submit(Request(f"r{i}", prompt_of(20, i), greedy(10)))
    events = drain(engine)
    for name in ("r0", "r1"):
        end = events[name][-1].end
        assert end and end.reason == "failed" and isinstance(end.error, EngineError)
        assert len(tokens_of(events[name])) == 2
    for i in (2, 3):
        assert tokens_of(events[f"r{i}"]) == direct_greedy(prompt_of(20, i), 10)
    assert engine.stats().ended == {"stop": 0, "length": 2, "cancelled": 0, "failed": 2}


def test_a_row_of_nan_fails_its_request_alone(make_engine: Make) -> None:
    engine, standin = make_engine()
    step = standin.step

    def poisoned(inputs: Any) -> torch.Tensor:
        logits = step(inputs)
        if standin.steps == 3:
            logits[1] = torch.nan
        return logits

    standin.step = poisoned  # type: ignore[method-assign]
    for i in range(3):
        engine.submit(Request(f"r{i}", prompt_of(20, i), greedy(6)))
    events = drain(engine)
    assert [reason_of(events[f"r{i}"]) for i in range(3)] == ["length", "failed", "length"]
    end = events["r1"][-1].end
    assert end and end.error and "after 22 tokens hold NaN" in end.error.message
    assert tokens_of(events["r2"]) == direct_greedy(prompt_of(20, 2), 6)


def test_logits_of_a_wrong_shape_fail_the_step(make_engine: Make) -> None:
    engine, standin = make_engine()
    step = standin.step
    standin.step = lambda inputs: step(inputs)[:, :-1]  # type: ignore[method-assign]
    engine.submit(Request("a", prompt_of(5), greedy(4)))
    end = drain(engine)["a"][-1].end
    assert end and end.error and "logits [1, 60], not [1, 61]" in end.error.message


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_cancelling_in_every_state_returns_the_pages(make_engine: Make, steps: int) -> None:
    engine, _ = make_engine(limits=Limits(max_requests=2, max_step_tokens=64))
    for i in range(4):
        engine.submit(Request(f"r{i}", prompt_of(150, i), greedy(10)))
    for _ in range(steps):
        engine.step()
    for i in range(4):
        event = engine.cancel(f"r{i}")
        assert event and event.end and event.end.reason == "cancelled"
        engine.audit()
    assert engine.cancel("r0") is None and not engine.scheduler.has_work
    while engine.has_work:
        assert not engine.step(), "what is in flight is dropped"
    assert not any(engine.pool.used_pages().values())


def test_refusals_leave_nothing_behind(make_engine: Make) -> None:
    engine, _ = make_engine()
    cases: list[tuple[Request, str, int]] = [
        (Request("a", [], greedy(4)), "prompt", 400),
        (Request("a", [VOCAB], greedy(4)), "prompt", 400),
        (Request("a", [-1], greedy(4)), "prompt", 400),
        (Request("a", prompt_of(1024), greedy(4)), "prompt", 400),
        (Request("a", prompt_of(1000), greedy(25)), "max_tokens", 400),
        (Request("a", [1], greedy(4, n=2)), "n", 400),
        (Request("a", [1], greedy(4, stop_token_ids=(99,))), "stop_token_ids", 400),
    ]
    for request, param, status in cases:
        with pytest.raises(RequestError) as caught:
            engine.submit(request)
        assert (caught.value.param, caught.value.status) == (param, status)
    engine.submit(Request("a", prompt_of(1000), greedy(24)))
    with pytest.raises(RequestError, match="`a` is in use"):
        engine.submit(Request("a", [1], greedy(4)))
    assert len(tokens_of(drain(engine)["a"])) == 24
    engine.submit(Request("a", [1], greedy(4)))
    drain(engine)


def test_statistics_add_up(make_engine: Make) -> None:
    engine, _ = make_engine()
    for i in range(3):
        engine.submit(Request(f"r{i}", prompt_of(10), greedy(5)))
    assert engine.stats(ahead=2).waiting == 5
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used["window"]) == (3, 0, 3)
    drain(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (30, 15, 5)
    assert stats.step_tokens == 30 + 3 * 4 and stats.ended["length"] == 3
    assert stats.step_s >= stats.launch_s + stats.wait_s > 0 and stats.host_s > 0 and stats.failed_steps == 0


def manifest_of(programs: dict[str, Program], groups: tuple[KVGroup, ...]) -> Manifest:
    return Manifest(
        format_version=1, model={}, model_sha256="", target="cpu", isa="default", compute_dtype="float32",
        max_context=1024, vocab_size=VOCAB, tools={}, passes=(), numerics=(), kernels={}, programs=programs,
        kv_groups=groups, state_groups=(), weights=(), embedded_weights=False,
    )  # fmt: skip


def program_of(**symbols: int) -> Program:
    return Program("mixed", symbols, INPUTS, (), (), {"logits": "logits"}, 0)


def test_an_engine_for_a_manifest_keeps_to_its_programs() -> None:
    groups = kv_groups()
    sizes = PoolSizes.for_requests(groups, 8, 512, 64)
    manifest = manifest_of({"step": program_of(T=64, R=4, S=64, Pw=9)}, groups)
    engine = Engine.for_manifest(StandIn(groups, sizes), manifest, sizes)
    limits = engine.scheduler.limits
    assert (limits.max_requests, limits.max_step_tokens, limits.logit_rows) == (4, 64, 64)
    engine.submit(Request("a", prompt_of(300), greedy(10)))
    assert tokens_of(drain(engine)["a"]) == direct_greedy(prompt_of(300), 10)
    for limits, name in (
        (Limits(max_requests=5, max_step_tokens=64), "max_requests"),
        (Limits(max_requests=4, max_step_tokens=65), "max_step_tokens"),
    ):
        with pytest.raises(ConfigError, match=name):
            Engine.for_manifest(StandIn(groups, sizes), manifest, sizes, limits=limits)
    with pytest.raises(ConfigError, match="max_context"):
        longer = PoolSizes.for_requests(groups, 4, 2048, 64)
        Engine.for_manifest(StandIn(groups, longer), manifest, longer)


def test_programs_that_disagree_are_refused() -> None:
    groups = kv_groups()
    other = Program("mixed", {}, (INPUTS[6].__class__("token_ids", "positions", ("T",)),), (), (), {}, 0)
    with pytest.raises(ArtifactError, match="disagree about input `token_ids`"):
        sizes = PoolSizes.for_requests(groups, 1, 64)
        Engine.for_manifest(StandIn(groups, sizes), manifest_of({"a": program_of(), "b": other}, groups), sizes)
