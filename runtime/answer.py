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
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from dsv4c.errors import Dsv4cError, RequestError
from dsv4c.runtime.completion import (
    Choice,
    Delta,
    ScoredToken,
    TextCodec,
    score_prompt,
)
from dsv4c.runtime.connections import connection_of
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.protocol import Usage, error_body, error_kind
from dsv4c.runtime.record import RequestRecord, record_of
from dsv4c.runtime.service import Group, Output, Score
from dsv4c.runtime.timing import Clocks

DONE = b"data: [DONE]\n\n"  # how OpenAI's streams end
_DIRECT = "dsv4c.send"
CLIENT_GONE = 499  # nginx's number for a client that closed the connection; never sent, only counted


@dataclass
class Part:
    """One sequence to generate: prompt tokens, engine parameters, and the choice that collects its output."""

    prompt: Sequence[int]
    params: SamplingParams
    choice: Choice
    echoed: list[ScoredToken] = field(default_factory=list)
    """The prompt's tokens, where they are echoed; there before the choice's first delta."""
    prompt_scores: Sequence[Score | None] | None = None
    """Of the prompt's tokens, where asked for; there before the choice's first delta."""
    cached_tokens: int = 0
    """Of the prompt, those that were not computed."""
    logprob: float = 0.0
    """Sum over the tokens generated, where they are scored."""


@dataclass
class Job:
    """A checked request. `parts[i]` becomes choice i of the response."""

    request_id: str
    model: str
    codec: TextCodec
    parts: list[Part]
    num_prompt_tokens: int
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    """Every chunk carries the usage so far."""
    echo: bool = False
    scored: bool = False
    score_only: bool = False
    """Generate nothing: the prompt's own scores are the answer."""
    thinking: bool = False
    fingerprint: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    own_words: Callable[[Dsv4cError], Dsv4cError] = lambda error: error
    """What befalls the request later, in the names of the API that it came by."""
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> Usage:
        """Tokens so far."""
        choices = [part.choice for part in self.parts]
        reasoning = sum(choice.num_reasoning_tokens for choice in choices) if self.thinking else None
        cached: dict[int, int] = {}  # of a prompt with several choices, what the one that found least has found
        for part in self.parts:
            cached[id(part.prompt)] = min(part.cached_tokens, cached.get(id(part.prompt), part.cached_tokens))
        num_tokens = sum(choice.num_tokens for choice in choices)
        return Usage(self.num_prompt_tokens, num_tokens, reasoning, sum(cached.values()))


class Writer(Protocol):
    """An endpoint's wire format: the whole body, or the server-sent events, of one job."""

    @property
    def path(self) -> str:
        """The route, for the metrics."""

    def whole(self, usage: Usage, /) -> Mapping[str, Any]:
        """The body of a response that is not a stream; every choice has ended."""

    def begin(self) -> bytes:
        """Events before all others; sent with the first batch."""

    def chunks(self, index: int, delta: Delta, finish: str | None, /) -> bytes:
        """Events of what became visible of choice `index`; `finish`, once and last, is why it ended."""

    def end(self, usage: Usage, /) -> bytes:
        """Events after all others."""

    def fail(self, error: Dsv4cError, /) -> bytes:
        """The event that ends a stream which failed."""


_encode = json.JSONEncoder(separators=(",", ":")).encode
_MARK = "\0text\0"  # nothing that the rest of an event can hold: NUL is written as \\u0000


