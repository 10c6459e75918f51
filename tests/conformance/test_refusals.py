"""What is refused, with the official clients: contradictions, images, prompts beyond the context, bad tools; and abuse
of lines, headers and paths with bare sockets. Always 4xx, an error body, and a server that goes on."""

from __future__ import annotations

import json
import socket
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.conformance.conftest import Host
from tests.conformance.dsml import ANTHROPIC_TOOLS, RESPONSES_TOOLS, SCHEMA, TOOLS

Q: list[Any] = [{"role": "user", "content": "hi"}]
LONG = "a b " * 10_000
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
NAMES_NONE: Any = {"type": "function", "function": {"name": "fly"}}
BROKEN: Any = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
CHATS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"reasoning_effort": "none", "extra_body": {"thinking": {"type": "enabled"}}}, "thinking"),
    (
        {"reasoning_effort": "high", "extra_body": {"chat_template_kwargs": {"thinking": False}}},
        "chat_template_kwargs.thinking",
    ),
    ({"extra_body": {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": False}}}, "thinking"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
    ({"response_format": FORM, "extra_body": {"guided_regex": "a+"}}, "guided_regex"),
    ({"extra_body": {"structured_outputs": {"regex": "a+", "choice": ["a"]}}}, "structured_outputs.choice"),
    ({"extra_body": {"min_tokens": 9}, "max_tokens": 3}, "min_tokens"),
    ({"extra_body": {"priority": 1}}, "priority"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": NAMES_NONE}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": NAMES_NONE}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": BROKEN}}], "tool_choice": "required"},
        "tools",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "array"}}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [{"type": "function", "function": {"name": "</think>"}}]}, "tools[0].function.name"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": BROKEN}}},
        "response_format.json_schema.schema",
    ),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"extra_body": {"guided_regex": "(((("}}, "guided_regex"),
    ({"extra_body": {"guided_grammar": "root ::= nothing"}}, "guided_grammar"),
    ({"messages": [{"role": "system", "content": LONG}, *Q]}, "messages"),
    ({"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
    ({"messages": [*Q, {"role": "assistant", "content": "ho"}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]},
        "messages[0].content[0]",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]}
            ]
        },
        "messages[0].content[1]",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]},
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "tool", "tool_call_id": "1", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}, *Q]},
        "messages[0].tool_calls[0].function",
    ),
    ({"n": 2, "max_tokens": 100_000}, "max_tokens"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logit_bias": {"4096": 1}}, "logit_bias"),
    ({"temperature": -0.1}, "temperature"),
]
COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4096}, "max_tokens"),
    ({"suffix": "end"}, "suffix"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [5, 4096]}, "prompt"),
    ({"prompt": [5, 0.5]}, "prompt"),
    ({"prompt": [[5], []]}, "prompt[1]"),
    ({"prompt": LONG}, "prompt"),
    ({"prompt": ["a"] * 300}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"extra_body": {"guided_choice": []}}, "guided_choice"),
    ({"extra_body": {"guided_json": '{"a": '}}, "guided_json"),
    ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids"),
]


@pytest.mark.parametrize(("change", "param"), CHATS, ids=lambda v: json.dumps(v)[:70])
@STREAM
def test_chats(client: openai.OpenAI, host: Host, change: dict[str, Any], param: str, stream: bool) -> None:
    given: dict[str, Any] = {"model": host.model, "messages": Q, "stream": stream, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**given)
    check(caught.value, param)


@pytest.mark.parametrize(("change", "param"), COMPLETIONS, ids=lambda v: json.dumps(v)[:70])
@STREAM
def test_completions(client: openai.OpenAI, host: Host, change: dict[str, Any], param: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": host.model, "prompt": "a", "stream": stream, **change})
    check(caught.value, param)


def check(error: openai.BadRequestError, param: str) -> None:
    assert error.param == param and error.type == "invalid_request_error" and error.code
    assert len(str(error)) < 900 and "Traceback" not in str(error)


def test_instructions_beyond_the_context(client: openai.OpenAI, claude: anthropic.Anthropic, host: Host) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        client.responses.create(model=host.model, input="hi", instructions=LONG)
    assert told.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="context"):
        claude.messages.create(model=host.model, messages=Q, system=LONG, max_tokens=4)
    with pytest.raises(openai.BadRequestError) as told:  # tools are part of the prompt
        wide: Any = {"type": "function", "function": {"name": "f", "description": LONG}}
        client.chat.completions.create(model=host.model, messages=Q, tools=[wide])
    assert told.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": Q, "tools": [{**TOOLS[0], "function": 3}]}),
        ("/v1/responses", {"input": "a", "tools": [{**RESPONSES_TOOLS[0], "name": 3}]}),
        ("/v1/messages", {"messages": Q, "max_tokens": 4, "tools": [{**ANTHROPIC_TOOLS[0], "name": 3}]}),
        *(
            ("/v1/messages", {"messages": Q, "max_tokens": 4, "tools": ANTHROPIC_TOOLS, "tool_choice": {"type": odd}})
            for odd in (None, 1, "", [], {}, [["a"]])
        ),
        ("/tokenize", {"prompt": "a", "messages": Q}),
        ("/tokenize", {}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [4096]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": "ab"}),
        ("/detokenize", {}),
        ("/v1/messages/count_tokens", {"messages": []}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
    ],
    ids=lambda v: json.dumps(v)[:60],
)
def test_fields_of_odd_types(host: Host, path: str, body: dict[str, Any]) -> None:
    response = host.post(path, body)
    error = response.json()["error"]
    assert response.status_code == 400 and set(error) == {"message", "type", "param", "code"} and error["param"]


