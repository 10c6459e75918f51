"""KV-aware routing: repeated prefixes go to the worker that has them, prompts are the standalone server's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4c.chat.codec import ChatCodec
from dsv4c.runtime.endpoints.chat import ChatBody
from tests.dynamo.conftest import load_example

pytest.importorskip("dynamo._core", reason="NVIDIA Dynamo is not installed: `make test-dynamo` installs it")

PREFIX, BLOCK = 640, 256
WHO = {"nvext": {"extra_fields": ["worker_id"]}}


@pytest.mark.parametrize("roles", [("both", "both"), ("prefill", "prefill", "decode")])
def test_repeated_prefixes_go_where_they_are(deploy: Callable[..., Any], roles: tuple[str, ...]) -> None:
    """At least 90 % of repeats of 640-token prefixes are served by the worker that computed them, and found there."""
    if "prefill" in roles:
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed: `make test-dynamo` installs it")
    draw = random.Random(0)
    prefixes = [[draw.randrange(10, 4000) for _ in range(PREFIX)] for _ in range(10)]
    with deploy(*roles) as deployment:

        def ask(prefix: list[int]) -> tuple[int, int]:
            prompt = prefix + [draw.randrange(10, 4000) for _ in range(20)]
            body = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True, "temperature": 0, **WHO}
            answer = deployment.post("/v1/completions", body)
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            return answer["nvext"]["worker_id"]["prefill_worker_id"], cached

        homes = [ask(prefix)[0] for prefix in prefixes]
        assert len(set(homes)) == 2, "both workers have some"
        repeats = [(i, *ask(prefixes[i])) for _ in range(3) for i in draw.sample(range(10), 10)]
    at_home = sum(worker == homes[i] for i, worker, _ in repeats)
    found = sum(cached >= PREFIX // BLOCK * BLOCK for _, _, cached in repeats)
    print(f"{at_home} of {len(repeats)} repeats were served where the prefix was, {found} found its blocks")
    assert at_home >= 0.9 * len(repeats) and found >= 0.9 * len(repeats)


@pytest.fixture(scope="module")
def logged(artifact: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A worker that serves the release 0731, and the file of what it is asked."""
    file = tmp_path_factory.mktemp("asked") / "prompts"
    entry = (str(Path(__file__).with_name("recording.py")), str(file))
    with load_example().Deployment(artifact, entry=entry) as deployment:
        deployment.wait(deployment.worker("both", "--chat-release", "0731"))
        yield deployment, file


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 2, "y": "é"}'}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "d",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
    }
]
ASK, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "reasoning_content": "why"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}
THINK = {"chat_template_kwargs": {"thinking": True}}
CHATS: dict[str, dict[str, Any]] = {
    "user": {"messages": [ASK]},
    "system": {"messages": [{"role": "system", "content": "be terse"}, ASK]},
    "turns": {"messages": [ASK, SAID, ASK]},
    "thinking": {"messages": [ASK, SAID, ASK], **THINK},
    "low": {"messages": [ASK], "reasoning_effort": "low"},
    "medium": {"messages": [ASK], "reasoning_effort": "medium"},
    "high": {"messages": [ASK], "reasoning_effort": "high"},
    "max": {"messages": [ASK], "reasoning_effort": "max"},
    "none": {"messages": [ASK], "reasoning_effort": "none"},
    "tools": {"messages": [ASK], "tools": TOOLS},
    "tools, thinking": {"messages": [ASK], "tools": TOOLS, **THINK},
    "no tool wanted": {"messages": [ASK], "tools": TOOLS, "tool_choice": "none"},
    "results": {"messages": [ASK, CALLED, RESULT], "tools": TOOLS, **THINK},
    "developer": {"messages": [{"role": "developer", "content": "be terse"}, ASK]},
    "characters": {"messages": [{"role": "user", "content": "日本語 ünï 🎉\n\n  spaced <tag> & \"quotes\""}]},
    "users": {"messages": [ASK, ASK]},
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_those_of_the_standalone_server(logged: tuple[Any, Path], artifact: Path, name: str) -> None:
    deployment, file = logged
    chat = CHATS[name]
    body = ChatBody(model="nano", **chat)
    mode, plan = body.mode(False), body.tool_plan()
    wanted = ChatCodec.from_folder(artifact / "tokenizer", release="0731").chat_prompt(
        chat["messages"], thinking=mode.thinking, effort=mode.effort, drop_thinking=mode.drop_thinking, tools=plan.shown
    )
    answer = deployment.post("/v1/chat/completions", {**chat, "max_tokens": 1, "temperature": 0})
    assert "error" not in answer, answer
    assert json.loads(file.read_text().splitlines()[-1]) == list(wanted)