def event(body: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    data = b"data: " + _encode(body).encode() + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data


class TextEvents:
    """Events that differ by one text alone. What stands around it is encoded once: most tokens of a stream are such."""

    def __init__(self, make: Callable[[int, str, str], bytes]) -> None:
        self._make = make
        self._around: dict[tuple[int, str], tuple[bytes, bytes]] = {}

    def of(self, index: int, kind: str, text: str) -> bytes:
        """The bytes of `make(index, kind, text)`."""
        around = self._around.get((index, kind))
        if around is None:
            before, _, after = self._make(index, kind, _MARK).partition(_encode(_MARK).encode())
            around = self._around[index, kind] = (before, after)
        return around[0] + _encode(text).encode() + around[1]


def head(job: Job, kind: str) -> dict[str, Any]:
    """What every OpenAI body and chunk begins with."""
    said: dict[str, Any] = {"id": job.request_id, "object": kind, "created": job.created, "model": job.model}
    if job.fingerprint is not None:
        said["system_fingerprint"] = job.fingerprint
    return said


class Host(Protocol):
    """What an answer asks of the server that gives it."""

    @property
    def metrics(self) -> Metrics: ...

    def group(self, timeout_s: float | None = None) -> AbstractAsyncContextManager[Group]:
        """Where the job runs, for `timeout_s` at most."""

    def timeout_s(self, header: str | None, /) -> float | None:
        """Seconds that a request with this `x-request-timeout` may take. Raises RequestError."""

    def refusal(self, error: Dsv4cError, path: str, /) -> JSONResponse:
        """The response to a request for this path that is refused."""


ErrorShape = Callable[[dict[str, Any], int], dict[str, Any]]
"""An endpoint's own error body, from OpenAI's and the status."""


def error_response(error: Dsv4cError, shape: ErrorShape | None = None, retry_after_s: int = 1) -> JSONResponse:
    """The OpenAI error body of a deliberate error, or the endpoint's own; a 503 says when to return."""
    status = error.status if isinstance(error, RequestError) else 500
    headers = {"retry-after": str(retry_after_s)} if status == 503 else None
    body = error_dict(error)
    return JSONResponse(body if shape is None else shape(body, status), status, headers=headers)


def error_dict(error: Dsv4cError) -> dict[str, Any]:
    """The OpenAI error body of a deliberate error."""
    message = f"{error.message}; hint: {error.hint}" if error.hint else error.message
    if isinstance(error, RequestError):
        return error_body(message, kind=error_kind(error.status), param=error.param, code=error.code)
    return error_body(message, kind=error_kind(500), code="engine_error")


def put_direct(scope: MutableMapping[str, Any], send: Send) -> None:
    """Lets the body of a stream pass by the layers between here and its answer, which look at heads alone."""
    scope[_DIRECT] = send


class Answer(Response):
    """The ASGI response of a job. It submits the job, relays what comes, and leaves nothing running behind."""

    def __init__(self, job: Job, writer: Writer, host: Host) -> None:
        self.background = None
        self._job = job
        self._writer = writer
        self._host = host
        self._clocks = Clocks(host.metrics)
        self._error: str | None = None
        self._begun = False
        self._status = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timeout_s = self._host.timeout_s(Headers(scope=scope).get("x-request-timeout"))
        async with self._host.group(timeout_s) as group:
            connection = connection_of(scope)
            group.abort = None if connection is None else connection.transport.abort
            watch = asyncio.create_task(_watch(receive, group))
            try:
                await self._answer(group, send, scope.get(_DIRECT, send))
            except Dsv4cError as error:
                await self._fail(self._job.own_words(error), scope, receive, send)
            finally:
                watch.cancel()
            if connection is not None and connection.stalled:
                self._status, self._error = CLIENT_GONE, "stalled"
        self._count(record_of(scope))

    async def _answer(self, group: Group, send: Send, direct: Send) -> None:
        job = self._job
        stream = _Stream(job, self._writer, group, send, direct) if job.stream else None
        for index, part in enumerate(job.parts):
            if job.echo and not job.scored:
                part.echoed = score_prompt(job.codec, part.prompt)
            if job.score_only and not job.scored:
                part.choice.end("length")
            else:
                group.submit(part.prompt, part.params, index)
        # a task of its own: every wake-up would else pass through all the layers around this
        await asyncio.create_task(self._relay(group, stream))
        self._begun = True
        if stream is not None:
            await stream.close(self._job.usage())
            return
        await self._send_whole(send)

    async def _relay(self, group: Group, stream: _Stream | None) -> None:
        """Takes what comes, and passes it on to a stream, until all sequences have ended."""
        while batch := await group.take():
            for index, output in batch:
                self._take(index, output, group)
            if stream is not None:
                self._begun = True
                await stream.relay({index for index, _ in batch})

    def _take(self, index: int, output: Output, group: Group) -> None:
        """Feeds one output of the engine to its choice."""
        job, part, token = self._job, self._job.parts[index], output.token_id
        choice = part.choice
        part.cached_tokens += output.cached_tokens
        if output.score is not None:
            part.logprob += output.score[0]
        if output.prompt_scores is not None:
            part.prompt_scores = output.prompt_scores
            if job.echo:
                part.echoed = score_prompt(job.codec, part.prompt, output.prompt_scores)
        if token is not None and job.score_only:
            choice.end("length")
        elif token is not None:
            self._clocks.token(index, output.queued_s)
            if output.finish_reason == "stop":
                eos = token in job.codec.eos_token_ids
                choice.end("stop", hidden_token=True, stop_token=None if eos else token)
            else:
                choice.push(token, output.score)
        if output.finish_reason is not None:
            choice.end(output.finish_reason)
        elif choice.finish_reason is not None:
            group.cancel(index)  # by a stop string: the engine knows nothing of text
        if choice.finish_reason is not None:
            self._clocks.sequence_ended(index, choice.num_tokens)

    async def _send_whole(self, send: Send) -> None:
        data = json.dumps(self._writer.whole(self._job.usage()), separators=(",", ":")).encode()
        headers = {"content-type": "application/json", "content-length": str(len(data)), **self._job.headers}
        await send(_start(headers))
        await send({"type": "http.response.body", "body": data})

    async def _fail(self, error: Dsv4cError, scope: Scope, receive: Receive, send: Send) -> None:
        self._status = error.status if isinstance(error, RequestError) else 500
        self._error = error.code if isinstance(error, RequestError) else "engine_error"
        if self._status == CLIENT_GONE:
            return
        if not self._begun:
            await self._host.refusal(error, self._writer.path)(scope, receive, send)
            return
        await send({"type": "http.response.body", "body": self._writer.fail(error), "more_body": False})

    def _count(self, record: RequestRecord | None) -> None:
        """Tells the metrics and the request's record how it went."""
        job = self._job
        reason = "cancelled" if self._status == CLIENT_GONE else "error"
        sequences = [(len(part.prompt), part.params.max_tokens, part.choice) for part in job.parts]
        self._clocks.ended(self._writer.path, self._status, reason, job.num_prompt_tokens, sequences)
        if record is None:
            return
        usage = job.usage()
        record.status, record.error = self._status, self._error
        record.response_id, record.model, record.stream = job.request_id, job.model, job.stream
        record.prompt_tokens, record.cached_tokens = usage.prompt_tokens, usage.cached_tokens
        record.completion_tokens = usage.completion_tokens
        record.finish_reasons = tuple(part.choice.finish_reason or reason for part in job.parts)
        self._clocks.fill(record)


class _Stream:
    """Server-sent events of one job. `send` takes the head of the response, `direct` its body."""

    def __init__(self, job: Job, writer: Writer, group: Group, send: Send, direct: Send) -> None:
        self._job = job
        self._writer = writer
        self._group = group
        self._send = send
        self._direct = direct
        self._open = False
        self._ended: set[int] = set()

    async def relay(self, indices: set[int]) -> None:
        """Sends what became visible of these choices."""
        begin = b"" if self._open else await self._begin()
        if len(indices) == 1:
            data = begin + self._chunks(next(iter(indices)))
        else:
            data = b"".join([begin, *(self._chunks(index) for index in sorted(indices))])
        if data:
            await self._push({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self, usage: Usage) -> None:
        """Sends the rest and the end."""
        await self.relay(set(range(len(self._job.parts))) - self._ended)
        await self._push({"type": "http.response.body", "body": self._writer.end(usage), "more_body": False})

    async def _push(self, message: Message) -> None:
        """Sends, and lets the group know that the client has not taken it yet."""
        self._group.sending = True
        await self._direct(message)
        self._group.sending = False

    async def _begin(self) -> bytes:
        self._open = True
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        await self._send(_start({**headers, "x-accel-buffering": "no", **self._job.headers}))
        return self._writer.begin()

    def _chunks(self, index: int) -> bytes:
        choice = self._job.parts[index].choice
        delta = choice.take()
        ended = choice.finish_reason is not None and index not in self._ended
        if not (delta or ended):
            return b""
        if ended:
            self._ended.add(index)
        return self._writer.chunks(index, delta, choice.finish_reason if ended else None)


def _start(headers: Mapping[str, str]) -> Message:
    pairs = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": pairs}


async def _watch(receive: Receive, group: Group) -> None:
    """Waits for the client to close its connection, then ends the group's iteration."""
    while (await receive())["type"] != "http.disconnect":
        pass
    group.fail(RequestError("the client closed the connection", status=CLIENT_GONE))
