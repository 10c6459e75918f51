"""The client's end of the wire: base address, key, and server-sent events as they come."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from dsv4c.errors import InputError


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server. `url` is without `/v1`."""

    url: str
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    def session(self, timeout_s: float | None = None) -> aiohttp.ClientSession:
        """A session of its own connections, as many as are needed at once; reads nothing from the environment."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self.headers, read_bufsize=2**20)


class Refused(InputError):
    """The server answered with an error, before the stream or in it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


async def call(session: aiohttp.ClientSession, method: str, url: str, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON answer of a request that is no stream. Raises Refused, or InputError if nobody answers."""
    try:
        async with session.request(method, url, json=body) as response:
            found = await response.json(content_type=None)
            if response.status >= 400:
                raise Refused(_message(found), response.status)
            return found
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise InputError(f"`{url}` does not answer: {_reason(error)}", hint="is the server there?") from error


async def events(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of one streamed answer, up to `[DONE]`. Raises Refused, or InputError for a stream that breaks off."""
    try:
        async with session.post(url, json=body) as response:
            if response.status >= 400:
                raise Refused(_message(await response.json(content_type=None)), response.status)
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    return
                event = json.loads(line[6:])
                if "error" in event:
                    raise Refused(_message(event), int(response.status))
                yield event
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise InputError(f"the answer of `{url}` broke off: {_reason(error)}") from error
    raise InputError(f"the answer of `{url}` broke off", hint="see the server's log")


async def served_model(session: aiohttp.ClientSession, server: Server) -> str:
    """The first model that the server has. Raises InputError."""
    listed = await call(session, "GET", f"{server.url}/v1/models")
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"`{server.url}/v1/models` lists no model", hint="give one with `--model`") from error


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        return os.strerror(error.os_error.errno).lower()
    return str(error) or type(error).__name__


def _message(found: Any) -> str:
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or found)[:300]
