"""The engine as NVIDIA Dynamo drives it: requests from the frontend in, chunks of tokens out, one class.

    start -> generate, abort, ... -> cleanup           Rust owns signals, registration, health and /metrics

`cleanup` comes while requests run: it lets them finish for `drain_s` seconds and then raises in those that have not,
so that the frontend moves them to another worker with what they have. A stream never just ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dynamo._core import Context
from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration
from dynamo.common.backend.health_check import build_health_check_payload
from dynamo.llm.exceptions import DynamoException, EngineShutdown, InvalidArgument, Unknown, WorkerUnavailable

from dsv4c.errors import ConfigError, Dsv4cError, RequestError
from dsv4c.runtime.dynamo.asked import Asked, read_request
from dsv4c.runtime.dynamo.chunks import Chunk, chunk_of, failure_of, usage
from dsv4c.runtime.dynamo.mail import Mailbox
from dsv4c.runtime.dynamo.watchdog import Watchdog
from dsv4c.runtime.grammar import Grammar, GrammarCodec, Grammars
from dsv4c.runtime.loop import EngineLoop
from dsv4c.runtime.request import Request, expand
from dsv4c.runtime.structured import StructuredFields, answer_grammar

_LOG = logging.getLogger("dsv4c.dynamo")
_LAST_WORDS_S = 2.0  # for what was raised in streams to reach the frontend


class WorkerCodec(GrammarCodec):
    """What a worker needs to know of tokens: the frontend reads and writes the text."""

    def in_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether the completion of this prompt begins with reasoning."""
        raise NotImplementedError


@dataclass(frozen=True)
class Card:
    """What the worker registers itself with."""

    model: str
    """A folder with `config.json` and the tokenizer, which the frontend reads."""
    served_model_name: str
    bos_token_id: int
    block_tokens: int
    """Of the prefix cache, and so of the router's."""
    total_blocks: int
    max_requests: int
    max_step_tokens: int


@dataclass
class _Job:
    """A request of the frontend that is being served."""

    mailbox: Mailbox
    requests: list[Request] = field(default_factory=list)


