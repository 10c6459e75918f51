"""The prefix cache in the engine: what is computed again, where requests resume, and that no token ever changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dsv4c.artifact import KVGroup
from dsv4c.errors import RunnerBroken
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.scheduler import Limits
from tests.runtime.standin import VOCAB, StandIn, direct_greedy, kv_groups, make_engine

BLOCK, HORIZON, WIDE = 16, 8, 8
GROUPS = kv_groups(window_page=4, block=BLOCK, horizon=HORIZON, wide=WIDE)
LAGS = pytest.mark.parametrize("lag", [0, 1])


def engine_of(
    lag: int = 0,
    *,
    sizes: PoolSizes | None = None,
    snapshots: int = 8,
    requests: int = 4,
    step_tokens: int = 64,
    context: int = 256,
    cache: bool = True,
    groups: Sequence[KVGroup] = GROUPS,
) -> tuple[Engine, StandIn]:
    sizes = sizes or PoolSizes.for_requests(groups, requests, context, step_tokens, snapshots)
    limits = Limits(max_requests=requests, max_step_tokens=step_tokens, prefix_cache=cache)
    return make_engine(sizes, limits, tuple(groups), horizon=HORIZON, lag=lag)


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
    cached: int = 0
    reason: str = ""


def run(engine: Engine, *requests: Request, before_step: Callable[[], None] = lambda: None) -> dict[str, Answer]:
    """Serves these requests to their ends; the engine is audited at the end."""
    for request in requests:
        engine.submit(request)
    answers = {r.id: Answer() for r in requests}
    while engine.has_work:
        before_step()
        for event in engine.step():
            take(answers, event)
    engine.audit()
    assert not any(engine.pool.used_pages().values())
    return answers


def take(answers: dict[str, Answer], event: Event) -> None:
    answer = answers[event.request_id]
    answer.tokens += event.tokens
    answer.cached += event.cached_tokens
    if event.end is not None:
        answer.reason = event.end.reason


def ask(engine: Engine, prompt: Sequence[int], count: int = 4, **options: Any) -> Answer:
    """One request alone, checked against direct computation."""
    answer = run(engine, Request("a", prompt, greedy(count), **options))["a"]
    assert answer.tokens == expected(prompt, count)
    return answer


# --- where requests resume ----------------------------------------------------------------------------------------


@LAGS
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 100])
def test_an_equal_prompt_resumes_at_the_last_block_before_its_end(lag: int, length: int) -> None:
    engine, _ = engine_of(lag)
    assert ask(engine, text(length)).cached == 0
    assert ask(engine, text(length)).cached == (length - 1) // BLOCK * BLOCK
    assert ask(engine, text(length)).cached == (length - 1) // BLOCK * BLOCK


@LAGS
def test_a_third_prompt_resumes_where_two_have_parted(lag: int) -> None:
    engine, _ = engine_of(lag, step_tokens=256)
    shared = text(70, "shared")
    assert ask(engine, shared + text(30, 1)).cached == 0
    assert ask(engine, shared + text(30, 2)).cached == 0, "the tree knows 64 tokens, but has no state there"
    assert ask(engine, shared + text(30, 3)).cached == 64
    assert ask(engine, shared[:66] + text(9, 4)).cached == 64


@LAGS
def test_the_next_turn_resumes_from_the_last_answer(lag: int) -> None:
    engine, _ = engine_of(lag)
    turn = text(20)
    answer = ask(engine, turn, 50)
    known = 20 + 50 - 1  # the last token is never computed
    turn += answer.tokens + text(5, "more")
    answer = ask(engine, turn, 30)
    assert answer.cached == known // BLOCK * BLOCK
    again = ask(engine, turn + answer.tokens + text(3, "end"))
    assert again.cached == (len(turn) + 30 - 1) // BLOCK * BLOCK


@LAGS
def test_what_one_request_moves_along_stays_where_another_resumed(lag: int) -> None:
    engine, _ = engine_of(lag)
    engine.submit(Request("long", text(20), greedy(120)))
    while len(engine.scheduler.running) == 0 or engine.scheduler.running[0].num_tokens < 20 + 30:
        engine.step()
    half = text(20) + expected(text(20), 29)
    answers = {"long": Answer(), "b": Answer()}
    engine.submit(Request("b", half, greedy(2)))
    while engine.has_work:
        for event in engine.step():
            take(answers, event)
    assert answers["b"].cached == 48 and answers["b"].tokens == expected(half, 2)
    assert ask(engine, half).cached == 48, "where b resumed, the snapshot has stayed"
    assert ask(engine, text(20) + expected(text(20), 120)).cached == (20 + 119) // BLOCK * BLOCK


@LAGS
def test_equal_prompts_at_once_share_their_pages(lag: int) -> None:
    engine, _ = engine_of(lag, step_tokens=256)
    for i in range(3):
        engine.submit(Request(f"r{i}", text(60), greedy(8)))
    most, answers = 0, {f"r{i}": Answer() for i in range(3)}
    while engine.has_work:
        for event in engine.step():
            take(answers, event)
        engine.audit()
        most = max(most, engine.pool.used_pages()["c4"])
    assert [a.tokens for a in answers.values()] == [expected(text(60), 8)] * 3
    assert most == 3 * 3 < 3 * 5, "48 tokens as they were computed at once; then once for all, with tails of their own"


def test_salts_and_a_switch_keep_requests_apart() -> None:
    engine, _ = engine_of()
    assert ask(engine, text(50), salt="a").cached == 0
    assert ask(engine, text(50), salt="b").cached == 0
    assert ask(engine, text(50)).cached == 0
    assert ask(engine, text(50), salt="a").cached == 48
    for off in (engine_of(cache=False)[0], engine_of(snapshots=0)[0]):
        assert ask(off, text(50)).cached == ask(off, text(50)).cached == 0
        assert off.stats().prefix_queried_tokens == 0 and off.scheduler.prefix is None


@LAGS
def test_prompt_logprobs_are_computed_whole_and_kept_for_others(lag: int) -> None:
    engine, _ = engine_of(lag)
    ask(engine, text(50))
    scored = Request("s", text(50), greedy(4, prompt_logprobs=1))
    events = []
    engine.submit(scored)
    while engine.has_work:
        events += engine.step()
    entries = next(e.prompt_logprobs for e in events if e.tokens)
    assert len(entries) == 50 and all(e is not None for e in entries[1:]) and scored.num_cached == 0
    assert [t for e in events for t in e.tokens] == expected(text(50), 4)
    other = text(40, "other")
    run(engine, Request("t", other, greedy(1, prompt_logprobs=0)))
    assert ask(engine, other).cached == 32
    assert engine.stats().prefix_queried_tokens == 50 + 40, "who must compute every row does not ask"


# --- chunks -------------------------------------------------------------------------------------------------------


def spans_of(engine: Engine, request: Request) -> list[tuple[int, int]]:
    """The chunks in which a request's prompt is computed."""
    engine.submit(request)
    spans, launch = [], engine.runner.launch

    def noted(steps: Any) -> Any:
        spans.extend((s.start, s.end) for s in steps if s.request is request)
        return launch(steps)

    engine.runner.launch = noted  # type: ignore[method-assign]
    while engine.has_work:
        engine.step()
    engine.runner.launch = launch  # type: ignore[method-assign]
    return spans


