"""Transfer through NVIDIA NIXL over UCX: one-sided reads of a peer's memory, on this host or another, host or device.

    describe()   the agent's metadata, and addresses of ledger and pools
    words, read  a READ each; done where the owner's process is not asked, or (TCP) whenever it polls
    release      a notification: the owner finds it when it polls

The connector's thread is the only one that touches the agent, which has no progress thread: those spin, and on few
cores cost a scheduling quantum for every small read. So an owner must poll while anything is exported.

A peer that has died makes a READ raise. One that hangs does not: its READ stays under way for ever, and may write
here whenever the peer goes on, even after its handle was released and the peer forgotten. Only the end of the agent
ends it. That is why a Read holds its buffer until it is over, and `close` destroys the agent.

UCX listens on the network devices it is given: the loopback device, unless told otherwise. Nothing that comes in is
authenticated: give it devices of a private network only.
"""

from __future__ import annotations

import base64
import binascii
import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from dsv4c.artifact import Manifest
from dsv4c.errors import ConfigError, EngineError, HandleError, LeaseLost, PeerGone
from dsv4c.runtime.engine import Engine
from dsv4c.runtime.transfer.backend import Backend, Read
from dsv4c.runtime.transfer.layout import Int64Array, Layout, Ranges
from dsv4c.runtime.transfer.ledger import Ledger
from dsv4c.runtime.transfer.node import Node
from dsv4c.runtime.transfer.setup import layout_of, make_node

PACKAGES = ("nixl_cu12", "nixl_cu13")
"""Of NIXL's own meta package `nixl`, what it chooses from. Either works without CUDA."""
_SCRATCH_WORDS = 1 << 16


def load_api() -> Any:
    """NIXL's Python interface. Raises ConfigError if it is not installed."""
    for package in PACKAGES:
        try:
            api = import_module(f"{package}._api")
            logging.getLogger("nixl").setLevel(logging.WARNING)  # it writes to stdout
            return api
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith(package):
                raise
    raise ConfigError("NIXL is not installed", hint="`pip install --no-deps nixl-cu12==1.5.1`")


@dataclass(frozen=True)
class _Memory:
    """A peer's memory as its handle describes it."""

    ledger: int
    rows: int
    words: int
    kind: str
    device: int
    addresses: Int64Array
    nbytes: Int64Array


