"""Requests of Dynamo's frontend, served by a node: from a request dict to chunks, for every role.

    both      computes the prompt and generates
    prefill   computes the prompt and hands over: one chunk, one token, `disaggregated_params`
    decode    takes over from a prefill worker, or computes the prompt itself: where none was sent, where its state is
              lost on the way, and for a probe

Nothing here imports Dynamo. Belongs to the event loop; the node calls back from its own threads.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from dsv4c.errors import EngineError, RequestError, TransferError
from dsv4c.runtime.dynamo.asked import Asked, read_request
from dsv4c.runtime.dynamo.chunks import Chunk, apart, chunk_of, failure_of, usage
from dsv4c.runtime.dynamo.clock import RequestClock
from dsv4c.runtime.dynamo.handover import Bootstrap, read_bootstrap, read_params, refusal_params, to_params
from dsv4c.runtime.dynamo.mail import Mailbox
from dsv4c.runtime.dynamo.publish import Publishing
from dsv4c.runtime.dynamo.rendezvous import Rendezvous, Room, meet
from dsv4c.runtime.grammar import Grammar, GrammarCodec, Grammars
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.request import Event, Request
from dsv4c.runtime.structured import StructuredFields, answer_grammar
from dsv4c.runtime.transfer.node import Granted, Node, Prefilled, prefill_params

Role = Literal["both", "prefill", "decode"]
_LOG = logging.getLogger("dsv4c.dynamo")


class WorkerCodec(GrammarCodec, Protocol):
    """What a worker needs to know of tokens: the frontend reads and writes the text."""

    def in_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether the completion of this prompt begins with reasoning."""

    def answer_start(self, prompt: Sequence[int]) -> int | None:
        """Where the answer begins that a chat's prompt asks for, if these tokens are one."""


class Context(Protocol):
    """Dynamo's, of one request."""

    def is_stopped(self) -> bool:
        """Whether its client has left."""

    def async_killed_or_stopped(self) -> Awaitable[bool]:
        """Waits until it has."""


@dataclass
class _Job:
    """A request of the frontend that is being served."""

    mailbox: Mailbox
    requests: list[Request] = field(default_factory=list)
    submitted: set[str] = field(default_factory=set)
    over: bool = False