def test_chunks_end_where_snapshots_are_wanted() -> None:
    engine, _ = engine_of(step_tokens=64, requests=1)
    assert spans_of(engine, Request("a", text(150), greedy(1))) == [(0, 64), (64, 128), (128, 144), (144, 150)]
    parted = text(100) + text(40, "b")
    assert spans_of(engine, Request("b", parted, greedy(1))) == [(0, 64), (64, 96), (96, 128), (128, 140)]
    assert spans_of(engine, Request("c", parted[:97], greedy(1))) == [(96, 97)]


@pytest.mark.parametrize(("budget", "first"), [(63, 63), (66, 64), (73, 64), (74, 74), (15, 15)])
def test_chunks_give_up_an_eighth_at_most_to_end_with_a_block(budget: int, first: int) -> None:
    engine, _ = engine_of(step_tokens=budget, requests=1)
    assert spans_of(engine, Request("a", text(200), greedy(1)))[0] == (0, first)


# --- pressure -----------------------------------------------------------------------------------------------------


@LAGS
def test_a_preempted_request_comes_back_through_the_cache(lag: int) -> None:
    engine, _ = engine_of(lag)
    engine.submit(Request("a", text(90), greedy(60)))
    answers = {"a": Answer()}
    while len(answers["a"].tokens) < 30:
        for event in engine.step():
            take(answers, event)
    before = engine.stats().step_tokens
    known = engine.scheduler.running[0].num_computed
    engine.scheduler.preempt_newest()
    while engine.has_work:
        for event in engine.step():
            take(answers, event)
        engine.audit()
    assert answers["a"].tokens == expected(text(90), 60) and answers["a"].cached == 0
    assert engine.stats().step_tokens - before == (149 - known) + known % BLOCK, "up to the last block's end for free"


@LAGS
def test_the_cache_gives_way_to_requests(lag: int) -> None:
    """Pools for one request of full length, full of what others left."""
    sizes = PoolSizes.for_requests(GROUPS, 1, 128, 64)
    engine, _ = engine_of(lag, sizes=PoolSizes(sizes.pages, 3, 128, 4), requests=2)
    for i in range(6):
        ask(engine, text(90, i))
    assert max(engine.pool.idle_pages()["c4"], 6) >= 6
    ask(engine, text(100, "long"), 28)
    assert ask(engine, text(100, "long")).cached >= 96


