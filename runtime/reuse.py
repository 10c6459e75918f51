"""What requests take from the prefix tree and leave in it: the policy of the prefix cache.

    match    before admission: the blocks of the request that the tree knows, and the deepest snapshot among them
    admit    it resumes there. At least one token is always left to compute: its logits are wanted
    open     the same for a request whose state is moved here, snapshot or not: window and states come with it
    stop     where its prefill must end a chunk, so that a snapshot can be taken there:
             at the last block's end before the end of its tokens, where an equal prompt will resume; and where it
             leaves what the tree knows: two prompts have that much in common, a third will too. Other chunks of a
             long prompt end with a block where that costs little
    advance  blocks go into the tree as they are computed and their tokens known, generated ones too. A snapshot at a
             stop stays until it is the least recently used. Besides, a request takes one at every other block's end
             that it meets, and moves it along: so it can resume when it is preempted, and so can the next turn of a
             conversation when it has ended. Once another request has resumed from it, it stays as well
    leave    the request has ended, or was preempted and will come back through `match`

Requests that want log-probabilities of their prompt match nothing, as all its rows must be computed; what they
compute is kept all the same. The pages of a request that is to be kept may be read by others, so they are never
exchanged for equal ones: where another has put its block into the tree first, such a request leaves it. `clear` is for
when results are in doubt: requests that run go on without the tree.

A request that verifies drafts may step over a block's end. Where rings have rows to spare (`slack` of them), what they
and the window held there is still whole, and the snapshot is taken a little late.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dsv4c.errors import EngineError
from dsv4c.runtime.blockkeys import block_key
from dsv4c.runtime.kvpool import KVPool
from dsv4c.runtime.prefix import Node, Pair, PrefixTree
from dsv4c.runtime.request import NEVER, Request

_LOSS = 8  # a chunk gives up an eighth of its tokens at most to end with a block


@dataclass(frozen=True, slots=True)
class Match:
    """The nodes that a request's tokens begin with, and the number of those up to the deepest snapshot."""

    path: list[Node] = field(default_factory=list)
    depth: int = 0


@dataclass(slots=True)
class _Trail:
    """Where a running request is in the tree (None: it was cleared), its stops, and the node of its own snapshot."""

    node: Node | None
    stops: frozenset[int]
    own: Node | None = None


