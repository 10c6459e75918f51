"""/v1/messages with the official anthropic client, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import Message

from tests.conformance.conftest import Host
from tests.conformance.dsml import ANTHROPIC_TOOLS, NOON, PARIS, TOOLS, calls, rest_of_call

Q: list[Any] = [{"role": "user", "content": "what is a socket?"}]
THINKING: dict[str, Any] = {"type": "enabled", "budget_tokens": 1024}


def ask(claude: anthropic.Anthropic, host: Host, **options: Any) -> Any:
    return claude.messages.create(**{"model": host.model, "messages": Q, "max_tokens": 200, **options})


def accumulated(claude: anthropic.Anthropic, host: Host, **options: Any) -> Any:
    """What the client makes of the stream."""
    given = {"model": host.model, "messages": Q, "max_tokens": 200, **options}
    with claude.messages.stream(**given) as stream:
        for _ in stream:
            pass
        return stream.get_final_message()


def test_text(claude: anthropic.Anthropic, host: Host) -> None:
    host.will_say("An end of a line.")
    message = ask(claude, host)
    assert [(block.type, block.text) for block in message.content] == [("text", "An end of a line.")]
    assert (message.stop_reason, message.stop_sequence, message.role) == ("end_turn", None, "assistant")
    assert message.id.startswith("msg_") and message.model == host.model and message._request_id == message.id
    assert message.usage.output_tokens == len(host.codec.encode("An end of a line.")) + 1
    Message.model_validate(message.to_dict())


def test_the_prompt_is_that_of_the_chat(claude: anthropic.Anthropic, client: openai.OpenAI, host: Host) -> None:
    turns: list[Any] = [*Q, {"role": "assistant", "content": "An end."}, {"role": "user", "content": "Of what?"}]
    host.will_say("a", "a", "a")
    system: Any = {"role": "system", "content": "Be brief."}
    chat = client.chat.completions.create(model=host.model, messages=[system, *turns], max_tokens=2)
    assert chat.usage is not None
    blocks = [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in turns]
    cached: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    for given in ({"system": "Be brief.", "messages": turns}, {"system": cached, "messages": blocks}):
        usage = ask(claude, host, **given).usage
        assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens
        counted: dict[str, Any] = {"model": host.model, **given}
        assert claude.messages.count_tokens(**counted).input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize("make", [ask, accumulated])
def test_thinking(claude: anthropic.Anthropic, host: Host, make: Any) -> None:
    host.will_say("I ponder.</think>An end.")
    message = make(claude, host, thinking=THINKING, max_tokens=1100)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("I ponder.", "An end.")
    assert message.usage.output_tokens_details.thinking_tokens > 0
    Message.model_validate(message.to_dict())


@pytest.mark.parametrize("kind", ["adaptive", "disabled"])
def test_other_kinds_of_thinking(claude: anthropic.Anthropic, host: Host, kind: str) -> None:
    host.will_say("I ponder.</think>An end." if kind == "adaptive" else "An end.")
    message = ask(claude, host, thinking={"type": kind})
    assert message.content[-1].text == "An end." and len(message.content) == (2 if kind == "adaptive" else 1)


@pytest.mark.parametrize("make", [ask, accumulated])
def test_tool_use(claude: anthropic.Anthropic, host: Host, make: Any) -> None:
    host.will_say("I look." + calls(PARIS, NOON))
    message = make(claude, host, tools=ANTHROPIC_TOOLS)
    assert message.stop_reason == "tool_use" and message.content[0].text == "I look."
    assert [(block.name, block.input) for block in message.content[1:]] == [PARIS, NOON]
    assert len({block.id for block in message.content[1:]}) == 2
    Message.model_validate(message.to_dict())


def test_one_tool_at_a_time(claude: anthropic.Anthropic, host: Host) -> None:
    host.will_say(calls(PARIS, NOON))
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    message = ask(claude, host, tools=ANTHROPIC_TOOLS, tool_choice=choice)
    assert [(block.name, block.input) for block in message.content] == [PARIS]


def test_a_named_tool(claude: anthropic.Anthropic, host: Host) -> None:
    host.will_say(rest_of_call({"city": "Oslo"}))
    message = ask(claude, host, tools=ANTHROPIC_TOOLS, tool_choice={"type": "tool", "name": "get_time"})
    assert [(block.name, block.input) for block in message.content] == [("get_time", {"city": "Oslo"})]
    assert message.stop_reason == "tool_use"


def test_no_tool(claude: anthropic.Anthropic, host: Host) -> None:
    host.will_say("No.")
    message = ask(claude, host, tools=ANTHROPIC_TOOLS, tool_choice={"type": "none"})
    assert message.content[0].text == "No." and message.stop_reason == "end_turn"


def test_tool_results_are_given_back(claude: anthropic.Anthropic, client: openai.OpenAI, host: Host) -> None:
    host.will_say("I see.</think>" + calls(PARIS, NOON))
    turns: list[Any] = list(Q)
    first = ask(claude, host, tools=ANTHROPIC_TOOLS, thinking={"type": "adaptive"})
    turns.append({"role": "assistant", "content": [block.to_dict() for block in first.content]})
    ids = [block.id for block in first.content if block.type == "tool_use"]
    results: list[Any] = [{"type": "tool_result", "tool_use_id": i, "content": "grey"} for i in ids]
    turns.append({"role": "user", "content": [*results, {"type": "text", "text": "So?"}]})
    host.will_say("Hm.</think>Grey.")
    last = ask(claude, host, messages=turns, tools=ANTHROPIC_TOOLS, thinking={"type": "adaptive"})
    assert last.content[-1].text == "Grey."
    made = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in zip(ids, (PARIS, NOON), strict=True)
    ]
    messages: list[Any] = [
        *Q,
        {"role": "assistant", "reasoning_content": "I see.", "content": None, "tool_calls": made},
        *({"role": "tool", "tool_call_id": i, "content": "grey"} for i in ids),
        {"role": "user", "content": "So?"},
    ]
    tools = [{"type": "function", "function": {**t["function"], "description": "Something."}} for t in TOOLS]  # type: ignore[dict-item]
    host.will_say("a")
    chat = client.chat.completions.create(
        model=host.model, messages=messages, tools=tools, reasoning_effort="high", max_tokens=2
    )  # type: ignore[call-overload]
    assert last.usage.input_tokens + last.usage.cache_read_input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize("make", [ask, accumulated])
def test_stop_sequence(claude: anthropic.Anthropic, host: Host, make: Any) -> None:
    host.will_say("one two three")
    message = make(claude, host, stop_sequences=["zzz", " two"])
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == ("stop_sequence", " two", "one")


@pytest.mark.parametrize("make", [ask, accumulated])
def test_cut_off(claude: anthropic.Anthropic, host: Host, make: Any) -> None:
    host.will_say("one two three four five six seven eight")
    message = make(claude, host, max_tokens=3)
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 3


def test_an_answer_that_is_begun_goes_on(claude: anthropic.Anthropic, host: Host) -> None:
    host.will_say(" end of a line.")
    message = ask(claude, host, messages=[*Q, {"role": "assistant", "content": "An"}])
    assert message.content[0].text == " end of a line."


def test_sampling(claude: anthropic.Anthropic, host: Host) -> None:
    def said(**options: Any) -> Any:
        return ask(claude, host, max_tokens=8, extra_body={"seed": 3, "ignore_eos": True, **options}).content

    assert said(temperature=1.0) == said(temperature=1.0) == said()
    assert said(temperature=0.0) == said(top_k=1) == said(top_p=1e-9) != said(temperature=2.0)


def test_events(claude: anthropic.Anthropic, host: Host) -> None:
    host.will_say("I ponder.</think>I look." + calls(PARIS))
    said = list(ask(claude, host, stream=True, thinking=THINKING, tools=ANTHROPIC_TOOLS, max_tokens=1100))
    assert said[0].type == "message_start" and said[0].message.content == [] and said[0].message.stop_reason is None
    assert said[0].message.usage.input_tokens > 0
    assert [e.type for e in said[-2:]] == ["message_delta", "message_stop"]
    assert said[-2].delta.stop_reason == "tool_use" and said[-2].usage.output_tokens > 10
    blocks: list[list[Any]] = []
    for e in said[1:-2]:
        if e.type == "content_block_start":
            blocks.append([e.content_block.type, ""])
            assert not e.content_block.to_dict().get("text") and not e.content_block.to_dict().get("input")
        assert e.index == len(blocks) - 1, "one block after another"
        if e.type == "content_block_delta":
            pieces = e.delta.to_dict()
            blocks[-1][1] += next(pieces[name] for name in ("text", "thinking", "partial_json") if name in pieces)
    assert [e.type for e in said].count("content_block_stop") == len(blocks) == 3
    assert blocks[:2] == [["thinking", "I ponder."], ["text", "I look."]]
    assert blocks[2][0] == "tool_use" and json.loads(blocks[2][1]) == PARIS[1]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}]},
        "messages[0].content[0].content[0]",
    ),
    ({"messages": [*Q, {"role": "assistant", "content": [{"type": "redacted_thinking"}]}]}, "messages[1].content[0]"),
    (
        {"messages": [*Q, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]},
        "messages[1].content[0].input",
    ),
    ({"messages": [*Q, {"role": "assistant", "content": "a"}], "thinking": THINKING}, "messages[1]"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "a b " * 10_000}]}, "messages"),
    ({"system": [IMAGE]}, "system[0]"),
    ({"system": 3}, "system"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": "a"}, "stop_sequences"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice"),
    ({"output_config": {"effort": "enormous"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda v: json.dumps(v)[:60])
def test_bad_requests(host: Host, change: dict[str, Any], param: str) -> None:
    response = host.post("/v1/messages", {"messages": Q, "max_tokens": 8, **change})
    assert response.status_code == 400 and response.headers["content-type"] == "application/json"
    body = response.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param and body["error"]["message"]


def test_errors_are_the_clients_own(claude: anthropic.Anthropic, host: Host) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no model"):
        ask(claude, host, model="claude-9")
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        ask(claude, host, max_tokens=-1)
    with pytest.raises(anthropic.BadRequestError, match="image"):
        ask(claude, host, messages=[{"role": "user", "content": [IMAGE]}], stream=True)


def test_fields_without_effect_are_named(host: Host) -> None:
    host.will_say("I</think>a")
    result = {"type": "tool_result", "tool_use_id": "a", "content": "no", "is_error": True}
    said = host.post(
        "/v1/messages",
        {"messages": [{"role": "user", "content": [result]}], "max_tokens": 8, "thinking": THINKING, "speed": "fast"},
        headers={"anthropic-version": "2023-06-01"},
    )
    named = ["messages[0].content[0].is_error", "speed", "thinking.budget_tokens"]
    assert said.status_code == 200 and said.headers["x-ignored-fields"].split(", ") == named
