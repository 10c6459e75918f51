"""/v1/chat/completions and /v1/completions with the official openai client: shapes, streams, reasoning, tools."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.conformance.conftest import Host
from tests.conformance.dsml import NOON, PARIS, SCHEMA, TOOLS, calls, rest_of_call

Q: list[Any] = [{"role": "user", "content": "what is a socket?"}]


def ask(client: openai.OpenAI, host: Host, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": host.model, "messages": Q, "max_tokens": 300, **options})


def joined(chunks: list[Any]) -> dict[str, Any]:
    """One choice put together from its chunks, which are checked against the client's own types."""
    out: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish": None}
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.to_dict())
        for choice in chunk.choices:
            assert out["finish"] is None, "nothing follows the finish reason"
            out["content"] += choice.delta.content or ""
            out["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    out["calls"].append([call.function.name, ""])
                out["calls"][call.index][1] += call.function.arguments or ""
            out["finish"] = choice.finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    out["calls"] = [(name, json.loads(text)) for name, text in out["calls"]]
    return out


def told(answer: Any) -> dict[str, Any]:
    """The same of a whole answer."""
    ChatCompletion.model_validate(answer.to_dict())
    message = answer.choices[0].message
    return {
        "content": message.content or "",
        "reasoning": getattr(message, "reasoning_content", None) or "",
        "calls": [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or []],
        "finish": answer.choices[0].finish_reason,
    }


THINKS = {"reasoning_effort": "high"}
WITH_TOOLS: dict[str, Any] = {"tools": TOOLS}
NAMED = {**WITH_TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_time"}}}
STOPS, CALLS = {"finish": "stop"}, {"finish": "tool_calls"}
SCRIPTS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("plain", "An end.", {}, {**STOPS, "content": "An end."}),
    ("empty", "", {}, STOPS),
    ("unicode", "Ein Ende: 終わり 😀 é", {}, {**STOPS, "content": "Ein Ende: 終わり 😀 é"}),
    ("reasoning", "Hm.</think>An end.", THINKS, {**STOPS, "reasoning": "Hm.", "content": "An end."}),
    ("only reasoning", "Hm. " * 200, {**THINKS, "max_tokens": 5}, {"finish": "length"}),
    ("empty reasoning", "</think>An end.", THINKS, {**STOPS, "content": "An end."}),
    ("call", calls(PARIS), WITH_TOOLS, {**CALLS, "calls": [PARIS]}),
    ("calls", "I look." + calls(PARIS, NOON), WITH_TOOLS, {**CALLS, "content": "I look.", "calls": [PARIS, NOON]}),
    ("thought call", "Hm.</think>" + calls(NOON), WITH_TOOLS | THINKS, {**CALLS, "reasoning": "Hm.", "calls": [NOON]}),
    ("one call", calls(PARIS, NOON), {**WITH_TOOLS, "parallel_tool_calls": False}, {**CALLS, "calls": [PARIS]}),
    ("named", rest_of_call({"city": "Oslo"}), NAMED, {**CALLS, "calls": [NOON]}),
    ("none", "No.", {**WITH_TOOLS, "tool_choice": "none"}, {**STOPS, "content": "No."}),
    ("stop string", "one two three", {"stop": [" three", "zz"]}, {**STOPS, "content": "one two"}),
    ("stop across tokens", "a b c d e f g", {"stop": "c d e"}, {**STOPS, "content": "a b "}),
    ("stop behind reasoning", "b</think>a b", {"stop": "b", **THINKS}, {**STOPS, "reasoning": "b", "content": "a "}),
    ("brackets", "a < b << c <|x|> </thin> d", {}, {**STOPS, "content": "a < b << c <|x|> </thin> d"}),
]


@pytest.mark.parametrize(("script", "options", "expected"), [s[1:] for s in SCRIPTS], ids=[s[0] for s in SCRIPTS])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_is_said_arrives(
    client: openai.OpenAI, host: Host, script: str, options: dict[str, Any], expected: dict[str, Any], stream: bool
) -> None:
    host.will_say(script)
    answer = ask(client, host, stream=stream, **options)
    found = joined(list(answer)) if stream else told(answer)
    nothing: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    if options.get("max_tokens") == 5:
        expected = {**expected, "reasoning": found["reasoning"]}
        assert found["reasoning"]
    assert found == {**nothing, **expected}


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_choices_do_not_mix(client: openai.OpenAI, host: Host, n: int, stream: bool) -> None:
    texts = [f"{i} said " * (i + 1) for i in range(n)]
    host.will_say(*texts)
    answer = ask(client, host, n=n, stream=stream)
    if stream:
        said = ["" for _ in range(n)]
        for chunk in answer:
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
    else:
        said = [choice.message.content for choice in answer.choices]
    assert said == texts


def test_turns_with_tools_are_taken_back(client: openai.OpenAI, host: Host) -> None:
    """The client's own message objects, as users append them."""
    host.will_say("I look." + calls(PARIS))
    turns = list(Q)
    first = ask(client, host, tools=TOOLS)
    turns.append(first.choices[0].message)
    turns.append({"role": "tool", "tool_call_id": first.choices[0].message.tool_calls[0].id, "content": "grey"})
    host.will_say("Grey.")
    last = ask(client, host, messages=turns, tools=TOOLS)
    assert last.choices[0].message.content == "Grey."


def test_the_clients_own_accumulation(client: openai.OpenAI, host: Host) -> None:
    host.will_say("I look." + calls(PARIS))
    strict: Any = [{"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": CLOSED}}]
    with client.chat.completions.stream(model=host.model, messages=Q, tools=strict) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content == "I look." and message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == PARIS[1]