def test_pages_that_others_use_already_count_once_for_admission() -> None:
    """9 pages of 16 tokens, 4 of them a prefix: two requests of 5 pages fit at once, one with 4 of its own waits."""
    pages = {"window": 100, "c4": 10, "c128": 100, "index": 100}
    engine, _ = engine_of(sizes=PoolSizes(pages, 5, 144, 4), step_tokens=128)
    system = text(64, "system")
    for i in range(2):
        ask(engine, system + text(10, i), 1)
    prompts = {name: system + text(own, name) for name, own in (("a", 10), ("b", 10), ("c", 60))}
    answers = {name: Answer() for name in prompts}
    for name, prompt in prompts.items():
        engine.submit(Request(name, prompt, greedy(3)))
    running = []
    while engine.has_work:
        for event in engine.step():
            take(answers, event)
        running.append(([r.id for r in engine.scheduler.running], engine.pool.used_pages()["c4"]))
    assert running[0] == (["a", "b"], 6) and (["c"], 8) in running
    assert engine.stats().preemptions == 0
    assert all(answers[name].tokens == expected(prompt, 3) for name, prompt in prompts.items())


def test_blocks_with_a_token_in_flight_are_not_known_yet() -> None:
    scheduler = engine_of()[0].scheduler
    one = Request("a", text(15), greedy(9))
    scheduler.submit(one)
    for computed in (15, 16):
        scheduler.commit(scheduler.schedule())
        assert one.num_computed == computed and one.num_tokens == 15
    scheduler.remove(one)
    assert scheduler.prefix is not None and scheduler.prefix.tree.num_nodes == 0
    scheduler.audit()


def test_a_failed_step_and_a_row_of_nan_empty_the_cache() -> None:
    for fault in ("raise", "nan"):
        engine, standin = engine_of()
        ask(engine, text(50))
        engine.submit(Request("other", text(70), greedy(20)))
        engine.step()
        assert any(engine.pool.idle_pages().values())
        step = standin.step

        def broken(inputs: Any, step: Any = step, standin: Any = standin, fault: str = fault) -> torch.Tensor:
            standin.step = step
            if fault == "raise":
                raise RuntimeError("kernel exploded")
            logits: torch.Tensor = step(inputs)
            return logits * torch.nan

        standin.step = broken  # type: ignore[method-assign]
        (event,) = engine.step()
        assert event.end is not None and event.end.reason == "failed"
        engine.audit()
        assert not any(engine.pool.idle_pages().values())
        assert ask(engine, text(50)).cached == 0
        assert ask(engine, text(50)).cached == 48


@LAGS
def test_who_runs_while_the_cache_is_emptied_goes_on(lag: int) -> None:
    engine, _ = engine_of(lag)
    ask(engine, text(40))
    answers = {"a": Answer(), "b": Answer()}
    engine.submit(Request("a", text(40) + text(30, "a"), greedy(40)))
    engine.submit(Request("b", text(70, "b"), greedy(40)))
    for n in range(200):
        for event in engine.step():
            take(answers, event)
        engine.audit()
        if n in (0, 3, 20):
            engine.scheduler.distrust()
            engine.audit()
        if n == 9:
            engine.scheduler.preempt_newest()
    assert answers["a"].tokens == expected(text(40) + text(30, "a"), 40) and answers["a"].cached == 32
    assert answers["b"].tokens == expected(text(70, "b"), 40)


def test_copies_that_fail_fail_the_step_and_nothing_stale_is_read() -> None:
    engine, _ = engine_of()
    ask(engine, text(50))
    copy, calls = engine.runner.copy_states, []

    def fails(pairs: Any) -> None:
        calls.append(list(pairs))
        engine.runner.copy_states = copy  # type: ignore[method-assign]
        raise RuntimeError("copy exploded")

    engine.runner.copy_states = fails  # type: ignore[method-assign]
    assert run(engine, Request("b", text(50), greedy(4)))["b"].reason == "failed"
    assert len(calls) == 1
    assert ask(engine, text(50)).cached == 0
    engine.runner.copy_states = lambda pairs: (_ for _ in ()).throw(RunnerBroken("gone"))  # type: ignore
    assert run(engine, Request("b", text(50), greedy(4)))["b"].reason == "failed"
    assert engine.failure is not None


# --- the soak -----------------------------------------------------------------------------------------------------

NUM_REQUESTS = 10_000
TINY = kv_groups(window_page=4, block=8, horizon=HORIZON, wide=WIDE)


