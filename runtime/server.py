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

from dsv4c.errors import EngineError, RequestError
from dsv4c.runtime.answer import CLIENT_GONE, Answer, ErrorShape, Job, Writer
from dsv4c.runtime.completion import TextCodec
from dsv4c.runtime.metrics import Metrics
from dsv4c.runtime.protocol import parse_json, refuse
from dsv4c.runtime.service import Bridge, Engine, Group

MAX_BODY_BYTES = 32 * 2**20  # a million tokens as ids, or as text of any script, with room to spare
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
        max_body_bytes: int = MAX_BODY_BYTES,
        fingerprint: str | None = None,
    ) -> None:
        self.engine = engine
        self.codec = codec
        self.model_name = model_name
        self.default_thinking = default_thinking
        self.strict = strict
        self.max_body_bytes = max_body_bytes
        self.fingerprint = fingerprint
        self.error_shapes: dict[str, ErrorShape] = {}
        """By path, of endpoints whose clients know another error body than OpenAI's."""
        self.metrics = Metrics(engine.stats)
        self.created = int(time.time())
        self.draining = False
        self._bridge: Bridge | None = None
        self._groups: set[Group] = set()

    def bind_loop(self) -> None:
        """Ties the server to the running event loop."""
        self._bridge = Bridge(asyncio.get_running_loop())

    def drain(self) -> None:
        """Takes no new requests; those in flight go on."""
        self.draining = True

    def abort_all(self) -> None:
        """Ends every request in flight: whole ones get a 503, streams an error event."""
        error = RequestError("the server is shutting down", status=503, code="shutting_down", hint="try again later")
        for group in list(self._groups):
            group.fail(error)

    @asynccontextmanager
    async def group(self) -> AsyncIterator[Group]:
        """The engine requests of one HTTP request, known to `abort_all` while they run."""
        if self._bridge is None:
            raise EngineError("the server has no event loop", hint="run the app with its lifespan")
        async with Group(self.engine, self._bridge) as group:
            self._groups.add(group)
            try:
                yield group
            finally:
                self._groups.discard(group)

    async def read_body(self, request: Request) -> dict[str, object]:
        """The JSON object of a request. Raises RequestError: 413 for a body over the limit, 400 for no JSON."""
        self.check_ready()
        limit = self.max_body_bytes
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
        return dict(parse_json(b"".join(chunks)))

    def check_ready(self) -> None:
        """Raises RequestError (503) when nothing can be served any more."""
        if self.draining:
            refuse("the server is shutting down", None, status=503, code="shutting_down", hint="try again later")
        if self.engine.failure is not None:
            refuse(f"the engine has stopped: {self.engine.failure.message}", None, status=503, code="engine_failed")

    def check_model(self, name: str) -> None:
        """Raises RequestError (404) unless this is the model served."""
        if name != self.model_name:
            hint = f"this server has `{self.model_name}`"
            refuse(f"no model `{name[:100]}`", "model", status=404, code="model_not_found", hint=hint)

    def extra_headers(self, request_id: str, ignored: list[str]) -> dict[str, str]:
        """The request id, and the names of fields without effect. Raises RequestError for those under `strict`."""
        headers = {"x-request-id": request_id}
        if not ignored:
            return headers
        shown = [name if _FIELD_NAME.fullmatch(name) else "?" for name in ignored[:16]]
        if self.strict:
            refuse(f"unknown field `{shown[0]}`", shown[0], code="unknown_parameter", hint="this server is strict")
        return {**headers, "x-ignored-fields": ", ".join(shown)}

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
        return Answer(job, writer, self.group, self.metrics, self.error_shapes.get(writer.path))


async def offload(function: Callable[[ArgumentT], list[int]], argument: ArgumentT, size: int) -> list[int]:
    """Tokenises in a thread when the text is long, so that running streams do not stall."""
    if size <= _INLINE_CHARS:
        return function(argument)
    return await asyncio.to_thread(function, argument)
