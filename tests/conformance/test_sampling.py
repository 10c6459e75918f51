"""Every sampling parameter does what it says, on /v1/completions and in chats, with the official client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.conformance.conftest import Host

PROMPT = "The package provides a class that"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
EXTRA = ("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "prompt_logprobs")
LENGTH = 12

Say = Callable[..., list[str]]


@pytest.fixture(params=["completions", "chat"])
def ask(request: pytest.FixtureRequest, client: openai.OpenAI, host: Host) -> Callable[..., Any]:
    """The endpoint's answer to the prompt, with these options."""

    def asked(**options: Any) -> Any:
        extra = {name: options.pop(name) for name in EXTRA if name in options}
        given = {"model": host.model, "max_tokens": LENGTH, "extra_body": {"ignore_eos": True, **extra}, **options}
        if request.param == "chat":
            return client.chat.completions.create(messages=MESSAGES, **given)
        return client.completions.create(prompt=PROMPT, **given)

    return asked


@pytest.fixture
def say(ask: Callable[..., Any]) -> Say:
    """The texts of the choices."""

    def said(**options: Any) -> list[str]:
        return [
            choice.message.content if hasattr(choice, "message") else choice.text for choice in ask(**options).choices
        ]

    return said


def test_temperature_0_is_greedy(say: Say) -> None:
    assert say(temperature=0) == say(temperature=0, seed=5) == say(temperature=0.0, top_p=0.5)


