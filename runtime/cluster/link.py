"""Links between the router and its workers: frames over a socket, opened by proof of a shared secret on both sides.

    Port(address, secret, accepted)  the router's: accepts, and lets each caller prove itself in a thread of its own
    dial(address, secret) -> Link    a worker's
    link.send(frame)                 returns at once; a thread writes, in order
    link.receive() -> frame          waits for one; LinkError when the link is closed

The proof: the router sends a nonce, the worker one of its own and the HMAC-SHA256 of both under the secret, the router
the HMAC of both under the secret and its own name. What follows is neither encrypted nor signed: addresses that others
can reach belong in a private network. A frame is its length in four bytes, big-endian, and as many bytes of msgpack.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable

from dsv4c.errors import ConfigError, LinkError
from dsv4c.runtime.cluster.address import Address, listen
from dsv4c.runtime.cluster.wire import MAX_BYTES

_PROOF_S = 5.0  # for a caller to prove itself, which takes one round trip
_CALLERS = 64  # that may be proving themselves at once
_NONCE = 32
_DIGEST = 32
_LENGTH = 4

Frame = bytes | Callable[[], bytes]


class Link:
    """One side of a connection that has been proven. Any thread may send and close; one receives."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.settimeout(None)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a frame waits for the last one's receipt
        self._socket = sock
        self._reader = sock.makefile("rb")
        self._outgoing: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write, name=f"dsv4c-{name}", daemon=True)
        self._writer.start()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def send(self, frame: Frame) -> None:
        """Queues a frame, or what makes it when its turn comes. On a closed link it is lost, as it would be on the way.

        Signal handlers may call it.
        """
        if not self.closed:
            self._outgoing.put(frame)

    def receive(self) -> bytes:
        """The next frame. Raises LinkError when the link is closed, from either side, or a frame is too large."""
        try:
            length = int.from_bytes(self._exactly(_LENGTH), "big")
            if length > MAX_BYTES:
                raise LinkError(f"a frame of {length} bytes is larger than {MAX_BYTES}")
            return self._exactly(length)
        except OSError as error:
            raise LinkError(f"the link is closed: {error.strerror or error}") from error

    def _exactly(self, count: int) -> bytes:
        data = self._reader.read(count)
        if len(data) < count:
            raise LinkError("the link is closed")
        return data

    def close(self) -> None:
        """Closes it at once; `receive` raises then. Does nothing if it is closed."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._outgoing.put(None)
        with contextlib.suppress(OSError):  # the other side has closed it already
            self._socket.shutdown(socket.SHUT_RDWR)

    def finish(self, timeout_s: float) -> None:
        """Closes it when everything is written, or after so many seconds."""
        self._outgoing.put(None)
        self._writer.join(timeout_s)
        self.close()

    def _write(self) -> None:
        try:
            while (frame := self._outgoing.get()) is not None:
                data = frame if isinstance(frame, bytes) else frame()
                self._socket.sendall(len(data).to_bytes(_LENGTH, "big") + data)
        except OSError:
            self.close()  # whoever receives on it hears of it


def dial(address: Address, secret: bytes) -> Link:
    """A link to a router. Raises LinkError if none answers, ConfigError if it has another secret."""
    try:
        sock = address.connect(_PROOF_S)
    except OSError as error:
        raise LinkError(f"no router answers at `{address}`: {error.strerror or error}") from error
    try:
        _prove_worker(sock, secret)
    except _WrongSecret as error:
        sock.close()
        raise ConfigError(
            f"the router at `{address}` has another secret", hint="give router and workers the same `--secret-file`"
        ) from error
    except OSError as error:
        sock.close()
        raise LinkError(f"the router at `{address}` does not answer: {error.strerror or error}") from error
    return Link(sock, "link")


def pair() -> tuple[Link, Link]:
    """The two sides of a link within this process."""
    ours, theirs = socket.socketpair()
    return Link(ours, "link"), Link(theirs, "link")


class Port:
    """Where workers call. `accepted` gets the link of each that has proven itself, in a thread of its own."""

    def __init__(
        self, address: Address, secret: bytes, accepted: Callable[[Link], None], sock: socket.socket | None = None
    ) -> None:
        """Binds and listens, unless `sock` does so already. Raises InputError if it cannot."""
        self._secret = secret
        self._accepted = accepted
        self._callers = threading.Semaphore(_CALLERS)
        self._socket = sock or listen(address)
        self._closing = False
        self.address = address.bound(self._socket)
        """Where it listens: with the port that was free, if none was named."""
        self._thread = threading.Thread(target=self._accept, name="dsv4c-port", daemon=True)

    def start(self) -> Port:
        """Begins to accept; call it once."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Accepts nobody any more; links that are open stay. Twice is once."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()
        self.address.remove()

    def _accept(self) -> None:
        log = logging.getLogger("dsv4c")
        while not self._closing:
            try:
                sock, _ = self._socket.accept()
            except OSError as error:
                if not self._closing:
                    log.warning("a worker's call failed: %s", error)
                    time.sleep(0.1)  # too many open files, most likely: it would fail again at once
                continue
            if not self._callers.acquire(blocking=False):
                sock.close()
                log.warning("more than %d callers at once: one was turned away", _CALLERS)
                continue
            threading.Thread(target=self._prove, args=(sock,), name="dsv4c-caller", daemon=True).start()

    def _prove(self, sock: socket.socket) -> None:
        try:
            _prove_router(sock, self._secret)
        except OSError as error:
            sock.close()
            logging.getLogger("dsv4c").warning("a caller was turned away: %s", error)
            return
        finally:
            self._callers.release()
        self._accepted(Link(sock, "link"))


class _WrongSecret(OSError):
    pass


def _prove_router(sock: socket.socket, secret: bytes) -> None:
    """Raises OSError if the other side has another secret, or takes too long."""
    deadline = time.monotonic() + _PROOF_S
    ours = secrets.token_bytes(_NONCE)
    sock.settimeout(_PROOF_S)
    sock.sendall(ours)
    answer = _read(sock, _NONCE + _DIGEST, deadline)
    theirs, digest = answer[:_NONCE], answer[_NONCE:]
    if not hmac.compare_digest(digest, _digest(secret, b"worker", ours, theirs)):
        raise _WrongSecret("it has another secret")
    sock.sendall(_digest(secret, b"router", ours, theirs))


def _prove_worker(sock: socket.socket, secret: bytes) -> None:
    """Raises OSError as `_prove_router` does."""
    deadline = time.monotonic() + _PROOF_S
    theirs = _read(sock, _NONCE, deadline)
    ours = secrets.token_bytes(_NONCE)
    sock.sendall(ours + _digest(secret, b"worker", theirs, ours))
    try:
        digest = _read(sock, _DIGEST, deadline)
    except ConnectionResetError as error:
        raise _WrongSecret("it has closed the link") from error
    if not hmac.compare_digest(digest, _digest(secret, b"router", theirs, ours)):
        raise _WrongSecret("it has another secret")


def _digest(secret: bytes, who: bytes, router: bytes, worker: bytes) -> bytes:
    return hmac.digest(secret, b"dsv4c link 1 " + who + router + worker, "sha256")


def _read(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("it has closed the link")
        data += piece
    return data
