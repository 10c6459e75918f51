"""One worker of both roles behind Dynamo's frontend: what a client may ask, and what it hears."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dsv4c.launch import Launched
from dsv4c.runtime.params import SamplingParams
from tests.dynamo.conftest import SHOWN, ids, load_example, prompts, stream

pytest.importorskip("dynamo._core", reason="NVIDIA Dynamo is not installed: `make test-dynamo` installs it")

U, TOOL = "user", [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def one(artifact: Any) -> Iterator[Any]:
    """A frontend and one worker that says what it is asked."""
    with load_example().Deployment(artifact) as deployment:
        worker = deployment.worker(
            "both", "--drain-timeout", "20", DYN_HEALTH_CHECK_ENABLED="true", DYN_CANARY_WAIT_TIME="1"
        )
        deployment.wait(worker)
        deployment.one = worker
        yield deployment


def completion(deployment: Any, prompt: list[int], **body: Any) -> Any:
    return deployment.post("/v1/completions", {"prompt": prompt, **SHOWN, **body})


def test_tokens_are_the_engines(one: Any, says: Callable[..., list[int]]) -> None:
    for i, prompt in enumerate(prompts(6, 300)):
        for body in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": i}):
            wanted = says(prompt, SamplingParams(max_tokens=12, ignore_eos=True, **body))
            answer = completion(one, prompt, max_tokens=12, ignore_eos=True, **body)
            assert ids(answer["choices"][0]) == wanted, (len(prompt), body)
            assert answer["usage"]["prompt_tokens"] == len(prompt)
            assert answer["usage"]["completion_tokens"] == len(wanted)


def test_stop_tokens_strings_and_lengths(one: Any, says: Callable[..., list[int]], launched: Launched) -> None:
    prompt = launched.codec.encode("The package provides")
    free = says(prompt, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    answer = completion(one, prompt, max_tokens=20, temperature=0, stop_token_ids=[free[5]])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert ids(answer["choices"][0])[:5] == free[: min(5, free.index(free[5]))]
    word = launched.codec.decode([free[3]])
    answer = one.post("/v1/completions", {"prompt": prompt, "max_tokens": 20, "temperature": 0, "stop": [word]})
    assert word not in answer["choices"][0]["text"] and answer["choices"][0]["finish_reason"] == "stop"
    answer = completion(one, prompt, max_tokens=7, temperature=0, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length" and len(ids(answer["choices"][0])) == 7


def test_every_choice_has_its_tokens(one: Any) -> None:
    body = {"max_tokens": 8, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    four = completion(one, [5, 6, 7], n=4, **body)["choices"]
    assert [choice["index"] for choice in four] == [0, 1, 2, 3]
    assert [len(ids(choice)) for choice in four] == [8] * 4 and len({tuple(ids(c)) for c in four}) > 1
    assert ids(four[0]) == ids(completion(one, [5, 6, 7], **body)["choices"][0])


def test_logprobs(one: Any) -> None:
    body = {"messages": [{"role": U, "content": "hi"}], "max_tokens": 3, "temperature": 0, "logprobs": True}
    content = one.post("/v1/chat/completions", {**body, "top_logprobs": 4})["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for entry in content:
        assert len(entry["top_logprobs"]) == 4 and entry["top_logprobs"][0]["logprob"] == entry["logprob"]
        found = [top["logprob"] for top in entry["top_logprobs"]]
        assert found == sorted(found, reverse=True)


def test_structured_output(one: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    messages, quiet = [{"role": U, "content": "a number"}], {"max_tokens": 400, "temperature": 0}
    answer = one.post("/v1/chat/completions", {"messages": messages, "response_format": shape, **quiet})
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["a"], int)
    answer = one.post("/v1/chat/completions", {"messages": messages, "guided_choice": ["yes", "no"]})
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": [5] * 2048}, "context"),
        ({"prompt": [5] * 40, "max_tokens": 5000}, "max_tokens"),
        ({"prompt": [5, 6], "best_of": 3}, "best_of"),
        ({"prompt": [5, 4_000_000]}, "Invalid request"),
        ({"prompt": [5], "guided_regex": "("}, "regex"),
    ],
)
def test_refusals(one: Any, body: dict[str, Any], said: str) -> None:
    answer = one.post("/v1/completions", {"max_tokens": 4, **body})
    assert answer.get("status") == 400 and said in answer["error"], answer


def test_a_client_that_leaves_ends_its_request(one: Any) -> None:
    chunks = stream(
        one, "/v1/completions", {"prompt": [5, 6], "max_tokens": 2000, "ignore_eos": True, "temperature": 0}
    )
    for _ in range(5):
        next(chunks)
    chunks.close()
    before = one.one.metric("dsv4c_engine_generated_tokens_total")
    while one.one.metric("dsv4c_requests_running"):
        time.sleep(0.05)
    assert one.one.metric("dsv4c_engine_generated_tokens_total") - before < 1500
    assert one.one.metric("dsv4c_sequences_finished_total") > 0


def test_metrics_health_and_models(one: Any) -> None:
    text = one.one.get("/metrics")
    for name in (
        "dsv4c_kv_pages",
        "dsv4c_prompt_tokens_total",
        "dynamo_component_total_blocks",
        "dsv4c_time_to_first_token",
    ):
        assert name in text, name
    listed = json.loads(one.frontend.get("/v1/models"))["data"]
    assert [(model["id"], model["context_window"]) for model in listed] == [("nano", 2048)]
    assert '"ready"' in one.one.get("/health")


def test_the_canary_is_answered(one: Any) -> None:
    before = one.one.metric("dsv4c_engine_generated_tokens_total")
    time.sleep(4)  # nobody else asks
    assert one.one.metric("dsv4c_engine_generated_tokens_total") > before


def test_sigterm_lets_a_request_finish(deploy: Callable[..., Any]) -> None:
    with deploy("both") as deployment:
        worker = deployment.processes[1]
        body = {"prompt": [5, 6], "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
        chunks = stream(deployment, "/v1/completions", body)
        next(chunks)
        worker.popen.send_signal(signal.SIGTERM)
        last = [chunk for chunk in chunks if chunk["choices"]][-1]
        assert last["choices"][0]["finish_reason"] == "length"
        assert worker.popen.wait(60) == 0, worker.tail()