class NixlBackend:
    """Backend over pools of the CPU or of one GPU, and a ledger in host memory."""

    kind = "nixl"
    released_poll_s = 0.0005
    """Over TCP, every round trip of a reader waits for the owner's next poll."""

    def __init__(self, layout: Layout, pools: Mapping[str, Tensor], ledger: Ledger, devices: str = "lo") -> None:
        """`pools`: by name, contiguous, on one device. `devices`: UCX's network devices, as `mlx5_0:1`; `all`: any.

        Raises ConfigError if NIXL is not installed or has no UCX.
        """
        tensors = [pools[name] for name in layout.pools]
        if any(not t.is_contiguous() for t in tensors) or len({t.device for t in tensors}) > 1:
            raise EngineError("pools are contiguous and on one device")
        api = load_api()
        self.peer_id = f"nixl-{secrets.token_hex(8)}"
        self._failures = _failures_of(api)
        config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
        agent = self._agent = api.nixl_agent(self.peer_id, config)
        if "UCX" not in agent.plugin_list:
            raise ConfigError("this NIXL has no UCX", hint="install the wheel `nixl-cu12`")
        agent.create_backend(
            "UCX", {"ucx_devices": "" if devices == "all" else devices, "ucx_error_handling_mode": "peer"}
        )
        device = tensors[0].device
        self._kind, self._device = ("DRAM", 0) if device.type == "cpu" else ("VRAM", device.index or 0)
        self._addresses = np.array([t.data_ptr() for t in tensors], np.int64)
        self._sizes = np.array([t.nbytes for t in tensors], np.int64)
        self._ledger = ledger
        places = zip(self._addresses.tolist(), self._sizes.tolist(), strict=True)
        agent.register_memory([(a, n, self._device, "") for a, n in places], self._kind)
        agent.register_memory([(ledger.words.ctypes.data, ledger.words.nbytes, 0, "")], "DRAM")
        self._blocks: list[Int64Array] = []
        self._scratch: dict[int, list[Int64Array]] = {}  # by words: what is free
        self._reading: set[_Reading] = set()
        self._metadata = base64.b64encode(agent.get_agent_metadata()).decode()

    def describe(self) -> dict[str, Any]:
        words = self._ledger.words
        return {
            "agent": self.peer_id,
            "metadata": self._metadata,
            "ledger": [words.ctypes.data, *words.shape],
            "memory": [self._kind, self._device],
            "pools": np.stack([self._addresses, self._sizes], axis=1).tolist(),
        }

    def open(self, description: Mapping[str, Any]) -> NixlPeer:
        memory, metadata = _memory_of(description, self._addresses.size)
        try:
            name = self._agent.add_remote_agent(metadata)
        except self._failures as error:
            raise PeerGone(f"`{description['agent']}` cannot be reached: {error}") from error
        name = name.decode() if isinstance(name, bytes) else name
        if name != description["agent"]:
            raise HandleError(f"the handle is malformed: `{name}` is not `{description['agent']}`")
        return NixlPeer(self, name, memory)

    def poll_released(self) -> Iterator[tuple[int, int]]:
        """Also lets the agent see to what peers ask of it."""
        for messages in self._agent.get_new_notifs().values():
            for message in messages:
                row, _, lease = message.partition(b":")
                if row.isdigit() and lease.isdigit():
                    yield int(row), int(lease)

    def close(self) -> None:
        """Ends the agent, and with it whatever it still reads."""
        for reading in list(self._reading):
            reading.abandon()
        self._agent = None

    # for peers

    def begin(self, peer: NixlPeer, kind: str, local: Int64Array, remote: Int64Array) -> Any:
        """Posts a READ of descriptors [n, 3]: address, bytes, device. Returns its handle, and whether it is over."""
        agent = self._agent
        try:
            here = agent.get_xfer_descs(local.astype(np.uint64), self._kind if kind == "pools" else "DRAM")
            there = agent.get_xfer_descs(remote.astype(np.uint64), peer.memory.kind if kind == "pools" else "DRAM")
            handle = agent.initialize_xfer("READ", here, there, peer.name)
            state = agent.transfer(handle)
        except self._failures as error:
            raise peer.lost(error) from error
        return handle, self.over(peer, state)

    def over(self, peer: NixlPeer, state: str) -> bool:
        """Whether a READ in this state is done. Raises PeerGone."""
        if state == "ERR":
            raise peer.lost("the read failed")
        return state == "DONE"

    def take_scratch(self, count: int) -> Int64Array:
        """Registered words, nobody else's until they are given back."""
        free = self._scratch.setdefault(count, [])
        if not free:
            block = np.zeros(max(count, _SCRATCH_WORDS), np.int64)
            self._agent.register_memory([(block.ctypes.data, block.nbytes, 0, "")], "DRAM")
            self._blocks.append(block)
            free.extend(block[at : at + count] for at in range(0, block.size - count + 1, count))
        return free.pop()

    def give_scratch(self, words: Int64Array) -> None:
        """Back: nothing writes there any more."""
        self._scratch[words.size].append(words)


class NixlPeer:
    """Another engine's memory, as its agent has registered it."""

    def __init__(self, backend: NixlBackend, name: str, memory: _Memory) -> None:
        self.name, self.memory = name, memory
        self._backend = backend
        self._gone: str | None = None

    def words(self, row: int, first: int, out: Int64Array) -> Read:
        memory = self.memory
        if not (0 <= row < memory.rows and first >= 0 and first + out.size <= memory.words):
            raise HandleError(f"`{self.name}` has no words [{first}, {first + out.size}) in row {row}")
        scratch = self._backend.take_scratch(out.size)
        source = memory.ledger + 8 * (row * memory.words + first)
        local = np.array([[scratch.ctypes.data, scratch.nbytes, 0]], np.int64)
        remote = np.array([[source, scratch.nbytes, 0]], np.int64)
        return _Reading(self._backend, self, "words", local, remote, (scratch, out))

    def read(self, ranges: Ranges) -> Read:
        own, memory, pool, nbytes = self._backend, self.memory, ranges.pool, ranges.nbytes
        if (ranges.source < 0).any() or (ranges.source + nbytes > memory.nbytes[pool]).any():
            raise LeaseLost(f"the ledger of `{self.name}` names pages that its pools do not have")
        if (ranges.target < 0).any() or (ranges.target + nbytes > own._sizes[pool]).any():
            raise HandleError("a copy would go beyond a pool")
        local = _columns(own._addresses[pool] + ranges.target, nbytes, own._device)
        remote = _columns(memory.addresses[pool] + ranges.source, nbytes, memory.device)
        return _Reading(own, self, "pools", local, remote)

    def release(self, row: int, lease: int) -> None:
        if self._gone is None:
            try:
                self._backend._agent.send_notif(self.name, b"%d:%d" % (row, lease))
            except self._backend._failures as error:
                self.lost(error)  # nobody is left to be told

    def check(self) -> None:
        """Knows what reads have found out: NIXL has no other sign of life."""
        if self._gone is not None:
            raise PeerGone(self._gone)

    def close(self) -> None:
        try:
            self._backend._agent.remove_remote_agent(self.name)
        except self._backend._failures as error:
            self.lost(error)  # of no consequence: it is forgotten either way

    def lost(self, why: object) -> PeerGone:
        """The error of a peer that does not answer any more."""
        self._gone = f"`{self.name}` is gone: {type(why).__name__ if isinstance(why, Exception) else ''} {why}".strip()
        return PeerGone(self._gone)


