"""The prompt string, rule by rule (model.md 4.2 to 4.4), against strings written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.chat.encoding import encode_messages
from dsv4c.errors import RequestError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOOL = {
    "type": "function",
    "function": {"name": "wéather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
TOOLS_TEXT = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{"name": "wéather", "description": "d", "parameters": {"type": "object", "properties": {}}}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""  # noqa: E501  a prompt is written as the model sees it
FORMAT_TEXT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def system(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": content, **more}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def result(call_id: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def chat(*messages: dict[str, Any], **options: Any) -> str:
    return encode_messages(messages, thinking=False, **options)


def think(*messages: dict[str, Any], **options: Any) -> str:
    return encode_messages(messages, thinking=True, **options)


# ---- turns and modes


def test_user() -> None:
    assert chat(user("q")) == f"{BOS}<｜User｜>q<｜Assistant｜></think>"
    assert think(user("q")) == f"{BOS}<｜User｜>q<｜Assistant｜><think>"


def test_system_has_no_role_token() -> None:
    assert chat(system("Be brief."), user("q")) == f"{BOS}Be brief.<｜User｜>q<｜Assistant｜></think>"
    assert chat(user("q"), system("s"), user("r")) == f"{BOS}<｜User｜>qs<｜User｜>r<｜Assistant｜></think>"


def test_assistant_in_chat_mode_shows_no_reasoning() -> None:
    got = chat(user("q"), assistant("a", reasoning_content="why"), user("r"))
    assert got == f"{BOS}<｜User｜>q<｜Assistant｜></think>a{EOS}<｜User｜>r<｜Assistant｜></think>"


def test_last_assistant_shows_its_reasoning() -> None:
    got = think(user("q"), assistant("a", reasoning_content="why"))
    assert got == f"{BOS}<｜User｜>q<｜Assistant｜><think>why</think>a{EOS}"


def test_last_assistant_without_reasoning_closes_it() -> None:
    assert think(user("q"), assistant("a")) == f"{BOS}<｜User｜>q<｜Assistant｜><think></think>a{EOS}"


@pytest.mark.parametrize("key", ["prefix", "wo_eos"])
def test_open_assistant_has_no_eos(key: str) -> None:
    got = chat(user("q"), assistant("An apple a", **{key: True}))
    assert got == f"{BOS}<｜User｜>q<｜Assistant｜></think>An apple a"


def test_consecutive_user_turns_are_one() -> None:
    assert chat(user("q"), user("r")) == f"{BOS}<｜User｜>q\n\nr<｜Assistant｜></think>"


def test_latest_reminder() -> None:
    reminder = {"role": "latest_reminder", "content": "2026-02-21"}
    got = chat(system("s"), reminder, user("q"))
    assert got == f"{BOS}s<｜latest_reminder｜>2026-02-21<｜User｜>q<｜Assistant｜></think>"
    got = think(user("q"), reminder, user("r"))
    assert got == (
        f"{BOS}<｜User｜>q<｜Assistant｜></think><｜latest_reminder｜>2026-02-21<｜User｜>r<｜Assistant｜><think>"
    )


def test_developer_is_like_a_user_with_tools() -> None:
    developer = {"role": "developer", "content": "dev", "tools": [TOOL], "response_format": {"type": "object"}}
    got = think(developer)
    expected = f'{BOS}<｜User｜>dev\n\n{TOOLS_TEXT}\n\n{FORMAT_TEXT}{{"type": "object"}}<｜Assistant｜><think>'
    assert got == expected


# ---- content


def test_content_parts_are_joined_by_a_blank_line() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}]
    assert chat(user(parts)) == f"{BOS}<｜User｜>a\n\n[Unsupported image_url]\n\nb<｜Assistant｜></think>"
    got = chat(user("q"), assistant(None, tool_calls=[call("1", "f", "{}")]), result("1", parts))
    assert got.endswith("<tool_result>a\n\n[Unsupported image_url]\n\nb</tool_result><｜Assistant｜></think>")


# ---- dropping of old reasoning


HISTORY = (user("q"), assistant("a", reasoning_content="why"), user("r"))


def test_old_reasoning_is_dropped() -> None:
    got = think(*HISTORY)
    assert got == f"{BOS}<｜User｜>q<｜Assistant｜></think>a{EOS}<｜User｜>r<｜Assistant｜><think>"


def test_old_reasoning_is_kept_on_request() -> None:
    got = think(*HISTORY, drop_thinking=False)
    assert got == f"{BOS}<｜User｜>q<｜Assistant｜><think>why</think>a{EOS}<｜User｜>r<｜Assistant｜><think>"


def test_tools_keep_old_reasoning() -> None:
    got = think(*HISTORY, tools=[TOOL])
    assert got == (
        f"{BOS}\n\n{TOOLS_TEXT}<｜User｜>q<｜Assistant｜><think>why</think>a{EOS}<｜User｜>r<｜Assistant｜><think>"
    )


def test_tool_results_count_as_a_user_turn() -> None:
    got = think(
        user("q"),
        assistant("", reasoning_content="look", tool_calls=[call("1", "f", "{}")]),
        result("1", "42"),
        assistant("a", reasoning_content="done"),
    )
    assert got == (
        f"{BOS}<｜User｜>q<｜Assistant｜></think>\n\n<｜DSML｜tool_calls>\n"
        f'<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}'
        f"<｜User｜><tool_result>42</tool_result><｜Assistant｜><think>done</think>a{EOS}"
    )


def test_old_developer_turns_are_dropped_only_with_the_reasoning() -> None:
    messages = ({"role": "developer", "content": "dev"}, assistant("a"), user("r"))
    assert think(*messages) == f"{BOS}a{EOS}<｜User｜>r<｜Assistant｜><think>"
    kept = f"{BOS}<｜User｜>dev<｜Assistant｜></think>a{EOS}<｜User｜>r<｜Assistant｜></think>"
    assert chat(*messages) == kept


# ---- tools, tool calls, tool results


def test_tools_text_follows_the_system_text() -> None:
    expected = f"{BOS}Be brief.\n\n{TOOLS_TEXT}<｜User｜>q<｜Assistant｜></think>"
    assert chat(system("Be brief."), user("q"), tools=[TOOL]) == expected
    assert chat(system("Be brief.", tools=[TOOL]), user("q")) == expected


def test_tools_without_a_system_turn() -> None:
    assert chat(user("q"), tools=[TOOL]) == f"{BOS}\n\n{TOOLS_TEXT}<｜User｜>q<｜Assistant｜></think>"


def test_tools_are_one_json_a_line() -> None:
    second = {"type": "function", "function": {"name": "b"}}
    lines = chat(user("q"), tools=[TOOL, second]).split("### Available Tool Schemas\n\n")[1].split("\n")
    assert lines[1:4] == ['{"name": "b"}', "", lines[3]]


def test_no_tools_is_no_text() -> None:
    assert chat(user("q"), tools=[]) == chat(user("q"))


def test_tool_calls() -> None:
    arguments = '{"city": "Zürich", "days": 3, "opts": {"a": [true, null]}, "raw": "x\\n\\"y\\""}'
    got = think(
        user("q"),
        assistant("I look.", reasoning_content="why", tool_calls=[call("1", "f", arguments), call("2", "g", {})]),
    )
    assert got == (
        f"{BOS}<｜User｜>q<｜Assistant｜><think>why</think>I look.\n\n"
        "<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="city" string="true">Zürich</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="opts" string="false">{"a": [true, null]}</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="raw" string="true">x\n"y"</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="g">\n'
        "\n"
        "</｜DSML｜invoke>\n"
        f"</｜DSML｜tool_calls>{EOS}"
    )


@pytest.mark.parametrize("arguments", ["not json", "[1, 2]", '{"a": NaN}'])
def test_arguments_that_are_no_object_become_one_string(arguments: str) -> None:
    got = chat(user("q"), assistant("", tool_calls=[call("1", "f", arguments)]))
    assert f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜DSML｜parameter>' in got


def test_tool_results_take_the_order_of_the_calls() -> None:
    calls = assistant(None, tool_calls=[call("a", "f", "{}"), call("b", "f", "{}")])
    got = chat(user("q"), calls, result("b", "two"), result("a", "one"), user("and?"))
    assert got.endswith(
        f"{EOS}<｜User｜><tool_result>one</tool_result>\n\n<tool_result>two</tool_result>\n\nand?<｜Assistant｜></think>"
    )


def test_text_between_tool_results_keeps_its_place() -> None:
    calls = assistant(None, tool_calls=[call("a", "f", "{}"), call("b", "f", "{}")])
    got = chat(user("q"), calls, result("b", "two"), user("wait"), result("a", "one"))
    assert "<｜User｜><tool_result>one</tool_result>\n\nwait\n\n<tool_result>two</tool_result><｜Assistant｜>" in got


# ---- response format


def test_response_format_follows_the_tools() -> None:
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    shown = '{"type": "object", "properties": {"é": {"type": "string"}}}'
    wrapped = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    expected = f"{BOS}s\n\n{TOOLS_TEXT}\n\n{FORMAT_TEXT}{shown}<｜User｜>q<｜Assistant｜></think>"
    assert chat(system("s"), user("q"), tools=[TOOL], response_format=wrapped) == expected
    assert chat(system("s", response_format=schema), user("q"), tools=[TOOL]) == expected


def test_response_format_of_text_is_nothing() -> None:
    assert chat(user("q"), response_format={"type": "text"}) == chat(user("q"))


def test_json_object_is_shown_as_it_is() -> None:
    expected = f'{BOS}\n\n{FORMAT_TEXT}{{"type": "json_object"}}<｜User｜>q<｜Assistant｜></think>'
    assert chat(user("q"), response_format={"type": "json_object"}) == expected


# ---- tasks


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url"])
def test_task_token_follows_the_message(task: str) -> None:
    assert chat(user("q", task=task)) == think(user("q", task=task)) == f"{BOS}<｜User｜>q<｜{task}｜>"


def test_action_task() -> None:
    assert chat(user("q", task="action")) == f"{BOS}<｜User｜>q<｜Assistant｜></think><｜action｜>"
    assert think(user("q", task="action")) == f"{BOS}<｜User｜>q<｜Assistant｜><think><｜action｜>"


def test_answer_to_a_task_has_no_reasoning() -> None:
    got = think(user("q", task="title"), assistant("A title", reasoning_content="x"))
    assert got == f"{BOS}<｜User｜>q<｜title｜>A title{EOS}"


def test_task_after_an_answer() -> None:
    got = chat(user("q"), assistant("a", task="title"), assistant("A title"))
    assert got == f"{BOS}<｜User｜>q<｜Assistant｜></think>a{EOS}<｜title｜>A title{EOS}"


def test_merged_turn_keeps_the_task() -> None:
    assert chat(user("p"), user("q", task="query")) == f"{BOS}<｜User｜>p\n\nq<｜query｜>"
    assert chat(user("p", task="query"), user("q")) == f"{BOS}<｜User｜>p<｜User｜>q<｜Assistant｜></think>"


# ---- efforts


ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"  # noqa: E501
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"  # noqa: E501
)
BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface symptom.\n"  # noqa: E501
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n"  # noqa: E501
)


@pytest.mark.parametrize(
    ("release", "effort", "text"),
    [
        ("preview", None, ""),
        ("preview", "high", ""),
        ("preview", "max", ABSOLUTE),
        ("preview", "low", ""),
        ("preview", "medium", ""),
        ("preview", "xhigh", ABSOLUTE),
        ("0731", None, ""),
        ("0731", "low", ""),
        ("0731", "minimal", ""),
        ("0731", "high", ABSOLUTE),
        ("0731", "medium", ABSOLUTE),
        ("0731", "max", BEYOND),
        ("0731", "xhigh", BEYOND),
    ],
)
def test_effort_text_follows_bos(release: Any, effort: str | None, text: str) -> None:
    got = think(system("s"), user("q"), effort=effort, release=release)
    assert got == f"{BOS}{text}s<｜User｜>q<｜Assistant｜><think>"
    assert chat(user("q"), effort=effort, release=release) == chat(user("q"))


# ---- refusals


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "q"}], "messages[0].role"),
        ([{"role": "robot", "content": "q"}], "messages[0].role"),
        ([{"role": ["user"], "content": "q"}], "messages[0].role"),
        ([user("q"), {"role": "user"}], "messages[1].content"),
        ([user(None)], "messages[0].content"),
        ([user(3)], "messages[0].content"),
        ([user(["q"])], "messages[0].content[0]"),
        ([user([{"type": "text"}])], "messages[0].content[0].text"),
        ([{"role": "system"}], "messages[0].content"),
        ([{"role": "tool", "tool_call_id": "1"}], "messages[0].content"),
        ([{"role": "tool", "tool_call_id": 1, "content": ""}], "messages[0].tool_call_id"),
        ([{"role": "developer", "content": ""}], "messages[0].content"),
        ([{"role": "latest_reminder"}], "messages[0].content"),
        ([user("q"), assistant(None)], "messages[1].content"),
        ([assistant("a", reasoning_content=1)], "messages[0].reasoning_content"),
        ([assistant("a", tool_calls="f()")], "messages[0].tool_calls"),
        ([assistant("a", tool_calls=[{}])], "messages[0].tool_calls[0].function"),
        ([assistant("a", tool_calls=[call("1", "", "{}")])], "messages[0].tool_calls[0].function.name"),
        ([assistant("a", tool_calls=[call("1", "f", None)])], "messages[0].tool_calls[0].function.arguments"),
        ([user("q", task="poem")], "messages[0].task"),
        ([user("q", task=["query"])], "messages[0].task"),
        ([user("q", tools=[TOOL])], "messages[0].tools"),
        ([system("s", tools=[{"type": "function"}])], "messages[0].tools[0]"),
    ],
)
def test_bad_messages_name_the_field(messages: list[Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        encode_messages(messages, thinking=False)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message[0].islower() or caught.value.message[0] == "`"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"effort": "hgh"}, "reasoning_effort"),
        ({"effort": "low-ish"}, "reasoning_effort"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [TOOL, {"type": "function", "function": {}}]}, "tools[1].function.name"),
        ({"tools": "f"}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)
def test_bad_options_name_the_field(options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(user("q"), **options)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_unknown_effort_hints_at_the_nearest() -> None:
    with pytest.raises(RequestError) as caught:
        think(user("q"), effort="hgh")
    assert caught.value.hint == "did you mean `high`?"


def test_two_response_formats_are_refused() -> None:
    with pytest.raises(RequestError, match="given twice"):
        chat(system("s", response_format={"a": 1}), user("q"), response_format={"type": "json_object"})


def test_messages_are_left_as_they_were() -> None:
    messages = [system("s"), *HISTORY, result("1", "x")]
    before = repr(messages)
    think(*messages, tools=[TOOL])
    assert repr(messages) == before


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"id": SCALARS, "function": st.fixed_dictionaries({}, optional={"name": SCALARS, "arguments": JSON})},
    ),
    max_size=2,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "latest_reminder", "x"])},
        optional={
            "content": st.text(max_size=4) | JSON, "reasoning_content": SCALARS, "tool_calls": CALLS | JSON,
            "tool_call_id": SCALARS, "task": st.sampled_from(["query", "action", "x"]), "prefix": SCALARS,
            "tools": st.sampled_from([[TOOL], [], {}, None]) | JSON, "response_format": JSON,
        },
    ),
    max_size=5,
)  # fmt: skip


@settings(deadline=None, max_examples=500)
@given(messages=MESSAGES, thinking=st.booleans(), drop=st.booleans(), tools=st.sampled_from([None, [TOOL]]) | JSON)
def test_messages_are_rendered_or_refused(messages: list[Any], thinking: bool, drop: bool, tools: Any) -> None:
    try:
        text = encode_messages(messages, thinking=thinking, drop_thinking=drop, tools=tools)
    except RequestError as error:
        assert error.status == 400 and error.param
    else:
        assert text.startswith(BOS)
