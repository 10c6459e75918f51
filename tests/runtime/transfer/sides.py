"""Engines' pools without engines: what a prefill side computes is a function of request, pool and page.

So it can be told apart wherever it lies; and whatever page is free is overwritten with noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dsv4c.artifact import KVGroup, Pool, StateGroup
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.params import SamplingParams
from dsv4c.runtime.poolsizes import PoolSizes, ceil_div, first_page
from dsv4c.runtime.request import Request
from dsv4c.runtime.transfer.layout import Layout
from dsv4c.runtime.transfer.leases import Leases
from dsv4c.runtime.transfer.ledger import Ledger, row_words
from dsv4c.runtime.transfer.pull import Place

CONTEXT = 512
GROUPS = (
    KVGroup("window", 1, 4, 8, (Pool("a.window", (6,), "uint8"), Pool("b.window", (6,), "uint8"))),
    KVGroup("c4", 4, 16, None, (Pool("a.c4", (3,), "float32"), Pool("b.c4", (3,), "float32"))),
    KVGroup("c128", 128, 128, None, (Pool("b.c128", (2,), "int16"),)),
)
STATES = (
    StateGroup("ring", (Pool("a.ring", (5,), "float32"),)),
    StateGroup("ring_128", (Pool("b.ring", (4,), "float32"),), empty_every=128),
)
MARKS = (("a.window", "a.c4", "a.ring"), ("b.window", "b.c4", "b.c128"))  # b.ring is final with the whole step only
LAYOUT = Layout(GROUPS, STATES, {"format_version": "4", "model_sha256": "of the test"}, MARKS)
COLUMNS = LAYOUT.columns(CONTEXT)
PAGES = {"window": 100, "c4": 70, "c128": 12}
SLOTS = 6


def content(seed: int, pool: int, column: int) -> np.ndarray:
    """What a request's page (or, at column -1, state row) holds: `unit_bytes` bytes."""
    draw = np.random.default_rng([seed, pool, column + 1])
    return draw.integers(0, 256, int(LAYOUT.unit_bytes[pool]), dtype=np.uint8)


def sizes(pages: dict[str, int] | None = None) -> PoolSizes:
    return PoolSizes(pages or PAGES, SLOTS, CONTEXT)


