"""NIXL between processes of this host: reads, releases, a peer that dies, one that hangs, handles that are no good."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4c.errors import HandleError, LeaseLost, PeerGone
from dsv4c.runtime.transfer.backend import Read
from dsv4c.runtime.transfer.layout import Ranges

pytest.importorskip("nixl_cu12", reason="NIXL is not installed: `make test-dynamo` installs it")

ROOT = Path(__file__).resolve().parents[3]
MIB = 8


@contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    command = [sys.executable, "-m", "tests.runtime.transfer.nixl_owner", str(MIB)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def ranges(pool: int, source: int, target: int, nbytes: int) -> Ranges:
    return Ranges(*(np.array([n], np.int64) for n in (pool, source, target, nbytes)))


def finish(read: Read) -> None:
    while not read.poll():
        time.sleep(0.0001)


@pytest.fixture(params=["", "tcp"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Our own side, with whatever UCX likes best on this host, and with TCP alone."""
    from tests.runtime.transfer.nixl_owner import sides

    if request.param:
        monkeypatch.setenv("UCX_TLS", request.param)
    pools, _, backend = sides(MIB, 0)
    yield pools, backend
    backend.close()


def test_words_pages_and_releases(reader: Any) -> None:
    pools, backend = reader
    with owner() as (process, description):
        peer = backend.open(description)
        words = np.zeros(5, np.int64)
        finish(peer.words(2, 3, words))
        assert words.tolist() == [3, 4, 5, 6, 7]
        finish(peer.read(ranges(1, 4096, 8192, 1 << 20)))
        filled = next(iter([pools[name] for name in pools][1:]))
        assert int((filled == 7).sum()) == 1 << 20 and bool((filled[8192 : 8192 + (1 << 20)] == 7).all())
        several = Ranges(*(np.array(v, np.int64) for v in ([0, 2], [0, 0], [0, 64], [MIB << 20, 100])))
        finish(peer.read(several))
        assert [int((pool == 7).sum()) for pool in pools.values()][:3] == [MIB << 20, 1 << 20, 100]
        for _ in range(100):
            finish(peer.words(1, 0, words))
        peer.release(2, 77)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == [2, 77]
        peer.check()
        peer.close()


def test_a_peer_that_dies(reader: Any) -> None:
    _, backend = reader
    words = np.zeros(4, np.int64)
    with owner() as (process, description):
        peer = backend.open(description)
        finish(peer.words(2, 0, words))
        process.kill()
        process.wait()
        for _ in range(2):
            with pytest.raises(PeerGone):
                finish(peer.read(ranges(0, 0, 0, 1 << 20)))
        with pytest.raises(PeerGone):
            peer.check()
        peer.release(2, 5)  # nobody hears it
        peer.close()
        with pytest.raises(PeerGone):
            finish(backend.open(description).words(2, 0, words))


def test_what_a_hanging_peer_has_not_sent_never_comes_once_the_agent_is_closed(reader: Any) -> None:
    pools, backend = reader
    words = np.zeros(4, np.int64)
    with owner() as (process, description):
        peer = backend.open(description)
        finish(peer.words(2, 0, words))
        process.send_signal(signal.SIGSTOP)
        try:
            read = peer.read(ranges(0, 0, 0, MIB << 20))
            for _ in range(2000):
                if read.poll():
                    break
                time.sleep(0.0005)
            backend.close()
            pool = next(iter(pools.values()))
            pool.zero_()
        finally:
            process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        assert not pool.any()


def test_what_is_out_of_bounds_is_not_read(reader: Any) -> None:
    _, backend = reader
    with owner() as (_, description):
        peer = backend.open(description)
        with pytest.raises(LeaseLost, match="do not have"):
            peer.read(ranges(0, 1, 0, MIB << 20))
        with pytest.raises(HandleError, match="beyond a pool"):
            peer.read(ranges(0, 0, 1, MIB << 20))
        for row, first in ((4, 0), (-1, 0), (0, 100_000)):
            with pytest.raises(HandleError, match="no words"):
                peer.words(row, first, np.zeros(4, np.int64))


def test_malformed_descriptions() -> None:
    from tests.runtime.transfer.nixl_owner import sides

    _, _, backend = sides(1, 0)
    good = backend.describe()
    changes: list[dict[str, Any]] = [
        {"metadata": "!!"}, {"metadata": ""}, {"agent": 5}, {"ledger": [1, 2]}, {"pools": []}, {"pools": [[0, 0]]},
        {"memory": ["DISK", 0]}, {"memory": "x"}, {"agent": "another"},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises((HandleError, PeerGone)):
            backend.open({**good, **change})
    for name in good:
        with pytest.raises(HandleError, match="malformed"):
            backend.open({k: v for k, v in good.items() if k != name})
    backend.close()
