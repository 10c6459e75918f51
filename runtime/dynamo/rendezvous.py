"""Where a decode worker meets the prefill worker of its request: a TCP port, one room a request.

    decode --{"room": n}--> prefill          then, line by line: {"type": "granted"}, {"type": "prefilled"}, and while
           <--messages-----                  nothing else is to be said {"type": "alive"} every second

Either may come first; the room's number, 63 random bits from the router, is all that lets somebody in. Use a private
network. Who hears nothing for `silence_s` seconds takes the other for lost, whatever its connection says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from dsv4c.errors import HandleError, PeerGone
from dsv4c.runtime.transfer.node import Granted, Prefilled

ALIVE_S = 1.0
SILENCE_S = 5.0
UNCLAIMED_S = 10.0
"""How long a visitor waits for the prefill request, which the router sends at the same time."""
KEPT_S = 60.0
"""How long a room waits for its visitor."""
_LINE_BYTES = 1 << 26  # a long prompt's log-probabilities
_decoder = msgspec.json.Decoder()


class Room:
    """What is said to the one visitor of a room, in order. Belongs to the event loop."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._claimed = False

    def claim(self) -> None:
        """The prefill request of this room is here: its visitor may wait for as long as it takes."""
        self._claimed = True

    def granted(self, granted: Granted) -> None:
        self._put({"type": "granted", "handle": dict(granted.handle)})

    def prefilled(self, prefilled: Prefilled) -> None:
        self._put({"type": "prefilled", "first": msgspec.to_builtins(prefilled)})
        self._messages.put_nowait(None)

    def failed(self, why: str) -> None:
        self._put({"type": "failed", "why": why})
        self._messages.put_nowait(None)

    def _put(self, message: object) -> None:
        self._messages.put_nowait(msgspec.json.encode(message) + b"\n")

    async def lines(self) -> AsyncIterator[bytes]:
        """What to send, with signs of life between."""
        clock = asyncio.get_running_loop()
        end = clock.time() + UNCLAIMED_S
        while True:
            try:
                line = await asyncio.wait_for(self._messages.get(), ALIVE_S)
            except TimeoutError:
                if not self._claimed and clock.time() > end:
                    self.failed("its request has not come")
                line = b'{"type":"alive"}\n'
            if line is None:
                return
            yield line


class Rendezvous:
    """The prefill worker's port."""

    def __init__(self) -> None:
        self.port = 0
        self._rooms: dict[int, Room] = {}
        self._server: asyncio.Server | None = None
        self._visits: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> None:
        """Listens; port 0 picks one."""
        self._server = await asyncio.start_server(self._visit, host, port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Listens no more and leaves its visitors, who then know."""
        if self._server is not None:
            self._server.close()
            for visit in list(self._visits):
                visit.cancel()
            await self._server.wait_closed()
            self._server = None

    def room(self, number: int) -> Room:
        """The room of this number; gone when it was left, or when nobody has come for long."""
        if number not in self._rooms:
            self._rooms[number] = Room()
            asyncio.get_running_loop().call_later(KEPT_S, self._rooms.pop, number, None)
        return self._rooms[number]

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._visits.add(task)
        number = None
        try:
            hello = _decoder.decode(await asyncio.wait_for(reader.readline(), SILENCE_S))
            number = hello["room"] if isinstance(hello, dict) else None
            if not isinstance(number, int):
                return
            async for line in self.room(number).lines():
                writer.write(line)
                await writer.drain()
        except (OSError, TimeoutError, msgspec.DecodeError, KeyError):
            return  # a visitor that has left, or was none
        finally:
            self._visits.discard(task)
            if number is not None:
                self._rooms.pop(number, None)
            writer.close()


async def meet(host: str, port: int, room: int, silence_s: float = SILENCE_S) -> AsyncIterator[Granted | Prefilled]:
    """What the prefill worker says of the request in this room; Prefilled is the last.

    Raises PeerGone if it is not there, says nothing for `silence_s`, leaves, or has failed; HandleError for nonsense.
    """
    try:
        async with asyncio.timeout(silence_s):
            reader, writer = await asyncio.open_connection(host, port, limit=_LINE_BYTES)
    except (OSError, TimeoutError) as error:
        raise PeerGone(f"the prefill worker at {host}:{port} cannot be reached: {error}") from error
    try:
        writer.write(msgspec.json.encode({"room": room}) + b"\n")
        while True:
            async with asyncio.timeout(silence_s):
                line = await reader.readline()
            if not line.endswith(b"\n"):
                raise PeerGone(f"the prefill worker at {host}:{port} has gone")
            message = _read(line)
            if message is not None:
                yield message
            if isinstance(message, Prefilled):
                return
    except TimeoutError:
        raise PeerGone(f"the prefill worker at {host}:{port} has said nothing for {silence_s:g} s") from None
    except (OSError, ValueError) as error:
        raise PeerGone(f"the prefill worker at {host}:{port} is lost: {error}") from error
    finally:
        writer.close()


def _read(line: bytes) -> Granted | Prefilled | None:
    """A message; None for a sign of life."""
    try:
        message = _decoder.decode(line)
        kind = message["type"]
        if kind == "granted":
            return Granted(dict(message["handle"]))
        if kind == "prefilled":
            return msgspec.convert(message["first"], Prefilled)
        if kind == "failed":
            raise PeerGone(f"the prefill failed: {message['why']}")
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError) as error:
        raise HandleError(f"the prefill worker's message is malformed: {error}") from error
    return None
