"""Tool calls over HTTP: `tools`, `tool_choice`, parallel calls, whole and streamed, with the official client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from dsv4c.chat.codec import ChatCodec
from dsv4c.runtime.app import create_app
from tests.runtime.scripted import ScriptedEngine, small_codec

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
TOOLS = [WEATHER, TIME]
CITY = '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>'
DAYS = '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>'
FIRST = f'<｜DSML｜invoke name="get_weather">\n{CITY}\n{DAYS}\n</｜DSML｜invoke>'
SECOND = f'<｜DSML｜invoke name="get_time">\n{CITY}\n</｜DSML｜invoke>'
BLOCK = f"\n\n<｜DSML｜tool_calls>\n{FIRST}\n{SECOND}\n</｜DSML｜tool_calls>"
CALLED = [("get_weather", {"city": "Paris", "days": 3}), ("get_time", {"city": "Paris"})]

Ask = Callable[..., tuple[Any, ScriptedEngine]]


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return small_codec()


@pytest.fixture(scope="module")
def serve(codec: ChatCodec) -> Callable[..., Any]:
    @contextmanager
    def start(*answers: str) -> Iterator[tuple[openai.OpenAI, ScriptedEngine]]:
        engine = ScriptedEngine(codec, answers)
        with TestClient(create_app(engine, codec, "m")) as http:
            client = openai.OpenAI(base_url="http://testserver/v1", api_key="x", max_retries=0, http_client=http)
            yield client, engine

    return start


def whole(client: openai.OpenAI, **options: Any) -> Any:
    given = {"model": "m", "messages": [{"role": "user", "content": "q"}], "tools": TOOLS, **options}
    return client.chat.completions.create(**given)


def streamed(client: openai.OpenAI, **options: Any) -> list[dict[str, Any]]:
    """The choices of a stream, put together: content, reasoning, calls, finish reason."""
    n = options.get("n", 1)
    out = [{"content": "", "reasoning": "", "calls": [], "finish": None} for _ in range(n)]
    for chunk in whole(client, stream=True, **options):
        for choice in chunk.choices:
            mine: Any = out[choice.index]
            assert mine["finish"] is None
            mine["finish"] = choice.finish_reason
            mine["content"] += choice.delta.content or ""
            mine["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(mine["calls"]) and call.type == "function"
                    mine["calls"].append([call.function.name, "", call.id])
                mine["calls"][call.index][1] += call.function.arguments
    return out


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def test_calls_whole(serve: Any) -> None:
    with serve(f"I look.{BLOCK}") as (client, engine):
        choice = whole(client).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
        assert calls_of(choice.message) == CALLED
        ids = [call.id for call in choice.message.tool_calls]
        assert len(set(ids)) == 2 and all(i.startswith("call_") for i in ids)
        prompt = engine.codec.decode(engine.prompts[0])
        assert '{"name": "get_time", "parameters": {"type": "object"}}' in prompt
    with serve(BLOCK) as (client, _):
        assert whole(client).choices[0].message.content is None


def test_calls_streamed(serve: Any) -> None:
    with serve(f"why</think>I look.{BLOCK}", "no</think>hm") as (client, _):
        one, other = streamed(client, n=2, reasoning_effort="high")
    assert (one["content"], one["reasoning"], one["finish"]) == ("I look.", "why", "tool_calls")
    assert [(name, json.loads(text)) for name, text, _ in one["calls"]] == CALLED
    assert (other["content"], other["calls"], other["finish"]) == ("hm", [], "stop")


def test_arguments_arrive_in_parts(serve: Any) -> None:
    with serve(BLOCK) as (client, _):
        parts = [
            call.function.arguments
            for chunk in whole(client, stream=True)
            for choice in chunk.choices
            for call in choice.delta.tool_calls or []
        ]
    assert "".join(parts) == '{"city": "Paris", "days": 3}{"city": "Paris"}'


def test_scores_come_with_calls(serve: Any) -> None:
    with serve(f"I look.{BLOCK}") as (client, _):
        choice = whole(client, logprobs=True).choices[0]
        text = "".join(token.token for token in choice.logprobs.content)
        assert text == f"I look.{BLOCK}"
        chunks = [c.choices[0] for c in whole(client, logprobs=True, stream=True)]
        streamed_text = "".join(t.token for c in chunks if c.logprobs for t in c.logprobs.content)
    assert streamed_text == text


def test_one_call_where_parallel_ones_are_not_wanted(serve: Any) -> None:
    with serve(f"{BLOCK} and more") as (client, _):
        message = whole(client, parallel_tool_calls=False).choices[0]
        assert calls_of(message.message) == CALLED[:1] and message.finish_reason == "tool_calls"
        one = streamed(client, parallel_tool_calls=False)[0]
        assert len(one["calls"]) == 1 and one["finish"] == "tool_calls" and one["content"] == ""


def test_none_shows_no_tools(serve: Any) -> None:
    with serve("hi") as (client, engine):
        answer = whole(client, tool_choice="none").choices[0]
        assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == ("hi", None, "stop")
        assert "get_weather" not in engine.codec.decode(engine.prompts[0])
        assert engine.params[0].logit_bias == {engine.codec.call_token: -100.0}
        whole(client)
        assert not engine.params[1].logit_bias


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called(serve: Any, stream: bool) -> None:
    rest = f"{CITY}\n</｜DSML｜invoke>\n{SECOND}\n</｜DSML｜tool_calls>"
    choice = {"type": "function", "function": {"name": "get_weather"}}
    with serve(rest) as (client, engine):
        if stream:
            one = streamed(client, tool_choice=choice)[0]
            calls, finish = [(name, json.loads(text)) for name, text, _ in one["calls"]], one["finish"]
        else:
            got = whole(client, tool_choice=choice).choices[0]
            calls, finish = calls_of(got.message), got.finish_reason
        assert (calls, finish) == ([("get_weather", {"city": "Paris"})], "tool_calls")
        end = '<｜Assistant｜></think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
        assert engine.codec.decode(engine.prompts[0]).endswith(end)


def test_required_lets_the_model_choose_the_function(serve: Any) -> None:
    rest = f'get_time">\n{CITY}\n</｜DSML｜invoke>\n{FIRST}\n</｜DSML｜tool_calls>'
    with serve(rest) as (client, engine):
        got = whole(client, tool_choice="required").choices[0]
        assert calls_of(got.message) == [CALLED[1], CALLED[0]]
        assert engine.codec.decode(engine.prompts[0]).endswith('<｜DSML｜invoke name="')
        one = streamed(client, tool_choice="required", parallel_tool_calls=False)[0]
        assert [name for name, *_ in one["calls"]] == ["get_time"]


def test_allowed_tools(serve: Any) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    with serve(f"{CITY}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>") as (client, engine):
        got = whole(client, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}).choices[0]
        assert calls_of(got.message) == [CALLED[1]]
        assert "get_weather" not in engine.codec.decode(engine.prompts[0])


def test_a_call_cut_off_by_the_limit_stays_unfinished(serve: Any, codec: ChatCodec) -> None:
    upto = BLOCK[: BLOCK.index("Paris") + 3]
    with serve(BLOCK) as (client, _):
        got = whole(client, max_tokens=len(codec.encode(upto))).choices[0]
        assert got.finish_reason == "length"
        call = got.message.tool_calls[0].function
        assert call.name == "get_weather" and call.arguments.startswith('{"city": "') and call.arguments[-1] != "}"
        with pytest.raises(ValueError):
            json.loads(call.arguments)


def test_stop_strings_see_the_content_alone(serve: Any) -> None:
    with serve(f"I look.{BLOCK}") as (client, _):
        assert calls_of(whole(client, stop=["Paris"]).choices[0].message) == CALLED
        got = whole(client, stop=["look"]).choices[0]
        assert (got.message.content, got.message.tool_calls, got.finish_reason) == ("I ", None, "stop")


def test_malformed_markup_never_leaks(serve: Any) -> None:
    for text in (
        BLOCK.replace("tool_calls", "toolcalls", 1),
        BLOCK[:40],
        BLOCK.replace("</｜DSML｜parameter>", ""),
        "｜DSML｜",
    ):
        with serve(f"a{text}") as (client, _):
            one = streamed(client)[0]
            assert "DSML" not in one["content"] and one["content"].startswith("a")
            message = whole(client).choices[0].message
            assert (message.content, [t for _, t, _ in one["calls"]]) == (
                one["content"], [c.function.arguments for c in message.tool_calls or []],
            )  # fmt: skip


def test_results_go_back(serve: Any) -> None:
    with serve(BLOCK, "Sunny.") as (client, engine):
        first = whole(client).choices[0].message
        results = [{"role": "tool", "tool_call_id": c.id, "content": f"r{i}"} for i, c in enumerate(first.tool_calls)]
        messages = [{"role": "user", "content": "q"}, first.model_dump(exclude_none=True), *reversed(results)]
        assert whole(client, messages=messages).choices[0].message.content == "Sunny."
        prompt = engine.codec.decode(engine.prompts[1])
        assert f"</think>{BLOCK}" in prompt, "the history is what the model wrote"
        assert "<｜User｜><tool_result>r0</tool_result>\n\n<tool_result>r1</tool_result><｜Assistant｜>" in prompt


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": []}}},
            "tool_choice.allowed_tools.mode",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        *(
            ({"tools": [{"type": "function", "function": {"name": name}}]}, "tools[0].function.name")
            for name in ('a"b', "<think>", "</｜DSML｜invoke>", "｜DSML｜", "a\n", "")
        ),
        ({"tool_choice": "required", "reasoning_effort": "high"}, "tool_choice"),
    ],
)  # fmt: skip
def test_bad_choices_are_named(serve: Any, options: dict[str, Any], param: str) -> None:
    with serve("hi") as (client, _), pytest.raises(openai.BadRequestError) as caught:
        whole(client, **options)
    assert caught.value.param == param
