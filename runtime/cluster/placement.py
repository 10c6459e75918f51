"""Where a request goes: of the workers that can hold it, the one with the least to do before its next token.

    prefill worker   has a slot and pages for the prompt, which it keeps until they are pulled. Cost: tokens of prompts
                     that it has yet to compute, and of this one those that its prefix cache does not have
    decode worker    has a slot and pages for the request to its end, or to its budget, beside all that it has. Cost:
                     requests that it runs, and of this one the tokens that are to be pulled or computed there

Claims are exact: the most pages of each KV group that a request of so many tokens ever holds (`peak_pages`), summed
over all that a worker was given. What its prefix cache shares comes on top, so it never has to refuse what it is given.
Blocks are known by hash, from what workers say of their prefix trees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dsv4c.artifact import KVGroup
from dsv4c.runtime.cluster.wire import Beat, Blocks, Facts, Role
from dsv4c.runtime.poolsizes import peak_pages

# In tokens of a prompt that cost as much. A step that decodes is bound by weights: a request more costs it little,
# but every step. Moving the state of a token is a copy, some hundredth of computing it.
_RUNNING_TOKENS = 64
_PULLED_SHARE = 1 / 64

Claim = tuple[int, ...]
"""Pages of each KV group, in the manifest's order."""


class Wire(Protocol):
    """What a message is sent by."""

    def send(self, frame: bytes, /) -> None: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class Member:
    """A worker as the router sees it: what it can hold, what it was given, which blocks it has."""

    name: str
    role: Role
    pid: int
    facts: Facts
    wire: Wire
    groups: Sequence[KVGroup]
    heard_s: float = 0.0
    leaving: bool = False
    lost: bool = False
    num_given: int = 0
    """Requests that it was ever given: of equals, whoever has had fewest is next."""
    refuses_until_s: float = 0.0
    """It has refused what it should hold: it is given nothing before."""
    beat: Beat = field(default_factory=Beat)
    blocks: set[int] = field(default_factory=set)
    given: dict[str, Claim] = field(default_factory=dict)
    """Attempt -> its claim."""
    uncomputed: dict[str, int] = field(default_factory=dict)
    """Attempt -> tokens of its prompt that are still to be computed here."""

    def __post_init__(self) -> None:
        self._claimed = [0] * len(self.groups)
        self._pages = [self.facts.pages.get(group.name, 0) for group in self.groups]

    @property
    def computes(self) -> bool:
        """Whether it takes prompts for others."""
        return self.role == "prefill"

    @property
    def generates(self) -> bool:
        return self.role != "prefill"

    def claim_of(self, tokens: int) -> Claim:
        """What a request of so many tokens claims here."""
        return tuple(peak_pages(group, tokens) for group in self.groups)

    def could_hold(self, tokens: int) -> bool:
        """Whether it could if it had nothing else."""
        fits = all(need <= pages for need, pages in zip(self.claim_of(tokens), self._pages, strict=True))
        return fits and tokens <= self.facts.max_context

    def has_room(self, claim: Claim, now_s: float) -> bool:
        """Whether it can be given such a request now."""
        if self.leaving or self.lost or now_s < self.refuses_until_s or len(self.given) >= self.facts.max_requests:
            return False
        return all(n + c <= p for n, c, p in zip(claim, self._claimed, self._pages, strict=True))

    def give(self, attempt: str, claim: Claim, uncomputed: int = 0) -> None:
        """Books a request."""
        self.num_given += 1
        self.given[attempt] = claim
        for i, pages in enumerate(claim):
            self._claimed[i] += pages
        if uncomputed:
            self.uncomputed[attempt] = uncomputed

    def rebook(self, attempt: str, claim: Claim) -> None:
        """Changes the claim of a request that is booked."""
        for i, (pages, before) in enumerate(zip(claim, self.given[attempt], strict=True)):
            self._claimed[i] += pages - before
        self.given[attempt] = claim

    def take(self, attempt: str) -> None:
        """Books it out; does nothing if it is not booked."""
        for i, pages in enumerate(self.given.pop(attempt, ())):
            self._claimed[i] -= pages
        self.uncomputed.pop(attempt, None)

    def learn(self, blocks: Blocks) -> None:
        """Takes note of blocks that its prefix cache has, or has no more."""
        if blocks.cleared:
            self.blocks.clear()
        self.blocks.difference_update(blocks.removed)
        self.blocks.update(blocks.stored)

    def matched(self, hashes: Sequence[int]) -> int:
        """How many of these blocks, from the first on, it has."""
        count = 0
        for known in hashes:
            if known not in self.blocks:
                break
            count += 1
        return count

    @property
    def claimed(self) -> dict[str, int]:
        """Group -> pages claimed."""
        return {group.name: pages for group, pages in zip(self.groups, self._claimed, strict=True)}


@dataclass(frozen=True)
class Need:
    """What is to be placed: known tokens, the most that it is held for, and the hashes of its blocks."""

    tokens: int
    held_tokens: int
    hashes: Sequence[int]
    block: int


@dataclass(frozen=True)
class Place:
    """A decode worker, a prefill worker (None: the former computes the prompt), and the blocks that are found there."""

    decode: Member
    prefill: Member | None
    cached_tokens: int


def place(members: Iterable[Member], need: Need, now_s: float) -> Place | None:
    """The place of a request, or None if there is none at the moment."""
    members = list(members)
    computing = [m for m in members if m.computes and not m.leaving and m.could_hold(need.tokens + 1)]
    generating = [m for m in members if m.generates and m.has_room(m.claim_of(need.held_tokens), now_s)]
    pairs = [
        (d, [p for p in computing if p.facts.transfer and p.facts.transfer == d.facts.transfer]) for d in generating
    ]
    found: list[tuple[float, Place]] = []
    for decode, peers in pairs:
        open_peers = [p for p in peers if p.has_room(p.claim_of(need.tokens + 1), now_s)]
        if peers and not open_peers:
            continue  # it waits for a prefill worker: decoding goes before
        local = need.tokens - min(need.tokens, decode.matched(need.hashes) * need.block)
        cost = float(_RUNNING_TOKENS * len(decode.given))
        if not peers:
            cost += sum(decode.uncomputed.values()) + local
            found.append((cost, Place(decode, None, need.tokens - local)))
            continue
        peer, to_compute = min(((p, _to_compute(p, need)) for p in open_peers), key=lambda x: (x[1], x[0].num_given))
        found.append((cost + _PULLED_SHARE * local + to_compute, Place(decode, peer, _cached(peer, need))))
    return min(found, key=lambda item: (item[0], item[1].decode.num_given))[1] if found else None


def _cached(member: Member, need: Need) -> int:
    return min(need.tokens - 1, member.matched(need.hashes) * need.block)


def _to_compute(member: Member, need: Need) -> int:
    """Tokens that it computes until this prompt is done."""
    return sum(member.uncomputed.values()) + need.tokens - _cached(member, need)
