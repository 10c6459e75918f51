"""Parameters, every operation of the sampler against a plain definition, and reproducible noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.errors import RequestError
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.sampler import SamplerState, logprobs_of, noise_key, sample, uniform

VOCAB = 40
NO_PROMPT = np.zeros(0, dtype=np.int64)


def state(prompt: Any = NO_PROMPT, generated: Any = (), stop: Any = (), **options: Any) -> SamplerState:
    one = SamplerState(SamplingParams(**options), np.array(prompt, dtype=np.int64), stop)
    for token in generated:
        one.accept(token)
    return one


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -5), ("min_tokens", -1), ("temperature", -0.1), ("temperature", math.nan),
        ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("top_k", -2), ("min_p", -0.1),
        ("min_p", 1.5), ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0.0),
        ("seed", 2**64), ("logit_bias", {3: 101.0}), ("logit_bias", {3: math.nan}), ("logprobs", -1), ("logprobs", 21),
        ("prompt_logprobs", 21), ("n", 0), ("n", 129),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{param: value})
    assert caught.value.status == 400 and caught.value.param == param and f"`{param}`" in caught.value.message


def test_values_that_contradict_or_leave_the_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match="more than `max_tokens` 3"):
        SamplingParams(max_tokens=3, min_tokens=4)
    for options in ({"logit_bias": {VOCAB: 1.0}}, {"stop_token_ids": (-1,)}):
        with pytest.raises(RequestError, match=f"the vocabulary has {VOCAB}") as caught:
            SamplingParams(**options).check_vocab(VOCAB)  # type: ignore[arg-type]
        assert caught.value.param in options


def test_greedy_takes_the_most_likely_and_leaves_the_logits_alone() -> None:
    logits = random_logits(5)
    before = logits.clone()
    tokens, logprobs = sample(logits, [state(temperature=0.0) for _ in range(5)])
    assert tokens == logits.argmax(-1).tolist() and logprobs == [None] * 5
    sample(logits, [state(temperature=0.0, logit_bias={1: 5.0}, presence_penalty=1.0, generated=[2])] * 5)
    assert torch.equal(logits, before)


def reference_edit(
    row: list[float], one: SamplerState, prompt: list[int], generated: list[int], stop: list[int]
) -> list[float]:
    p = one.params
    out = list(row)
    for token, bias in p.logit_bias.items():
        out[token] += bias
    for token in {*prompt, *generated}:
        out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
    for token in set(generated):
        out[token] -= p.frequency_penalty * generated.count(token) + p.presence_penalty
    if len(generated) < p.min_tokens:
        for token in stop:
            out[token] = -math.inf
    return out


tokens_st = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            tokens_st, tokens_st, st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=4),
            st.sampled_from([1.0, 1.3, 0.8]), st.sampled_from([0.0, 0.7, -1.0]), st.sampled_from([0.0, 0.4]),
            st.integers(0, 6),
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_edits_equal_a_plain_definition_and_rows_do_not_mix(cases: list[Any]) -> None:
    logits = random_logits(len(cases), seed=len(cases))
    stop, states, want = [3, 7], [], []
    for i, (prompt, generated, bias, repetition, presence, frequency, min_tokens) in enumerate(cases):
        one = state(
            prompt, generated, stop, temperature=0.0, logit_bias=bias, repetition_penalty=repetition,
            presence_penalty=presence, frequency_penalty=frequency, min_tokens=min_tokens,
        )  # fmt: skip
        states.append(one)
        want.append(reference_edit(logits[i].tolist(), one, prompt, generated, stop))
    tokens, _ = sample(logits, states)
    for token, row in zip(tokens, want, strict=True):
        assert token is not None and row[token] >= max(row) - 1e-4


def kept_tokens(logits: list[float], draws: int = 600, **options: Any) -> set[int | None]:
    rows = torch.tensor([logits] * draws)
    states = [state(seed=i, **options) for i in range(draws)]
    return set(sample(rows, states)[0])


def test_filters_keep_what_their_definitions_say() -> None:
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log().tolist()
    assert kept_tokens(logits) == {0, 1, 2, 3, 4}
    assert kept_tokens(logits, top_k=2) == {0, 1}
    assert kept_tokens(logits, top_k=-1) == {0, 1, 2, 3, 4}
    assert kept_tokens(logits, top_p=0.65) == {0, 1}
    assert kept_tokens(logits, top_p=0.75) == {0, 1, 2}
    assert kept_tokens(logits, top_p=1e-9) == {0}
    assert kept_tokens(logits, min_p=0.3) == {0, 1, 2}
    assert kept_tokens(logits, top_k=3, top_p=0.8) == {0, 1}, "top_p of what top_k left: 0.4 / 0.85 + 0.3 / 0.85"
    assert kept_tokens(logits, top_k=100) == {0, 1, 2, 3, 4}
    assert kept_tokens([1.0, 1.0, 1.0, 0.0], top_k=2) == {0, 1, 2}, "ties stay together"
    assert kept_tokens(logits, top_k=2, top_p=0.3) == {0}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits, draws = random_logits(1, seed=3, vocab=8)[0], 20_000
    one = state(temperature=temperature, seed=11)
    counts = torch.zeros(8)
    for _ in range(draws // 1000):
        states = []
        for _ in range(1000):
            copy = state(temperature=temperature, seed=11)
            copy.generated = one.generated
            one.generated += 1
            states.append(copy)
        counts += torch.bincount(torch.tensor(sample(logits.expand(1000, 8), states)[0]), minlength=8)
    expected = torch.softmax(logits / temperature, -1) * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 24.3, "7 degrees of freedom, p = 0.001"


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 500),
    st.integers(0, 7),
    st.sampled_from([{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.05}]),
)
def test_a_row_draws_the_same_alone_and_among_others(seed: int, done: int, at: int, options: dict[str, Any]) -> None:
    logits = random_logits(8, seed=done, vocab=1000)
    mine = state(temperature=0.9, seed=seed, **options)
    mine.generated = done
    others = [
        state(temperature=t, **o)
        for t, o in [(1.5, {"top_p": 0.3}), (0.0, {}), (0.7, {"top_k": 3}), (1.0, {"logprobs": 2}),
                     (1.0, {"min_p": 0.5}), (1.0, {"logit_bias": {2: 9.0}}), (2.0, {})]
    ]  # fmt: skip
    alone = sample(logits[at : at + 1], [mine])[0][0]
    assert sample(logits, [*others[:at], mine, *others[at:]])[0][at] == alone


def test_noise_depends_on_seed_choice_and_count_and_is_uniform() -> None:
    keys = np.array([noise_key(s, c) for s in range(-4, 50) for c in range(4)], dtype=np.uint64)
    assert len(set(keys.tolist())) == keys.size
    counters = np.arange(2000, dtype=np.uint64)
    table = np.array([uniform(np.full(2000, k, dtype=np.uint64), counters) for k in keys])
    assert ((table >= 0) & (table < 1)).all() and np.unique(table).size == table.size
    assert abs(table.mean() - 0.5) < 0.005 and abs(table.var() - 1 / 12) < 0.002
    correlation = np.corrcoef(table[:40])
    assert np.abs(correlation - np.eye(40)).max() < 0.12
    first = uniform(np.array([noise_key(5, 0)], dtype=np.uint64), np.zeros(1, dtype=np.uint64))
    assert first.tolist() == [0.43336395725302745], "a seed keeps its meaning from one release to the next"
    assert state(seed=None).key != state(seed=None).key


def test_extreme_values_never_give_nan() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [3e38, 3e38, -3e38], [-torch.inf, 0.0, -torch.inf]])
    for temperature in (1e-4, 1.0, 1e6):
        tokens, _ = sample(logits, [state(temperature=temperature, seed=i) for i in range(3)])
        assert tokens[0] == 0 and tokens[1] in (0, 1) and tokens[2] == 1
    assert sample(torch.tensor([[0.0, 1e-3]]), [state(temperature=1e-30, seed=1)])[0] == [1]


def test_a_broken_row_gives_none_alone() -> None:
    logits = random_logits(3)
    logits[1, 5] = torch.nan
    logits[2, 0] = torch.inf
    for temperature in (0.0, 1.0):
        tokens, logprobs = sample(logits, [state(temperature=temperature, logprobs=1)] * 3)
        assert tokens[0] is not None and tokens[1:] == [None, None]
        assert logprobs[0] is not None and logprobs[1:] == [None, None]
    assert sample(torch.full((1, 4), -torch.inf), [state()]) == ([None], [None])


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(3)
    states = [
        state(temperature=0.0, logprobs=0), state(temperature=0.0),
        state(temperature=0.3, seed=1, logprobs=3, logit_bias={9: 100.0}),
    ]  # fmt: skip
    tokens, logprobs = sample(logits, states)
    want = torch.log_softmax(logits, -1)
    assert tokens[0] is not None and tokens[2] == 9 and logprobs[1] is None
    first, third = logprobs[0], logprobs[2]
    assert first and first.top == () and first.logprob == pytest.approx(float(want[0, tokens[0]]))
    assert third and third.token_id == 9 and third.logprob == pytest.approx(float(want[2, 9]))
    best = want[2].topk(3)
    assert [t for t, _ in third.top] == best.indices.tolist()
    assert [v for _, v in third.top] == pytest.approx(best.values.tolist())
    assert logprobs_of(logits[:0], [], []) == []
    assert len(logprobs_of(logits[:1], [0], [VOCAB + 5])[0].top) == VOCAB