def allocate(size: PoolSizes, memory: memoryview | None = None) -> dict[str, torch.Tensor]:
    """Pools by name, each as bytes [units, unit bytes]; in `memory`, one after the other, if given."""
    counts = [size.pages[g.name] for g in GROUPS for _ in g.pools] + [SLOTS for s in STATES for _ in s.pools]
    out, at = {}, 0
    for name, count, unit in zip(LAYOUT.pools, counts, LAYOUT.unit_bytes.tolist(), strict=True):
        if memory is None:
            out[name] = torch.zeros((count, unit), dtype=torch.uint8)
        else:
            part = torch.frombuffer(memory, dtype=torch.uint8, count=count * unit, offset=at)
            out[name] = part.reshape(count, unit)
        at += -(-count * unit // 4096) * 4096
    return out


def pools_bytes(size: PoolSizes) -> int:
    counts = [size.pages[g.name] for g in GROUPS for _ in g.pools] + [SLOTS for s in STATES for _ in s.pools]
    return sum(-(-c * u // 4096) * 4096 for c, u in zip(counts, LAYOUT.unit_bytes.tolist(), strict=True))


class Side:
    """The prefill side: a KVPool, its tensors, a ledger and leases; steps are what a test says."""

    def __init__(
        self,
        size: PoolSizes | None = None,
        pools: dict[str, torch.Tensor] | None = None,
        words: np.ndarray | None = None,
    ) -> None:
        size = size or sizes()
        self.pool = KVPool(GROUPS, size)
        self.pools = pools or allocate(size)
        self.bytes = [self.pools[name].numpy() for name in LAYOUT.pools]
        rows = SLOTS if words is None else words.shape[0]
        self.ledger = Ledger(np.zeros((rows, row_words(COLUMNS)), np.int64) if words is None else words, COLUMNS)
        self.leases = Leases(self.ledger, self.pool)
        self.requests: dict[str, Request] = {}
        self.computed: dict[str, int] = {}
        self._noise = np.random.default_rng(0)

    def submit(self, request_id: str, seed: int, tokens: int) -> None:
        """A request of so many tokens, which are its seed."""
        request = Request(request_id, [seed] * tokens, SamplingParams(max_tokens=1))
        self.requests[request_id] = request
        self.admit(request_id)

    def admit(self, request_id: str) -> None:
        request = self.requests[request_id]
        slot = self.pool.admit()
        assert slot is not None
        request.slot, request.status = slot, "running"
        self.computed[request_id] = 0
        self.leases.admitted(request)

    def step(self, request_id: str, end: int, during: Callable[[], None] = lambda: None) -> None:
        """Computes the request's tokens up to `end`; `during` is called behind each mark."""
        request, start = self.requests[request_id], self.computed[request_id]
        assert self.pool.grow(request.slot, end)
        self.leases.launching(request, end)
        self.pool.evict(request.slot, end)  # as the scheduler does at once when a step was launched
        for number, names in enumerate((*MARKS, LAYOUT.pools)):
            for name in names:
                self._write(request, name, start, end)
            if number < len(MARKS):
                self.leases.mark(number)
            during()
        self.computed[request_id] = request.num_computed = end
        self.leases.computed(request, end)
        if end == request.num_tokens:
            self.leases.ended(request, True)

    def _write(self, request: Request, name: str, start: int, end: int) -> None:
        seed, number = int(request.token(0)), LAYOUT.pools.index(name)
        for group in GROUPS:
            if number in LAYOUT.pools_of[group.name]:
                for column in range(start // group.page_tokens, ceil_div(end, group.page_tokens)):
                    whole = content(seed, number, column)
                    if end < (column + 1) * group.page_tokens and end < request.num_tokens:
                        whole = whole ^ 255  # not final
                    page = int(self.pool.tables[group.name][request.slot, column])
                    if page:
                        self.bytes[number][page] = whole
                return
        self.bytes[number][request.slot] = content(seed, number, -1) ^ (0 if end == request.num_tokens else 255)

    def exchange(self, request_id: str, group: str, column: int) -> None:
        """Another page with the same content takes the place of the request's. Engines do not; readers would see it."""
        request = self.requests[request_id]
        (other,) = [g for g in self.pool._groups if g.spec.name == group]
        old, new = int(other.table[request.slot, column]), other.free.pop()
        for number in LAYOUT.pools_of[group]:
            self.bytes[number][new] = self.bytes[number][old]
        other.refs[new], other.refs[old] = 1, 0
        other.table[request.slot, column] = new
        other.free.insert(0, old)
        lease = self.leases.of(request_id)
        assert lease is not None
        self.leases._write(lease, {})  # before anybody computes
        self.noise()

    def noise(self) -> None:
        """Somebody else computes: every page and slot that is free holds other bytes now."""
        for number, name in enumerate(LAYOUT.pools):
            group = next((g for g in self.pool._groups if any(p.name == name for p in g.spec.pools)), None)
            free = self.pool._free_slots if group is None else group.free
            self.bytes[number][free] = self._noise.integers(0, 256, (len(free), self.bytes[number].shape[1]), np.uint8)

    def preempt(self, request_id: str) -> None:
        request = self.requests[request_id]
        self.leases.preempted(request)
        self.pool.release(request.slot)
        request.slot = request.num_computed = 0
        self.noise()

    def fail(self, request_id: str) -> None:
        request = self.requests.pop(request_id)
        self.leases.ended(request, False)
        self._release(request)

    def let_go(self, request_id: str) -> None:
        request = self.requests.pop(request_id)
        lease = self.leases.of(request_id)
        assert lease is not None
        self.leases.free(lease)
        self._release(request)

    def _release(self, request: Request) -> None:
        if request.slot:
            self.pool.release(request.slot)
            request.slot = 0
        self.noise()


class Taker:
    """The decode side: pages for requests to come, and what must be in them at the end."""

    def __init__(self, size: PoolSizes | None = None, pools: dict[str, torch.Tensor] | None = None) -> None:
        size = size or sizes({name: count + 20 for name, count in PAGES.items()})
        self.pool = KVPool(GROUPS, size)
        self.pools = pools or allocate(size)
        self.bytes = [self.pools[name].numpy() for name in LAYOUT.pools]

    def place(self, target: int, start: int = 0) -> Place:
        """Pages for a request of `target` tokens of which `start` are here."""
        slot = self.pool.admit()
        assert slot is not None and self.pool.grow(slot, target)
        self.pool.evict(slot, target)
        tables = {}
        for group in GROUPS:
            first = first_page(group, target)
            row = self.pool.tables[group.name][slot, first : ceil_div(target, group.page_tokens)]
            tables[group.name] = (first, row.tolist())
        return Place(slot, start, target, tables)

    def check(self, place: Place, seed: int) -> None:
        """Asserts that every page that token `target` and later ones read is what was computed."""
        for group in GROUPS:
            first, pages = place.tables[group.name]
            skip = place.start // group.page_tokens if group.horizon is None else 0
            for number in LAYOUT.pools_of[group.name]:
                for column, page in enumerate(pages, first):
                    if column >= skip:
                        found, wanted = self.bytes[number][page], content(seed, number, column)
                        assert np.array_equal(found, wanted), (LAYOUT.pools[number], column)
        for states in STATES:
            if not states.empty_at(place.target):
                for number in LAYOUT.pools_of[states.name]:
                    assert np.array_equal(self.bytes[number][place.slot], content(seed, number, -1)), states.name

    def checked_start(self, seed: int, place: Place, columns: Sequence[str] = ()) -> None:
        """Puts in place what a prefix found here would be."""
        for group in GROUPS:
            first, pages = place.tables[group.name]
            for number in LAYOUT.pools_of[group.name]:
                for column, page in enumerate(pages, first):
                    if (column + 1) * group.page_tokens <= place.start:
                        self.bytes[number][page] = content(seed, number, column)
