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
from dsv4c.runtime.params import MAX_TEMPERATURE, SamplingParams
from dsv4c.runtime.sampler import SamplerState, log_uniforms, logprobs_of, noise_key, sample
from tests.chances import chance

VOCAB = 40
FIRST_NOISE = [-0.489931975, -2.17168169, -0.00960231169]
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


def draws_of(logits: torch.Tensor, count: int, *, seed: int = 11, every: int = 1000, **options: Any) -> torch.Tensor:
    """int64 [count]: the first tokens of a request whose logits never change."""
    states = [state(seed=seed, **options) for _ in range(every)]
    rows, tokens = logits.expand(every, -1), []
    for first in range(0, count, every):
        for i, one in enumerate(states):
            one.generated = first + i
        tokens.append(torch.tensor(sample(rows, states)[0]))
    return torch.cat(tokens)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.5])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = random_logits(1, seed=3, vocab=12)[0] / 2
    tokens = draws_of(logits, 100_000, temperature=temperature)
    assert chance(torch.bincount(tokens, minlength=12), torch.softmax(logits.double() / temperature, -1)) > 0.001


def test_draws_of_other_counts_and_seeds_are_independent() -> None:
    """Pairs of draws fall as the product of their distributions."""
    logits = random_logits(1, seed=5, vocab=5)[0] / 3
    p = torch.softmax(logits.double(), -1)
    draws = {seed: draws_of(logits, 40_000, seed=seed) for seed in (1, 2)}
    one, other = draws[1], draws[2]
    for a, b in ((one[:-1], one[1:]), (one[:-5], one[5:]), (one, other), (one[1:], other[:-1])):
        # pairs that overlap would count some draws twice
        a, b = a[::2], b[::2]
        assert chance(torch.bincount(5 * a + b, minlength=25), torch.outer(p, p).flatten()) > 0.001


@pytest.mark.parametrize("apart", [0.1, 0.5, 1.5])
def test_distributions_that_overlap_mostly_draw_the_same(apart: float) -> None:
    """The rate at which one key and count give P and Q the same token is between (1 - d) / (1 + d) and 1 - d."""
    count = 20_000
    for seed in range(4):
        p = random_logits(1, seed=seed, vocab=30)[0] / 2
        q = p + apart * random_logits(1, seed=100 + seed, vocab=30)[0] / 3
        distance = float((torch.softmax(p, -1) - torch.softmax(q, -1)).abs().sum() / 2)
        rate = float((draws_of(p, count) == draws_of(q, count)).double().mean())
        spread = 4 * math.sqrt(0.25 / count)
        assert (1 - distance) / (1 + distance) - spread < rate < 1 - distance + spread


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


def noise(keys: Any, counters: Any, vocab: int = 1) -> Any:
    keys = np.array([key % 2**64 for key in np.atleast_1d(keys).tolist()], dtype=np.uint64)
    return log_uniforms(*np.broadcast_arrays(keys, np.atleast_1d(counters).astype(np.uint64)), vocab)


def test_noise_depends_on_seed_choice_count_and_token() -> None:
    keys = [noise_key(s, c) for s in range(-4, 50) for c in range(4)]
    assert len(set(keys)) == len(keys)
    table = np.array([noise(k, np.arange(300), 8) for k in keys])
    assert (table < 0).all() and np.isfinite(table).all()
    assert np.unique(table).size > 0.98 * table.size, "float32 collide now and then"
    normal = (np.exp(table.astype(np.float64)) - 0.5) * math.sqrt(12)
    assert abs(normal.mean()) < 0.01 and abs(normal.var() - 1) < 0.01
    # neighbours in every direction: keys, counts, tokens that share a hash, and tokens that do not
    for a, b in (
        (normal[1:], normal[:-1]), (normal[:, 1:], normal[:, :-1]), (normal[:, :, 0::2], normal[:, :, 1::2]),
        (normal[:, :, 2:], normal[:, :, :-2]),
    ):  # fmt: skip
        assert abs((a * b).mean()) < 4.5 / math.sqrt(a.size)
    first = noise(noise_key(5, 0), 0, 3)[0]
    assert first.tolist() == pytest.approx(FIRST_NOISE, rel=1e-6), (
        "a seed keeps its meaning from one release to the next"
    )
    assert state(seed=None).key != state(seed=None).key


def test_early_arrivals_are_as_frequent_as_they_must_be() -> None:
    """Of the smallest E of a vocabulary all bits count: likely winners are among them."""
    arrivals = -noise(range(100), 7, 129_280)
    for most in (1e-5, 1e-4, 1e-2, 1.0):
        expected = arrivals.size * -math.expm1(-most)
        assert abs(int((arrivals < most).sum()) - expected) < 4.5 * math.sqrt(expected)
    earliest = np.sort(arrivals.min(-1)) * 129_280
    assert abs(earliest.mean() - 1) < 0.4 and np.unique(earliest).size == 100


def key_of(number: int, count: int) -> int:
    """The key whose stream's number `count` has `number` as its own number 0: SplitMix64 backwards."""

    def back(z: int) -> int:
        for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
            whole = z
            for _ in range(64 // shift):
                whole = z ^ (whole >> shift)
            z = whole * pow(factor, -1, 2**64) % 2**64
        return z

    gamma = 0x9E3779B97F4A7C15
    return (back((back(number) - gamma) % 2**64) - (count + 1) * gamma) % 2**64


@pytest.mark.parametrize("number", [0, 2**64 - 1, 2**32 - 1, 2**64 - 2**32])
def test_no_bits_make_noise_that_is_0_or_infinite(number: int) -> None:
    key = key_of(number, 3)
    both = noise(key, 3, 2)[0]
    bits = np.array([number % 2**32, number >> 32])
    assert np.allclose(both, np.where(bits == 0, -(2.0**-33), np.log(2.0**-24)), rtol=1e-5)
    for token in (0, 1):
        one = state(temperature=1.0)
        one.key, one.generated = key, 3
        logits = torch.full((1, 4), -torch.inf)
        logits[0, token] = -5.0
        assert sample(logits, [one])[0] == [token], "what has no weight never arrives"


def test_extreme_values_never_give_nan() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [3e38, 3e38, -3e38], [-torch.inf, 0.0, -torch.inf]])
    for temperature in (1e-4, 1.0, MAX_TEMPERATURE):
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