@pytest.mark.parametrize("only_one", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_filters_that_leave_one_token_are_greedy(say: Say, only_one: dict[str, Any]) -> None:
    assert say(**{"temperature": 1.5, "seed": 1, **only_one}) == say(temperature=0)


def test_a_mask_holds_at_any_temperature(host: Host, ask: Callable[..., Any]) -> None:
    """The end of the answer is masked up to `min_tokens`, and so is what a grammar does not allow."""
    answer = ask(temperature=1e6, min_tokens=LENGTH, ignore_eos=False, seed=1)
    assert answer.usage.completion_tokens == LENGTH
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(temperature=3.5e38)


@pytest.mark.parametrize("all_of_them", [{"top_k": -1}, {"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 10**6}])
def test_filters_that_leave_all_tokens_change_nothing(say: Say, all_of_them: dict[str, Any]) -> None:
    assert say(temperature=1, seed=2, **all_of_them) == say(temperature=1, seed=2)


def test_seed(say: Say) -> None:
    assert say(temperature=2, seed=3) == say(temperature=2, seed=3)
    assert len({say(temperature=2, seed=seed)[0] for seed in range(4)}) > 1
    assert len({say(temperature=2)[0] for _ in range(4)}) > 1
    assert say(temperature=2, seed=-1) == say(temperature=2, seed=-1)


def test_n_choices_are_those_of_the_seeds_that_follow(say: Say) -> None:
    assert say(temperature=2, seed=10, n=3) == [say(temperature=2, seed=seed)[0] for seed in (10, 11, 12)]


def test_logit_bias(host: Host, ask: Callable[..., Any], say: Say) -> None:
    token = host.codec.encode("x")[0]
    assert say(temperature=0, logit_bias={str(token): 100}) == ["x" * LENGTH]
    usual = host.codec.encode(say(temperature=0)[0])[0]
    changed = say(temperature=0, logit_bias={str(usual): -100})
    assert changed != say(temperature=0) and not changed[0].startswith(host.codec.decode([usual]))


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_penalties(host: Host, say: Say, name: str) -> None:
    """With a bias that makes the model repeat one token, a penalty brings others in; none changes nothing."""
    token = host.codec.encode("x")[0]
    logits = {"temperature": 0, "logit_bias": {str(token): 20}, "max_tokens": 40}
    none = 1.0 if name == "repetition_penalty" else 0.0
    assert say(**logits, **{name: none}) == say(**logits)
    strong = 50.0 if name == "repetition_penalty" else 2.0
    counts = [say(**logits, **extra)[0].count("x") for extra in ({}, {name: strong})]
    assert counts[1] < counts[0] if name != "presence_penalty" else counts[1] <= counts[0]


@pytest.mark.parametrize("stop", ["one", ["zzz", "one"], ["one two", "one"]])
def test_stop_strings(host: Host, ask: Callable[..., Any], say: Say, stop: Any) -> None:
    host.will_say("say one two three")
    choice = ask(stop=stop).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "one")
    host.will_say("say one two three")
    assert say(stop=stop) == ["say "]


def test_stop_token_ids_ignore_eos_and_min_tokens(host: Host, ask: Callable[..., Any]) -> None:
    stop = host.codec.encode("x")[0]
    wanted = {"stop_token_ids": [stop], "logit_bias": {str(stop): 100}, "temperature": 0}
    answer = ask(**wanted)
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", stop)
    assert answer.usage.completion_tokens == 1
    assert ask(min_tokens=5, **wanted).usage.completion_tokens == 6
    host.will_say("ab", "ab")
    assert ask().choices[0].finish_reason == "length"
    ended = ask(ignore_eos=False)
    assert ended.choices[0].finish_reason == "stop" and ended.choices[0].stop_reason is None


@pytest.mark.parametrize("length", [1, 5])
def test_max_tokens(ask: Callable[..., Any], length: int) -> None:
    answer = ask(max_tokens=length)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == length


def test_stream_options(ask: Callable[..., Any]) -> None:
    assert all(chunk.usage is None for chunk in ask(stream=True))
    asked = list(ask(stream=True, temperature=0, stream_options={"include_usage": True}))
    assert asked[-1].choices == [] and asked[-1].usage.completion_tokens == LENGTH
    assert all(chunk.usage is None for chunk in asked[:-1])
    both = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in ask(stream=True, temperature=0, stream_options=both)]
    assert counts == sorted(counts) and counts[-1] == LENGTH and counts[0] < LENGTH


def test_prompt_logprobs(host: Host, ask: Callable[..., Any]) -> None:
    answer = ask(prompt_logprobs=2, max_tokens=1)
    scores = getattr(answer.choices[0], "prompt_logprobs", None) or answer.prompt_logprobs
    assert len(scores) == answer.usage.prompt_tokens and scores[0] is None
    for entry in scores[1:]:
        assert 2 <= len(entry) <= 3
        for token, score in entry.items():
            assert score["logprob"] <= 0 and score["decoded_token"] == host.codec.token_text(int(token))
        assert {1, 2} <= {score["rank"] for score in entry.values()}


def test_best_of_shows_the_likeliest(client: openai.OpenAI, host: Host) -> None:
    given: dict[str, Any] = {"model": host.model, "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 1.5, "seed": 7}
    given["extra_body"] = {"ignore_eos": True}
    all_four = client.completions.create(n=4, logprobs=0, **given)
    mean = {c.text: sum(c.logprobs.token_logprobs) / LENGTH for c in all_four.choices}
    best = client.completions.create(n=2, best_of=4, **given)
    assert [c.text for c in best.choices] == sorted(mean, key=lambda text: -mean[text])[:2]
    assert [c.index for c in best.choices] == [0, 1] and best.choices[0].logprobs is None
    assert best.usage.completion_tokens == 4 * LENGTH


def test_echo(client: openai.OpenAI, host: Host) -> None:
    given: dict[str, Any] = {"model": host.model, "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "echo": True}
    scored = client.completions.create(logprobs=1, **given).choices[0]
    assert scored.text.startswith(PROMPT) and scored.text == client.completions.create(**given).choices[0].text
    assert len(scored.logprobs.tokens) == len(host.codec.encode(PROMPT)) + 3
    assert scored.logprobs.token_logprobs[0] is None


def test_logprobs_of_completions(client: openai.OpenAI, host: Host) -> None:
    given: dict[str, Any] = {"model": host.model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    for count in (0, 1, 5):
        scores = client.completions.create(logprobs=count, **given).choices[0].logprobs
        assert all(max(1, count) <= len(top) <= count + 1 for top in scores.top_logprobs)
        assert scores.token_logprobs == [max(top.values()) for top in scores.top_logprobs], "greedy is the likeliest"
    both = client.completions.create(logprobs=1, echo=True, extra_body={"prompt_logprobs": 3}, **given).choices[0]
    assert all(len(top) <= 2 for top in both.logprobs.top_logprobs[1:]), "as many as were asked for, on either side"
    assert all(len(entry) >= 3 for entry in both.prompt_logprobs[1:])


def test_logprobs_of_chats(client: openai.OpenAI, host: Host) -> None:
    given: dict[str, Any] = {"model": host.model, "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    for count in (None, 0, 5):
        choice = client.chat.completions.create(logprobs=True, top_logprobs=count, **given).choices[0]
        assert len(choice.logprobs.content) == 4
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == (count or 0) and bytes(token.bytes) is not None
            assert not count or token.logprob == max(top.logprob for top in token.top_logprobs)
    assert client.chat.completions.create(**given).choices[0].logprobs is None


def test_max_completion_tokens(client: openai.OpenAI, host: Host) -> None:
    answer = client.chat.completions.create(model=host.model, messages=MESSAGES, max_completion_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens <= 3
