"""One generation request from checked fields to bytes on the wire, whole or as server-sent events.

    Job (prompts, parameters, choices) --submit--> first batch --> 200 + headers --> chunks ... usage, [DONE]
                                             |--> 4xx / 5xx while nothing has been sent
                                             '--> an `error` event once the stream has begun

The status waits for the first batch, so that a request refused late (out of pages, engine fault) still gets a true
status. The client's connection is watched all the while: when it closes, the group is cancelled.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from dsv4c.errors import Dsv4cError, RequestError
from dsv4c.runtime.completion import (
    Choice,
    Delta,
    ScoredToken,
    TextCodec,
    chat_logprobs,
    completion_logprobs,
    score_prompt,
)
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.protocol import Usage, error_body, error_kind
from dsv4c.runtime.service import Group, Output

CLIENT_GONE = 499  # nginx's number for a client that closed the connection; never sent, only counted
_RETRY_AFTER_S = 1  # a decode step or two frees pages; a client that backs off further does so by itself


@dataclass(frozen=True)
class Part:
    """One sequence to generate: prompt tokens, engine parameters, and the choice that collects its output."""

    prompt: Sequence[int]
    params: SamplingParams
    choice: Choice


@dataclass
class Job:
    """A checked request. `parts[i]` becomes choice i of the response."""

    kind: Literal["completion", "chat"]
    request_id: str
    model: str
    codec: TextCodec
    parts: list[Part]
    num_prompt_tokens: int
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    scored: bool = False
    score_only: bool = False
    """Generate nothing: the prompt's own scores are the answer."""
    thinking: bool = False
    fingerprint: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))


