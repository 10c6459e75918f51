"""Transfer through shared memory, between engines of one machine and user: a reader maps the peer's pools, and copies.

    /dev/shm/dsv4c-<random>     header page | ledger | pools, from offsets that are multiples of 4096
                                mode 0600; made by a worker for its own life, and unlinked when it closes

The owner holds an exclusive lock (flock) on the file, which the kernel lets go of when the process dies, however it
does. So a peer is gone when its file can be locked; and a segment that a crash has left behind is one that can be
locked by whoever starts next, who removes it. No process id is compared, so containers that share /dev/shm may. A
process that is forked, and not replaced by another program, keeps its parent's lock: workers start others by spawn.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import platform
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from dsv4c.errors import ConfigError, HandleError, PeerGone
from dsv4c.runtime.transfer.backend import DONE, Read
from dsv4c.runtime.transfer.hostcopy import Bytes, HostCopy
from dsv4c.runtime.transfer.layout import Int64Array, Layout, Ranges
from dsv4c.runtime.transfer.ledger import LEASE, RELEASED, Ledger, row_words

_LOG = logging.getLogger("dsv4c.transfer")
FOLDER = Path("/dev/shm")
PAGE = 4096
FORMAT = 1
_NAME = re.compile(r"dsv4c-[0-9a-f]{16}")


def _ceil(n: int) -> int:
    return -(-n // PAGE) * PAGE


class Header(msgspec.Struct, frozen=True):
    """The first line of a segment: the ledger's rows and words of each, and where the pools begin, in bytes."""

    format: int
    pid: int
    rows: int
    words: int
    pools: int


class Segment:
    """A worker's own segment: memory for its pools, and the ledger. Close it when nothing uses either any more."""

    def __init__(self, fd: int, name: str, ledger: tuple[int, int], pools: tuple[int, int], size: int) -> None:
        """`ledger`: rows and words of each; `pools`: offset and bytes. Use `create`."""
        self.name = name
        self._fd = fd
        self._map = mmap.mmap(fd, size)
        rows, words = ledger
        self.words: Int64Array = np.frombuffer(self._map, np.int64, rows * words, PAGE).reshape(rows, words)
        self.memory = memoryview(self._map)[pools[0] : pools[0] + pools[1]]
        """Zeroed, writable: for `loader.allocate`."""
        self.pools_offset = pools[0]

    @classmethod
    def create(cls, pools_bytes: int, rows: int, columns: Sequence[int], folder: Path = FOLDER) -> Segment:
        """A segment for pools of so many bytes and a ledger of so many leases. Raises ConfigError if it does not fit.

        Memory is reserved at once: a full /dev/shm is refused here, and kills nobody later.
        """
        words = row_words(columns)
        pools_offset = _ceil(PAGE + 8 * rows * words)
        size = pools_offset + max(PAGE, _ceil(pools_bytes))
        fd, name = _make(folder)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            os.unlink(folder / name)
            os.close(fd)
            free = os.statvfs(folder)
            raise ConfigError(
                f"{size} bytes of shared memory are not to be had, `{folder}` has {free.f_bavail * free.f_frsize}: "
                f"{error.strerror}",
                hint="give less KV memory, or mount a larger /dev/shm (docker: --shm-size)",
            ) from error
        header = Header(FORMAT, os.getpid(), rows, words, pools_offset)
        os.pwrite(fd, msgspec.json.encode(header) + b"\n", 0)
        return cls(fd, name, (rows, words), (pools_offset, pools_bytes), size)

    def close(self, folder: Path = FOLDER) -> None:
        """Removes the name and lets peers know; the memory goes with the last that maps it. Twice is once."""
        if self._fd < 0:
            return
        (folder / self.name).unlink(missing_ok=True)
        os.close(self._fd)  # and with it the lock
        self._fd = -1


def _make(folder: Path) -> tuple[int, str]:
    """A new, locked file."""
    while True:
        name = f"dsv4c-{secrets.token_hex(8)}"
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd, name
        os.close(fd)  # somebody who cleans up was between the two calls, and took it for left over


def remove_left_over(folder: Path = FOLDER) -> list[str]:
    """Removes the segments of workers of this user that have died without closing them; their names."""
    removed = []
    for path in sorted(folder.glob("dsv4c-*")):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue  # closed this moment, or another user's
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its owner lives
        else:
            path.unlink(missing_ok=True)
            _LOG.warning("removed `%s`, %d bytes left behind by a worker that died", path, os.fstat(fd).st_size)
            removed.append(path.name)
        finally:
            os.close(fd)
    return removed