class DynamoEngine(LLMEngine):  # type: ignore[misc]  # Dynamo is not installed where types are checked
    """One engine that runs in a thread of its own, already started, as a worker of Dynamo."""

    def __init__(
        self,
        loop: EngineLoop,
        codec: WorkerCodec,
        card: Card,
        *,
        grammars: Grammars | None = None,
        drain_s: float = 30.0,
        stream_interval: int = 1,
    ) -> None:
        """`stream_interval`: tokens of a chunk, the first excepted. `grammars`: None where none can be enforced."""
        self._loop = loop
        self._codec = codec
        self._card = card
        self._grammars = grammars
        self._drain_s = drain_s
        self._stream_interval = stream_interval
        self._numbers = itertools.count(1)
        self._jobs: dict[str, _Job] = {}
        self._watchdog: asyncio.Future[None] | None = None
        self._closing = False
        self._closed = False

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> Any:
        """Dynamo's own way to start a worker. Raises ConfigError: it is `dsv4c dynamo` that knows how to load one."""
        raise ConfigError("this engine is not started by its class", hint="`dsv4c dynamo ARTIFACT --role both`")

    async def start(self, worker_id: int) -> EngineConfig:
        """What to register; the engine serves already."""
        card = self._card
        _LOG.info("worker %d serves `%s`", worker_id, card.served_model_name)
        return EngineConfig(
            model=card.model,
            served_model_name=card.served_model_name,
            llm=LlmRegistration(
                context_length=self._loop.max_context,
                kv_cache_block_size=card.block_tokens,
                total_kv_blocks=card.total_blocks,
                max_num_seqs=card.max_requests,
                max_num_batched_tokens=card.max_step_tokens,
            ),
        )

    async def on_endpoint_ready(self, endpoint: Any) -> None:
        """Begins to watch whether the worker stays registered."""
        client = await endpoint.client()
        watchdog = Watchdog(endpoint.connection_id(), client.instance_ids, lambda: signal.raise_signal(signal.SIGTERM))
        self._watchdog = asyncio.ensure_future(watchdog.run())

    async def generate(self, request: Mapping[str, Any], context: Context) -> AsyncGenerator[Chunk, None]:
        """Chunks of every choice until all have ended. Raises what Dynamo knows: see `_translated`."""
        try:
            asked = read_request(request, self._codec.eos_token_ids)
            async for chunk in self._answer(asked, context):
                yield chunk
        except Dsv4cError as error:
            raise self._translated(error) from error

    async def _answer(self, asked: Asked, context: Context) -> AsyncGenerator[Chunk, None]:
        if self._closing:
            raise EngineShutdown("the worker is shutting down")
        if context.is_stopped():  # its client has left on the way here
            yield {**_cancelled(asked, 0)}
            return
        grammar = await self._grammar(asked)
        asked = replace(asked, params=replace(asked.params, grammar=grammar))
        number = str(next(self._numbers))
        job = self._jobs[number] = _Job(Mailbox(asyncio.get_running_loop(), self._stream_interval))
        watch = asyncio.ensure_future(self._watch(context, job))
        try:
            async for chunk in self._run(number, asked, job):
                yield chunk
        finally:
            watch.cancel()
            del self._jobs[number]
            for one in job.requests:
                self._loop.cancel(one.id)

    async def _run(self, number: str, asked: Asked, job: _Job) -> AsyncGenerator[Chunk, None]:
        """Submits every choice and yields what comes of them."""
        cached: dict[int, int] = {}
        for one in expand(number, asked.prompt, asked.params):
            self._loop.submit(one, job.mailbox.sink(one.choice))
            job.requests.append(one)
        running = {one.choice for one in job.requests}
        while running:
            for index, events in (await job.mailbox.take()).items():
                failure = failure_of(events[-1])
                if failure is not None:
                    raise failure
                cached[index] = cached.get(index, 0) + sum(event.cached_tokens for event in events)
                if events[-1].end is not None:
                    running.discard(index)
                yield chunk_of(
                    events, index, len(asked.prompt), cached[index], scored=asked.params.logprobs is not None
                )

    async def _watch(self, context: Context, job: _Job) -> None:
        """Ends the request's choices when its client has left."""
        await context.async_killed_or_stopped()
        for one in job.requests:
            self._loop.cancel(one.id)

    async def _grammar(self, asked: Asked) -> Grammar | None:
        if asked.guide is None:
            return None
        body = StructuredFields(structured_outputs={asked.guide.kind: asked.guide.value})
        return await answer_grammar(
            self._grammars, self._codec, body, reasons=self._codec.in_reasoning(asked.prompt)
        )  # fmt: skip

    def _translated(self, error: Dsv4cError) -> DynamoException:
        """The error as Dynamo knows it: 400 for a request at fault, else one after which another worker is tried."""
        text = f"{error.message}; {error.hint}" if error.hint else error.message
        if self._loop.failure is not None or self._closing:
            return EngineShutdown(text)
        if isinstance(error, RequestError):
            return InvalidArgument(text) if error.status < 500 else WorkerUnavailable(text)
        return Unknown(text)

    async def health_check_payload(self) -> dict[str, Any]:
        """A request of one token, sent when nothing else has come for a while."""
        return dict(build_health_check_payload(bos_token_id=self._card.bos_token_id))

    async def cleanup(self) -> None:
        """Lets requests finish, for `drain_s` seconds; the rest is raised out of. May be called again."""
        self._closing = True
        if self._closed:
            return
        self._closed = True
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not await self._settled(self._drain_s):
            _LOG.warning(
                "%d requests have not finished in %g s: they go to other workers", len(self._jobs), self._drain_s
            )
            for job in self._jobs.values():
                job.mailbox.fail(EngineShutdown("the worker is shutting down"))
            await self._settled(_LAST_WORDS_S)
        await asyncio.to_thread(self._loop.close, drain=False)
        if self._grammars is not None:
            self._grammars.close()

    async def _settled(self, seconds: float) -> bool:
        """Whether no request is left within as many seconds."""
        clock = asyncio.get_running_loop()
        end = clock.time() + seconds
        while self._jobs and clock.time() < end:
            await asyncio.sleep(0.02)
        return not self._jobs


def _cancelled(asked: Asked, generated: int) -> Chunk:
    return {
        "token_ids": [],
        "index": 0,
        "finish_reason": "cancelled",
        "completion_usage": usage(len(asked.prompt), generated, 0),
    }