def error_response(error: Dsv4cError) -> JSONResponse:
    """The OpenAI error body of a deliberate error, with its status."""
    status = error.status if isinstance(error, RequestError) else 500
    headers = {"retry-after": str(_RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(_error_dict(error), status, headers=headers)


def _error_dict(error: Dsv4cError) -> dict[str, Any]:
    message = f"{error.message}; hint: {error.hint}" if error.hint else error.message
    if isinstance(error, RequestError):
        return error_body(message, kind=error_kind(error.status), param=error.param, code=error.code)
    return error_body(message, kind=error_kind(500), code="engine_error")


class Answer(Response):
    """The ASGI response of a job. It submits the job, relays what comes, and leaves nothing running behind."""

    def __init__(
        self, job: Job, open_group: Callable[[], AbstractAsyncContextManager[Group]], metrics: Metrics
    ) -> None:
        self.background = None
        self._job = job
        self._open_group = open_group
        self._metrics = metrics
        self._start_s = time.perf_counter()
        self._first_s: dict[int, float] = {}
        self._cached = [0] * len(job.parts)
        self._echoes: dict[int, list[ScoredToken]] = {}
        self._begun = False
        self._status = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._open_group() as group:
            watch = asyncio.create_task(_watch(receive, group))
            try:
                await self._answer(group, send)
            except Dsv4cError as error:
                await self._fail(error, scope, receive, send)
            finally:
                watch.cancel()
        self._count()

    async def _answer(self, group: Group, send: Send) -> None:
        job = self._job
        stream = _Stream(job, send) if job.stream else None
        for index, part in enumerate(job.parts):
            if job.echo and not job.scored:
                self._echoes[index] = score_prompt(job.codec, part.prompt)
            if job.score_only and not job.scored:
                part.choice.end("length")
            else:
                group.submit(part.prompt, part.params, index)
        async for batch in group.batches():
            for index, output in batch:
                self._take(index, output, group)
            if stream is not None:
                self._begun = True
                await stream.relay({index for index, _ in batch}, self._echoes)
        self._begun = True
        if stream is not None:
            await stream.close(self._usage(), self._echoes)
            return
        await self._send_whole(send)

    def _take(self, index: int, output: Output, group: Group) -> None:
        """Feeds one output of the engine to its choice."""
        job, part, token = self._job, self._job.parts[index], output.token_id
        choice = part.choice
        self._cached[index] += output.cached_tokens
        if output.prompt_scores is not None and job.echo:
            self._echoes[index] = score_prompt(job.codec, part.prompt, output.prompt_scores)
        if token is not None and job.score_only:
            choice.end("length")
        elif token is not None:
            self._time_first(index)
            if output.finish_reason == "stop":
                choice.end("stop", hidden_token=True)
            else:
                choice.push(token, output.score)
        if output.finish_reason is not None:
            choice.end(output.finish_reason)
        elif choice.finish_reason is not None:
            group.cancel(index)  # by a stop string: the engine knows nothing of text
        if choice.finish_reason is not None:
            self._time_end(index)

    async def _send_whole(self, send: Send) -> None:
        job = self._job
        choices = [_whole_choice(job, i, self._echoes.get(i, [])) for i in range(len(job.parts))]
        body = _head(job, "text_completion" if job.kind == "completion" else "chat.completion")
        body |= {"choices": choices, "usage": self._usage().to_dict()}
        data = json.dumps(body, separators=(",", ":")).encode()
        headers = {"content-type": "application/json", "content-length": str(len(data)), **job.headers}
        await send(_start(headers))
        await send({"type": "http.response.body", "body": data})

    async def _fail(self, error: Dsv4cError, scope: Scope, receive: Receive, send: Send) -> None:
        self._status = error.status if isinstance(error, RequestError) else 500
        if self._status == CLIENT_GONE:
            return
        if not self._begun:
            await error_response(error)(scope, receive, send)
            return
        data = f"data: {json.dumps(_error_dict(error))}\n\n".encode()
        await send({"type": "http.response.body", "body": data, "more_body": False})

    def _usage(self) -> Usage:
        choices = [part.choice for part in self._job.parts]
        reasoning = sum(choice.num_reasoning_tokens for choice in choices) if self._job.thinking else None
        cached: dict[int, int] = {}  # of a prompt with several choices, what the one that found least has found
        for part, tokens in zip(self._job.parts, self._cached, strict=True):
            cached[id(part.prompt)] = min(tokens, cached.get(id(part.prompt), tokens))
        num_tokens = sum(choice.num_tokens for choice in choices)
        return Usage(self._job.num_prompt_tokens, num_tokens, reasoning, sum(cached.values()))

    def _time_first(self, index: int) -> None:
        if index not in self._first_s:
            self._first_s[index] = time.perf_counter()
            self._metrics.first_token.observe(self._first_s[index] - self._start_s)

    def _time_end(self, index: int) -> None:
        num_tokens = self._job.parts[index].choice.num_tokens
        if index in self._first_s and num_tokens > 1:
            self._metrics.output_token.observe((time.perf_counter() - self._first_s[index]) / (num_tokens - 1))

    def _count(self) -> None:
        metrics, job = self._metrics, self._job
        path = "/v1/completions" if job.kind == "completion" else "/v1/chat/completions"
        metrics.responses.labels(path, str(self._status)).inc()
        metrics.request.observe(time.perf_counter() - self._start_s)
        metrics.prompt_tokens.inc(job.num_prompt_tokens)
        for part in job.parts:
            reason = part.choice.finish_reason or ("cancelled" if self._status == CLIENT_GONE else "error")
            metrics.finished.labels(reason).inc()
            metrics.generation_tokens.inc(part.choice.num_tokens)


class _Stream:
    """Server-sent events of one job. Each choice has one prebuilt chunk whose parts are replaced."""

    def __init__(self, job: Job, send: Send) -> None:
        self._job = job
        self._send = send
        self._open = False
        self._ended: set[int] = set()
        self._offsets = [0] * len(job.parts)
        self._greeted: set[int] = set()

    async def relay(self, indices: set[int], echoes: dict[int, list[ScoredToken]]) -> None:
        """Sends what became visible of these choices."""
        await self._begin()
        data = b"".join(self._chunks(index, echoes) for index in sorted(indices))
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self, usage: Usage, echoes: dict[int, list[ScoredToken]]) -> None:
        """Sends the rest, the usage if wanted, and the end."""
        await self.relay(set(range(len(self._job.parts))) - self._ended, echoes)
        data = b""
        if self._job.include_usage:
            data = self._event([], usage.to_dict())
        await self._send({"type": "http.response.body", "body": data + b"data: [DONE]\n\n", "more_body": False})

    async def _begin(self) -> None:
        if self._open:
            return
        self._open = True
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        await self._send(_start({**headers, "x-accel-buffering": "no", **self._job.headers}))

    def _chunks(self, index: int, echoes: dict[int, list[ScoredToken]]) -> bytes:
        job, choice = self._job, self._job.parts[index].choice
        delta = choice.take()
        ended = choice.finish_reason is not None and index not in self._ended
        if not (delta or ended):
            return b""
        if ended:
            self._ended.add(index)
        finish = choice.finish_reason if ended else None
        if job.kind == "completion":
            return self._completion_chunk(index, delta, finish, echoes)
        return self._chat_chunks(index, delta, finish)

    def _completion_chunk(
        self, index: int, delta: Delta, finish: str | None, echoes: dict[int, list[ScoredToken]]
    ) -> bytes:
        text, tokens = delta.content, delta.tokens
        if self._job.echo and index not in self._greeted:
            self._greeted.add(index)
            text = "".join(token.text for token in echoes[index]) + text
            tokens = echoes[index] + tokens
        logprobs = None
        if self._job.scored:
            logprobs = completion_logprobs(self._job.codec, tokens, self._offsets[index])
            self._offsets[index] += sum(len(token.text) for token in tokens)
        return self._event([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}])

    def _chat_chunks(self, index: int, delta: Delta, finish: str | None) -> bytes:
        data = b""
        if index not in self._greeted:
            self._greeted.add(index)
            data = self._event([_chat_chunk(index, {"role": "assistant", "content": ""})])
        if delta:
            said: dict[str, str] = {}
            if delta.reasoning:
                said["reasoning_content"] = delta.reasoning
            if delta.content or not delta.reasoning:
                said["content"] = delta.content
            chunk = _chat_chunk(index, said)
            if self._job.scored:
                chunk["logprobs"] = chat_logprobs(self._job.codec, delta.tokens)
            data += self._event([chunk])
        if finish is not None:
            data += self._event([_chat_chunk(index, {}, finish)])
        return data

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body = _head(self._job, "text_completion" if self._job.kind == "completion" else "chat.completion.chunk")
        body["choices"] = choices
        if self._job.include_usage:
            body["usage"] = usage
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _head(job: Job, kind: str) -> dict[str, Any]:
    head: dict[str, Any] = {"id": job.request_id, "object": kind, "created": job.created, "model": job.model}
    if job.fingerprint is not None:
        head["system_fingerprint"] = job.fingerprint
    return head


def _chat_chunk(index: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _whole_choice(job: Job, index: int, prompt: list[ScoredToken]) -> dict[str, Any]:
    choice = job.parts[index].choice
    delta = choice.take()
    finish = choice.finish_reason
    if job.kind == "completion":
        text = "".join(token.text for token in prompt) + delta.content
        logprobs = completion_logprobs(job.codec, prompt + delta.tokens, 0) if job.scored else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
    message: dict[str, Any] = {"role": "assistant", "content": delta.content}
    if job.thinking:
        message["reasoning_content"] = delta.reasoning
    scores = chat_logprobs(job.codec, delta.tokens) if job.scored else None
    return {"index": index, "message": message, "logprobs": scores, "finish_reason": finish}


def _start(headers: Mapping[str, str]) -> Message:
    pairs = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": pairs}


async def _watch(receive: Receive, group: Group) -> None:
    """Waits for the client to close its connection, then ends the group's iteration."""
    while (await receive())["type"] != "http.disconnect":
        pass
    group.fail(RequestError("the client closed the connection", status=CLIENT_GONE))
