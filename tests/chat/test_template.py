"""The chat template says what the encoder says, of whatever servers pass on to templates."""

from __future__ import annotations

import json
from typing import Any, get_args

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4c.chat.encoding import encode_messages
from dsv4c.chat.prompts import EFFORT_ALIASES, EFFORTS, Release
from dsv4c.chat.template import chat_template
from tests.chat.cases import cases

RELEASES: tuple[Release, ...] = get_args(Release)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def template(release: Release) -> jinja2.Template:
    """As servers make one: Hugging Face's environment."""
    made = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    made.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    made.globals["raise_exception"] = _refuse
    return made.from_string(chat_template(release))


TEMPLATES = {release: template(release) for release in RELEASES}
texts = st.text("ab é\n<>{}%\"'|", max_size=12)
arguments = st.dictionaries(
    texts.filter(bool), st.one_of(texts, st.integers(), st.none(), st.lists(st.booleans())), max_size=3
)
ids = st.sampled_from(["c0", "c1", "c2", ""])
calls = st.builds(lambda i, a: {"id": i, "type": "function", "function": {"name": "f", "arguments": a}}, ids, arguments)
contents = texts | st.lists(st.builds(lambda t: {"type": "text", "text": t}, texts), min_size=1, max_size=3)
tools = st.lists(
    st.builds(lambda n: {"type": "function", "function": {"name": n or "f", "parameters": {}}}, texts), max_size=2
)


def message(role: str) -> st.SearchStrategy[dict[str, Any]]:
    made: dict[str, Any] = {"role": st.just(role), "content": texts.filter(bool) if role == "developer" else contents}
    if role == "assistant":
        made |= {"reasoning_content": texts, "tool_calls": st.lists(calls, max_size=3)}
    if role == "tool":
        made |= {"tool_call_id": ids}
    return st.fixed_dictionaries(made)


turns = st.lists(st.one_of(*map(message, ("system", "user", "assistant", "tool", "developer"))), max_size=7)
last = st.one_of(*map(message, ("user", "tool", "developer")))


@cases(300)
@given(
    release=st.sampled_from(RELEASES), before=turns, end=last, given_tools=tools, thinking=st.booleans(),
    drop=st.booleans(), effort=st.sampled_from([None, "none", "low", "medium", "high", "max"]),
)  # fmt: skip
def test_template_is_encoder(
    release: Release, before: list[dict[str, Any]], end: dict[str, Any], given_tools: list[dict[str, Any]],
    thinking: bool, drop: bool, effort: str | None,
) -> None:  # fmt: skip
    messages = [*before, end]
    shown = TEMPLATES[release].render(
        messages=messages, tools=given_tools or None, thinking=thinking, reasoning_effort=effort, drop_thinking=drop
    )
    level = None if effort == "none" else effort
    wanted = encode_messages(
        _with_text_arguments(messages), thinking=thinking and effort != "none", effort=level, drop_thinking=drop,
        tools=given_tools or None, release=release,
    )  # fmt: skip
    assert shown == wanted


def _with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As clients send them; servers have them parsed for templates."""
    out = json.loads(json.dumps(messages))
    for call in (call for one in out for call in one.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return list(out)


@pytest.mark.parametrize("release", RELEASES)
def test_efforts(release: Release) -> None:
    messages = [{"role": "user", "content": "a"}]
    for effort in (*EFFORTS[release], *EFFORT_ALIASES[release]):
        shown = TEMPLATES[release].render(messages=messages, thinking=True, reasoning_effort=effort)
        assert shown == encode_messages(messages, thinking=True, effort=effort, release=release)
    with pytest.raises(jinja2.TemplateError, match="unknown effort `most`"):
        TEMPLATES[release].render(messages=messages, thinking=True, reasoning_effort="most")


def test_response_format_is_shown_where_it_is_passed_on() -> None:
    messages = [{"role": "user", "content": "a"}]
    for shape in (
        {"type": "json_object"},
        {"type": "text"},
        {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    ):
        shown = TEMPLATES["preview"].render(messages=messages, response_format=shape)
        assert shown == encode_messages(messages, thinking=False, response_format=shape)


def test_what_asks_for_nothing_is_refused() -> None:
    for messages in ([], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]):
        with pytest.raises(jinja2.TemplateError, match="the last message"):
            TEMPLATES["preview"].render(messages=messages)