class _Reading:
    """A READ under way. Holds what it writes to until it is over."""

    def __init__(
        self,
        backend: NixlBackend,
        peer: NixlPeer,
        kind: str,
        local: Int64Array,
        remote: Int64Array,
        words: tuple[Int64Array, Int64Array] | None = None,
    ) -> None:
        """`words`: registered memory that `local` is, and where what arrives there belongs."""
        self._backend, self._peer, self._words = backend, peer, words
        self._handle, over = backend.begin(peer, kind, local, remote)
        self._over = False
        backend._reading.add(self)
        if over:
            self._finish()

    def poll(self) -> bool:
        if self._over:
            return True
        backend = self._backend
        try:
            over = backend.over(self._peer, backend._agent.check_xfer_state(self._handle))
        except backend._failures as error:
            self.abandon()
            raise self._peer.lost(error) from error
        except PeerGone:
            self.abandon()
            raise
        if over:
            self._finish()
        return over

    def _finish(self) -> None:
        self._over = True
        self._backend._reading.discard(self)
        self._backend._agent.release_xfer_handle(self._handle)
        if self._words is not None:
            scratch, out = self._words
            out[:] = scratch
            self._backend.give_scratch(scratch)
            self._words = None

    def abandon(self) -> None:
        """Gives the handle back whatever state it is in; registered words are not used again."""
        self._over = True
        self._backend._reading.discard(self)
        try:
            self._backend._agent.release_xfer_handle(self._handle)
        except self._backend._failures as error:
            self._peer.lost(error)
        self._handle = None


def _columns(addresses: Int64Array, nbytes: Int64Array, device: int) -> Int64Array:
    return np.stack([addresses, nbytes, np.full(addresses.size, device, np.int64)], axis=1)


def _failures_of(api: Any) -> tuple[type[Exception], ...]:
    """NIXL's own errors, which have no common base."""
    found = vars(api.nixlBind).items()
    return tuple(e for name, e in found if name.endswith("Error") and isinstance(e, type) and issubclass(e, Exception))


def _memory_of(description: Mapping[str, Any], pools: int) -> tuple[_Memory, bytes]:
    """What a handle says, checked. Raises HandleError."""
    try:
        metadata = base64.b64decode(description["metadata"], validate=True)
        ledger, rows, words = (int(n) for n in description["ledger"])
        kind, device = description["memory"]
        places = np.array(description["pools"], np.int64)
        if not isinstance(description["agent"], str):
            raise ValueError("`agent` is no text")
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise HandleError(f"the handle is malformed: {error}") from error
    if kind not in ("DRAM", "VRAM") or places.shape != (pools, 2) or min(ledger, rows, words, places.min()) < 1:
        raise HandleError("the handle is malformed: pools without places")
    return _Memory(ledger, rows, words, kind, int(device), places[:, 0], places[:, 1]), metadata


def nixl_node(
    engine: Engine,
    manifest: Manifest,
    pools: Mapping[str, Tensor],
    *,
    devices: str = "lo",
    extra: Mapping[str, str] | None = None,
    ttl_s: float = 30.0,
    deadline_s: float = 10.0,
) -> Node:
    """A node whose pools peers read through NIXL, over these network devices."""

    def make(layout: Layout, ledger: Ledger) -> Backend:
        return NixlBackend(layout, pools, ledger, devices)

    return make_node(engine, layout_of(manifest, extra), make, ttl_s=ttl_s, deadline_s=deadline_s)
