"""Worker processes of one host: started, watched, started again, ended with their parent.

    parent --stdin: the secret, then nothing, for as long as it lives--> child
    child  --stderr, line by line, behind the worker's name------------> the parent's stderr

A child whose stdin ends has lost its parent, however that died, and ends too. Children have process groups of their
own: Ctrl-C reaches the parent alone, which ends them when it has seen its clients off. A child that has served and dies
is started again, later each time it lives but shortly; one that never joins ends the start with its exit code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv4c.errors import ConfigError, EngineError

_LOG = logging.getLogger("dsv4c")
_TERM_S = 10.0  # for a child to end when it is told to; an interpreter with torch takes a second to end
_AGAIN_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)  # before a child that died is started again: the first time, the second...
_LONG_S = 10.0  # a child that lived for so long does not die of its start: it is started again at once


@dataclass(frozen=True)
class Child:
    """A worker process to be: its name, and its command line."""

    name: str
    command: Sequence[str]


class Processes:
    """The worker processes of a router. Use as a context: leaving it ends them all."""

    def __init__(
        self, children: Sequence[Child], secret: str, joined: Callable[[str], bool] = lambda name: False
    ) -> None:
        self._children = children
        self._secret = secret
        self.joined = joined
        """Whether a worker of this name has ever joined the router; may be set while they start."""
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._failed: tuple[str, int] | None = None
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._keepers = [
            threading.Thread(target=self._keep, args=(child,), name=f"dsv4c-{child.name}", daemon=True)
            for child in children
        ]

    def __enter__(self) -> Processes:
        for keeper in self._keepers:
            keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, int]:
        """Name -> process of those that run."""
        with self._lock:
            return {name: process.pid for name, process in self._running.items()}

    def await_all(self) -> None:
        """Waits until every child has joined. Raises ConfigError or EngineError, as its code says, if one ends."""
        while self._failed is None and not all(self.joined(child.name) for child in self._children):
            self._changed.wait(0.02)
            self._changed.clear()
        if self._failed is None:
            return
        name, code = self._failed
        kind = ConfigError if code == 2 else EngineError
        raise kind(f"worker `{name}` ended with code {code} before it could serve", hint="its own message is above")

    def close(self) -> None:
        """Ends every child, at the latest after a while by force, and waits for it."""
        self._closing.set()
        with self._lock:
            running = list(self._running.values())
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _TERM_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for keeper in self._keepers:
            if keeper.ident is not None:
                keeper.join()

    def _keep(self, child: Child) -> None:
        """Runs one child after the other, until it is time to end."""
        short = 0
        while not self._closing.wait(_AGAIN_S[min(short, len(_AGAIN_S) - 1)]):
            began = time.monotonic()
            code = self._run(child)
            if self._closing.is_set():
                return
            if not self.joined(child.name):
                self._failed = (child.name, code)
                self._changed.set()
                return
            lived_s = time.monotonic() - began
            short = 0 if lived_s > _LONG_S else short + 1
            _LOG.warning(
                "worker `%s` has ended (%s) after %.1f s: it is started again", child.name, _said(code), lived_s
            )

    def _run(self, child: Child) -> int:
        """The exit code of one process, when it has ended."""
        with self._lock:
            if self._closing.is_set():
                return 0
            process = subprocess.Popen(child.command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
            self._running[child.name] = process
        assert process.stdin is not None and process.stderr is not None
        with contextlib.suppress(BrokenPipeError):  # it has died already, and its code will say why
            process.stdin.write(self._secret.encode() + b"\n")
            process.stdin.flush()
        for line in process.stderr:
            sys.stderr.write(f"{child.name} | {line.decode(errors='replace')}")
            sys.stderr.flush()
        code = process.wait()
        with self._lock:
            del self._running[child.name]
        process.stderr.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return code


def _said(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"


class Parent:
    """In a child: the secret that its parent gave, and the parent's end, which is the end of stdin."""

    def __init__(self) -> None:
        """Reads the secret; until `ended` is set, the parent's end is the child's at once."""
        self.secret = sys.stdin.readline().strip()
        self.ended: Callable[[], None] | None = None
        """What ends the child in good order; it has a few seconds."""
        threading.Thread(target=self._wait, name="dsv4c-parent", daemon=True).start()

    def _wait(self) -> None:
        while sys.stdin.read(1):
            pass
        if self.ended is not None:
            self.ended()
            time.sleep(_TERM_S)
        os._exit(1)  # what it leaves behind is found by the next one
