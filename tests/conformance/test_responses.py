"""/v1/responses with the official openai client, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from tests.conformance.conftest import Host
from tests.conformance.dsml import NOON, PARIS, RESPONSES_TOOLS, calls, rest_of_call

Q = "what is a socket?"


def ask(client: openai.OpenAI, host: Host, **options: Any) -> Any:
    return client.responses.create(**{"model": host.model, "input": Q, "max_output_tokens": 200, **options})


def events(client: openai.OpenAI, host: Host, **options: Any) -> list[Any]:
    return list(ask(client, host, stream=True, **options))


def parsed(response: Any) -> Response:
    """The response, checked strictly against the client's own types."""
    return Response.model_validate(response.to_dict())


def test_text(client: openai.OpenAI, host: Host) -> None:
    host.will_say("An end of a line.")
    response = ask(client, host)
    assert response.output_text == "An end of a line." and response.status == "completed"
    assert response.id.startswith("resp_") and response.object == "response" and response.store is False
    assert [item.type for item in response.output] == ["message"]
    assert response.output[0].role == "assistant" and response.output[0].status == "completed"
    assert (
        response.usage.input_tokens > 4
        and response.usage.output_tokens == len(host.codec.encode("An end of a line.")) + 1
    )
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    parsed(response)


def test_what_the_request_said_is_repeated(client: openai.OpenAI, host: Host) -> None:
    host.will_say("a")
    given: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "metadata": {"a": "b"}, "instructions": "Be brief."}
    response = ask(client, host, parallel_tool_calls=False, tool_choice="none", tools=RESPONSES_TOOLS, **given)
    for name, value in given.items():
        assert getattr(response, name) == value
    assert response.max_output_tokens == 200 and response.parallel_tool_calls is False
    assert response.tool_choice == "none" and len(response.tools) == 2


def test_the_prompt_is_that_of_the_chat(client: openai.OpenAI, host: Host) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": Q},
        {"role": "assistant", "content": "An end."},
        {"role": "user", "content": "Of what?"},
    ]
    host.will_say("a", "a", "a")
    chat = client.chat.completions.create(model=host.model, messages=messages, max_tokens=2)
    items = [{"role": m["role"], "content": m["content"]} for m in messages[1:]]
    one = ask(client, host, instructions="Be brief.", input=items)
    items[0]["content"] = [{"type": "input_text", "text": Q}]
    items[1] = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "An end."}]}
    other = ask(client, host, input=[{"role": "developer", "content": "Be brief."}, *items])
    assert chat.usage is not None
    assert one.usage.input_tokens == other.usage.input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(client: openai.OpenAI, host: Host, stream: bool) -> None:
    host.will_say("I ponder.</think>An end.")
    options: dict[str, Any] = {"reasoning": {"effort": "high"}}
    response = events(client, host, **options)[-1].response if stream else ask(client, host, **options)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "I ponder." and response.output_text == "An end."
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    parsed(response)


@pytest.mark.parametrize("stream", [False, True])
def test_function_calls(client: openai.OpenAI, host: Host, stream: bool) -> None:
    host.will_say("I look." + calls(PARIS, NOON))
    options: dict[str, Any] = {"tools": RESPONSES_TOOLS}
    response = events(client, host, **options)[-1].response if stream else ask(client, host, **options)
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    made = [(item.name, json.loads(item.arguments)) for item in response.output[1:]]
    assert made == [PARIS, NOON] and response.status == "completed"
    assert len({item.call_id for item in response.output[1:]}) == 2
    parsed(response)


