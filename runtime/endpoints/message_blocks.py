"""The wire format of /v1/messages: content blocks (thinking, text, tool_use) one after another, and its error body.

message_start -> (content_block_start, ...delta, content_block_stop) for each block -> message_delta -> message_stop
"""

from __future__ import annotations

import json
from typing import Any

from dsv4c.errors import Dsv4cError, RequestError
from dsv4c.runtime.answer import Job, error_dict, event
from dsv4c.runtime.completion import CallDelta, Delta
from dsv4c.runtime.protocol import Usage

PATH = "/v1/messages"
_DELTAS = {"thinking": "thinking_delta", "text": "text_delta"}
_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_shape(body: dict[str, Any], status: int) -> dict[str, Any]:
    """Anthropic's error body, with OpenAI's fields left in it."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**body["error"], "type": kind}}


class MessagesWriter:
    """The message, or its events. One choice."""

    path = PATH

    def __init__(self, job: Job) -> None:
        self._job = job
        self._blocks: list[dict[str, Any]] = []
        self._calls: dict[int, int] = {}
        self._open = False
        self._events: list[bytes] = []
        self._finish = ""

    def whole(self, usage: Usage) -> dict[str, Any]:
        choice = self._job.parts[0].choice
        self._take(choice.take(), choice.finish_reason)
        for block in self._blocks:
            if block["type"] == "tool_use":
                block["input"] = _input(block["input"])
        return {**self._message(usage), "content": self._blocks, **self._stop()}

    def begin(self) -> bytes:
        self._emit("message_start", message=self._message(self._job.usage()))
        return self._sent()

    def chunks(self, index: int, delta: Delta, finish: str | None) -> bytes:
        self._take(delta, finish)
        return self._sent()

    def end(self, usage: Usage) -> bytes:
        self._emit("message_delta", delta=self._stop(), usage=_usage(usage))
        self._emit("message_stop")
        return self._sent()

    def fail(self, error: Dsv4cError) -> bytes:
        status = error.status if isinstance(error, RequestError) else 500
        return event(error_shape(error_dict(error), status), "error")

    def _message(self, usage: Usage) -> dict[str, Any]:
        return {
            "id": self._job.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._job.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def _stop(self) -> dict[str, Any]:
        reason = self._job.parts[0].choice.stop_reason
        if self._finish == "stop" and isinstance(reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": reason}
        reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
        return {"stop_reason": reasons.get(self._finish, "end_turn"), "stop_sequence": None}

    def _take(self, delta: Delta, finish: str | None) -> None:
        """Grows the blocks."""
        if delta.reasoning:
            self._text("thinking", delta.reasoning)
        if delta.content:
            self._text("text", delta.content)
        for call in delta.tool_calls:
            self._call(call)
        if finish is not None:
            self._finish = finish
            if not self._blocks:
                self._text("text", "")
            self._close()

    def _text(self, kind: str, text: str) -> None:
        if not self._open or self._blocks[-1]["type"] != kind:
            signed = {"signature": ""} if kind == "thinking" else {}
            self._start({"type": kind, kind: "", **signed})
        self._blocks[-1][kind] += text
        if text:
            self._grow(len(self._blocks) - 1, {"type": _DELTAS[kind], kind: text})

    def _call(self, call: CallDelta) -> None:
        if call.index not in self._calls:
            self._calls[call.index] = len(self._blocks)
            self._start({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            self._blocks[-1]["input"] = ""
        index = self._calls[call.index]
        self._blocks[index]["input"] += call.arguments
        if call.arguments:
            self._grow(index, {"type": "input_json_delta", "partial_json": call.arguments})

    def _start(self, block: dict[str, Any]) -> None:
        self._close()
        self._blocks.append(block)
        self._open = True
        self._emit("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _grow(self, index: int, delta: dict[str, Any]) -> None:
        self._emit("content_block_delta", index=index, delta=delta)

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._emit("content_block_stop", index=len(self._blocks) - 1)

    def _emit(self, kind: str, **said: Any) -> None:
        if self._job.stream:
            self._events.append(event({"type": kind, **said}, kind))

    def _sent(self) -> bytes:
        data, self._events = b"".join(self._events), []
        return data


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what came from the cache apart."""
    said: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens is not None:
        said["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return said


def _input(text: str) -> Any:
    """The arguments of a call; of one that was cut off, which are no JSON yet, the text."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {"partial_json": text}
