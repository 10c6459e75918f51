"""What the handlers of one server share: engine, codec, limits, numbers, and the checks common to all requests.

No global state: two servers live in one process. app.py makes the application; each file of endpoints/ adds routes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from dsv4c.errors import Dsv4cError, EngineError, RequestError
from dsv4c.runtime.answer import CLIENT_GONE, Answer, ErrorShape, Job, Writer, error_response
from dsv4c.runtime.completion import TextCodec
from dsv4c.runtime.grammar import Grammar, Grammars
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.operations import Operations, Pace, asked_timeout
from dsv4c.runtime.protocol import parse_json, refuse
from dsv4c.runtime.service import Bridge, Engine, Group
from dsv4c.runtime.structured import StructuredFields, answer_grammar
from dsv4c.runtime.tools import ToolPlan

_INLINE_CHARS = 8192  # longer texts are tokenised in a thread: about 2 ms here, which other streams would notice
_FIELD_NAME = re.compile(r"[][A-Za-z0-9_.-]{1,64}")
ArgumentT = TypeVar("ArgumentT")


class Server:
    """What the handlers share: engine, codec, numbers, and whether new requests are still taken."""

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        model_name: str,
        *,
        default_thinking: bool = False,
        strict: bool = False,
        operations: Operations | None = None,
        fingerprint: str | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.engine = engine
        self.codec = codec
        self.model_name = model_name
        self.default_thinking = default_thinking
        self.strict = strict
        self.operations = operations or Operations()
        self.fingerprint = fingerprint
        self.grammars = grammars
        """None: the engine can enforce none."""
        self.error_shapes: dict[str, ErrorShape] = {}
        """By path, of endpoints whose clients know another error body than OpenAI's."""
        self.metrics = Metrics(engine.stats, model_name)
        self.pace = Pace()
        self.created = int(time.time())
        self.leaving = False
        """Whether `/ready` sends new clients elsewhere; requests are taken until `draining`."""
        self.draining = False
        self._bridge: Bridge | None = None
        self._groups: set[Group] = set()

    def bind_loop(self) -> None:
        """Ties the server to the running event loop."""
        self._bridge = Bridge(asyncio.get_running_loop())

    def unbind_loop(self) -> None:
        """Leaves the event loop, which is about to end: requests in flight end with it."""
        self.abort_all()

    def leave(self) -> None:
        """Is not ready any more, yet takes requests: of clients that do not know so far."""
        self.leaving = True

    def drain(self) -> None:
        """Takes no new requests; those in flight go on."""
        self.leaving = self.draining = True

    def abort_all(self) -> None:
        """Ends every request in flight: whole ones get a 503, streams an error event."""
        error = RequestError("the server is shutting down", status=503, code="shutting_down", hint="try again later")
        for group in list(self._groups):
            group.expire(error)

    @asynccontextmanager
    async def group(self, timeout_s: float | None = None) -> AsyncIterator[Group]:
        """The engine requests of one HTTP request, known to `abort_all` while they run, for `timeout_s` at most."""
        if self._bridge is None:
            raise EngineError("the server has no event loop", hint="run the app with its lifespan")
        loop, timer = asyncio.get_running_loop(), None
        async with Group(self.engine, self._bridge) as group:
            self._groups.add(group)
            if timeout_s is not None:
                message = f"the request took longer than {timeout_s:g} seconds"
                late = RequestError(message, status=504, code="deadline_exceeded", hint="ask for fewer tokens")
                timer = loop.call_later(timeout_s, group.expire, late)
            try:
                yield group
            finally:
                self._groups.discard(group)
                self.pace.ended(loop.time())
                if timer is not None:
                    timer.cancel()

    def refusal(self, error: Dsv4cError, path: str) -> JSONResponse:
        """The response to a request for this path that is refused, or failed before anything was sent."""
        waiting = self.engine.stats().waiting
        retry_s = self.pace.retry_after_s(asyncio.get_running_loop().time(), waiting)
        return error_response(error, self.error_shapes.get(path), retry_s)

    def timeout_s(self, header: str | None) -> float | None:
        """Seconds that a request with this `x-request-timeout` may take. Raises RequestError."""
        try:
            return asked_timeout(header, self.operations.request_timeout_s)
        except ValueError:
            refuse("the header `x-request-timeout` must be a positive number of seconds", "x-request-timeout")

    async def read_body(self, request: Request) -> dict[str, object]:
        """The JSON object of a request. Raises RequestError: 413 for a body over the limit, 400 for no JSON, 408 for
        one that does not arrive in time."""
        self.check_serving()
        try:
            async with asyncio.timeout(self.operations.body_timeout_s):
                data = await self._read(request)
        except TimeoutError:
            refuse("the request body did not arrive in time", None, status=408, code="request_timeout")
        return dict(parse_json(data))

    async def _read(self, request: Request) -> bytes:
        limit = self.operations.max_body_bytes
        declared = request.headers.get("content-length", "")
        chunks: list[bytes] = []
        size = int(declared) if declared.isdigit() else 0
        if size <= limit:
            size = 0
            try:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit:
                        break
                    chunks.append(chunk)
            except ClientDisconnect:
                refuse("the client closed the connection", None, status=CLIENT_GONE, code="client_gone")
        if size > limit:
            refuse(f"the request body is larger than {limit} bytes", None, status=413, code="body_too_large")
        return b"".join(chunks)

    def check_healthy(self) -> None:
        """Raises RequestError (503) when nothing can be served until somebody restarts the server."""
        if self.engine.failure is not None:
            refuse(f"the engine has stopped: {self.engine.failure.message}", None, status=503, code="engine_failed")

    def check_serving(self) -> None:
        """Raises RequestError (503) when no request is taken."""
        if self.draining:
            refuse("the server is shutting down", None, status=503, code="shutting_down", hint="try again later")
        self.check_healthy()

    def check_ready(self) -> None:
        """Raises RequestError (503) when new requests should go elsewhere: it stops, has failed, or is full."""
        if self.leaving:
            refuse("the server is shutting down", None, status=503, code="shutting_down", hint="try again later")
        self.check_healthy()
        stats = self.engine.stats()
        if stats.max_waiting and stats.waiting >= stats.max_waiting:
            refuse("the queue is full", None, status=503, code="queue_full", hint="try again later")

    def check_model(self, name: str) -> None:
        """Raises RequestError (404) unless this is the model served."""
        if name != self.model_name:
            hint = f"this server has `{self.model_name}`"
            refuse(f"no model `{name[:100]}`", "model", status=404, code="model_not_found", hint=hint)

    def extra_headers(self, request_id: str, ignored: list[str]) -> dict[str, str]:
        """The request id, and the names of fields without effect. Raises RequestError for those under `strict`."""
        return {"x-request-id": request_id, **self.ignored_header(ignored)}

    def ignored_header(self, ignored: list[str]) -> dict[str, str]:
        """A header with the names of fields without effect. Raises RequestError for those under `strict`."""
        if not ignored:
            return {}
        shown = [name if _FIELD_NAME.fullmatch(name) else "?" for name in ignored[:16]]
        if self.strict:
            refuse(f"unknown field `{shown[0]}`", shown[0], code="unknown_parameter", hint="this server is strict")
        return {"x-ignored-fields": ", ".join(shown)}

    async def grammar(
        self, body: StructuredFields, *, reasons: bool = False, plan: ToolPlan | None = None, begun: str = ""
    ) -> Grammar | None:
        """The grammar that the answers to a request must match, compiled: see `structured.answer_grammar`."""
        return await answer_grammar(self.grammars, self.codec, body, reasons=reasons, plan=plan, begun=begun)

    def room(self, prompt_len: int, asked: int | None, param: str) -> int:
        """How many tokens may follow a prompt. Raises RequestError when the context cannot hold what was asked."""
        context = self.engine.max_context
        if prompt_len == 0:
            refuse(f"`{param}` has no tokens", param, hint="give at least 1 token")
        if prompt_len >= context:
            text = f"the prompt has {prompt_len} tokens, the context is {context} with at least 1 to generate"
            refuse(text, param, code="context_length_exceeded", hint="shorten the prompt")
        if asked is not None and prompt_len + asked > context:
            refuse(
                f"the prompt's {prompt_len} tokens and `max_tokens` {asked} exceed the context of {context}",
                "max_tokens",
                code="context_length_exceeded",
                hint=f"`max_tokens` can be {context - prompt_len} at most",
            )
        return context - prompt_len

    def answer(self, job: Job, writer: Writer) -> Answer:
        """The response that runs a checked job and puts what comes on the wire."""
        if not self.operations.priority and any(part.params.priority for part in job.parts):
            hint = "`--scheduling-policy priority` turns them on"
            refuse("this server serves in order of arrival, without priorities", "priority", hint=hint)
        return Answer(job, writer, self)


async def offload(function: Callable[[ArgumentT], list[int]], argument: ArgumentT, size: int) -> list[int]:
    """Tokenises in a thread when the text is long, so that running streams do not stall."""
    if size <= _INLINE_CHARS:
        return function(argument)
    return await asyncio.to_thread(function, argument)