class ShmBackend:
    """Backend over a segment whose memory holds the pools; also for an engine that only reads, without exporting."""

    kind = "shm"
    released_poll_s = 0.005

    def __init__(
        self, segment: Segment, layout: Layout, pools: Mapping[str, Tensor], ledger: Ledger, folder: Path = FOLDER
    ) -> None:
        """`pools`: by name, views of the segment's memory. Raises ConfigError if they are not."""
        self._segment, self._ledger, self._folder = segment, ledger, folder
        tensors = [pools[name] for name in layout.pools]
        base = np.frombuffer(segment.memory, np.uint8).ctypes.data
        self._sizes = np.array([t.nbytes for t in tensors], np.int64)
        self._units = layout.unit_bytes
        offsets = np.array([t.data_ptr() for t in tensors], np.int64) - base
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ConfigError(
                f"shared memory needs the order of stores that x86 keeps, this machine is `{platform.machine()}`",
                hint="use `--transfer nixl`",
            )
        if any(t.device.type != "cpu" or not t.is_contiguous() for t in tensors):
            raise ConfigError("shared memory moves pools of the CPU only", hint="use `--transfer nixl` on a GPU")
        if (offsets < 0).any() or (offsets + self._sizes > segment.memory.nbytes).any():
            raise ConfigError("the pools do not lie in the segment", hint="allocate them in `Segment.memory`")
        self._offsets = offsets + segment.pools_offset
        self._bytes = [t.reshape(-1).view(torch.uint8).numpy() for t in tensors]

    @property
    def peer_id(self) -> str:
        return self._segment.name

    def describe(self) -> dict[str, Any]:
        return {"name": self._segment.name, "offsets": self._offsets.tolist(), "bytes": self._sizes.tolist()}

    def open(self, description: Mapping[str, Any]) -> ShmPeer:
        return ShmPeer(description, self._bytes, self._units, self._folder)

    def poll_released(self) -> Iterator[tuple[int, int]]:
        return iter(self._ledger.let_go())

    def close(self) -> None:
        self._segment.close(self._folder)


class ShmPeer:
    """Another worker's segment, mapped. Its pools can only be read."""

    def __init__(
        self, description: Mapping[str, Any], targets: Sequence[Bytes], unit_bytes: Int64Array, folder: Path
    ) -> None:
        name, offsets, nbytes = (description.get(key) for key in ("name", "offsets", "bytes"))
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise HandleError("the handle is malformed: it names no segment")
        if not all(isinstance(v, list) and all(type(n) is int for n in v) for v in (offsets, nbytes)):
            raise HandleError("the handle is malformed: pools without places")
        assert isinstance(offsets, list) and isinstance(nbytes, list)
        self._offsets, self._bytes = np.array(offsets, np.int64), np.array(nbytes, np.int64)
        self._name = name
        try:
            self._fd = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise PeerGone(f"segment `{name}` cannot be opened: {error.strerror}") from error
        try:
            self._open(targets, unit_bytes)
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self, targets: Sequence[Bytes], unit_bytes: Int64Array) -> None:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise HandleError(f"`{self._name}` is no segment of this user")
        try:
            header = msgspec.json.decode(os.pread(self._fd, PAGE, 0).partition(b"\n")[0], type=Header)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HandleError(f"`{self._name}` is no segment: its header cannot be read") from error
        if header.format != FORMAT:
            raise HandleError(f"segment `{self._name}` has another format", hint="run the same version in every role")
        self._rows, self._words, start = header.rows, header.words, header.pools
        same = self._offsets.size == self._bytes.size == len(targets)
        if not same or (self._offsets < start).any() or (self._bytes < 0).any():
            raise HandleError(f"the handle is malformed: pools outside segment `{self._name}`")
        if (self._offsets + self._bytes > found.st_size).any():
            raise HandleError(f"the handle is malformed: pools outside segment `{self._name}`")
        self.check()
        self._table = mmap.mmap(self._fd, start)
        self._ledger = np.frombuffer(self._table, np.int64, self._rows * self._words, PAGE)
        self._ledger = self._ledger.reshape(self._rows, self._words)
        self._pools = mmap.mmap(self._fd, found.st_size, prot=mmap.PROT_READ)
        places = zip(self._offsets.tolist(), self._bytes.tolist(), strict=True)
        sources = [np.frombuffer(self._pools, np.uint8, nbytes, offset) for offset, nbytes in places]
        self._copy = HostCopy(self._name, sources, targets, unit_bytes)

    def words(self, row: int, first: int, out: Int64Array) -> Read:
        if not (0 <= row < self._rows and first + out.size <= self._words):
            raise HandleError(f"segment `{self._name}` has no words [{first}, {first + out.size}) in row {row}")
        out[:] = self._ledger[row, first : first + out.size]
        return DONE

    def read(self, ranges: Ranges) -> Read:
        self._copy.copy(ranges)
        return DONE

    def release(self, row: int, lease: int) -> None:
        if self._ledger[row, LEASE] == lease:
            self._ledger[row, RELEASED] = lease

    def check(self) -> None:
        """An owner that lives holds the lock."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        raise PeerGone(f"the worker of segment `{self._name}` has died or closed")

    def close(self) -> None:
        os.close(self._fd)
        del self._ledger, self._copy, self._pools, self._table  # unmapped with the last reference, an error's even