CLOSED = {**SCHEMA, "additionalProperties": False, "required": ["city", "days"]}


def test_structured_output_is_enforced(client: openai.OpenAI, host: Host) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = ask(client, host, response_format=form, temperature=1, seed=seed)
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content)["a"], int)
    given: Any = {"model": host.model, "prompt": "a", "max_tokens": 8, "extra_body": {"guided_choice": ["yes", "no"]}}
    assert client.completions.create(**given).choices[0].text in ("yes", "no")


def test_completions_shape(client: openai.OpenAI, host: Host) -> None:
    host.will_say("one two", "one two")
    given: Any = {"model": host.model, "prompt": "a", "max_tokens": 20}
    whole = client.completions.create(**given)
    Completion.model_validate(whole.to_dict())
    assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == (
        "text_completion",
        "one two",
        "stop",
    )
    chunks = list(client.completions.create(stream=True, **given))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize("kind", ["text", "texts", "ids", "id lists"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_kinds_of_prompts(client: openai.OpenAI, host: Host, kind: str, stream: bool) -> None:
    texts = ["one", "two two"]
    ids = [host.codec.encode(text) for text in texts]
    prompt: Any = {"text": texts[0], "texts": texts, "ids": ids[0], "id lists": ids}[kind]
    count = 1 if kind in ("text", "ids") else 2
    host.will_say(*("first", "second")[:count])
    answer = client.completions.create(model=host.model, prompt=prompt, max_tokens=20, stream=stream)
    said = ["" for _ in range(count)]
    for part in answer if stream else [answer]:  # type: ignore[union-attr]
        for choice in part.choices:
            said[choice.index] += choice.text
    assert said == ["first", "second"][:count]


def test_asynchronous_client(host: Host) -> None:
    host.will_say("one", "one")

    async def both() -> list[Any]:
        client = openai.AsyncOpenAI(base_url=f"{host.url}/v1", api_key="unused", max_retries=0)
        whole = await client.chat.completions.create(model=host.model, messages=Q)
        stream = await client.chat.completions.create(model=host.model, messages=Q, stream=True)
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
        return [whole.choices[0].message.content, text]

    assert asyncio.run(both()) == ["one", "one"]


def test_errors_are_the_clients_own(client: openai.OpenAI, host: Host) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, host, model="gpt-9")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, host, messages=[{"role": "system", "content": "a b " * 10_000}, *Q])
    assert long.value.code == "context_length_exceeded" and long.value.type == "invalid_request_error"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="image"):
            ask(client, host, stream=stream, messages=[{"role": "user", "content": [{"type": "image_url"}]}])
