"""Grammars in the engine: what is generated matches, and is what the request alone would get."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dsv4c.errors import EngineError, RequestError
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.grammar import Grammar, Grammars, GrammarSource, fill_masks
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request, expand
from dsv4c.runtime.sampler import SamplerState, sample
from tests.runtime.live import EOS, TOKENS, ToyCodec
from tests.runtime.oracle import Oracle
from tests.runtime.standin import VOCAB
from tests.runtime.test_speculation import HORIZON, WIDE, Answer, engine_of, serve, text

GRAMMARS = Grammars(ToyCodec())
LAGS = pytest.mark.parametrize("lag", [0, 1])
PATTERNS = (r"[a-z]{4,9}", r"(the|end|é)( (of|to|[0-9]+))*\.", r"x?", r"日日|日(é)+", r"[^a-y]{0,12}!", r"([0-9]{2}:)+")


def regex(pattern: str) -> Grammar:
    return GRAMMARS.build(GrammarSource(json.dumps({"grammars": [{"lark_grammar": f"start: /{pattern}/"}]}), "regex"))


def lark(source: str) -> Grammar:
    return GRAMMARS.build(GrammarSource(json.dumps({"grammars": [{"lark_grammar": source}]}), "grammar"))


def said(tokens: Sequence[int]) -> str:
    return b"".join(TOKENS[t] for t in tokens if t != EOS).decode()


def allowed(grammar: Grammar, tokens: Sequence[int] = (), stops: Sequence[int] = (EOS,)) -> set[int]:
    cursor = grammar.start(stops).ahead(tokens)
    (row,) = fill_masks([cursor], grammar.vocab_size)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), count=VOCAB, bitorder="little")).tolist())


def ids(text_: str) -> list[int]:
    return ToyCodec().encode(text_)


# --- one cursor -----------------------------------------------------------------------------------------------------


def test_masks_allow_what_continues_the_text_and_nothing_else() -> None:
    grammar = regex("ab[cd]|the")
    assert {TOKENS[t] for t in allowed(grammar)} == {b"a", b"t", b"the"}
    assert {TOKENS[t] for t in allowed(grammar, ids("ab"))} == {b"c", b"d"}


def test_bytes_of_a_character_come_one_by_one() -> None:
    assert {TOKENS[t] for t in allowed(regex("é"))} == {b"\xc3"}
    assert {TOKENS[t] for t in allowed(regex("é"), [TOKENS.index(b"\xc3")])} == {b"\xa9"}


def test_added_tokens_are_no_text() -> None:
    everything = allowed(regex(r"(.|\n)*"))
    assert everything.isdisjoint({0, 2, 3}) and EOS in everything
    assert allowed(lark("start: <[3]> /a/")) == {3}


def test_the_end_is_where_the_grammar_is() -> None:
    cursor = regex("a{2}").start([EOS])
    cursor.accept(ids("a")[0])
    assert not cursor.over
    cursor.accept(ids("a")[0])
    assert cursor.over and cursor.fault is None


def test_a_stop_token_that_ends_nothing_is_masked() -> None:
    assert EOS in allowed(regex("a+"), ids("a"))
    assert EOS not in allowed(regex("a+"), ids("a"), stops=())


def test_a_token_that_cannot_follow_is_a_fault_and_behind_a_wrong_draft_nothing_is_masked() -> None:
    cursor = regex("ab").start([EOS])
    ahead = cursor.ahead(ids("xb"))
    assert ahead.over and ahead.fault is None and not cursor.over
    cursor.accept(ids("x")[0])
    assert cursor.over and isinstance(cursor.fault, EngineError) and "cannot follow" in cursor.fault.message


def test_copies_go_their_own_way() -> None:
    cursor = regex("ab|cd").start([EOS])
    other = copy.deepcopy(cursor)
    other.accept(ids("c")[0])
    assert {TOKENS[t] for t in allowed_of(cursor)} == {b"a", b"c"}
    assert {TOKENS[t] for t in allowed_of(other)} == {b"d"}


def allowed_of(cursor: Any) -> set[int]:
    (row,) = fill_masks([cursor], VOCAB)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), count=VOCAB, bitorder="little")).tolist())


def test_a_grammar_goes_on_behind_given_tokens() -> None:
    assert {TOKENS[t] for t in allowed(regex("abc").ahead(ids("ab")))} == {b"c"}
    with pytest.raises(EngineError, match="does not allow"):
        regex("abc").ahead(ids("x"))


# --- compiling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("start: /(a/", "unclosed group"),
        ("start: b", "unknown name"),
        ("start: /[^\\s\\S]/", "matches no text"),
        ('start: %json {"uniqueItems": true}', "uniqueItems"),
        ("", "grammar"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_its_field(source: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        lark(source)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "grammar", "invalid_grammar")


def test_compiling_happens_in_threads_once() -> None:
    grammars = Grammars(ToyCodec())
    source = GrammarSource(json.dumps({"grammars": [{"lark_grammar": "start: /ab/"}]}), "regex")

    async def both() -> tuple[Grammar, Grammar]:
        return await grammars.compile(source), await grammars.compile(source)

    first, second = asyncio.run(both())
    assert first is second
    grammars.close()


def test_too_many_compilations_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(ToyCodec())
    monkeypatch.setattr("dsv4c.runtime.grammar.MAX_WAITING", 0)
    with pytest.raises(RequestError) as caught:
        asyncio.run(grammars.compile(GrammarSource("start: /a/", "regex")))
    assert caught.value.status == 503
    grammars.close()


# --- sampling -------------------------------------------------------------------------------------------------------


def state_of(pattern: str | None, **options: Any) -> SamplerState:
    grammar = None if pattern is None else regex(pattern)
    return SamplerState(SamplingParams(seed=3, grammar=grammar, **options), np.array([5, 6]), [EOS])


def test_only_rows_with_a_grammar_are_masked_and_the_logits_stay() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, TOKENS.index(b"z")] = 5.0
    before = logits.clone()
    tokens, _ = sample(logits, [state_of("a", temperature=0.0), state_of(None, temperature=0.0)])
    assert [TOKENS[t or 0] for t in tokens] == [b"a", b"z"] and torch.equal(logits, before)


def test_logprobs_are_those_before_the_mask() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    _, (entry,) = sample(logits, [state_of("a", logprobs=1)])
    assert entry is not None
    assert entry.logprob == pytest.approx(float(torch.log_softmax(logits[0], -1)[entry.token_id]), abs=1e-6)


def test_min_tokens_yields_where_nothing_but_the_end_is_left() -> None:
    state = state_of("ab?", min_tokens=9)
    state.accept(ids("a")[0])
    assert allowed(regex("ab?"), ids("a")) == {EOS, ids("b")[0]}
    for _ in range(3):
        tokens, _ = sample(torch.zeros(1, VOCAB), [state])
        assert tokens == ids("b")


def test_tokens_beyond_the_grammars_vocabulary_are_masked() -> None:
    logits = torch.zeros(1, VOCAB + 3)
    logits[0, VOCAB:] = 9.0
    assert sample(logits, [state_of("a", temperature=0.0)])[0] == ids("a")


# --- the engine -----------------------------------------------------------------------------------------------------


def matching(pattern: str, tokens: Sequence[int], reason: str) -> None:
    if reason == "stop":
        assert re.fullmatch(pattern, said(tokens)), said(tokens)
    else:
        assert reason == "length"


@LAGS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_generated_matches(lag: int, pattern: str) -> None:
    engine, _ = engine_of(0, lag)
    params = SamplingParams(max_tokens=40, seed=1, n=3, grammar=regex(pattern))
    requests = expand("a", text(9), params)
    engine.eos_token_ids = (EOS,)
    for answer in serve(engine, requests).values():
        matching(pattern, answer.tokens, answer.reason)


def serve_interrupted(engine: Engine, requests: Sequence[Request], seed: int) -> dict[str, Answer]:
    """`serve`, with the newest request preempted now and then."""
    rng, answers = random.Random(seed), {r.id: Answer() for r in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        if len(engine.scheduler.running) > 1 and rng.random() < 0.2:
            engine.scheduler.preempt_newest()
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.audit()
    return answers


def random_request(rng: random.Random, number: int) -> tuple[Request, str | None]:
    pattern = rng.choice([None, *PATTERNS])
    params = SamplingParams(
        max_tokens=rng.randrange(1, 40),
        min_tokens=0,
        temperature=rng.choice([0.0, 0.7, 1.0, 5.0]),
        top_p=rng.choice([1.0, 0.7]),
        top_k=rng.choice([0, 5]),
        seed=rng.randrange(1000),
        presence_penalty=rng.choice([0.0, 1.5]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        logit_bias={rng.randrange(VOCAB): 3.0} if rng.random() < 0.3 else {},
        logprobs=rng.choice([None, 0, 2]),
        stop_token_ids=(rng.randrange(4, VOCAB),) if rng.random() < 0.3 else (),
        ignore_eos=rng.random() < 0.3,
        grammar=None if pattern is None else regex(pattern),
    )
    return Request(f"r{number}", text(rng.randrange(1, 40), (number, rng.random())), params), pattern


@LAGS
@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_neighbours_drafts_preemption_and_lag_change_nothing(lag: int, drafts: int, seed: int) -> None:
    def made() -> list[tuple[Request, str | None]]:
        rng = random.Random(seed)
        return [random_request(rng, i) for i in range(12)]

    alone = {}
    for request, _ in made():
        engine, _ = engine_of(0, 0)
        engine.eos_token_ids = (EOS,)
        alone |= serve(engine, [request])
    oracle = Oracle(errors=0.3, brief=0.1, seed=seed, horizon=HORIZON, wide=WIDE)
    engine, _ = engine_of(drafts, lag, oracle, share=0.4)
    engine.eos_token_ids = (EOS,)
    pairs = made()
    together = serve_interrupted(engine, [request for request, _ in pairs], seed)
    assert engine.scheduler.num_preemptions > 0
    assert together == alone
    for request, pattern in pairs:
        answer = together[request.id]
        if pattern is not None and not set(answer.tokens) & set(request.params.stop_token_ids):
            matching(pattern, answer.tokens, answer.reason)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_empty_text_ends_at_once(ignore_eos: bool) -> None:
    engine, _ = engine_of(0, 0)
    engine.eos_token_ids = (EOS,)
    params = SamplingParams(max_tokens=9, ignore_eos=ignore_eos, grammar=lark('start: ""'))
    answer = serve(engine, [Request("a", text(5), params)])["a"]
    assert (answer.tokens, answer.reason) == ([EOS], "stop")


@LAGS
def test_right_drafts_are_kept_under_a_grammar(lag: int) -> None:
    engine, standin = engine_of(3, lag)
    answer = serve(engine, [Request("a", text(5), SamplingParams(max_tokens=41, grammar=regex("[a-z]+"), seed=2))])["a"]
    assert answer.reason == "length" and len(answer.tokens) == 41
    assert standin.steps == 1 + 40 // 4


def test_a_request_with_a_grammar_waits_for_its_token_others_do_not() -> None:
    engine, standin = engine_of(0, 1)
    ruled = Request("a", text(5), SamplingParams(max_tokens=8, grammar=regex("[a-z]+"), seed=2))
    free = Request("b", text(5), SamplingParams(max_tokens=16, temperature=0.0))
    answers = serve(engine, [ruled, free])
    assert len(answers["a"].tokens) == 8 and len(answers["b"].tokens) == 16
    assert standin.steps <= 17


@LAGS
@pytest.mark.parametrize("pattern", [r"[a-z]{4,9}", r"([0-9]{2}:)+", r"日(é)+"])
def test_a_grammar_goes_on_behind_what_another_engine_has_generated(lag: int, pattern: str) -> None:
    def ask(generated: Sequence[int] = ()) -> Request:
        params = SamplingParams(max_tokens=9, grammar=regex(pattern), seed=4)
        return Request("a", text(5), params, generated=generated)

    engine, _ = engine_of(0, lag)
    whole = serve(engine, [ask()])["a"]
    for count in range(1, len(whole.tokens)):
        rest = serve(engine, [ask(whole.tokens[:count])])["a"]
        assert (rest.tokens, rest.reason) == (whole.tokens[count:], whole.reason)
    with pytest.raises(RequestError, match="generated so far"):
        engine.submit(ask([*whole.tokens[:1], TOKENS.index(b"\n")]))


def test_a_fault_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engine_of(0, 0)
    ruled = Request("a", text(5), SamplingParams(max_tokens=8, temperature=0.0, grammar=regex("[a-z]+")))
    free = Request("b", text(5), SamplingParams(max_tokens=8, temperature=0.0))
    monkeypatch.setattr("dsv4c.runtime.sampler._mask", lambda *_: None)  # a runner that masks nothing
    answers = serve(engine, [ruled, free])
    assert answers["a"].reason == "failed" and answers["b"].reason == "length"


def test_another_models_grammar_is_refused() -> None:
    engine, _ = engine_of(0, 0)
    grammar = regex("a")
    grammar.vocab_size = VOCAB + 1
    with pytest.raises(EngineError, match="knows"):
        engine.submit(Request("a", text(5), SamplingParams(grammar=grammar)))
