"""Thinking modes, efforts, quick tasks and open prefixes over HTTP: what the model is shown, how its answer is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from dsv4c.chat.codec import ChatCodec
from dsv4c.runtime.app import create_app
from dsv4c.runtime.grammar import Grammars
from tests.runtime.scripted import ScriptedEngine, small_codec

Q = [{"role": "user", "content": "q"}]
OLD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "why"}, *Q]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module", params=["preview", "0731"])
def codec(request: pytest.FixtureRequest) -> ChatCodec:
    return small_codec(request.param)


@contextmanager
def serving(codec: ChatCodec, *answers: str, **options: Any) -> Iterator[Callable[..., httpx.Response]]:
    """A function that asks, and gives the response with the prompt in its headers."""
    engine = ScriptedEngine(codec, answers)
    with TestClient(create_app(engine, codec, "m", grammars=Grammars(codec), **options)) as http:

        def ask(messages: Any = Q, **fields: Any) -> httpx.Response:
            response = http.post("/v1/chat/completions", json={"model": "m", "messages": messages, **fields})
            if engine.prompts:
                response.extensions["prompt"] = codec.decode(engine.prompts[-1])
            return response

        yield ask


def message(response: httpx.Response) -> tuple[str | None, str | None]:
    """(reasoning, content)."""
    assert response.status_code == 200, response.text
    said = response.json()["choices"][0]["message"]
    return said.get("reasoning_content"), said["content"]


THINKS: list[dict[str, Any]] = [
    {"thinking": {"type": "enabled"}},
    {"reasoning_effort": "high"},
    {"reasoning_effort": "max"},
    {"chat_template_kwargs": {"thinking": True}},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"chat_template_kwargs": {"reasoning_effort": "high"}},
    {"chat_template_kwargs": {"thinking": True, "reasoning_effort": "high"}, "reasoning_effort": "high"},
]
CHATS: list[dict[str, Any]] = [
    {},
    {"thinking": {"type": "disabled"}},
    {"reasoning_effort": "none"},
    {"chat_template_kwargs": {"thinking": False}},
]


@pytest.mark.parametrize("fields", THINKS)
def test_thinking_keeps_reasoning_apart(codec: ChatCodec, fields: dict[str, Any]) -> None:
    with serving(codec, "why</think>so") as ask:
        response = ask(**fields)
        assert message(response) == ("why", "so")
        assert response.extensions["prompt"].endswith("<｜User｜>q<｜Assistant｜><think>")
        assert response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize("fields", CHATS)
def test_chat_is_content_alone(codec: ChatCodec, fields: dict[str, Any]) -> None:
    with serving(codec, "so") as ask:
        response = ask(**fields)
        assert message(response) == (None, "so")
        assert response.extensions["prompt"].endswith("<｜User｜>q<｜Assistant｜></think>")


def test_the_servers_default_holds_where_the_request_says_nothing(codec: ChatCodec) -> None:
    with serving(codec, "why</think>so", default_thinking=True) as ask:
        assert message(ask()) == ("why", "so")
        assert message(ask(reasoning_effort="none")) == (None, "why</think>so")


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high", "xhigh", "max"])
def test_every_effort_is_the_releases_own(codec: ChatCodec, effort: str) -> None:
    text = {"minimal": 0, "low": 0, "medium": 1, "high": 1, "xhigh": 2, "max": 2}[effort]
    opening = ["q<", "Reasoning Effort: Absolute", "Reasoning Effort: Beyond"]
    if codec.release == "preview":
        opening = ["<｜User｜>q", "<｜User｜>q", "Reasoning Effort: Absolute"]
    with serving(codec, "</think>") as ask:
        prompt = ask(reasoning_effort=effort).extensions["prompt"]
        assert prompt.startswith(opening[text]) or (text == 0 and prompt.startswith("<｜User｜>q"))


def test_old_reasoning_is_shown_on_request_and_with_tools(codec: ChatCodec) -> None:
    think: dict[str, Any] = {"reasoning_effort": "high"}
    with serving(codec, "</think>so") as ask:
        assert "<｜Assistant｜></think>b" in ask(OLD, **think).extensions["prompt"]
        kept = ask(OLD, **think, chat_template_kwargs={"drop_thinking": False}).extensions["prompt"]
        assert "<｜Assistant｜><think>why</think>b" in kept
        assert "<｜Assistant｜><think>why</think>b" in ask(OLD, **think, tools=[TOOL]).extensions["prompt"]
        renamed = [OLD[0], {"role": "assistant", "content": "b", "reasoning": "why"}, *Q]
        assert "why</think>b" in ask(renamed, **think, tools=[TOOL]).extensions["prompt"]


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url", "action"])
@pytest.mark.parametrize("fields", [{}, {"reasoning_effort": "high"}])
def test_quick_tasks_are_answered_without_reasoning(codec: ChatCodec, task: str, fields: dict[str, Any]) -> None:
    with serving(codec, "Paris</think>") as ask:
        response = ask([{"role": "user", "content": "q", "task": task}], **fields)
        assert message(response)[1] == "Paris</think>"
        assert response.extensions["prompt"].endswith(f"<｜{task}｜>")


def test_an_open_prefix_is_continued(codec: ChatCodec) -> None:
    with serving(codec, "swer") as ask:
        messages = [*Q, {"role": "assistant", "content": "An", "reasoning_content": "why", "prefix": True}]
        assert message(ask(messages)) == (None, "swer")
        response = ask(messages, reasoning_effort="high")
        assert message(response) == ("", "swer")
        assert response.extensions["prompt"].endswith("<think>why</think>An")


def test_all_roles_and_the_response_format(codec: ChatCodec) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "latest_reminder", "content": "today"},
        {"role": "developer", "content": "d"},
    ]
    schema = {"type": "object", "properties": {"é": {}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with serving(codec, "{}") as ask:
        prompt = ask(messages, response_format=wanted).extensions["prompt"]
    text = '## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{"type": "object", "prop'
    assert prompt.startswith(f"s\n\n{text}")
    assert prompt.endswith("<｜latest_reminder｜>today<｜User｜>d<｜Assistant｜></think>")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "thinking"),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": True}}, "thinking"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs.thinking"),
        ({"chat_template_kwargs": {"drop_thinking": "no"}}, "chat_template_kwargs.drop_thinking"),
        ({"chat_template_kwargs": {"reasoning_effort": 3}}, "chat_template_kwargs.reasoning_effort"),
        ({"chat_template_kwargs": {"reasoning_effort": "max"}, "reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_bad_modes_are_named(codec: ChatCodec, fields: dict[str, Any], param: str) -> None:
    with serving(codec, "") as ask:
        response = ask(**fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
