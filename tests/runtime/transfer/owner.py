"""A prefill side in a process of its own, to be killed and stopped: commands on stdin, one answer on stdout for each.

python -m tests.runtime.transfer.owner FOLDER        FOLDER: where segments go
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dsv4c.runtime.transfer.connector import Connector
from dsv4c.runtime.transfer.handle import tokens_sha256
from dsv4c.runtime.transfer.shm import Segment, ShmBackend
from tests.runtime.transfer.sides import COLUMNS, LAYOUT, SLOTS, Side, allocate, pools_bytes, sizes

ROOT = Path(__file__).resolve().parents[3]


class Owner:
    """The process, seen from the test."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.transfer.owner", str(folder)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def do(self, command: str, *args: object) -> Any:
        """Has a command done, and waits for it."""
        self.start(command, *args)
        return self.answer()

    def start(self, command: str, *args: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *args]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def main(folder: Path) -> None:
    size = sizes()
    segment = Segment.create(pools_bytes(size), SLOTS, COLUMNS, folder)
    pools = allocate(size, segment.memory)
    side = Side(size, pools, segment.words)
    connector = Connector(ShmBackend(segment, LAYOUT, pools, side.ledger, folder), LAYOUT, COLUMNS)
    released: list[tuple[int, int]] = []
    connector.on_released = lambda row, lease: released.append((row, lease))
    side.leases.changed = connector.watch

    def submit(request_id: str, seed: int, tokens: int) -> object:
        side.submit(request_id, seed, tokens)
        lease = side.leases.of(request_id)
        assert lease is not None
        return connector.export(lease.row, lease.number, tokens, tokens_sha256(side.requests[request_id].tokens()))

    def crawl(request_id: str, seconds: float) -> None:
        """Computes a token at a time, so that there is always something under way."""
        for end in range(side.computed[request_id] + 1, side.requests[request_id].num_tokens + 1):
            side.step(request_id, end)
            time.sleep(seconds)

    commands = {
        "submit": submit, "step": side.step, "crawl": crawl, "let_go": side.let_go, "fail": side.fail,
        "preempt": side.preempt, "admit": side.admit, "name": lambda: segment.name,
        "released": lambda: sorted(set(released)), "close": connector.close,
    }  # fmt: skip
    for line in sys.stdin:
        name, *args = json.loads(line)
        print(json.dumps(commands[name](*args)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