class PrefixCache:
    """The prefix tree as the scheduler uses it. `num_queried`, `num_hit`: prompt tokens looked up, and found."""

    def __init__(self, pool: KVPool, slack: int = 0) -> None:
        self.tree = PrefixTree(pool)
        self._slack = slack
        self.num_queried = 0
        self.num_hit = 0
        self._pool = pool
        self._trails: dict[Request, _Trail] = {}

    def match(self, request: Request) -> Match:
        """What of a waiting request is known. Changes nothing."""
        if request.scores_prompt:
            return Match()
        keys = self._keys(request, (request.num_tokens - 1) // self.tree.block)
        path = self.tree.find(keys, request.salt)
        depth = next((i for i in range(len(path), 0, -1) if path[i - 1].snapshot is not None), 0)
        return Match(path, depth)

    def shared(self, match: Match, *, kept: bool = False) -> dict[str, int]:
        """Group -> pages that resuming takes from other requests, which so are not to be had by it.

        `kept`: whether some of these have left the tree and kept their pages.
        """
        counts = dict.fromkeys(self._pool.tables, 0)
        for node in match.path[: match.depth]:
            if not node.users and not kept:
                break
            for group, pages in node.pages.items():
                counts[group] += len(pages) if node.users else self._pool.num_used(group, pages)
        return counts

    def admit(self, request: Request, match: Match) -> None:
        """Lets a request that was just given its slot resume where the match says; sets its `num_computed`."""
        block, node = self.tree.block, match.path[match.depth - 1] if match.depth else None
        if node is None:
            node = self.tree.begin(request.salt)
        else:
            self.tree.resume(node, request.slot, request)
        request.num_computed = node.tokens
        request.block_end = node.tokens + block
        stops = frozenset({(request.num_tokens - 1) // block * block, len(match.path) * block})
        own = node if node.snapshot is not None and node.snapshot.owner is request else None
        self._trails[request] = _Trail(node, stops, own)
        if request.num_preemptions == 0 and not request.scores_prompt:
            request.num_cached = min(node.tokens, request.num_prompt)
            self.num_hit += request.num_cached
            self.num_queried += request.num_prompt

    def known(self, request: Request) -> Match:
        """What of a moving request is known: it needs no snapshot. Changes nothing."""
        path = self.tree.find(self._keys(request, request.num_tokens // self.tree.block), request.salt)
        return Match(path, len(path))

    def open(self, request: Request, match: Match) -> dict[str, list[int]]:
        """Lets a moving request that was just given its slot begin where the match says; sets its `num_computed`.

        Group without a horizon -> the pages that its slot must share.
        """
        node = match.path[-1] if match.path else None
        pages: dict[str, list[int]] = {}
        if node is None:
            node = self.tree.begin(request.salt)
        else:
            pages = self.tree.use(node)
        request.num_computed = node.tokens
        request.block_end = node.tokens + self.tree.block
        self._trails[request] = _Trail(node, frozenset({request.num_tokens // self.tree.block * self.tree.block}))
        return pages

    def chunk_end(self, request: Request, start: int, end: int) -> int:
        """Where a chunk of tokens [start, end) should end instead: at a stop, or with a block."""
        trail = self._trails[request]
        if trail.node is None:
            return end
        stops = [stop for stop in trail.stops if start < stop < end]
        if stops:
            return min(stops)
        over = end % self.tree.block
        return end - over if end < request.num_total and over * _LOSS <= end - start else end

    def advance(self, request: Request) -> None:
        """Puts the blocks that a running request has completed into the tree, and takes a snapshot where it stands.

        For requests whose `num_computed` has reached `block_end`; before anything else is launched.
        """
        block, trail = self.tree.block, self._trails[request]
        known = min(request.num_computed, request.num_tokens)
        if trail.node is None or known < request.block_end:
            return
        keys = self._keys(request, known // block)
        for key in keys[trail.node.tokens // block :]:
            if request.keep and key in trail.node.children:
                self.tree.leave(trail.node)
                trail.node, request.block_end = None, NEVER
                return
            trail.node = self.tree.extend(trail.node, key, request.slot)
        request.block_end = trail.node.tokens + block
        over = request.num_computed + request.num_uncertain - trail.node.tokens
        if over == 0 or (0 < over <= self._slack and self._pool.reaches_back(request.slot, trail.node.tokens)):
            self._keep(request, trail, trail.node)

    def leave(self, request: Request) -> None:
        """Ends a request's part in the tree, with what it has computed so far; it still has its pages."""
        if request.num_computed >= request.block_end:
            self.advance(request)
        trail = self._trails.pop(request)
        request.block_end = NEVER
        if trail.node is not None:
            self.tree.leave(trail.node)

    def make_room(self, request: Request, tokens: int) -> None:
        """Evicts what it takes for the request's pages to cover `tokens` tokens; `KVPool.fit` says if they can."""
        self.tree.make_room(request.slot, tokens)

    def clear(self) -> None:
        """Forgets everything that was computed."""
        self.tree.clear()
        for request, trail in self._trails.items():
            trail.node, request.block_end = None, NEVER

    def copies(self) -> Iterator[list[Pair]]:
        """See PrefixTree.copies."""
        return self.tree.copies()

    def audit(self, running: list[Request]) -> None:
        """Proves the tree and the pool sound for these running requests. Raises EngineError that names the fault."""
        if self._trails.keys() != set(running):
            raise EngineError(f"{len(self._trails)} requests are in the prefix tree, {len(running)} run")
        self.tree.audit([trail.node for trail in self._trails.values() if trail.node is not None])
        self._pool.audit(self.tree.references())
        for request, trail in self._trails.items():
            if trail.node is not None and trail.node.tokens > request.num_computed:
                raise EngineError(f"{request} is in the prefix tree at {trail.node}")

    def _keep(self, request: Request, trail: _Trail, node: Node) -> None:
        """Sees to a snapshot at the node where the request stands."""
        stays = node.tokens in trail.stops
        if node.snapshot is not None:
            if stays:
                node.snapshot.owner = None
            return
        if not stays:
            if trail.own is not None and trail.own.snapshot is not None and trail.own.snapshot.owner is request:
                self.tree.forget(trail.own)
            trail.own = node
        self.tree.snapshot(node, request.slot, None if stays else request)

    def _keys(self, request: Request, count: int) -> list[bytes]:
        """The first `count` blocks of a request, whose tokens are known, as the tree calls them."""
        keys, block = request.block_keys, self.tree.block
        for start in range(len(keys) * block, count * block, block):
            keys.append(block_key(request.tokens(start, start + block)))
        return keys[:count]
