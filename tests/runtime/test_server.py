"""The official `openai` client against a real server, over the stand-in and over the bundled nano model."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from dsv4c.runtime.poolsizes import PoolSizes
from tests.runtime.live import Live, wait_for
from tests.runtime.standin import direct_logits

PROMPT = "the server reads a file and "
CHAT: list[Any] = [{"role": "user", "content": "what is a socket?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(params=["toy", "nano"])
def live(request: pytest.FixtureRequest) -> Live:
    server: Live = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.api, api_key="unused", max_retries=0)


def complete(client: openai.OpenAI, live: Live, **options: Any) -> Any:
    return client.completions.create(**{"model": live.model, "prompt": PROMPT, "max_tokens": 16, **GREEDY, **options})


def chat(client: openai.OpenAI, live: Live, **options: Any) -> Any:
    given = {"model": live.model, "messages": CHAT, "max_tokens": 16, **GREEDY, **options}
    return client.chat.completions.create(**given)


def test_lists_models(client: openai.OpenAI, live: Live) -> None:
    assert [model.id for model in client.models.list()] == [live.model]
    assert client.models.retrieve(live.model).id == live.model
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("gpt-9")


def test_completion(client: openai.OpenAI, live: Live) -> None:
    answer = complete(client, live)
    assert answer.object == "text_completion" and answer.model == live.model and answer.id.startswith("cmpl-")
    assert answer.choices[0].text and answer.choices[0].finish_reason == "length"
    num_prompt = len(live.codec.encode(PROMPT))
    assert answer.usage.prompt_tokens == num_prompt
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (16, num_prompt + 16)


def cached(usage: Any) -> int:
    return int(usage.prompt_tokens_details.cached_tokens)


def prefix_metrics(live: Live) -> list[int]:
    """Tokens looked up, and found."""
    lines = httpx.get(f"{live.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return [int(float(values[f"dsv4c_prefix_cache_{name}_total"])) for name in ("queries", "hits")]


def test_cached_tokens_in_usage_and_metrics(client: openai.OpenAI, live: Live) -> None:
    ids = [random.Random(i).randrange(10, 60) for i in range(600)]
    before = prefix_metrics(live)
    assert [cached(complete(client, live, prompt=ids, max_tokens=2).usage) for _ in range(2)] == [0, 512]
    assert [b - a for a, b in zip(before, prefix_metrics(live), strict=True)] == [1200, 512]
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    assert cached(list(complete(client, live, prompt=ids, **asked))[-1].usage) == 512
    assert cached(complete(client, live, prompt=ids, n=2).usage) == 512, "a prompt counts once"
    complete(client, live, prompt=[ids[:300], ids[300:]])
    assert cached(complete(client, live, prompt=[ids, ids[:300], ids[300:]]).usage) == 512 + 256 + 256
    stopped = complete(client, live, prompt=ids, logprobs=0, echo=True, max_tokens=1)
    assert cached(stopped.usage) == 0, "whoever wants the prompt's log-probabilities computes all of it"
    said: list[Any] = [{"role": "user", "content": " ".join(map(str, ids[:200]))}]
    first, second = chat(client, live, messages=said).usage, chat(client, live, messages=said).usage
    assert cached(first) == 0 and cached(second) == (second.prompt_tokens - 1) // 256 * 256 > 0
    assert cached(list(chat(client, live, messages=said, **asked))[-1].usage) == cached(second)


def test_prompts_as_text_and_ids_alone_and_together(client: openai.OpenAI, live: Live) -> None:
    texts = ["a ", "open the file ", "return "]
    alone = [complete(client, live, prompt=text).choices[0].text for text in texts]
    ids = [live.codec.encode(text) for text in texts]
    assert [complete(client, live, prompt=i).choices[0].text for i in ids] == alone
    for together in (texts, ids):
        answer = complete(client, live, prompt=together)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage.prompt_tokens == sum(map(len, ids)) and answer.usage.completion_tokens == 48


def test_default_length_of_a_completion(client: openai.OpenAI, live: Live) -> None:
    answer = client.completions.create(model=live.model, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("options", [{}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1}, {"n": 2}])
def test_streamed_completion_is_the_whole_one(client: openai.OpenAI, live: Live, options: dict[str, Any]) -> None:
    whole = complete(client, live, seed=1, **options)
    chunks = list(complete(client, live, seed=1, stream=True, **options))
    assert all(chunk.id == chunks[0].id and chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        if "logprobs" not in options:
            assert choice.logprobs is None
            continue
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [item for c in mine for item in getattr(c.logprobs, name)]
            assert (
                joined == pytest.approx(getattr(choice.logprobs, name), abs=1e-4)
                if name == "token_logprobs"
                else (len(joined) == len(getattr(choice.logprobs, name)))
            )


def test_stream_with_usage(client: openai.OpenAI, live: Live) -> None:
    for call in (complete, chat):
        usage = call(client, live).usage
        chunks = list(call(client, live, stream=True, stream_options={"include_usage": True}))
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices == [] and chunks[-1].usage == usage


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, live: Live, max_tokens: int) -> None:
    """The request of log-likelihood evaluations."""
    ids = live.codec.encode(PROMPT)
    answer = complete(client, live, prompt=[ids, ids[:5]], echo=True, logprobs=1, max_tokens=max_tokens)
    for choice, prompt in zip(answer.choices, [ids, ids[:5]], strict=True):
        scores = choice.logprobs
        assert choice.text.startswith(live.codec.decode(prompt))
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == len(prompt) + max_tokens
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        assert all(value <= 0 for value in scores.token_logprobs[1:])
        assert all(1 <= len(top) <= 2 for top in scores.top_logprobs[1:])
        assert all(
            max(t.values()) >= v for t, v in zip(scores.top_logprobs[1:], scores.token_logprobs[1:], strict=True)
        )
        for token, start, end in zip(scores.tokens, scores.text_offset, scores.text_offset[1:], strict=False):
            assert token.startswith("bytes:") or choice.text[start:end] == token
        if max_tokens:  # greedy: the generated token is the most likely one
            assert scores.token_logprobs[-1] == max(scores.top_logprobs[-1].values())
    assert answer.usage.completion_tokens == 2 * max_tokens
    assert answer.choices[0].finish_reason == "length"


def test_echo_without_generation(client: openai.OpenAI, live: Live) -> None:
    answer = complete(client, live, echo=True, max_tokens=0)
    assert answer.choices[0].text == PROMPT and answer.usage.completion_tokens == 0
    chunks = list(complete(client, live, echo=True, max_tokens=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT


def test_logprobs_are_the_models(toy_server: Live) -> None:
    client = openai.OpenAI(base_url=toy_server.api, api_key="unused", max_retries=0)
    ids = toy_server.codec.encode(PROMPT)
    scores = complete(client, toy_server, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    for i in range(1, len(ids)):
        logits = direct_logits(ids[:i]).astype(np.float64)
        expected = logits[ids[i]] - math.log(np.exp(logits).sum())
        assert scores.token_logprobs[i] == pytest.approx(expected, abs=1e-4)


def test_chat(client: openai.OpenAI, live: Live) -> None:
    answer = chat(client, live)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content
    assert not hasattr(message, "reasoning_content")
    assert answer.usage.completion_tokens == 16 and answer.usage.prompt_tokens > 4
    assert chat(client, live, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


def test_streamed_chat_is_the_whole_one(client: openai.OpenAI, live: Live) -> None:
    whole = chat(client, live, logprobs=True, top_logprobs=2, n=2, temperature=1, seed=3)
    chunks = list(chat(client, live, logprobs=True, top_logprobs=2, n=2, temperature=1, seed=3, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason == "length"
        tokens = [entry for c in mine if c.logprobs for entry in c.logprobs.content]
        assert [entry.token for entry in tokens] == [entry.token for entry in choice.logprobs.content]
        assert all(len(entry.top_logprobs) == 2 for entry in tokens)
        raw = b"".join(bytes(e.bytes) for e in tokens if e.token not in live.special)
        assert raw.decode(errors="replace") == choice.message.content


def test_thinking_keeps_reasoning_apart(client: openai.OpenAI, live: Live) -> None:
    """The end of thinking is forced by a bias once, and made impossible once."""
    end = next(i for i in range(live.codec.vocab_size) if live.codec.token_text(i) == "</think>")
    ways: list[dict[str, Any]] = [
        {"reasoning_effort": "high"},
        {"extra_body": {"thinking": {"type": "enabled"}, "ignore_eos": True}},
        {"extra_body": {"chat_template_kwargs": {"thinking": True}, "ignore_eos": True}},
    ]
    for way in ways:
        never = chat(client, live, logit_bias={str(end): -100}, **way)
        assert never.choices[0].message.reasoning_content and not never.choices[0].message.content
        assert never.usage.completion_tokens_details.reasoning_tokens == 16
    always = chat(client, live, logit_bias={str(end): 100}, max_tokens=3, reasoning_effort="high")
    message = always.choices[0].message
    assert message.reasoning_content == "" and message.content == "</think></think>"
    chunks = list(chat(client, live, logit_bias={str(end): -100}, reasoning_effort="high", stream=True))
    said = [getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks]
    never = chat(client, live, logit_bias={str(end): -100}, reasoning_effort="high")
    assert "".join(said) == never.choices[0].message.reasoning_content


def test_nano_is_made_to_call_tools(nano_server: Live) -> None:
    """What nano writes after a forced head is no markup; all of it arrives, in both ways the same."""
    client = openai.OpenAI(base_url=nano_server.api, api_key="unused", max_retries=0)
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    named = {"type": "function", "function": {"name": "f"}}
    for choice in (named, "required"):
        asked: dict[str, Any] = {"tools": [tool], "tool_choice": choice, "max_tokens": 24}
        whole = chat(client, nano_server, **asked).choices[0]
        assert [call.function.name for call in whole.message.tool_calls] == ["f"]
        deltas = [chunk.choices[0].delta for chunk in chat(client, nano_server, stream=True, **asked) if chunk.choices]
        assert "".join(d.content or "" for d in deltas) == (whole.message.content or "")
        assert [c.function.name for d in deltas for c in d.tool_calls or [] if c.function.name] == ["f"]
        assert "DSML" not in (whole.message.content or "") and whole.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text(client: openai.OpenAI, live: Live, stream: bool) -> None:
    text = complete(client, live, max_tokens=48).choices[0].text
    stop = text[12:15]
    given = complete(client, live, max_tokens=48, stop=["never seen", stop], logprobs=1, stream=stream)
    chunks = list(given) if stream else [given]
    assert "".join(c.choices[0].text for c in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert len(tokens) <= 15
    used = complete(client, live, max_tokens=48, stop=stop).usage.completion_tokens
    assert used < 48
    wait_for(lambda: live.pages_used() == 0)


def test_stop_token_ends_with_stop(client: openai.OpenAI, live: Live) -> None:
    eos = live.codec.eos_token_ids[0]
    answer = complete(client, live, logit_bias={str(eos): 100}, extra_body={})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1
    chunks = list(chat(client, live, logit_bias={str(eos): 100}, extra_body={}, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_seed_reproduces(client: openai.OpenAI, live: Live) -> None:
    def draw(seed: int, n: int = 1, **options: Any) -> list[str]:
        answer = complete(client, live, seed=seed, n=n, temperature=1, max_tokens=24, **options)
        return [choice.text for choice in answer.choices]

    assert draw(7) == draw(7) != draw(8)
    three = draw(7, n=3)
    assert three == draw(7, n=3) and len(set(three)) == 3 and three[:1] == draw(7)
    sampled = {"top_p": 0.9, "extra_body": {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True}}
    assert draw(9, presence_penalty=0.5, **sampled) == draw(9, presence_penalty=0.5, **sampled)


def test_knobs_reach_the_engine(client: openai.OpenAI, live: Live) -> None:
    greedy = complete(client, live).choices[0].text
    one = {"ignore_eos": True}
    assert complete(client, live, temperature=1, extra_body={"top_k": 1, **one}).choices[0].text == greedy
    assert complete(client, live, temperature=1, extra_body={"min_p": 1.0, **one}).choices[0].text == greedy
    token = live.codec.encode("a")[0]
    forced = complete(client, live, logit_bias={str(token): 100}, max_tokens=4).choices[0].text
    assert forced == "aaaa"
    varied = complete(client, live, logit_bias={str(token): 20}, extra_body={"repetition_penalty": 10.0, **one})
    assert varied.choices[0].text != "a" * 16


async def _read(stream: AsyncIterator[Any]) -> str:
    return "".join([chunk.choices[0].text async for chunk in stream])


def test_32_concurrent_streams(client: openai.OpenAI, live: Live) -> None:
    prompts = [f"{PROMPT}{i} " for i in range(32)]
    alone = [complete(client, live, prompt=p, max_tokens=24).choices[0].text for p in prompts[:4]]

    async def one(many: openai.AsyncOpenAI, prompt: str) -> str:
        given: dict[str, Any] = {"model": live.model, "max_tokens": 24, "stream": True, **GREEDY}
        return await _read(await many.completions.create(prompt=prompt, **given))

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=live.api, api_key="unused", max_retries=0) as many:
            return await asyncio.gather(*[one(many, p) for p in prompts])

    texts = asyncio.run(all_of_them())
    assert texts[:4] == alone and all(texts)
    wait_for(lambda: live.pages_used() == 0)


def test_client_that_leaves_mid_stream_frees_its_pages(client: openai.OpenAI, live: Live) -> None:
    for call in (complete, chat):
        stream = call(client, live, max_tokens=_room(live), stream=True)
        next(iter(stream))
        assert live.pages_used() > 0
        stream.close()
        wait_for(lambda: live.pages_used() == 0)
    live.engine.audit()
    assert complete(client, live, max_tokens=2).usage.completion_tokens == 2


def _room(live: Live) -> int:
    sizes: PoolSizes = live.engine.pool.sizes
    return min(2000, sizes.max_context - 200)
