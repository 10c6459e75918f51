"""Runs the app: bind early, serve, drain on SIGTERM or SIGINT.

    bind() --> (load, capture: minutes) --> serve() --SIGTERM--> /ready says no, while requests still come (drain delay)
                                                     ---------> no new connections, requests in flight finish
                                                     --deadline--> the rest is aborted with a clear error
                                                     --second SIGINT--> at once

Binding before loading makes a port in use an error of the first second. Logs go to stderr, data to nowhere else.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import ssl
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dsv4c.errors import InputError
from dsv4c.runtime.connections import Patience, Watch, keep_alive
from dsv4c.runtime.logs import LogFormat, log_config
from dsv4c.runtime.malformed import http_protocol
from dsv4c.runtime.server import Server
from dsv4c.runtime.tls import Tls

DRAIN_S = 30.0  # what orchestrators grant between SIGTERM and SIGKILL by default
IDLE_S = 75  # longer than clients (httpx 5 s, aiohttp 15 s) and proxies (60 s) keep an idle one: they close first
_TICK_S = 0.1  # as often as uvicorn looks for signals
_LAST_WORDS_S = 2  # for error events of aborted streams to reach their clients


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A TCP socket bound to this address, not listening yet; port 0 picks a free one.

    Raises InputError when the port is in use or not ours to take, or when the host is not an address of this machine.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"`port` must be between 0 and 65535, not {port}", hint="8000 is the default")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"`{host}` is not a host name or address", hint="127.0.0.1 serves this machine") from error
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart waits for TIME_WAIT
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _bind_error(host, port, error) from error
    return sock


def serve(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    sock: socket.socket | None = None,
    drain_s: float = DRAIN_S,
    drain_delay_s: float = 0.0,
    tls: Tls | None = None,
    log_level: str = "info",
    log_format: LogFormat = "text",
) -> None:
    """Serves until a signal comes; returns when every request has ended or was aborted.

    `sock`: what `bind` gave, in place of host and port. `drain_delay_s`: how long requests are still taken after the
    signal, while `/ready` sends new clients elsewhere. Raises InputError as `bind` does.
    """
    sock = sock or bind(host, port)
    GracefulServer(
        app, sock, drain_s=drain_s, drain_delay_s=drain_delay_s, tls=tls, log_level=log_level, log_format=log_format
    ).run()


class GracefulServer(uvicorn.Server):
    """uvicorn on a bound socket that aborts what is still running `drain_s` seconds after it was told to stop."""

    def __init__(
        self,
        app: FastAPI,
        sock: socket.socket,
        *,
        drain_s: float = DRAIN_S,
        drain_delay_s: float = 0.0,
        idle_s: int = IDLE_S,
        tls: Tls | None = None,
        log_level: str = "info",
        log_format: LogFormat = "text",
    ) -> None:
        self._sock = sock
        self._drain_s = drain_s
        self._drain_delay_s = drain_delay_s
        self._tls = tls
        self._app_server: Server = app.state.server
        super().__init__(
            uvicorn.Config(
                app,
                http=http_protocol(),
                ws="none",
                access_log=False,  # logs.log_request says more
                log_config=log_config(log_level, log_format),
                server_header=False,
                ssl_certfile=None if tls is None else tls.certificate,
                ssl_keyfile=None if tls is None else tls.key,
                ssl_ca_certs=None if tls is None or tls.ca is None else str(tls.ca),
                ssl_cert_reqs=ssl.CERT_NONE if tls is None or tls.ca is None else ssl.CERT_REQUIRED,
                timeout_keep_alive=idle_s,
                timeout_graceful_shutdown=int(drain_s) + _LAST_WORDS_S,
            )
        )

        operations = self._app_server.operations
        patience = Patience(operations.head_timeout_s, operations.body_timeout_s, operations.stall_timeout_s)
        self._watch = Watch(self.server_state.connections, patience)  # type: ignore[arg-type]  # of our protocols

    @property
    def url(self) -> str:
        """Where clients reach it."""
        host, port = self._sock.getsockname()[:2]
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until told to stop. Raises InputError if another process listens on the port by now."""
        host, port = self._sock.getsockname()[:2]
        keep_alive(self._sock)
        try:
            self._sock.listen(self.config.backlog)
        except OSError as error:
            self._sock.close()
            raise _bind_error(host, port, error) from error
        logging.getLogger("dsv4c").info("listening on %s", self.url)
        super().run(sockets=sockets or [self._sock])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. A second SIGINT: stop at once. The process then ends normally, not by the signal."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
            self._app_server.abort_all()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watch.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app_server.leave()
        end_s = time.monotonic() + self._drain_delay_s
        while time.monotonic() < end_s and not self.force_exit:
            await asyncio.sleep(_TICK_S)
        self._app_server.drain()
        deadline = asyncio.get_running_loop().call_later(self._drain_s, self._app_server.abort_all)
        try:
            await super().shutdown(sockets)
            if self.force_exit:
                await asyncio.sleep(_TICK_S)  # for the error events of aborted streams to be written
                await self.lifespan.shutdown()  # uvicorn leaves it out, and its cancellation would print a trace
                logging.getLogger("dsv4c").warning("stopped at once: requests in flight were ended")
        finally:
            deadline.cancel()
            self._watch.stop()


def _bind_error(host: str, port: int, error: OSError) -> InputError:
    if error.errno == errno.EADDRINUSE:
        return InputError(f"port {port} on `{host}` is in use", hint="stop the other server or choose another `--port`")
    if error.errno in (errno.EACCES, errno.EPERM):
        return InputError(f"port {port} on `{host}` needs privileges", hint="choose a `--port` above 1023")
    return InputError(f"cannot bind `{host}` port {port}: {error.strerror}", hint="127.0.0.1 serves this machine")