def test_calls_and_their_results_are_given_back(client: openai.OpenAI, host: Host) -> None:
    host.will_say("I see.</think>" + calls(PARIS))
    turns: list[Any] = [{"role": "user", "content": "How is it in Paris?"}]
    first = ask(client, host, input=turns, tools=RESPONSES_TOOLS, reasoning={"effort": "high"})
    turns += [item.to_dict() for item in first.output]
    call_id = first.output[-1].call_id
    turns.append({"type": "function_call_output", "call_id": call_id, "output": '{"sky": "grey"}'})
    host.will_say("Grey it is, I think.</think>Grey.")
    last = ask(client, host, input=turns, tools=RESPONSES_TOOLS, reasoning={"effort": "high"})
    assert last.output_text == "Grey."
    host.will_say("a")
    call = {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(PARIS[1])}}
    chat = client.chat.completions.create(
        model=host.model,
        tools=[{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in RESPONSES_TOOLS],
        reasoning_effort="high",
        max_tokens=2,
        messages=[
            turns[0],
            {"role": "assistant", "reasoning_content": "I see.", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "content": '{"sky": "grey"}'},
        ],  # type: ignore[arg-type, list-item]
    )
    assert chat.usage is not None and last.usage.input_tokens == chat.usage.prompt_tokens


def test_a_named_function(client: openai.OpenAI, host: Host) -> None:
    host.will_say(rest_of_call({"city": "Oslo"}))
    response = ask(client, host, tools=RESPONSES_TOOLS, tool_choice={"type": "function", "name": "get_time"})
    assert [(item.type, item.name, json.loads(item.arguments)) for item in response.output] == [
        ("function_call", "get_time", {"city": "Oslo"})
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_cut_off(client: openai.OpenAI, host: Host, stream: bool) -> None:
    host.will_say("one two three four five six seven eight")
    options: dict[str, Any] = {"max_output_tokens": 3}
    said = events(client, host, **options) if stream else []
    response = said[-1].response if stream else ask(client, host, **options)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete" and response.usage.output_tokens == 3
    assert not stream or said[-1].type == "response.incomplete"


def test_events_grow_the_items(client: openai.OpenAI, host: Host) -> None:
    host.will_say("I ponder.</think>I look." + calls(PARIS))
    said = events(client, host, reasoning={"effort": "high"}, tools=RESPONSES_TOOLS)
    assert [e.sequence_number for e in said] == list(range(len(said)))
    assert [e.type for e in said[:2]] == ["response.created", "response.in_progress"]
    assert said[0].response.status == "in_progress" and said[0].response.output == []
    final = said[-1].response
    for i, item in enumerate(final.output):
        mine = [e for e in said if getattr(e, "output_index", None) == i]
        assert (mine[0].type, mine[-1].type) == ("response.output_item.added", "response.output_item.done")
        assert mine[-1].item.to_dict() == item.to_dict() and mine[0].item.status == "in_progress"
        text = "".join(e.delta for e in mine if e.type.endswith(".delta"))
        whole = item.arguments if item.type == "function_call" else item.content[0].text
        assert text == whole
        (done,) = [e for e in mine if e.type.endswith(("text.done", "arguments.done"))]
        assert (done.arguments if item.type == "function_call" else done.text) == whole
    ends = [i for i, e in enumerate(said) if e.type == "response.output_item.done"]
    starts = [i for i, e in enumerate(said) if e.type == "response.output_item.added"]
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False)), "one item after another"


def test_the_clients_own_accumulation(client: openai.OpenAI, host: Host) -> None:
    host.will_say("I look." + calls(NOON))
    with client.responses.stream(model=host.model, input=Q, tools=RESPONSES_TOOLS) as stream:  # type: ignore[arg-type]
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "I look." and final.output[-1].type == "function_call"


def test_logprobs(client: openai.OpenAI, host: Host) -> None:
    options: dict[str, Any] = {"top_logprobs": 2, "include": ["message.output_text.logprobs"], "max_output_tokens": 4}
    response = ask(client, host, temperature=0, extra_body={"ignore_eos": True}, **options)
    scores = response.output[0].content[0].logprobs
    assert len(scores) == 4 and all(len(score.top_logprobs) == 2 for score in scores)
    host.will_say("I ponder.</think>An end.")
    reasoned = ask(client, host, reasoning={"effort": "high"}, top_logprobs=0)
    scores = reasoned.output[1].content[0].logprobs
    assert "".join(score.token for score in scores) == "An end."


def test_json_is_asked_for_in_the_prompt(client: openai.OpenAI, host: Host) -> None:
    lengths = []
    for text in ({"format": {"type": "text"}}, {"format": {"type": "json_object"}}):
        host.will_say('{"a": 1}')
        response = ask(client, host, text=text)
        assert response.output_text == '{"a": 1}' and response.text.format.type == text["format"]["type"]
        lengths.append(response.usage.input_tokens)
    assert lengths[0] < lengths[1]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": ["hi"]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "hi"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
    ({"instructions": "a", "input": [{"role": "user", "content": [{"type": "x"}]}]}, "input[0].content[0]"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ({"input": "a b " * 10_000}, "input"),
    ({"temperature": -1}, "temperature"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": RESPONSES_TOOLS, "tool_choice": {"type": "function", "name": "nope"}}, "tool_choice"),
    ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"metadata": {"a": 1}}, "metadata.a"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda v: json.dumps(v)[:60])
def test_bad_requests_are_named_in_their_own_words(
    client: openai.OpenAI, host: Host, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, host, **change)
    assert caught.value.param == param
    assert not any(f"`{word}" in str(caught.value) for word in ("messages", "max_tokens", "response_format"))


def test_fields_without_effect_are_named(host: Host) -> None:
    host.will_say("a")
    odd = {"store": True, "max_tool_calls": 3, "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"}}
    said = host.post("/v1/responses", {"input": Q, "reasoning": {"summary": "auto"}, "user": "u", **odd})
    named = ["include[0]", "max_tool_calls", "reasoning.summary", "store", "text.verbosity"]
    assert said.headers["x-ignored-fields"].split(", ") == named