class Serving:
    """Serves until it is told that the worker closes; then lets what runs finish."""

    def __init__(
        self,
        node: Node,
        codec: WorkerCodec,
        metrics: Metrics,
        publishing: Publishing,
        *,
        role: Role = "both",
        grammars: Grammars | None = None,
        rendezvous: Rendezvous | None = None,
        stream_interval: int = 1,
    ) -> None:
        """`stream_interval`: tokens of a chunk, the first excepted. `grammars`: None where none can be enforced.
        `rendezvous`: of a prefill worker that is met there."""
        self._node, self._codec, self._metrics, self._publishing = node, codec, metrics, publishing
        self._role = role
        self._grammars = grammars
        self._rendezvous = rendezvous
        self._stream_interval = stream_interval
        self._numbers = itertools.count(1)
        self._jobs: dict[str, _Job] = {}

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def fail_all(self, error: Exception) -> None:
        """Raises this in every request that still runs."""
        for job in self._jobs.values():
            job.mailbox.fail(error)

    async def answer(
        self, request: Mapping[str, Any], context: Context, *, probe: bool = False
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of every choice until all have ended. Raises RequestError for what cannot be served, EngineError.

        `probe`: a sign of life is wanted; no other worker is asked.
        """
        try:
            asked = await self._read(request)
        except RequestError as error:
            if self._role != "prefill" or error.status >= 500:
                raise
            yield self._refused(request, error)
            return
        if context.is_stopped():  # its client has left on the way here
            yield _cancelled(asked)
            return
        number = str(next(self._numbers))
        job = self._jobs[number] = _Job(Mailbox(asyncio.get_running_loop(), self._stream_interval))
        tasks: list[asyncio.Future[None]] = [asyncio.ensure_future(self._watch(context, job))]
        self._publishing.entered()
        try:
            chunks = (
                self._prefill(number, asked, request, job)
                if self._role == "prefill" and not probe
                else self._generate(number, asked, None if probe else request, job, tasks)
            )
            async for chunk in chunks:
                yield chunk
        finally:
            for task in tasks:
                task.cancel()
            del self._jobs[number]
            self._cancel(job)
            self._publishing.left()

    async def _read(self, request: Mapping[str, Any]) -> Asked:
        """The request, its grammar compiled, and what of its prompt an earlier worker has generated set apart."""
        asked = read_request(request, self._codec.eos_token_ids, self._codec.answer_start)
        context = self._node.loop.max_context
        if len(asked.prompt) + len(asked.generated) >= context:
            raise RequestError(
                f"the prompt has {len(asked.prompt)} tokens, the context is {context} with at least 1 to generate",
                param="prompt",
                code="context_length_exceeded",
            )
        return replace(asked, params=replace(asked.params, grammar=await self._grammar(asked)))

    async def _grammar(self, asked: Asked) -> Grammar | None:
        if asked.guide is None:
            return None
        body = StructuredFields(structured_outputs={asked.guide.kind: asked.guide.value})
        reasons = self._codec.in_reasoning(asked.prompt)
        return await answer_grammar(self._grammars, self._codec, body, reasons=reasons)

    def _cancel(self, job: _Job) -> None:
        job.over = True
        for one in job.requests:
            if one.id in job.submitted:
                self._node.cancel(one.id)

    async def _watch(self, context: Context, job: _Job) -> None:
        """Ends the request's choices when its client has left."""
        await context.async_killed_or_stopped()
        self._cancel(job)
        for one in job.requests:
            if one.id not in job.submitted:
                job.mailbox.put(one.choice, Event(one.id, end=one.ended("cancelled")))

    # both, decode

    async def _generate(
        self,
        number: str,
        asked: Asked,
        request: Mapping[str, Any] | None,
        job: _Job,
        tasks: list[asyncio.Future[None]],
    ) -> AsyncGenerator[Chunk, None]:
        """Submits every choice and yields what comes of them. The first takes over from the prefill worker, if any."""
        job.requests = [_request(f"{number}-{i}", asked, i) for i in range(asked.params.n)]
        running, cached, ends = set(range(len(job.requests))), dict.fromkeys(range(len(job.requests)), 0), list[Chunk]()
        waiting = self._begin(job, asked, request, tasks)
        clock = RequestClock(self._metrics, len(asked.prompt), asked.params)
        while running:
            for index, events in (await job.mailbox.take()).items():
                failure = failure_of(events[-1])
                if failure is not None:
                    raise failure
                clock.events(index, events)
                for one in waiting:
                    self._submit(job, one)  # behind the first, whose blocks they share
                waiting = []
                cached[index] += sum(event.cached_tokens for event in events)
                scored = asked.params.logprobs is not None
                chunk = chunk_of(events, index, len(asked.prompt), cached[index], scored=scored)
                if events[-1].end is not None:
                    running.discard(index)
                    if asked.params.n > 1:
                        chunk, end = apart(chunk)
                        ends.append(end)
                if chunk["token_ids"] or "finish_reason" in chunk:
                    yield chunk
        for chunk in ends:  # the frontend reads no further than the first
            yield chunk

    def _begin(
        self, job: _Job, asked: Asked, request: Mapping[str, Any] | None, tasks: list[asyncio.Future[None]]
    ) -> list[Request]:
        """Starts the first choice, and all others unless the first takes its state over; those are returned."""
        first, others = job.requests[0], job.requests[1:]
        try:
            handed = read_params(request) if request is not None and self._role == "decode" else None
            meeting = read_bootstrap(request) if request is not None and self._role == "decode" else None
        except TransferError as error:
            _LOG.error("the prompt of a request is computed here: %s", error)
            handed = meeting = None
        if handed is not None:
            self._take_over(job, handed[0], handed[1])
            return others
        if meeting is not None:
            tasks.append(asyncio.ensure_future(self._follow(job, meeting)))
            return others
        for one in (first, *others):
            self._submit(job, one)
        return []

    def _submit(self, job: _Job, one: Request) -> None:
        """Has a request computed here. Raises RequestError."""
        if not job.over:
            self._node.decode(one, None, job.mailbox.sink(one.choice))
            job.submitted.add(one.id)

    def _take_over(self, job: _Job, granted: Granted, first: Prefilled | None) -> None:
        """Has the state of the first choice pulled; the node computes it where the handle is of no use."""
        if job.over:
            self._node.forgo(granted.handle)
            return
        one = job.requests[0]
        self._node.decode(one, granted.handle, job.mailbox.sink(0), first)
        job.submitted.add(one.id)

    async def _follow(self, job: _Job, where: Bootstrap) -> None:
        """Hears from the prefill worker what becomes of the prompt, and acts on it."""
        request_id = job.requests[0].id
        try:
            async for message in meet(where.host, where.port, where.room):
                if isinstance(message, Granted):
                    self._take_over(job, message, None)
                elif not job.over and request_id in job.submitted:
                    self._node.prefilled(request_id, message)
                if job.over:
                    return
        except TransferError as error:
            _LOG.warning("the prompt of a request is computed here: %s", error)
            if request_id in job.submitted:
                self._node.prefill_failed(request_id, error.message)
            elif not job.over:
                self._compute(job)
        except (RequestError, EngineError) as error:
            job.mailbox.fail(error)

    def _compute(self, job: _Job) -> None:
        try:
            self._submit(job, job.requests[0])
        except (RequestError, EngineError) as error:
            job.mailbox.fail(error)

    # prefill

    async def _prefill(
        self, number: str, asked: Asked, request: Mapping[str, Any], job: _Job
    ) -> AsyncGenerator[Chunk, None]:
        """Computes the prompt and one token of the first choice, and says where the state is."""
        where = read_bootstrap(request)
        room = self._rendezvous.room(where.room) if where is not None and self._rendezvous is not None else None
        if room is not None:
            room.claim()
        params = prefill_params(asked.params, len(asked.generated))
        one = Request(number, asked.prompt, params, generated=asked.generated, keep=True)
        job.requests = [one]
        done: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
        granted: list[Granted] = []
        sink = _on_loop(lambda message: self._hear(message, granted, done, room))
        clock = RequestClock(self._metrics, len(asked.prompt), params)
        try:
            self._node.prefill(one, sink)
            job.submitted.add(one.id)
            first = await _first_of(done, job.mailbox.failure())
        except (RequestError, EngineError) as error:
            if isinstance(error, RequestError) and error.status < 499:
                yield self._refused(request, error)
                return
            if room is not None:
                room.failed(error.message)
            raise
        job.submitted.discard(one.id)  # it has ended, and is kept: that is the lease's affair now
        clock.prefilled(first)
        yield {
            "token_ids": list(first.tokens),
            "index": 0,
            "finish_reason": "stop" if first.finish == "stop" else "length",
            "completion_usage": usage(len(asked.prompt), len(asked.generated) + len(first.tokens), first.cached_tokens),
            "disaggregated_params": to_params(granted[0], first),
        }

    def _refused(self, request: Mapping[str, Any], error: RequestError) -> Chunk:
        """Hands a request at fault over to the decode worker, who will say so."""
        where = read_bootstrap(request)
        if where is not None and self._rendezvous is not None:
            self._rendezvous.room(where.room).failed(error.message)
        params = refusal_params(error)
        return {"token_ids": [], "index": 0, "finish_reason": "length", "disaggregated_params": params}

    def _hear(
        self, message: object, granted: list[Granted], done: asyncio.Future[Prefilled], room: Room | None
    ) -> None:
        """What the node says of a prefill."""
        if isinstance(message, Granted):
            granted.append(message)
            if room is not None:
                room.granted(message)
        elif isinstance(message, Prefilled):
            if room is not None:
                room.prefilled(message)
            if not done.done():
                done.set_result(message)
        elif isinstance(message, Event) and message.end is not None and not done.done():
            cancelled = RequestError("the request was cancelled", status=499, code="cancelled")
            done.set_exception(failure_of(message) or cancelled)


def _on_loop(call: Callable[[object], None]) -> Callable[[object], None]:
    """Called from any thread, calls in the event loop."""
    loop = asyncio.get_running_loop()

    def put(message: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(call, message)

    return put


async def _first_of(done: asyncio.Future[Prefilled], failure: Awaitable[None]) -> Prefilled:
    """The result, unless the failure is raised first."""
    other = asyncio.ensure_future(failure)
    try:
        await asyncio.wait((done, other), return_when=asyncio.FIRST_COMPLETED)
        if other.done():
            other.result()
        return await done
    finally:
        other.cancel()


def _request(request_id: str, asked: Asked, choice: int) -> Request:
    params = replace(asked.params, n=1)
    return Request(request_id, asked.prompt, params, choice=choice, generated=asked.generated)


def _cancelled(asked: Asked) -> Chunk:
    done = usage(len(asked.prompt), len(asked.generated), 0)
    return {"token_ids": [], "index": 0, "finish_reason": "cancelled", "completion_usage": done}