@pytest.mark.parametrize("number", [7.0, 7])
def test_whole_numbers_are_integers(host: Host, number: float) -> None:
    """JSON Schema, and so the OpenAPI document, calls 7.0 an integer; 7.5 and "7" are none."""
    given = {"prompt": [number, number], "max_tokens": number, "seed": number, "top_k": number, "logprobs": number}
    said = host.post("/v1/completions", {**given, "stop_token_ids": [number], "ignore_eos": True}).json()
    assert said["usage"]["prompt_tokens"] == 2 and said["usage"]["completion_tokens"] <= 7
    for wrong in (7.5, "7", True):
        refused = host.post("/v1/completions", {"prompt": "a", "max_tokens": wrong})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"


# --- lines, headers, paths ------------------------------------------------------------------------------------------


def exchange(host: Host, raw: bytes) -> bytes:
    """What comes back for these bytes, until the server closes or answers."""
    with socket.create_connection(host.live.address, timeout=60) as connection:
        connection.sendall(raw)
        got = b""
        while b"\r\n\r\n" not in got and (more := connection.recv(65536)):
            got += more
        return got


BODY = json.dumps({"model": "nano", "prompt": "a", "max_tokens": 1}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
BYTES: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "no HTTP": (b"hello\r\n\r\n", (400,)),
    "no method": (b" / HTTP/1.1\r\n\r\n", (400,)),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40 + b"\r\n\r\n", (400,)),
    "bad length": (POST + b"content-length: ten\r\n\r\n" + BODY, (400,)),
    "negative length": (POST + b"content-length: -1\r\n\r\n" + BODY, (400,)),
    "two lengths": (POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n" + BODY, (400,)),
    "bad chunk": (POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + BODY, (400,)),
    "huge length": (POST + b"content-length: 99999999999\r\n\r\n" + BODY, (413,)),
    "huge header": (POST + b"x-a: " + b"a" * 70_000 + b"\r\n\r\n", (400,)),
    "many headers": (POST + b"".join(b"x-%d: a\r\n" % i for i in range(9000)) + b"\r\n", (400,)),
    "huge path": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", (400,)),
    "control character": (POST + b"x-a: b\x00c\r\n\r\n", (400,)),
    "no colon": (POST + b"nonsense\r\n\r\n", (400,)),
    "no JSON at all": (POST + b"content-length: 3\r\n\r\nabc", (400,)),
    "no body": (POST + b"\r\n", (400,)),
    "gzip": (POST + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00", (400,)),
    "as a form": (POST + b"content-type: application/x-www-form-urlencoded\r\ncontent-length: 3\r\n\r\na=b", (400,)),
    "chunks": (POST + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), (200,)),
    "an id with a line's end": (POST + b"x-request-id: a\\r\\nset-cookie: b\r\ncontent-length: 0\r\n\r\n", (400,)),
    "timeout of nonsense": (
        POST + b"x-request-timeout: soon\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY),
        (400,),
    ),
    "timeout of infinity": (
        POST + b"x-request-timeout: inf\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY),
        (400,),
    ),
}


@pytest.mark.parametrize("name", sorted(BYTES))
def test_bytes_of_requests(host: Host, name: str) -> None:
    raw, statuses = BYTES[name]
    said = exchange(host, raw)
    assert said.startswith(b"HTTP/1.1 ") and int(said.split()[1]) in statuses, said[:200]
    assert b"Traceback" not in said and b"set-cookie" not in said.lower()
    assert httpx.get(f"{host.url}/health").status_code == 200


PATHS = (
    *("/v1", "/v1/", "//", "//v1/models", "/v1//models", "/v1/models/", "/V1/models", "/v1/chat/completions/"),
    *("/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../../etc/passwd", "/page/%2e%2e%2fpyproject.toml"),
    *("/v1/models/%00", "/v1/models/..%2f..%2fetc", "/v1/models/%ff%fe", "/v1/models/<script>", "/%0d%0aset-cookie:a"),
    *("/docs", "/redoc", "/.git/config", "/v1/models/" + "a" * 5000, "/*", "/v1/completions;a=b"),
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
def test_paths_that_are_none(host: Host, path: str) -> None:
    said = exchange(host, b"GET " + path.encode() + b" HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n")
    status = int(said.split()[1])
    assert status in (400, 404, 405) and b"content-type: application/json" in said.lower(), said[:300]
    head = said.lower().partition(b"\r\n\r\n")[0]
    assert b"set-cookie" not in head and b"location" not in head and b"evil.example" not in head
