"""The prefix tree: who has computed these tokens before, and which pages and states are left of it.

A node stands for one block of tokens behind those of its parents, `block_tokens` long: whole pages of every group. It
holds the block's pages of the groups without a horizon (c4, c128, index). Pages alone do not let a request go on: it
also needs the window's last pages and the compressor states as they were right there. Some nodes have these, as a
snapshot: its window pages, held, and a row of its own in the state pools behind the requests' slots.

    find(keys)            the nodes that begin a prompt, as far as the tree knows it
    resume(node, slot)    the slot goes on behind a node with a snapshot: pages adopted, states copied, node in use
    use(node)             the node in use, for a slot that takes its pages and gets window and states from elsewhere
    extend(node, ...)     the next block of a request at `node`: a new node, or the one that is there, whose pages then
                          replace the request's own
    snapshot(node, slot)  keeps the slot's state, which must be that at the node's end
    leave(node)           the request has ended or lost its pages
    make_room(slot, n)    evicts until the slot can grow to n tokens

A request in use of a node is in use of its parents, and refers to the pages of all of them. So a node in use is never
evicted, and the pages of one that is not are idle (or of a request that has left the tree and is kept). Least recently
used first: leaves where pages of their groups lack, snapshots alone where window pages or rows do (whoever reads those
window pages has its own references). Copies of states are queued in the order of what caused them and belong in front
of the next step. If asked to, the tree logs the blocks that it stores and removes, for those who route requests.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dsv4c.errors import EngineError
from dsv4c.runtime.blockkeys import KVEvent, block_hash, root_hash, tokens_of
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.poolsizes import block_tokens, first_page

Pages = dict[str, tuple[int, ...]]
Pair = tuple[int, int]


@dataclass(slots=True)
class Snapshot:
    """What a request needs to go on at a node besides pages of blocks: a row of states, and the window's last pages.

    `owner`: who may move it further on as it goes; None once another request has resumed from it.
    """

    row: int
    tail: Pages
    owner: object | None


class Node:
    """One block of tokens. `tokens`: how many there are up to its end. `users`: requests at it or below."""

    __slots__ = ("children", "hash", "key", "pages", "parent", "snapshot", "tokens", "users")

    def __init__(self, parent: Node | None, key: Hashable, tokens: int, pages: Pages) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.snapshot: Snapshot | None = None
        self.users = 0
        self.hash = 0
        """Its name elsewhere (blockkeys.py), if the tree is tracked."""

    def __repr__(self) -> str:
        return f"Node({self.tokens} tokens, {self.users} users{', snapshot' if self.snapshot else ''})"


class PrefixTree:
    """Blocks and snapshots over one KVPool, whose `sizes.snapshots` rows it hands out. Not thread-safe."""

    def __init__(self, pool: KVPool) -> None:
        self.block = block_tokens(pool.groups)
        self._pool = pool
        self._growing = tuple(g.name for g in pool.groups if g.horizon is None)
        self._windows = tuple(g for g in pool.groups if g.horizon is not None)
        self._roots: dict[Hashable, Node] = {}
        self._idle: OrderedDict[Node, None] = OrderedDict()  # nobody uses them; a node comes behind its children
        self._snapshots: OrderedDict[Node, None] = OrderedDict()
        slots = pool.sizes.slots
        self._rows = range(slots, slots + pool.sizes.snapshots)
        self._free_rows = list(reversed(self._rows))
        self._copies: list[list[Pair]] = []
        self.num_nodes = 0
        self._events: list[KVEvent] | None = None

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    def track(self) -> None:
        """Begins the log of `events`, with the blocks that are there."""
        if self._events is None:
            self._events = []
            for root in self._roots.values():
                root.hash = root_hash(root.key)
            for node in self._nodes():
                self._log_stored(node)

    def events(self) -> list[KVEvent]:
        """The log since the last call. Somebody must read it once it is kept."""
        out = self._events or []
        if out:
            self._events = []
        return out

    def hashes(self) -> list[int]:
        """The hashes of all blocks that are there, parents before children; none if there is no log."""
        return [] if self._events is None else [node.hash for node in self._nodes()]

    def find(self, keys: Iterable[bytes], salt: Hashable = None) -> list[Node]:
        """The nodes of these blocks, from the first on, until one is not known."""
        node, path = self._roots.get(salt), []
        for key in keys:
            node = node.children.get(key) if node is not None else None
            if node is None:
                break
            path.append(node)
        return path

    def begin(self, salt: Hashable = None) -> Node:
        """The root that requests with this salt use when they resume from nothing; in use."""
        if salt not in self._roots:
            self._roots[salt] = Node(None, salt, 0, {})
            if self._events is not None:
                self._roots[salt].hash = root_hash(salt)
        root = self._roots[salt]
        root.users += 1
        return root

    def resume(self, node: Node, slot: int, owner: object) -> None:
        """Gives a slot just admitted the pages up to the node, and its states by a copy. The node is in use then."""
        snapshot = node.snapshot
        if snapshot is None:
            raise EngineError(f"{node} has no snapshot to resume from")
        self._pool.adopt(slot, {**self._pages_to(node), **snapshot.tail}, node.tokens)
        self._enter(node)
        if snapshot.owner is not owner:
            snapshot.owner = None
        self._snapshots.move_to_end(node)
        self._queue_copy(snapshot.row, slot)

    def use(self, node: Node) -> dict[str, list[int]]:
        """Puts the node in use. Group without a horizon -> the pages up to there, which the user must refer to."""
        self._enter(node)
        return self._pages_to(node)

    def _pages_to(self, node: Node) -> dict[str, list[int]]:
        path = list(_upwards(node))[-2::-1]  # without the root
        return {name: [page for n in path for page in n.pages[name]] for name in self._growing}

    def _enter(self, node: Node) -> None:
        for used in _upwards(node):
            if used.users == 0 and used.parent is not None:
                del self._idle[used]
            used.users += 1

    def extend(self, node: Node, key: bytes, slot: int) -> Node:
        """The node of the next block of a request at `node`; the request, which has computed it in `slot`, is at it."""
        child = node.children.get(key)
        end = node.tokens + self.block
        if child is None:
            pages = {name: self._pool.pages_of(slot, name, node.tokens, end) for name in self._growing}
            child = node.children[key] = Node(node, key, end, pages)
            self.num_nodes += 1
            self._log_stored(child)
            for name, held in pages.items():
                self._pool.hold(name, held)
        else:
            for name in self._growing:
                first = node.tokens * len(child.pages[name]) // self.block
                self._pool.exchange(slot, name, first, child.pages[name])
            if child.users == 0:
                del self._idle[child]
        child.users += 1
        return child

    def leave(self, node: Node) -> None:
        """A request is no longer at this node. Whatever nobody uses becomes the most recently used."""
        for left in _upwards(node):
            left.users -= 1
            if left.users == 0 and left.parent is not None:
                self._idle[left] = None
            elif left.users == 0 and not left.children:
                del self._roots[left.key]

    def snapshot(self, node: Node, slot: int, owner: object | None) -> bool:
        """Keeps the state of `slot`, evicting the least recently used snapshot for want of a row; False without rows.

        The slot must have computed the tokens up to the node's end, and no more than rings have rows to spare.
        """
        if node.snapshot is not None:
            raise EngineError(f"{node} has a snapshot already")
        if not self._rows:
            return False
        if not self._free_rows:
            self.forget(next(iter(self._snapshots)))
        end = node.tokens
        tail = {
            g.name: self._pool.pages_of(slot, g.name, first_page(g, end) * g.page_tokens, end) for g in self._windows
        }
        for name, pages in tail.items():
            self._pool.hold(name, pages)
        node.snapshot = Snapshot(self._free_rows.pop(), tail, owner)
        self._snapshots[node] = None
        self._queue_copy(slot, node.snapshot.row)
        return True

    def forget(self, node: Node) -> None:
        """Drops a node's snapshot: its row is free and its window pages are the tree's no longer."""
        if node.snapshot is None:
            raise EngineError(f"{node} has no snapshot")
        for name, pages in node.snapshot.tail.items():
            self._pool.let_go(name, pages)
        self._free_rows.append(node.snapshot.row)
        node.snapshot = None
        del self._snapshots[node]

    def make_room(self, slot: int, tokens: int) -> None:
        """Evicts until the pool has the free pages for `grow(slot, tokens)`; `fit` must have said that it can."""
        while short := self._pool.lacking(slot, tokens):
            growing = next((name for name in short if name in self._growing), None)
            victim = next(iter(self._snapshots if growing is None else self._idle), None)
            if victim is None:
                raise EngineError(f"{short} pages lack for slot {slot}, and nothing is left to evict")
            if growing is None:
                self.forget(victim)
            else:
                self._evict(victim)

    def clear(self) -> None:
        """Forgets everything. Whoever is at a node must not use it again. Rows on their way to requests still go."""
        for node in list(self._nodes()):
            self._drop_pages(node)
        if self._events is not None:
            self._events.append(KVEvent("cleared"))
        self._roots.clear()
        self._idle.clear()
        self.num_nodes = 0
        self._copies = [[p for p in pairs if p[1] not in self._rows] for pairs in self._copies]

    @property
    def has_copies(self) -> bool:
        return any(self._copies)

    def copies(self) -> Iterator[list[Pair]]:
        """The queued copies (source row, target row), in calls for `copy_states`; each is done once the next is asked.

        Within a call no target is another pair's target or a later pair's source.
        """
        while self._copies:
            if self._copies[0]:
                yield self._copies[0]
            del self._copies[0]

    def _queue_copy(self, source: int, target: int) -> None:
        written = {t for _, t in self._copies[-1]} if self._copies else set()
        if not self._copies or source in written or target in written:
            self._copies.append([])
        self._copies[-1].append((source, target))

    def _evict(self, node: Node) -> None:
        """Takes an unused leaf out of the tree."""
        if node.users or node.children or node.parent is None:
            raise EngineError(f"{node} is in use and cannot be evicted")
        self._drop_pages(node)
        del self._idle[node]
        self.num_nodes -= 1
        if self._events is not None:
            self._events.append(KVEvent("removed", node.hash))
        parent = node.parent
        del parent.children[node.key]  # type: ignore[arg-type]
        if parent.parent is None and not parent.children and not parent.users:
            del self._roots[parent.key]

    def _log_stored(self, node: Node) -> None:
        if self._events is None or node.parent is None:
            return
        assert isinstance(node.key, bytes)
        node.hash = block_hash(node.parent.hash, node.key)
        above = None if node.parent.parent is None else node.parent.hash
        self._events.append(KVEvent("stored", node.hash, above, tokens_of(node.key)))

    def _drop_pages(self, node: Node) -> None:
        if node.snapshot is not None:
            self.forget(node)
        for name, pages in node.pages.items():
            self._pool.let_go(name, pages)

    def _nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents before children."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def references(self) -> dict[str, list[int]]:
        """Group -> pages that the tree holds, once for each time: what `KVPool.audit` compares with its counts."""
        held: dict[str, list[int]] = {g.name: [] for g in self._pool.groups}
        for node in self._nodes():
            for name, pages in (*node.pages.items(), *(node.snapshot.tail.items() if node.snapshot else ())):
                held[name].extend(pages)
        return held

    def audit(self, at: Sequence[Node]) -> None:
        """Proves the tree sound, given the nodes that requests are at. Raises EngineError that names the fault."""
        users = Counter(used for node in at for used in _upwards(node))
        nodes = list(self._nodes())
        wrong = [n for n in (*self._roots.values(), *nodes) if n.users != users[n]]
        if wrong or users.keys() - {*self._roots.values(), *nodes}:
            raise EngineError(f"prefix tree: users of {wrong or 'nodes that are gone'} are not {len(at)} requests")
        order = {node: i for i, node in enumerate(self._idle)}
        if order.keys() != {n for n in nodes if not n.users} or len(nodes) != self.num_nodes:
            raise EngineError(f"prefix tree: of {len(nodes)} nodes {len(order)} are listed as idle")
        if any(n.parent in order and order[n.parent] < order[n] for n in order):
            raise EngineError("prefix tree: a node would be evicted before its children")
        kept = [n.snapshot.row for n in nodes if n.snapshot is not None]
        if sorted([*kept, *self._free_rows]) != list(self._rows) or len(kept) != len(self._snapshots):
            raise EngineError(f"prefix tree: rows {kept} and {self._free_rows} are not {self._rows}")


def _upwards(node: Node | None) -> Iterator[Node]:
    """The node and its parents, root last."""
    while node is not None:
        yield node
        node = node.parent
