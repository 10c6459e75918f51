"""A request that nobody asked for, served before the first real one: whatever is made on first use is then there.

Libraries load kernels, parsers compile patterns and allocators fill their caches on first use, 10 to 30 ms that the
first client would wait for. A rehearsal runs on an engine, or on an app over one, that is then renewed: it counts
nothing, and nothing of it is left.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from dsv4c.errors import EngineError
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.request import Request

_TOKENS = 3


def rehearse(engine: Engine) -> None:
    """One request through prefill, decode, sampling and log-probabilities. Raises EngineError if it fails."""
    asked = SamplingParams(max_tokens=_TOKENS, temperature=0.7, top_p=0.9, seed=0, logprobs=1, ignore_eos=True)
    engine.submit(Request("rehearsal", [0] * min(8, engine.max_context - _TOKENS), asked))
    while engine.has_work:
        for event in engine.step():
            if event.end is not None and event.end.error is not None:
                raise EngineError(f"the rehearsal failed: {event.end.error.message}", hint=event.end.error.hint)


def rehearse_app(app: Any, model_name: str) -> None:
    """One streamed completion through the whole app, an ASGI callable. Raises EngineError if it is refused."""
    status = asyncio.run(_ask(app, {"model": model_name, "prompt": "a", "max_tokens": _TOKENS, "stream": True}))
    if status != 200:
        raise EngineError(f"the rehearsal was answered with status {status}")


async def _ask(app: Any, body: dict[str, Any]) -> int:
    """The status of one POST to /v1/completions, when all of the answer has come."""
    app.state.server.bind_loop()
    parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    found: list[int] = []

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()  # the client stays until it is answered
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.append(int(message["status"]))

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0),
        "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    return found[0]
