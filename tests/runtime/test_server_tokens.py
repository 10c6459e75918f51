"""/tokenize and /detokenize agree with what the generating endpoints count and show."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.runtime.live import Live

MESSAGES = [{"role": "user", "content": "what is a socket?"}]


@pytest.fixture(params=["toy", "nano"])
def live(request: pytest.FixtureRequest) -> Live:
    server: Live = request.getfixturevalue(f"{request.param}_server")
    return server


def ask(live: Live, path: str, **body: Any) -> httpx.Response:
    return httpx.post(live.url + path, json=body)


def test_text_there_and_back(live: Live) -> None:
    text = "a socket is an end of a line of bytes"
    said = ask(live, "/tokenize", prompt=text, model=live.model, return_token_strs=True).json()
    assert said["tokens"] == live.codec.encode(text) and said["count"] == len(said["tokens"])
    assert "".join(said["token_strs"]) == text and said["max_model_len"] == live.engine.max_context
    assert ask(live, "/detokenize", tokens=said["tokens"]).json() == {"prompt": text}
    assert ask(live, "/tokenize", prompt="").json()["tokens"] == []
    assert ask(live, "/detokenize", tokens=[]).json() == {"prompt": ""}


def test_counts_are_those_of_the_endpoints(live: Live) -> None:
    for options in ({}, {"thinking": {"type": "enabled"}}):
        count = ask(live, "/tokenize", messages=MESSAGES, **options).json()["count"]
        given = {"model": live.model, "messages": MESSAGES, "max_tokens": 1, **options}
        assert ask(live, "/v1/chat/completions", **given).json()["usage"]["prompt_tokens"] == count


def test_special_tokens_are_shown_when_asked_for(live: Live) -> None:
    eos = sorted(live.codec.eos_token_ids)[0]
    assert ask(live, "/detokenize", tokens=[eos]).json() == {"prompt": ""}
    shown = ask(live, "/detokenize", tokens=[eos], skip_special_tokens=False).json()
    assert shown == {"prompt": live.codec.token_text(eos)}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
    ],
)
def test_bad_requests(toy_server: Live, path: str, body: dict[str, Any], param: str) -> None:
    response = ask(toy_server, path, **body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert ask(toy_server, path, model="gpt-9", prompt="a", tokens=[]).status_code == 404


def test_unknown_fields_are_named(toy_server: Live) -> None:
    assert ask(toy_server, "/tokenize", prompt="a", odd=1).headers["x-ignored-fields"] == "odd"
    assert ask(toy_server, "/detokenize", tokens=[], odd=1).headers["x-ignored-fields"] == "odd"
    said = ask(toy_server, "/tokenize", messages=MESSAGES, add_generation_prompt=True, continue_final_message=True)
    assert said.headers["x-ignored-fields"] == "continue_final_message"
