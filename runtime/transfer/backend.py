"""What a way of moving bytes must offer: open a peer, read its ledger and its pools, and tell it when that is done.

All calls come from one thread, the Connector's. A `Read` may be asked again and again; after it has said True, or
raised, it writes nothing any more. While it says False it may, whatever becomes of the request: its pages and its
buffer must stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from dsv4c.runtime.transfer.layout import Int64Array, Ranges


class Read(Protocol):
    """Bytes on their way from a peer."""

    def poll(self) -> bool:
        """Whether they are here. Raises PeerGone."""


class Peer(Protocol):
    """Another engine's memory, as far as it has exported it."""

    def words(self, row: int, first: int, out: Int64Array) -> Read:
        """Reads words [first, first + out.size) of a ledger row into `out`."""

    def read(self, ranges: Ranges) -> Read:
        """Copies from the peer's pools into our own. Raises LeaseLost for ranges that its pools do not have."""

    def release(self, row: int, lease: int) -> None:
        """Tells the owner that nobody reads this lease any more. May be lost; leases expire."""

    def check(self) -> None:
        """Raises PeerGone if the peer is known to be dead."""

    def close(self) -> None:
        """Forgets the peer; no Read of it is under way."""


class Backend(Protocol):
    """One way of moving bytes, over this engine's pools and ledger."""

    @property
    def kind(self) -> str:
        """`shm`, `local`, `nixl`: two sides must have the same."""

    @property
    def peer_id(self) -> str:
        """This engine's name among its peers, new in every life of its process."""

    @property
    def released_poll_s(self) -> float:
        """Seconds between two calls of `poll_released` while a lease is out: so much longer pages stay."""

    def describe(self) -> dict[str, Any]:
        """What a peer needs to open this engine's memory; JSON values only."""

    def open(self, description: Mapping[str, Any]) -> Peer:
        """A peer by its description. Raises PeerGone if it is not there, HandleError if that makes no sense."""

    def poll_released(self) -> Iterable[tuple[int, int]]:
        """Ledger row and number of leases that readers have let go of; some may be told twice, or be long gone."""

    def close(self) -> None:
        """Gives everything back. What is under way is ended, so that nothing writes afterwards."""


class Done:
    """A Read that was over when it began."""

    def poll(self) -> bool:
        return True


DONE = Done()
