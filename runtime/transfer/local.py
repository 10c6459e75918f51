"""Transfer between engines of one process: their pools copied tensor to tensor, also from device to device.

A Hub is where they find each other; it is made by whoever makes the engines, and given to each.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4c.errors import EngineError, HandleError, LeaseLost, PeerGone
from dsv4c.runtime.transfer.backend import DONE, Read
from dsv4c.runtime.transfer.hostcopy import HostCopy
from dsv4c.runtime.transfer.layout import Int64Array, Layout, Ranges
from dsv4c.runtime.transfer.ledger import LEASE, RELEASED, Ledger


class Hub:
    """The engines of a process that may pull from each other, by name."""

    def __init__(self) -> None:
        self.members: dict[str, LocalBackend] = {}


class _OnDevice:
    """Copies that a device was told to make."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def poll(self) -> bool:
        return bool(self._event.query())


class LocalBackend:
    """Backend over tensors of this process."""

    kind = "local"
    released_poll_s = 0.005

    def __init__(self, hub: Hub, layout: Layout, pools: Mapping[str, Tensor], ledger: Ledger) -> None:
        """`pools`: by name, contiguous, all on one device."""
        tensors = [pools[name] for name in layout.pools]
        if any(not t.is_contiguous() for t in tensors) or len({t.device for t in tensors}) > 1:
            raise EngineError("pools are contiguous and on one device")
        self.bytes = [t.reshape(-1).view(torch.uint8) for t in tensors]
        """Of each pool of the layout, its bytes."""
        self.ledger, self.unit_bytes = ledger, layout.unit_bytes
        self.peer_id = f"local-{secrets.token_hex(8)}"
        self._hub = hub
        device = tensors[0].device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        hub.members[self.peer_id] = self

    def describe(self) -> dict[str, Any]:
        return {"member": self.peer_id}

    def open(self, description: Mapping[str, Any]) -> LocalPeer:
        found = self._hub.members.get(str(description.get("member")))
        if found is None:
            raise PeerGone(f"`{description.get('member')}` is not in this process")
        return LocalPeer(self._hub, found, self)

    def poll_released(self) -> Iterator[tuple[int, int]]:
        return iter(self.ledger.let_go())

    def close(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        self._hub.members.pop(self.peer_id, None)


class LocalPeer:
    """Another engine of this process."""

    def __init__(self, hub: Hub, other: LocalBackend, own: LocalBackend) -> None:
        self._hub, self._other, self._own = hub, other, own
        self._host: HostCopy | None = None
        if own.stream is None and other.stream is None:
            sources, targets = ([t.numpy() for t in side.bytes] for side in (other, own))
            self._host = HostCopy(other.peer_id, sources, targets, own.unit_bytes)

    def words(self, row: int, first: int, out: Int64Array) -> Read:
        words = self._other.ledger.words
        if not (0 <= row < words.shape[0] and first + out.size <= words.shape[1]):
            raise HandleError(f"`{self._other.peer_id}` has no words [{first}, {first + out.size}) in row {row}")
        out[:] = words[row, first : first + out.size]
        return DONE

    def read(self, ranges: Ranges) -> Read:
        if self._host is not None:
            self._host.copy(ranges)
            return DONE
        columns = (ranges.pool, ranges.source, ranges.target, ranges.nbytes)
        copies = list(zip(*(c.tolist() for c in columns), strict=True))
        for pool, source, target, n in copies:
            if not 0 <= source <= source + n <= self._other.bytes[pool].numel():
                raise LeaseLost(f"the ledger of `{self._other.peer_id}` names pages that its pools do not have")
            if not 0 <= target <= target + n <= self._own.bytes[pool].numel():
                raise HandleError("a copy would go beyond a pool")
        return self._read_on_device(copies)

    def _read_on_device(self, copies: list[tuple[int, int, int, int]]) -> Read:
        """Copies in a stream beside the engines': what is read was final before, what is written nobody reads yet."""
        stream = self._own.stream or self._other.stream
        assert stream is not None
        with torch.cuda.stream(stream):
            for pool, source, target, n in copies:
                self._own.bytes[pool][target : target + n].copy_(
                    self._other.bytes[pool][source : source + n], non_blocking=True
                )
            event = torch.cuda.Event()
            event.record(stream)
        return _OnDevice(event)

    def release(self, row: int, lease: int) -> None:
        words = self._other.ledger.words
        if words[row, LEASE] == lease:
            words[row, RELEASED] = lease

    def check(self) -> None:
        if self._other.peer_id not in self._hub.members:
            raise PeerGone(f"`{self._other.peer_id}` has closed")

    def close(self) -> None:
        """Nothing to give back."""
