"""Addresses of routers, and the secret that opens them.

`HOST:PORT`, `[HOST]:PORT`, `unix:PATH`, or `abstract:NAME`: a socket of this machine that needs no file.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from dsv4c.errors import ConfigError, InputError

SHORTEST_SECRET = 16  # bytes
_BACKLOG = 64  # workers that call before anybody answers
_MAKE_ONE = "make one with `(umask 077; openssl rand -hex 32 > FILE)`"


@dataclass(frozen=True)
class Address:
    """Where a router listens: `host` and `port`, or `name`, a path or \\0 and a name."""

    host: str = ""
    port: int = 0
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ConfigError."""
        kind, _, name = text.partition(":")
        if kind in ("unix", "abstract") and name:
            return cls(name=name if kind == "unix" else "\0" + name)
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ConfigError(
                f"`{text}` is no address of a router", hint="such as 127.0.0.1:7500 or unix:/run/dsv4c/router.sock"
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        if self.host:
            return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return f"abstract:{self.name[1:]}" if self.name.startswith("\0") else f"unix:{self.name}"

    @property
    def on_this_machine(self) -> bool:
        """Whether nobody outside can reach it."""
        return not self.host or self.host in ("localhost", "::1") or self.host.startswith("127.")

    def connect(self, timeout_s: float) -> socket.socket:
        """Raises OSError."""
        if self.host:
            return socket.create_connection((self.host, self.port), timeout_s)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout_s)
        try:
            sock.connect(self.name)
        except OSError:
            sock.close()
            raise
        return sock

    def bound(self, sock: socket.socket) -> Address:
        """The address that a socket listens at which was bound to this one."""
        return replace(self, port=sock.getsockname()[1]) if self.host else self

    def remove(self) -> None:
        """Removes the socket's file, if it has one."""
        if self.name and not self.name.startswith("\0"):
            Path(self.name).unlink(missing_ok=True)


def listen(address: Address) -> socket.socket:
    """A socket that listens there. Raises InputError."""
    try:
        if address.host:
            family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
        return _listen_unix(address)
    except socket.gaierror as error:
        raise InputError(f"`{address.host}` is not a host name or address") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"`{address}` is in use", hint="another router listens there") from error
        raise InputError(f"cannot listen at `{address}`: {error.strerror or error}") from error


def _listen_unix(address: Address) -> socket.socket:
    _remove_left_over(Path(address.name))
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)  # a socket's file is for its owner alone
    try:
        sock.bind(address.name)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _remove_left_over(path: Path) -> None:
    """Removes the socket of a router that has gone without taking it along."""
    if str(path).startswith("\0") or not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            logging.getLogger("dsv4c").info("removed `%s`, left behind by a router that has gone", path)


def read_secret(file: Path) -> bytes:
    """The secret in a file, without white space around it. Raises ConfigError that does not tell it."""
    try:
        found = file.read_bytes().strip()
        mode = stat.S_IMODE(file.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"cannot read `{file}`: {error.strerror}", hint=_MAKE_ONE) from error
    if len(found) < SHORTEST_SECRET:
        raise ConfigError(f"the secret in `{file}` is shorter than {SHORTEST_SECRET} bytes", hint=_MAKE_ONE)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others than its owner may read `{file}`", hint=f"chmod 600 {file}")
    return found
