"""Structured output and forced calls at every endpoint, whole and streamed: nano's own words, held to it."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import openai
import pytest

from tests.conformance.conftest import Host
from tests.conformance.dsml import NOON, PARIS, TOOLS, calls

Q: list[Any] = [{"role": "user", "content": "which one?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["file", "socket"]}, "open": {"type": "boolean"}},
    "required": ["kind", "open"],
    "additionalProperties": False,
}
GBNF = 'root ::= ("yes" | "no") ", " [0-9] [0-9]?'
KINDS: dict[str, dict[str, Any]] = {
    "json": {"structured_outputs": {"json": SCHEMA}},
    "guided_json": {"guided_json": json.dumps(SCHEMA)},
    "choice": {"structured_outputs": {"choice": ["yes", "no, never"]}},
    "guided_choice": {"guided_choice": ["yes", "no, never"]},
    "regex": {"structured_outputs": {"regex": "[a-f]{3,5}-[0-9]{2}"}},
    "guided_regex": {"guided_regex": "[a-f]{3,5}-[0-9]{2}"},
    "grammar": {"structured_outputs": {"grammar": GBNF}},
    "guided_grammar": {"guided_grammar": GBNF},
}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
FORMATS: dict[str, dict[str, Any]] = {
    "completions": {"extra_body": {"response_format": FORM}},
    "chat": {"response_format": FORM},
    "responses": {"text": {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}}},
    "messages": {"extra_body": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}},
}
ENDPOINTS = sorted(FORMATS)
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Ask:
    """The same request at any endpoint, with its official client: the text or the calls of the answer."""

    def __init__(self, client: openai.OpenAI, claude: anthropic.Anthropic, model: str) -> None:
        self.client, self.claude, self.model = client, claude, model

    def text(self, endpoint: str, stream: bool, **options: Any) -> str:
        given: dict[str, Any] = {"model": self.model, "stream": stream, **options}
        if endpoint == "completions":
            answer = self.client.completions.create(prompt="which one? ", max_tokens=200, **given)
            return "".join(c.text for part in (answer if stream else [answer]) for c in part.choices)
        if endpoint == "chat":
            answer = self.client.chat.completions.create(messages=Q, max_tokens=200, **given)
            if not stream:
                return answer.choices[0].message.content or ""
            return "".join(c.delta.content or "" for part in answer for c in part.choices)
        if endpoint == "responses":
            answer = self.client.responses.create(input=Q, max_output_tokens=200, **given)
            if not stream:
                return str(answer.output_text)
            return "".join(event.delta for event in answer if event.type == "response.output_text.delta")
        answer = self.claude.messages.create(messages=Q, max_tokens=200, **given)
        if not stream:
            return "".join(block.text for block in answer.content)
        return "".join(e.delta.text for e in answer if e.type == "content_block_delta")

    def calls(self, endpoint: str, stream: bool, tool: dict[str, Any], choice: str) -> list[tuple[str, Any]]:
        """`choice`: required or named."""
        name, parameters = tool["name"], tool["parameters"]
        given: dict[str, Any] = {"model": self.model, "stream": stream}
        if endpoint == "chat":
            named: Any = {"type": "function", "function": {"name": name}}
            given |= {"tools": [{"type": "function", "function": {**tool, "strict": True}}], "max_tokens": 200}
            given["tool_choice"] = "required" if choice == "required" else named
            answer = self.client.chat.completions.create(messages=Q, **given)
            if not stream:
                made = answer.choices[0].message.tool_calls
                return [(call.function.name, json.loads(call.function.arguments)) for call in made]
            deltas = [d for part in answer for c in part.choices for d in c.delta.tool_calls or ()]
            names = [d.function.name for d in deltas if d.id is not None]
            texts = ["".join(d.function.arguments or "" for d in deltas if d.index == i) for i in range(len(names))]
            return list(zip(names, map(json.loads, texts), strict=True))
        if endpoint == "responses":
            given |= {"tools": [{"type": "function", **tool, "strict": True}], "max_output_tokens": 200}
            given["tool_choice"] = "required" if choice == "required" else {"type": "function", "name": name}
            answer = self.client.responses.create(input=Q, **given)
            items = list(answer)[-1].response.output if stream else answer.output
            return [(item.name, json.loads(item.arguments)) for item in items]
        given |= {"tools": [{"name": name, "input_schema": parameters}], "max_tokens": 200}
        given["tool_choice"] = {"type": "any"} if choice == "required" else {"type": "tool", "name": name}
        if not stream:
            return [(block.name, block.input) for block in self.claude.messages.create(messages=Q, **given).content]
        del given["stream"]
        with self.claude.messages.stream(messages=Q, **given) as events:
            return [(block.name, block.input) for block in events.get_final_message().content]


@pytest.fixture
def ask(client: openai.OpenAI, claude: anthropic.Anthropic, host: Host) -> Ask:
    return Ask(client, claude, host.model)


def check(kind: str, text: str) -> None:
    if "json" in kind:
        answer = json.loads(text)
        assert set(answer) == {"kind", "open"} and answer["kind"] in ("file", "socket"), text
        assert isinstance(answer["open"], bool)
    elif "choice" in kind:
        assert text in ("yes", "no, never")
    else:
        assert re.fullmatch("[a-f]{3,5}-[0-9]{2}" if "regex" in kind else "(yes|no), [0-9][0-9]?", text), text


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("kind", sorted(KINDS))
@STREAM
def test_text_is_held_to_what_was_asked(ask: Ask, endpoint: str, kind: str, stream: bool) -> None:
    check(kind, ask.text(endpoint, stream, extra_body={**KINDS[kind], "seed": 3}))


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@STREAM
def test_each_api_s_own_spelling_of_a_schema(ask: Ask, endpoint: str, stream: bool) -> None:
    check("json", ask.text(endpoint, stream, **FORMATS[endpoint]))


@pytest.mark.parametrize("endpoint", ["chat", "responses", "messages"])
@pytest.mark.parametrize("choice", ["required", "named"])
@STREAM
def test_a_forced_call_keeps_to_its_schema(ask: Ask, endpoint: str, choice: str, stream: bool) -> None:
    tool = {"name": "look", "description": "Looks.", "parameters": SCHEMA}
    ((name, arguments),) = ask.calls(endpoint, stream, tool, choice)
    assert name == "look"
    check("json", json.dumps(arguments))


@STREAM
def test_a_call_is_forced_behind_reasoning(client: openai.OpenAI, host: Host, stream: bool) -> None:
    host.will_say("Hm.</think>" + calls(NOON))
    named: Any = {"type": "function", "function": {"name": "get_time"}}
    given: dict[str, Any] = {"tools": TOOLS, "tool_choice": named, "reasoning_effort": "high", "max_tokens": 300}
    answer = client.chat.completions.create(model=host.model, messages=Q, stream=stream, **given)
    if not stream:
        message = answer.choices[0].message
        assert message.reasoning_content == "Hm." and message.tool_calls[0].function.name == "get_time"
        assert json.loads(message.tool_calls[0].function.arguments) == NOON[1]
        return
    deltas = [choice.delta for part in answer for choice in part.choices]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Hm."
    texts = [c.function.arguments or "" for d in deltas for c in d.tool_calls or ()]
    assert json.loads("".join(texts)) == NOON[1]


@STREAM
def test_allowed_tools(client: openai.OpenAI, host: Host, stream: bool) -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    host.will_say(calls(PARIS))
    choice: Any = {"type": "allowed_tools", "allowed_tools": allowed}
    given: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
    answer = client.chat.completions.create(model=host.model, messages=Q, stream=stream, **given)
    if stream:
        names = [c.function.name for p in answer for o in p.choices for c in o.delta.tool_calls or () if c.id]
    else:
        names = [call.function.name for call in answer.choices[0].message.tool_calls]
    assert names == ["get_weather"]


def test_a_schema_that_is_only_shown_is_not_enforced(client: openai.OpenAI, host: Host) -> None:
    host.will_say("no JSON")
    shown: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": False}}
    answer = client.chat.completions.create(model=host.model, messages=Q, response_format=shown)
    assert answer.choices[0].message.content == "no JSON"