@dataclass(frozen=True)
class Script:
    """Prompts with what is asked of them; `cancels[i]`: tokens after which the client of request i leaves."""

    prompts: list[list[int]]
    counts: list[int]
    cancels: dict[int, int]


def script_of(count: int, shared: float = 0.85) -> Script:
    """Requests over a few prefixes; the rest of a prompt is its own. Some continue what an earlier one began."""
    rng = random.Random(7)
    prefixes = [text(length, f"prefix {length}") for length in (17, 24, 31, 40)]
    prompts: list[list[int]] = []
    for i in range(count):
        own, draw = text(rng.randint(1, 9), i), rng.random()
        if draw < shared:
            prefix = rng.choice(prefixes)
            prompts.append(prefix[: len(prefix) if rng.random() < 0.9 else rng.randint(1, len(prefix))] + own)
        elif draw < shared + 0.05 and prompts:
            prompts.append((rng.choice(prompts[-40:]) + own)[:60])
        else:
            prompts.append(text(rng.randint(1, 48), i))
    counts = [rng.randint(1, 5) if rng.random() < 0.97 else rng.randint(16, 30) for _ in range(count)]
    return Script(prompts, counts, {i: rng.randint(0, 5) for i in range(count) if rng.random() < 0.03})


def soak(engine: Engine, script: Script) -> list[Answer]:
    """Serves the script with a short queue, cancels and preempts on the way. Nothing is left behind in any pool."""
    rng = random.Random(3)
    answers = {str(i): Answer() for i in range(len(script.prompts))}
    following, steps = 0, 0

    def cancel(request_id: str) -> None:
        event = engine.cancel(request_id)
        assert event is not None
        take(answers, event)

    while following < len(answers) or engine.has_work:
        while following < len(answers) and len(engine.scheduler.waiting) < 6:
            engine.submit(Request(str(following), script.prompts[following], greedy(script.counts[following])))
            if script.cancels.get(following) == 0:
                cancel(str(following))
            following += 1
        for event in engine.step():
            take(answers, event)
            most = script.cancels.get(int(event.request_id))
            if event.end is None and most is not None and len(answers[event.request_id].tokens) >= most:
                cancel(event.request_id)
        if engine.scheduler.running and rng.random() < 0.02:
            engine.scheduler.preempt_newest()
        steps += 1
        if steps % 50 == 0:
            engine.audit()
    engine.audit()
    assert not any(engine.pool.used_pages().values())
    engine.scheduler.distrust()
    engine.audit()
    assert engine.pool.free_pages() == engine.pool.total_pages()
    return list(answers.values())


def test_ten_thousand_requests_over_a_third_of_the_pages() -> None:
    """No page is lost in any pool, and every token is that of a run without the cache, with and without lag."""
    full = PoolSizes.for_requests(TINY, 8, 96, 64, 12)
    sizes = PoolSizes({name: 1 + (pages - 1) // 3 for name, pages in full.pages.items()}, 9, 96, 12)
    script = script_of(NUM_REQUESTS)
    plain, _ = engine_of(sizes=sizes, requests=8, cache=False, groups=TINY)
    expected = soak(plain, script)
    assert sum(len(a.tokens) for a in expected) > 2 * NUM_REQUESTS
    for lag in (0, 1):
        engine, _ = engine_of(lag, sizes=sizes, requests=8, groups=TINY)
        answers, stats = soak(engine, script), engine.stats()
        assert [a.tokens for a in answers] == [a.tokens for a in expected]
        assert [a.reason for a in answers] == [a.reason for a in expected]
        assert stats.preemptions > 100 and stats.ended["cancelled"] > 100 and stats.failed_steps == 0
        assert sum(a.cached for a in answers) == stats.prefix_hit_tokens > stats.prefix_queried_tokens // 4
        assert stats.step_tokens < 0.8 * plain.stats().step_tokens


@LAGS
def test_prompts_that_share_nine_tenths_need_a_fifth_of_the_work(lag: int) -> None:
    rng = random.Random(5)
    prefixes = [text(288, f"system {i}") for i in range(4)]
    prompts = [prefixes[i % 4] + text(rng.randint(28, 36), i) for i in range(400)]
    work = []
    for cache in (False, True):
        sizes = PoolSizes.for_requests(GROUPS, 8, 384, 64, 16)
        engine, _ = engine_of(lag, sizes=sizes, requests=8, cache=cache)
        answers = run(engine, *(Request(str(i), p, greedy(2)) for i, p in enumerate(prompts)))
        work.append((engine.stats().step_tokens - len(prompts), [a.tokens for a in answers.values()]))
    assert work[0][1] == work[1][1] and work[0][0] == sum(map(len, prompts))
    assert work[0][0] >= 5 * work[1][0], f"{work[0][0]} tokens of prompts, {work[1][0]} computed"
