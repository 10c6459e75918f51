"""The wire format of /v1/responses: output items grow from deltas, each growth an event.

delta --> items (reasoning, message, function_call): added, ...delta, done --> response.completed
"""

from __future__ import annotations

import uuid
from typing import Any

from dsv4c.errors import Dsv4cError
from dsv4c.runtime.answer import Job, error_dict, event
from dsv4c.runtime.completion import CallDelta, Delta, ScoredToken, chat_logprobs
from dsv4c.runtime.protocol import Usage

PATH = "/v1/responses"


class ResponsesWriter:
    """The response object, or its events. One choice."""

    path = PATH

    def __init__(self, job: Job, echoed: dict[str, Any]) -> None:
        self._job = job
        self._echoed = echoed
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._calls: dict[int, dict[str, Any]] = {}
        self._events: list[bytes] = []
        self._number = 0
        self._num_seen = 0
        self._finish: str | None = None

    def whole(self, usage: Usage) -> dict[str, Any]:
        choice = self._job.parts[0].choice
        self._take(choice.take(), choice.finish_reason)
        return self._response(usage)

    def begin(self) -> bytes:
        for kind in ("created", "in_progress"):
            self._emit(f"response.{kind}", response=self._response(None))
        return self._sent()

    def chunks(self, index: int, delta: Delta, finish: str | None) -> bytes:
        self._take(delta, finish)
        return self._sent()

    def end(self, usage: Usage) -> bytes:
        response = self._response(usage)
        self._emit(f"response.{response['status']}", response=response)
        return self._sent()

    def fail(self, error: Dsv4cError) -> bytes:
        said = error_dict(error)["error"]
        self._emit("error", code=said["code"], message=said["message"], param=said["param"])
        failed = {**self._response(None), "status": "failed"}
        failed["error"] = {"code": "server_error", "message": said["message"]}
        self._emit("response.failed", response=failed)
        return self._sent()

    def _response(self, usage: Usage | None) -> dict[str, Any]:
        job, status, why = self._job, "in_progress", None
        if usage is not None:
            cut = self._finish == "length"
            status, why = ("incomplete", {"reason": "max_output_tokens"}) if cut else ("completed", None)
        return {
            "id": job.request_id,
            "object": "response",
            "created_at": job.created,
            "status": status,
            "error": None,
            "incomplete_details": why,
            "model": job.model,
            "output": self._items if usage is not None else [],
            "usage": None if usage is None else _usage(usage),
            **self._echoed,
        }

    def _take(self, delta: Delta, finish: str | None) -> None:
        """Grows the items."""
        tokens = self._content_tokens(delta.tokens)
        if delta.reasoning:
            self._text("reasoning", "reasoning_text", "response.reasoning_text", delta.reasoning)
        if delta.content:
            self._text("message", "output_text", "response.output_text", delta.content, self._scores(tokens))
        for call in delta.tool_calls:
            self._call(call)
        if finish is None:
            return
        self._finish = finish
        if not self._items:
            self._text("message", "output_text", "response.output_text", "", self._scores(tokens))
        self._close("incomplete" if finish == "length" else "completed")

    def _content_tokens(self, tokens: list[ScoredToken]) -> list[ScoredToken]:
        """Those that are not reasoning, which has no place for log-probabilities."""
        first = max(0, self._job.parts[0].choice.num_reasoning_tokens - self._num_seen)
        self._num_seen += len(tokens)
        return tokens[first:]

    def _scores(self, tokens: list[ScoredToken]) -> list[dict[str, Any]]:
        scores: list[dict[str, Any]] = chat_logprobs(self._job.codec, tokens)["content"] if self._job.scored else []
        return scores

    def _text(
        self, kind: str, part_kind: str, name: str, text: str, logprobs: list[dict[str, Any]] | None = None
    ) -> None:
        """Adds text to the open item of this kind, opening one if need be."""
        if self._open is None or self._open["type"] != kind:
            self._close("completed")
            part: dict[str, Any] = {"type": part_kind, "text": ""}
            item: dict[str, Any] = {"type": kind, "id": _new("rs"), "summary": []}
            if kind == "message":
                item = {"type": kind, "id": _new("msg"), "role": "assistant"}
                part |= {"annotations": [], "logprobs": []}
            item |= {"status": "in_progress", "content": []}
            self._add(item)
            self._emit_part("response.content_part.added", item, part=dict(part))
            item["content"].append(part)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        extra = {}
        if kind == "message":
            part["logprobs"] += logprobs or []
            extra = {"logprobs": logprobs or []}
        if text:
            self._emit_part(f"{name}.delta", self._open, delta=text, **extra)

    def _call(self, call: CallDelta) -> None:
        if call.index not in self._calls:
            self._close("completed")
            known = {"id": _new("fc"), "call_id": call.id, "name": call.name}
            self._calls[call.index] = {"type": "function_call", **known, "arguments": "", "status": "in_progress"}
            self._add(self._calls[call.index])
        item = self._calls[call.index]
        item["arguments"] += call.arguments
        if call.arguments:
            self._emit_item("response.function_call_arguments.delta", item, delta=call.arguments)

    def _add(self, item: dict[str, Any]) -> None:
        self._items.append(item)
        self._open = item
        self._emit("response.output_item.added", output_index=len(self._items) - 1, item=_copy(item))

    def _close(self, status: str) -> None:
        """Ends the open item, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            self._emit_item(
                "response.function_call_arguments.done", item, arguments=item["arguments"], name=item["name"]
            )
        else:
            part = item["content"][0]
            name, extra = "reasoning_text", {}
            if item["type"] == "message":
                name, extra = "output_text", {"logprobs": part["logprobs"]}
            self._emit_part(f"response.{name}.done", item, text=part["text"], **extra)
            self._emit_part("response.content_part.done", item, part=part)
        self._emit("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _emit_part(self, kind: str, item: dict[str, Any], **said: Any) -> None:
        self._emit_item(kind, item, content_index=0, **said)

    def _emit_item(self, kind: str, item: dict[str, Any], **said: Any) -> None:
        self._emit(kind, item_id=item["id"], output_index=len(self._items) - 1, **said)

    def _emit(self, kind: str, **said: Any) -> None:
        if self._job.stream:
            self._events.append(event({"type": kind, "sequence_number": self._number, **said}, kind))
            self._number += 1

    def _sent(self) -> bytes:
        data, self._events = b"".join(self._events), []
        return data


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "content": []} if "content" in item else dict(item)


def _new(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
