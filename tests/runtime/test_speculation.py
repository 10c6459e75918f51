"""Speculative decoding in the engine: no draft, right or wrong, ever changes a token, an end or a state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.errors import ConfigError, EngineError
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.scheduler import Limits
from dsv4c.runtime.speculation import Speculation
from tests.runtime.oracle import Oracle
from tests.runtime.standin import C4_RING, VOCAB, StandIn, direct_greedy, kv_groups, make_engine

HORIZON, WIDE, BLOCK = 8, 8, 16
GROUPS = kv_groups(window_page=4, block=BLOCK, horizon=HORIZON, wide=WIDE)
LAGS = pytest.mark.parametrize("lag", [0, 1])
STEPS = 2000  # a bound for tests that hang, far above what they need


def engine_of(
    tokens: int = 2,
    lag: int = 0,
    oracle: Oracle | None = None,
    *,
    requests: int = 4,
    share: float = 1.0,
    **options: Any,
) -> tuple[Engine, StandIn]:
    """An engine with `tokens` drafts a request; `share`: of the pages that its requests need at most."""
    oracle = oracle or Oracle(horizon=HORIZON, wide=WIDE)
    limits = Limits(max_requests=requests, max_step_tokens=32, speculative_tokens=tokens, **options)
    sizes = PoolSizes.for_requests(GROUPS, requests, 128, 32, 4)
    least = PoolSizes.for_requests(GROUPS, 1, 128, 32).pages
    pages = {name: max(least[name], int(count * share)) for name, count in sizes.pages.items()}
    sizes = PoolSizes(pages, sizes.slots, sizes.max_context, sizes.snapshots)
    return make_engine(sizes, limits, GROUPS, horizon=HORIZON, lag=lag, drafter=oracle if tokens else None)


def text(length: int, seed: object = 0) -> list[int]:
    rng = random.Random(f"{seed}")
    return [rng.randrange(VOCAB) for _ in range(length)]


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)


def expected(prompt: Sequence[int], count: int) -> list[int]:
    return direct_greedy(prompt, count, HORIZON, WIDE)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt: list[Any] = field(default_factory=list)
    reason: str = ""

    def take(self, event: Event) -> None:
        assert not self.reason, "an event after the end"
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.prompt += event.prompt_logprobs
        if event.end is not None:
            self.reason = event.end.reason


def serve(engine: Engine, requests: Sequence[Request]) -> dict[str, Answer]:
    answers = {r.id: Answer() for r in requests}
    for request in requests:
        engine.submit(request)
    for _ in range(STEPS):
        if not engine.has_work:
            break
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.audit()
    assert not engine.has_work and not any(engine.pool.used_pages().values())
    return answers


# --- what speculation saves ---------------------------------------------------------------------------------------


@LAGS
@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_right_drafts_bring_several_tokens_a_step(lag: int, tokens: int) -> None:
    engine, standin = engine_of(tokens, lag)
    answer = serve(engine, [Request("a", text(10), greedy(61))])["a"]
    assert answer.tokens == expected(text(10), 61)
    # the first token comes with the prompt, the last needs no draft
    assert standin.steps == 1 + -(-60 // (1 + tokens))
    stats = engine.stats().speculation
    assert stats.accepted == stats.drafted == 61 - 1 - (standin.steps - 1)
    assert sum(stats.kept) / stats.steps > tokens - 1


@LAGS
def test_wrong_drafts_cost_no_token(lag: int) -> None:
    engine, standin = engine_of(3, lag, Oracle(1.0, horizon=HORIZON, wide=WIDE))
    answer = serve(engine, [Request("a", text(10), greedy(40))])["a"]
    assert answer.tokens == expected(text(10), 40) and standin.steps == 40
    stats = engine.stats().speculation
    # none before the first token, none where the last may be in flight already
    assert stats.accepted == 0 and stats.tried[0] == 38 - lag


@LAGS
def test_drafts_share_a_step_with_prompts_where_that_is_allowed(lag: int) -> None:
    for mixed in (True, False):
        engine, standin = engine_of(2, lag, mixed_drafts=mixed)
        requests = [Request("a", text(4), greedy(30)), Request("b", text(100), greedy(5))]
        answers = serve(engine, requests)
        assert answers["a"].tokens == expected(text(4), 30) and answers["b"].tokens == expected(text(100), 5)
        assert engine.stats().speculation.accepted > 10
        widths = [shapes["token_ids"][0] for shapes in standin.log]
        assert (max(widths) == 32) and (widths[1] == 32 if mixed else True)


# --- what it must never change ------------------------------------------------------------------------------------


class StopAt:
    """Ends the text at the `at`-th token."""

    def __init__(self, at: int) -> None:
        self.left = at

    def push(self, token_id: int) -> bool:
        self.left -= 1
        return self.left == 0


def random_request(rng: random.Random, number: int) -> Request:
    count = rng.choice([1, 2, 3, 7, 20, 40])
    options: dict[str, Any] = {"temperature": rng.choice([0.0, 0.0, 0.5, 1.2]), "seed": rng.randrange(1000)}
    if rng.random() < 0.3:
        options |= {"logprobs": rng.choice([0, 3])}
    if rng.random() < 0.2:
        options |= {"prompt_logprobs": 1}
    if rng.random() < 0.3:
        options |= {"frequency_penalty": 0.7, "repetition_penalty": 1.3, "presence_penalty": -0.2}
    if rng.random() < 0.2:
        options |= {"logit_bias": {3: 2.0, 5: -4.0}}
    if rng.random() < 0.3:
        options |= {"top_k": 7, "top_p": 0.9, "min_p": 0.01}
    if rng.random() < 0.4:
        options |= {"stop_token_ids": tuple(rng.sample(range(VOCAB), 3)), "min_tokens": min(count, rng.randrange(8))}
    # prompts that share beginnings, for the prefix cache
    prompt = text(rng.choice([0, 20, 40]), "shared") + text(rng.choice([1, 2, 9, 30]), number % 5)
    stop = StopAt(rng.randrange(1, 30)) if rng.random() < 0.3 else None
    return Request(f"r{number}", prompt, SamplingParams(max_tokens=count, **options), text_stop=stop)


def requests_of(seed: int, count: int) -> list[Request]:
    rng = random.Random(f"requests {seed}")
    return [random_request(rng, i) for i in range(count)]


def live(engine: Engine, requests: Sequence[Request], seed: int, cancelled: frozenset[str]) -> dict[str, Answer]:
    """Requests come at random times, are preempted at random, and those named are cancelled at some time."""
    rng, coming = random.Random(f"life {seed}"), list(requests)
    answers = {r.id: Answer() for r in requests}
    for _ in range(STEPS):
        if not engine.has_work and not coming:
            break
        while coming and rng.random() < 0.5:
            engine.submit(coming.pop(0))
        if len(engine.scheduler.running) > 1 and rng.random() < 0.05:
            engine.scheduler.preempt_newest()
        for name in cancelled:
            if rng.random() < 0.05:
                event = engine.cancel(name)
                if event is not None:
                    answers[name].take(event)
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.audit()
    assert not engine.has_work and not any(engine.pool.used_pages().values())
    return answers


@LAGS
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 5),
    errors=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    brief=st.sampled_from([0.0, 0.2]),
    share=st.sampled_from([1.0, 0.4]),
    prefix_cache=st.booleans(),
    mixed_drafts=st.booleans(),
    learns=st.booleans(),
)
def test_answers_are_those_without_speculation(
    lag: int, seed: int, tokens: int, errors: float, brief: float, share: float, prefix_cache: bool,
    mixed_drafts: bool, learns: bool,
) -> None:  # fmt: skip
    plain, _ = engine_of(0, requests=12)
    expected_answers = serve(plain, requests_of(seed, 12))
    cancelled = frozenset(random.Random(seed).sample(sorted(expected_answers), 2))
    oracle = Oracle(errors, brief, seed, HORIZON, WIDE)
    engine, _ = engine_of(
        tokens, lag, oracle, share=share, prefix_cache=prefix_cache, mixed_drafts=mixed_drafts, requests=5
    )  # fmt: skip
    if learns:
        engine.speculation = Speculation(tokens)
        engine.scheduler._lengths = engine.speculation.length
    answers = live(engine, requests_of(seed, 12), seed, cancelled)
    for name, answer in answers.items():
        wanted = expected_answers[name]
        if answer.reason == "cancelled":
            assert answer.tokens == wanted.tokens[: len(answer.tokens)]
        else:
            assert answer.tokens == wanted.tokens and answer.reason == wanted.reason
            assert answer.logprobs == wanted.logprobs and answer.prompt == wanted.prompt


def state_of(standin: StandIn, engine: Engine, request: Request) -> dict[str, Any]:
    """Everything that a later token of the request can read."""
    end, slot = request.num_computed, request.slot
    out: dict[str, Any] = {}
    spans = {"window": (max(0, end + 1 - HORIZON), end), "c4": (0, end // 4), "index": (0, end // 4)}
    for group, (first, last) in {**spans, "c128": (0, end // WIDE)}.items():
        entries, per = np.arange(first, last), standin.groups[group].entries_per_page
        pages = engine.pool.tables[group][slot, entries // per]
        assert (pages > 0).all()
        out[group] = standin.pools[group][pages * per + entries % per].tolist()
    for name, rows in (("c4", C4_RING), ("c128", end % WIDE)):
        ring = standin.rings[name]
        out[f"ring {name}"] = ring[slot, np.arange(max(0, end - rows), end) % ring.shape[1]].tolist()
    return out


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 5), errors=st.floats(0, 1), length=st.integers(1, 40))
def test_pools_and_rings_are_those_of_a_run_that_never_speculated(
    seed: int, tokens: int, errors: float, length: int
) -> None:
    """Whatever was accepted and rejected before, in every step; position by position."""
    plain, bare = engine_of(0)
    engine, standin = engine_of(tokens, 0, Oracle(errors, 0.1, seed, HORIZON, WIDE))
    one, two = (Request("a", text(length, seed), greedy(60)) for _ in range(2))
    plain.submit(one)
    engine.submit(two)
    while True:
        engine.step()
        if two.status == "ended":
            break
        while one.num_computed < two.num_computed:
            plain.step()
        assert one.num_computed == two.num_computed and one.tokens().tolist() == two.tokens().tolist()
        assert state_of(bare, plain, one) == state_of(standin, engine, two)


# --- where it goes on from ----------------------------------------------------------------------------------------


@LAGS
def test_a_block_that_drafts_step_over_is_kept_all_the_same(lag: int) -> None:
    engine, _ = engine_of(3, lag, requests=2)
    turn = text(21)
    answer = serve(engine, [Request("a", turn, greedy(50))])["a"]
    again = Request("b", turn + answer.tokens + text(3), greedy(20))
    got = serve(engine, [again])["b"]
    assert got.tokens == expected(turn + answer.tokens + text(3), 20)
    assert again.num_cached >= (21 + 50 - 1) // BLOCK * BLOCK - BLOCK


@LAGS
def test_a_failed_step_ends_its_requests_and_no_draft_outlives_them(lag: int) -> None:
    engine, standin = engine_of(2, lag)
    standin.fail_at = {6}
    answers = serve(engine, [Request("a", text(9), greedy(30))])
    assert answers["a"].reason == "failed"
    again = serve(engine, [Request("b", text(9), greedy(30))])
    assert again["b"].tokens == expected(text(9), 30)


def test_a_runner_that_brings_too_many_tokens_is_refused() -> None:
    engine, _ = engine_of(1)
    engine.submit(Request("a", text(5), greedy(9)))
    engine.step()
    runner = engine.runner
    compute = runner.collect
    runner.collect = lambda ticket: _longer(compute(ticket))  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="3 tokens of a step with 1 drafts"):
        engine.step()


def _longer(chosen: Any) -> Any:
    import dataclasses

    return dataclasses.replace(chosen, tokens=[[1, 2, 3]], logprobs=[[None, None, None]])


def test_limits_leave_room_for_drafts() -> None:
    with pytest.raises(ConfigError, match="`max_step_tokens` is 32, fewer than `max_requests` 16 with 2 drafts each"):
        Limits(max_requests=16, max_step_tokens=32, speculative_tokens=2)


# --- how many -----------------------------------------------------------------------------------------------------


def served(policy: Speculation, requests: int, cost: Any, rate: float, steps: int) -> list[int]:
    """Lengths of so many steps, each as long as `cost` says, with drafts kept at this rate."""
    rng, out = random.Random(1), []
    for _ in range(steps):
        length = policy.length(requests)
        out.append(length)
        policy.observe(requests, length, cost(requests, length))
        for _ in range(requests):
            kept = next((i for i in range(length) if rng.random() >= rate), length)
            policy.record([(length, kept)])
    return out


def test_lengths_follow_cost_and_acceptance() -> None:
    def cheap(requests: int, drafts: int) -> float:
        return 1.0 + 0.05 * drafts

    def dear(requests: int, drafts: int) -> float:
        return 1.0 + 0.9 * drafts

    assert served(Speculation(3), 1, cheap, 0.9, 2000)[-200:].count(3) > 180
    assert served(Speculation(3), 1, dear, 0.6, 2000)[-200:].count(0) > 180
    assert served(Speculation(3), 1, cheap, 0.02, 4000)[-200:].count(0) > 180
    # each size of step has its own: cheap alone, dear in company
    policy = Speculation(3)
    assert min(served(policy, 1, cheap, 0.8, 1500)[-50:]) >= 1
    assert served(policy, 32, dear, 0.6, 1500)[-100:].count(0) > 80
    assert policy.length(1) >= 1


def test_trials_find_that_drafts_pay_again() -> None:
    policy = Speculation(1)
    assert served(policy, 4, lambda n, k: 1.0 + 0.9 * k, 0.3, 1000)[-1] == 0
    assert served(policy, 4, lambda n, k: 1.0 + 0.01 * k, 0.95, 3000)[-100:].count(1) > 90


def test_a_fixed_length_is_kept_and_no_drafts_are_none() -> None:
    assert set(served(Speculation(2, fixed=True), 8, lambda n, k: 1.0 + 9 * k, 0.0, 300)) == {2}
    assert Speculation(0).length(5) == 0
